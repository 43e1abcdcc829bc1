"""The Triton backend of attention_decode: whether it can serve a call, the append and the attention.

Serves NVIDIA GPUs of compute capability 8.0 and newer, and CPU tensors while Triton's interpreter is on.
"""

from __future__ import annotations

from ...triton_support import device_obstacles
from .call import DecodeCall
from .triton_append import append
from .triton_forward import forward

__all__ = ["append", "forward", "unsupported"]


def unsupported(call: DecodeCall) -> list[str]:
    """Why these kernels can't serve the call, one sentence a reason; empty if they can."""
    return call.unsupported_by_kernels() + device_obstacles(call.device)
