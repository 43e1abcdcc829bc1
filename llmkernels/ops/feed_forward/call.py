"""What the choice of a backend for a feed-forward depends on, and what every backend means by an
activation, a weight's layout and the precision of a product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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


def operand(matrix: Tensor, along: int) -> tuple[Tensor, int, bool]:
    """A matrix that a kernel reads where it lies, the stride of its other dimension, and whether its unit
    stride is along the dimension ``along``. One that has no unit stride is copied."""
    for dim in (1, 0):
        if matrix.stride(dim) == 1 or matrix.shape[dim] == 1:
            return matrix, matrix.stride(1 - dim), dim == along
    matrix = matrix.contiguous()
    return matrix, matrix.stride(0), along == 1


def product_kind(dtype: torch.dtype) -> str:
    """ "half" for 16-bit operands, whose products are exact in float32; for float32 ones "tf32" where torch's
    own switch allows it to cuBLAS, else "ieee"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
