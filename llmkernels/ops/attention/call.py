"""What the choice of a backend for attention depends on, and the settings that its kernels share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
# Stands for "no limit" on either side of a window: beyond any length, and small enough to add a position to.
UNLIMITED = 2**30


class Settings(NamedTuple):
    """The numbers of one call, as its kernels take them.

    Key j is visible to query i where ``i + offset - left <= j <= i + offset + right``, with offset = Lk - Lq
    if bottom_right, else 0. softcap: 0 for none. max_seqlen_q, max_seqlen_k: the lengths, or of packed
    sequences the longest.
    """

    scale: float
    softcap: float
    dropout_p: float
    left: int
    right: int
    bottom_right: bool
    max_seqlen_q: int
    max_seqlen_k: int


class AttentionCall(NamedTuple):
    """One call of attention or attention_varlen without its tensors and lengths; None where not given."""

    op: str
    device: torch.device
    dtype: torch.dtype
    mask_dtype: torch.dtype | None = None
    varlen: bool = False
    beyond_torch: bool = False  # asks for what scaled_dot_product_attention does not have
    gradients: bool = False
    deterministic: bool = True
    size_obstacle: str | None = None  # what of the shapes the kernels can't serve
    obstacle: str | None = None  # a reason that no backend but torch can serve the tensors: a subclass, ...

    def unsupported_by_kernels(self) -> list[str]:
        """Reasons that hold for every kernel of ours, Triton's and CUDA C++'s alike."""
        reasons = [reason for reason in (self.obstacle, self.size_obstacle) if reason is not None]
        for name, dtype in (("query", self.dtype), ("attn_mask", self.mask_dtype)):
            if dtype not in (None, torch.bool, *KERNEL_DTYPES):
                reasons.append(f"{name} is {dtype}; the kernels take float16, bfloat16 and float32")
        return reasons


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast casts for operators on ``device``; of meta, which has none, torch refuses to say."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def size_obstacle(head_dim: int, value_dim: int) -> str | None:
    """Why the kernels can't serve these head dims of query and value, or None."""
    for name, size in (("query", head_dim), ("value", value_dim)):
        if not 1 <= size <= LARGEST_HEAD_DIM:
            return f"{name}'s head_dim is {size}; the kernels take 1 to {LARGEST_HEAD_DIM}"
    return None


def new_rows(like: Tensor, head_dim: int) -> Tensor:
    """An empty [B, H, L, head_dim] for ``like`` [B, H, L, D]: in memory [B, L, H, head_dim] where ``like``
    has its heads inside its rows, so that merging them again is a view, else contiguous."""
    b, h, length, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(b, length, h, head_dim).transpose(1, 2)
    return like.new_empty(b, h, length, head_dim)


def arranged(rows: Tensor, like: Tensor) -> Tensor:
    """``rows`` [B, H, L, D] in the memory layout of ``new_rows(like, D)``."""
    if like.stride(1) < like.stride(2):
        return rows.transpose(1, 2).contiguous().transpose(1, 2)
    return rows.contiguous()


def sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum of exp(sink - lse) delta, [Hq]; empty without sinks. A sink of -inf has no weight even in a row
    that sees no key."""
    if sinks is None:
        return lse.new_empty(0)
    weights = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks[:, None] - lse))
    return -(weights * delta).sum(dim=(0, 2))
