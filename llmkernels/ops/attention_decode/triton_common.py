"""What the append and the attention over the cache share: where a token lies."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import vector_width


def common_vector_width(*tensors: Tensor) -> int:
    """How many elements of a row of these [_, _, _, D] tensors one thread may read or write at once."""
    sizes = (size for tensor in tensors for size in (tensor.shape[3], *tensor.stride()[:3]))
    return vector_width(tuple(tensor.dtype for tensor in tensors), *sizes)


def unit_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last stride is not 1."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def page_size(cache: Tensor, block_table: Tensor | None) -> int:
    """Tokens a page; 0 for a cache that has none."""
    return 0 if block_table is None else cache.shape[2]


@triton.jit
def sequence_length(lengths_ptr, sequence, NEW, CAPACITY):
    """int32: the tokens of a sequence with its NEW ones, as far as the cache holds them."""
    length = tl.maximum(tl.load(lengths_ptr + sequence).to(tl.int64), 0) + NEW
    return tl.minimum(length, CAPACITY).to(tl.int32)


@triton.jit
def page_of(table_ptr, positions, mask, PAGE_SIZE: tl.constexpr):
    """int64: the table's entries for these positions, as they are; -1 outside the mask."""
    return tl.load(table_ptr + positions // PAGE_SIZE, mask=mask, other=-1).to(tl.int64)
