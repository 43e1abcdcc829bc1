"""What the Triton norm kernels of both directions share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def vector_width(dtypes: tuple[torch.dtype | None, ...], *sizes: int) -> int:
    """How many elements one thread may read at once: a power of two that divides the row length and the row
    strides.

    Triton by itself sees divisibility by 16 and nothing less, and would read rows of 1000 element by element;
    the kernels are told this number instead. It is limited to 16 bytes of the widest dtype, not of each: then
    tiles of 16-bit and 32-bit tensors have one layout in the registers and meet without an exchange through
    shared memory.
    """
    bits = 4 if torch.float32 in dtypes else 8
    for size in sizes:
        bits |= size
    return bits & -bits


@triton.jit
def kept_by_dropout(seed_ptr, rows, first_column, N, threshold, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps: word j % 4 of Philox-4x32-7 at counter row * ceil(N / 4) + j // 4, of
    which the upper 31 bits are compared with the threshold. first_column is a multiple of 4."""
    offs_quad = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    quads = rows[:, None] * ((N + 3) // 4) + offs_quad[None, :]  # int64 [ROWS, BLOCK_N / 4]
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr), quads, n_rounds=7)
    threshold = threshold.to(tl.uint32)
    even = tl.interleave((w0 >> 1) >= threshold, (w2 >> 1) >= threshold)  # [ROWS, BLOCK_N / 2]
    odd = tl.interleave((w1 >> 1) >= threshold, (w3 >> 1) >= threshold)
    return tl.interleave(even, odd)  # [ROWS, BLOCK_N]
