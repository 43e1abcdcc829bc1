"""python -m llmkernels.replacement.worker JOBS RESULTS: interpreted.run in a process of its own.

Both are files of torch.save that interpreted.verify writes and reads.
"""

from __future__ import annotations

import sys

import torch

from .interpreted import run

if __name__ == "__main__":
    job_file, result_file = sys.argv[1:]
    torch.save(run(torch.load(job_file, weights_only=False)), result_file)
