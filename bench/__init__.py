"""Measured speed and memory of every op and model beside its peers; ``llmkernels bench``."""

import os

import torch

if not torch.cuda.is_available():
    # So that kernels can be checked all the same. Triton reads it when imported, which torch._dynamo does.
    os.environ.setdefault("TRITON_INTERPRET", "1")
