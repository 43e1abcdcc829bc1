"""What the choice of a backend for a decoding step depends on, and the reasons all its GPU kernels share."""

from __future__ import annotations

from typing import NamedTuple

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256


class DecodeCall(NamedTuple):
    """One call of attention_decode without its tensors and sizes."""

    op: str
    device: torch.device
    dtype: torch.dtype  # of the query and of both caches
    large_heads: bool = False  # a head dim beyond LARGEST_HEAD_DIM
    strided_rows: bool = False  # a cache whose last stride is not 1
    obstacle: str | None = None  # a reason that no kernel can serve the tensors: a subclass, functorch, ...

    def unsupported_by_kernels(self) -> list[str]:
        """Reasons that hold for every kernel of ours."""
        reasons = [] if self.obstacle is None else [self.obstacle]
        if self.dtype not in KERNEL_DTYPES:
            reasons.append(f"query is {self.dtype}; the kernels take float16, bfloat16 and float32")
        if self.large_heads:
            reasons.append(f"a head dim is larger than {LARGEST_HEAD_DIM}")
        if self.strided_rows:
            reasons.append("the last stride of a cache is not 1")
        return reasons
