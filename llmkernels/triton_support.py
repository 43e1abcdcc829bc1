"""What every op's Triton kernels share: where they can run, and the facts a launch depends on."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton decides at its own import between compiling and interpreting its functions; ours follow the same
# choice.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
if INTERPRETED:
    from . import interpreter

    interpreter.install()

# What the launchers assume of the machine under the interpreter: a table row, and enough programs that
# several share the rows of even a small problem.
_INTERPRETED_ARCHITECTURE = 90
_INTERPRETED_PROCESSORS = 2
_OLDEST_ARCHITECTURE = 80


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as Triton names it: 90 for sm_90."""
    if device.type != "cuda":
        return _INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context to launch in: Triton takes the current device's stream, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def device_obstacles(device: torch.device) -> list[str]:
    """Why Triton kernels can't run there, one sentence a reason; empty if they can."""
    if device.type == "cpu":
        needed = "set TRITON_INTERPRET=1 before triton is imported"
        return [] if INTERPRETED else [f"on a CPU Triton kernels run only through the interpreter: {needed}"]
    if device.type != "cuda" or torch.version.hip is not None:
        name = "a HIP device" if device.type == "cuda" else device.type
        return [f"the input is on {name}; the Triton kernels serve NVIDIA GPUs"]
    found = architecture(device)
    if found < _OLDEST_ARCHITECTURE:
        return [f"the GPU is sm_{found}; the Triton kernels need sm_{_OLDEST_ARCHITECTURE} or newer"]
    return []


@triton.jit
def known_multiple(size, VEC: tl.constexpr):
    """``size``, a multiple of VEC, in a form from which the compiler concludes that it is one."""
    return size // VEC * VEC
