"""What the choice of a backend for a feed-forward depends on, and what every backend means by an
activation."""

from __future__ import annotations

from typing import NamedTuple

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# By the public name: the function that is applied, and whether a second projection multiplies it.
ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
}


class FeedForwardCall(NamedTuple):
    """One call of linear_activation or feed_forward without its tensors and sizes; every tensor of a call is
    of one dtype, under autocast of autocast's."""

    op: str
    device: torch.device
    dtype: torch.dtype
    obstacle: str | None = None  # a reason that no kernel can serve the tensors: a subclass, functorch, ...

    def unsupported_by_kernels(self) -> list[str]:
        """Reasons that hold for every kernel of ours, whatever it is written in."""
        reasons = [] if self.obstacle is None else [self.obstacle]
        if self.dtype not in KERNEL_DTYPES:
            reasons.append(f"input is {self.dtype}; the kernels take float16, bfloat16 and float32")
        return reasons
