"""The Triton backend of the norms: whether it can serve a call, and its forward and backward.

Serves NVIDIA GPUs of compute capability 8.0 and newer, and CPU tensors while Triton's interpreter is on.
"""

from __future__ import annotations

import torch

from .call import NormCall
from .triton_backward import backward
from .triton_common import INTERPRETED, architecture
from .triton_forward import forward

__all__ = ["backward", "forward", "unsupported"]

_OLDEST_ARCHITECTURE = 80


def unsupported(call: NormCall) -> list[str]:
    """Why these kernels can't serve the call, one sentence a reason; empty if they can."""
    return call.unsupported_by_kernels() + _device_obstacles(call.device)


def _device_obstacles(device: torch.device) -> list[str]:
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
