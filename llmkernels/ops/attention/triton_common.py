"""What the Triton attention kernels of both directions share: the logits of a tile, which tiles a mask cuts,
and dot products that keep what is masked out.

Positions are int32 and local to a sequence; pointers reach a tile by 64-bit offsets, and inside it by 32-bit
ones. Logits and logsumexps are in base 2 (``_log2``): exp2 is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import tanh

LOG2E = tl.constexpr(1.4426950408889634)
# Rows of a tile are addressed by 32-bit offsets, at most this many of them.
_ROWS_PER_TILE = 256


def addressable(tensor: Tensor) -> Tensor:
    """``tensor`` [B, H, L, D], copied if its last stride is not 1 or a tile's offsets would pass 32 bits."""
    unit = tensor.shape[3] <= 1 or tensor.stride(3) == 1
    return tensor if unit and tensor.stride(2) * _ROWS_PER_TILE < 2**31 else tensor.contiguous()


@triton.jit
def sequence_bounds(cu_seqlens_ptr, sequence, length):
    """Where a sequence starts in its packed tensor (int64) and how long it is; of dense tensors 0 and
    ``length``."""
    if cu_seqlens_ptr is None:
        start = tl.full([], 0, tl.int64)
        found = length
    else:
        first = tl.load(cu_seqlens_ptr + sequence)
        found = tl.load(cu_seqlens_ptr + sequence + 1) - first
        start = first.to(tl.int64)
    return start, found


@triton.jit
def tile_range(first, last, before, after, length, BLOCK: tl.constexpr):
    """Tiles of BLOCK positions on the other axis that see some of the positions first..last, where position x
    sees x - before to x + after, out of 0..length - 1.

    Returns low, full_low, full_high, high: tiles from ``low`` to ``high`` have to be visited; those from
    ``full_low`` to ``full_high`` (starts of tiles all four, maybe an empty range) are seen whole by each.
    """
    low = tl.maximum(first - before, 0) // BLOCK * BLOCK
    high = tl.maximum(tl.minimum(last + after + 1, length), 0)
    high = tl.maximum(tl.cdiv(high, BLOCK) * BLOCK, low)
    full_low = tl.cdiv(tl.maximum(last - before, 0), BLOCK) * BLOCK
    full_high = tl.maximum(tl.minimum(first + after + 1, length), 0) // BLOCK * BLOCK
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)
    return low, full_low, full_high, high


@triton.jit
def cut_tile(index, low, full_low, full_high, BLOCK: tl.constexpr):
    """The start of the index-th tile of those that ``tile_range`` leaves outside the full ones."""
    start = low + index * BLOCK
    return tl.where(start < full_low, start, start + (full_high - full_low))


@triton.jit
def tile_logits(
    qk, bias_ptrs, inside, slope, position, key_position, left, right, scale, softcap, MASKED: tl.constexpr
):  # fmt: skip
    """The base-2 logits of a tile and, for the derivative of the soft cap, tanh(scale qk / softcap).

    qk: float32, [M, N] or, all arguments alike, its transpose. bias_ptrs: pointers of the tile to a bias or
    boolean mask, or None; inside: where they may be read. slope: ALiBi's for this head, or None. position:
    i + offset of the queries, key_position: j, broadcastable to the tile. softcap: or None. MASKED: some key
    of the tile may be invisible to some query, by ``inside``, left and right, or the mask.
    """
    capped = qk
    if softcap is None:
        logits = qk * (scale * LOG2E)
    else:
        capped = tanh(qk * (scale / softcap))
        logits = capped * (softcap * LOG2E)
    if slope is not None:
        logits -= tl.abs(position - key_position).to(tl.float32) * (slope * LOG2E)
    if MASKED:
        visible = inside & (key_position >= position - left) & (key_position <= position + right)
        if bias_ptrs is not None:
            bias = tl.load(bias_ptrs, mask=inside, other=0.0)
            if bias_ptrs.dtype.element_ty.is_int():
                visible &= bias != 0
            else:
                bias = bias.to(tl.float32)
                visible &= bias != float("-inf")
                logits += bias * LOG2E
        logits = tl.where(visible, logits, float("-inf"))
    return logits, capped


@triton.jit
def finite(tile):
    """``tile`` with 0 for NaN and infinities: times a probability of 0 they would be NaN."""
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), tile, tl.zeros_like(tile))


@triton.jit
def dot_of_visible(weights, logits, value, acc, PRECISION: tl.constexpr):
    """acc + weights value [M, D] for a masked tile: a value that is NaN or infinite reaches only the rows
    that see its key, those whose logit is not -inf.

    It reaches them as products beyond float32's range, infinite where the key is seen and 0 elsewhere; NaN as
    both infinities.
    """
    wide = value.to(tl.float32)
    large: tl.constexpr = 2.0**100
    seen = tl.where(logits > float("-inf"), large, 0.0).to(tl.bfloat16)
    # One dot in a loop: in a row they would each want registers, or tensor memory, of their own.
    for sign in tl.range(-1, 2, 2, num_stages=1):
        spoilt = tl.where(wide * sign < float("inf"), 0.0, large * sign).to(tl.bfloat16)
        acc = tl.dot(seen, spoilt, acc)
    return tl.dot(weights, finite(value), acc, input_precision=PRECISION)
