"""Shows every kernel on the CPU: Triton's through its interpreter, CUDA C++'s through the emulator's build.

Triton reads TRITON_INTERPRET once, when it is imported. Where this process was not started with it, the
layers go to one that is (worker.py).
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..dispatch import explain, use_backend
from .adapters import Adapter
from .verification import INTERPRETED_ROWS, Check, check, refusal, summary

_TIMEOUT_SECONDS = 600


class Job(NamedTuple):
    """A layer to try every kernel on: a copy on the CPU, and the dtype of its inputs."""

    adapter: Adapter
    module: nn.Module
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the kernels of one backend did with one job: exactly one of check, unavailable, failure is set."""

    backend: str
    check: Check | None = None
    unavailable: str | None = None  # it can't run here, none of it is called, or no inputs are known
    failure: str | None = None  # they ran and raised


class Unavailable(Exception):
    """No kernel could be shown, and why."""


def verify(jobs: Sequence[Job]) -> list[list[Outcome]]:
    """For each job the outcome of each kernel. Raises Unavailable where no interpreter can be had."""
    if _interpreting():
        return run(jobs)
    with tempfile.TemporaryDirectory(prefix="llmkernels-") as folder:
        job_file, result_file = Path(folder, "jobs"), Path(folder, "results")
        package_root = str(Path(__file__).parents[2])
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH")))),
        }
        command = [sys.executable, "-m", f"{__package__}.worker", str(job_file), str(result_file)]
        try:
            torch.save(list(jobs), job_file)
            worker = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
            if worker.returncode != 0:
                raise Unavailable(
                    (worker.stderr.strip().splitlines() or [f"exit status {worker.returncode}"])[-1]
                )
            return torch.load(result_file, weights_only=False)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the interpreter took more than {_TIMEOUT_SECONDS} seconds") from None
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error


def _interpreting() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        from ..interpreter import active
    except ImportError:
        return True  # without triton no other process has an interpreter either
    return active()


def run(jobs: Sequence[Job]) -> list[list[Outcome]]:
    """``verify`` in this process."""
    return [[_try(job, backend) for backend in job.adapter.kernels] for job in jobs]


def _try(job: Job, backend: str) -> Outcome:
    adapter, module, dtype = job
    try:
        examples = adapter.synthetic_inputs(module, dtype, torch.device("cpu"), INTERPRETED_ROWS)
        # As a preference: where the backend has no kernel of one op, those of the others are shown.
        with use_backend(backend), explain() as decisions:
            found = check(adapter, module, examples, None, backend, interpreted=True)
        service = summary(decisions, backend)
        ops = [op for op, name in service.kernels if name == backend]
        if not ops:
            return Outcome(backend, unavailable="; ".join(service.reasons))
        if service.reasons:
            found = dataclasses.replace(found, backend=f"{backend}: {' + '.join(ops)}")
        return Outcome(backend, found)
    except Exception as error:
        refused = refusal(adapter, module, dtype, torch.device("cpu"), INTERPRETED_ROWS)
        if refused is not None:
            return Outcome(backend, unavailable=refused)
        return Outcome(backend, failure=f"{type(error).__name__}: {error}")
