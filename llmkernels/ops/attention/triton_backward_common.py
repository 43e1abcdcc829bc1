"""What the kernels of attention's Triton backward share: rows of a matrix, and the gradients of one tile."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import known_multiple


@triton.jit
def head_rows(ptr, strides, batch, head, start, VEC: tl.constexpr):
    """Where row ``start`` of one head's matrix in a tensor of ``strides`` (batch, head, row) lies, and how
    far apart its rows are; all strides are multiples of VEC. batch, head, start: int64."""
    row_stride = known_multiple(strides[2], VEC)
    ptr += batch * known_multiple(strides[0], VEC) + head * known_multiple(strides[1], VEC)
    return ptr + start * row_stride, row_stride


@triton.jit
def row_pointers(ptr, row_stride, first, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [BLOCK, BLOCK_D] to the rows first.. of a matrix."""
    offs, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return ptr + first.to(tl.int64) * row_stride + (offs[:, None] * row_stride + offs_d[None, :])


@triton.jit
def load_rows(ptr, row_stride, first, mask, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first.. of a matrix of D columns, 0 beyond them and where ``mask`` [BLOCK], or None, is false."""
    ptrs = row_pointers(ptr, row_stride, first, BLOCK, BLOCK_D)
    mask_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    if mask is None and BLOCK_D == D:
        tile = tl.load(ptrs)
    elif mask is None:
        tile = tl.load(ptrs, mask=mask_d, other=0.0)
    elif BLOCK_D == D:
        tile = tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        tile = tl.load(ptrs, mask=mask[:, None] & mask_d, other=0.0)
    return tile  # [BLOCK, BLOCK_D]


@triton.jit
def store_rows(
    ptr, row_stride, first, tile, mask, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Writes ``tile`` [BLOCK, BLOCK_D], in the pointer's dtype, to the rows first.. where ``mask`` [BLOCK] is
    true."""
    ptrs = row_pointers(ptr, row_stride, first, BLOCK, BLOCK_D)
    mask_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask[:, None] & mask_d)


@triton.jit
def bias_pointers(ptr, strides, batch, head, first_m, first_n, offs_m, offs_n):
    """Pointers to the tile of a bias at first_m, first_n; offs_m and offs_n have the tile's orientation."""
    ptr += batch * strides[0] + head * strides[1]
    ptr += first_m.to(tl.int64) * strides[2] + first_n.to(tl.int64) * strides[3]
    return ptr + (offs_m * strides[2] + offs_n * strides[3])


@triton.jit
def tile_gradients(logits, capped, lse_log2, delta, dp, kept, kept_scale, softcap, MASKED: tl.constexpr):
    """Of a tile: the probabilities that dropout keeps, not yet scaled, and the gradient of scale * qk; with a
    softcap of None that of the logits.

    logits, capped, MASKED: as ``tile_logits`` has them. lse_log2, delta: of the tile's rows, dp: dout v^T,
    kept: dropout's mask or None, all broadcastable to the tile. What is masked is 0 whatever stands in these.
    """
    p = tl.math.exp2(logits - lse_log2)
    if MASKED:
        p = tl.where(logits > float("-inf"), p, 0.0)
    weights = p
    if kept is not None:
        weights = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * kept_scale, 0.0)
    ds = p * (dp - delta)
    if softcap is not None:
        ds *= 1 - capped * capped
    if MASKED:
        ds = tl.where(logits > float("-inf"), ds, 0.0)
    return weights, ds
