"""Programs that show llmkernels at work: ``python -m examples.demo`` runs them all."""

import os

# Each is read when a library is loaded. OpenMP threads that spin while they wait cost a small model more than
# they compute as soon as another program runs on the same cores. The pretrained model comes in a package:
# nothing is fetched over the network.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # reads the first of them

# Without a GPU the Triton kernels run through their interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
