"""The Triton backend of the feed-forward: whether it can serve a call, and its forward and backward.

Serves NVIDIA GPUs of compute capability 8.0 and newer, and CPU tensors while Triton's interpreter is on.
"""

from __future__ import annotations

from ...triton_support import device_obstacles
from .call import FeedForwardCall
from .triton_backward import backward
from .triton_forward import forward

__all__ = ["backward", "forward", "unsupported"]


def unsupported(call: FeedForwardCall) -> list[str]:
    """Why these kernels can't serve the call, one sentence a reason; empty if they can."""
    return call.unsupported_by_kernels() + device_obstacles(call.device)
