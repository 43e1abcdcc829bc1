"""What the choice of a backend for a norm depends on, and the reasons all its GPU kernels share."""

from __future__ import annotations

from typing import NamedTuple

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class NormCall(NamedTuple):
    """One call of layer_norm, add_layer_norm or rms_norm without its tensors and sizes; None where not
    given."""

    op: str
    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None  # of the residual that comes in
    new_residual_dtype: torch.dtype | None = None  # of the one that goes out
    obstacle: str | None = None  # a reason that no kernel can serve the tensors: a subclass, functorch, ...

    def unsupported_by_kernels(self) -> list[str]:
        """Reasons that hold for every kernel of ours, Triton's and CUDA C++'s alike."""
        reasons = [] if self.obstacle is None else [self.obstacle]
        named = (
            ("input", self.dtype),
            ("weight", self.weight_dtype),
            ("bias", self.bias_dtype),
            ("residual", self.residual_dtype),
            ("residual_dtype", self.new_residual_dtype),
        )
        reasons += [
            f"{name} is {dtype}; the kernels take float16, bfloat16 and float32"
            for name, dtype in named
            if dtype is not None and dtype not in KERNEL_DTYPES
        ]
        return reasons
