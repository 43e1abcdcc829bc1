"""The gradient of attention's bias in Triton; the formulas stand in reference.backward."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_support import kept_by_dropout
from .triton_backward_common import bias_pointers, head_rows, load_rows, tile_gradients
from .triton_common import tile_logits, tile_range


@triton.jit(do_not_specialize=[
    "batches", "heads", "group", "length_q", "length_k", "bias_batches", "bias_heads", "left", "right",
    "bottom_right", "quads_per_row", "threshold",
])  # fmt: skip
def _attention_backward_bias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_log2_ptr, delta_ptr, bias_ptr, slopes_ptr, seed_ptr, dbias_ptr,
    q_strides, k_strides, v_strides, dout_strides, bias_strides, slopes_stride,
    batches, heads, group, length_q, length_k, bias_batches, bias_heads,
    left, right, bottom_right, quads_per_row, threshold, kept_scale, scale, softcap,
    VEC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
):  # fmt: skip
    """dbias = P (dP - delta), summed over all that share an element of the bias.

    Program i owns a tile of dbias in the bias's own coordinates, contiguous [bias_batches, bias_heads, Lq or
    1 (ONE_ROW), Lk or 1 (ONE_COLUMN)], makes the logits and dP of every batch, head and tile that share it
    again and adds them up in one order: the scores are in registers only.
    """
    tiles_m, tiles_n = tl.cdiv(length_q, BLOCK_M), tl.cdiv(length_k, BLOCK_N)
    own_tiles_m = 1 if ONE_ROW else tiles_m
    own_tiles_n = 1 if ONE_COLUMN else tiles_n
    pid = tl.program_id(0)
    own_n = pid % own_tiles_n * BLOCK_N
    own_m = pid // own_tiles_n % own_tiles_m * BLOCK_M
    own_pair = (pid // own_tiles_n // own_tiles_m).to(tl.int64)
    own_batch, own_head = own_pair // bias_heads, own_pair % bias_heads
    offset = bottom_right * (length_k - length_q)

    # The tiles that share the own one: from low_m to high_m of queries, from low_n to high_n of keys.
    low_m, low_n = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    high_m, high_n = tiles_m * BLOCK_M, tiles_n * BLOCK_N
    if not ONE_ROW:
        last_m = tl.minimum(own_m + BLOCK_M, length_q) - 1
        low_n, _full_low, _full_high, high_n = tile_range(
            own_m + offset, last_m + offset, left, right, length_k, BLOCK_N
        )
        low_m, high_m = own_m, own_m + BLOCK_M
    elif not ONE_COLUMN:
        last_n = tl.minimum(own_n + BLOCK_N, length_k) - 1
        low_m, _full_low, _full_high, high_m = tile_range(
            own_n - offset, last_n - offset, right, left, length_q, BLOCK_M
        )
    if not ONE_COLUMN:
        seen = (low_n <= own_n) & (own_n < high_n)
        low_n, high_n = own_n, tl.where(seen, own_n + BLOCK_N, own_n)
    across = (high_n - low_n) // BLOCK_N
    tiles = (high_m - low_m) // BLOCK_M * across
    sharing_heads = heads // bias_heads
    pairs = batches // bias_batches * sharing_heads

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for index in tl.range(0, pairs * tiles, num_stages=STAGES):
        pair = (index // tiles).to(tl.int64)
        batch, head = own_batch + pair // sharing_heads, own_head + pair % sharing_heads
        first_m = low_m + index % tiles // across * BLOCK_M
        first_n = low_n + index % across * BLOCK_N
        m, n = first_m + offs_m, first_n + offs_n
        mask_m, mask_n = m < length_q, n < length_k
        inside = mask_m[:, None] & mask_n[None, :]  # [BLOCK_M, BLOCK_N]
        q_head_ptr, q_stride = head_rows(q_ptr, q_strides, batch, head, 0, VEC)
        dout_head_ptr, dout_stride = head_rows(dout_ptr, dout_strides, batch, head, 0, VEC)
        k_head_ptr, k_stride = head_rows(k_ptr, k_strides, batch, head // group, 0, VEC)
        v_head_ptr, v_stride = head_rows(v_ptr, v_strides, batch, head // group, 0, VEC)
        q = load_rows(q_head_ptr, q_stride, first_m, mask_m, BLOCK_M, D, BLOCK_D)
        dout = load_rows(dout_head_ptr, dout_stride, first_m, mask_m, BLOCK_M, DV, BLOCK_DV)
        k = load_rows(k_head_ptr, k_stride, first_n, mask_n, BLOCK_N, D, BLOCK_D)
        v = load_rows(v_head_ptr, v_stride, first_n, mask_n, BLOCK_N, DV, BLOCK_DV)
        rows = (batch * heads + head) * length_q + m  # int64 [BLOCK_M]
        lse_log2 = tl.load(lse_log2_ptr + rows, mask=mask_m, other=0.0)[:, None]
        delta = tl.load(delta_ptr + rows, mask=mask_m, other=0.0)[:, None]
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + batch * slopes_stride + head)
        kept = None
        if seed_ptr is not None:
            kept = kept_by_dropout(seed_ptr, rows, first_n, 4 * quads_per_row, threshold, BLOCK_M, BLOCK_N)
        bias_ptrs = bias_pointers(
            bias_ptr, bias_strides, batch, head, first_m, first_n, offs_m[:, None], offs_n[None, :]
        )
        logits, capped = tile_logits(
            qk, bias_ptrs, inside, slope, (m + offset)[:, None], n[None, :], left, right, scale, softcap, True
        )
        _, dlogits = tile_gradients(logits, capped, lse_log2, delta, dp, kept, kept_scale, None, True)
        dbias += dlogits

    rows, columns = length_q, length_k
    if ONE_ROW:
        dbias = tl.sum(dbias, axis=0)[None, :]
        offs_m = tl.arange(0, 1)
        rows = 1
    if ONE_COLUMN:
        dbias = tl.sum(dbias, axis=1)[:, None]
        offs_n = tl.arange(0, 1)
        columns = 1
    m, n = own_m + offs_m, own_n + offs_n
    ptrs = dbias_ptr + (own_pair * rows + m)[:, None] * columns + n[None, :]
    tl.store(ptrs, dbias.to(dbias_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])
