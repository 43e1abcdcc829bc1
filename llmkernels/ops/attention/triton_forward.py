"""Forward of attention in Triton: the online softmax of FlashAttention (Dao et al., arXiv 2205.14135)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import dropout_scale, dropout_threshold
from ...triton_support import (
    INTERPRETED,
    architecture,
    dot_precision,
    kept_by_dropout,
    known_multiple,
    on_device,
    padded,
    vector_width,
)
from . import tiles
from .call import UNLIMITED, Settings, new_rows
from .triton_common import (
    LOG2E,
    addressable,
    cut_tile,
    dot_of_visible,
    sequence_bounds,
    tile_logits,
    tile_range,
)

_LN2 = tl.constexpr(0.6931471805599453)
_UNLIMITED = tl.constexpr(UNLIMITED)
# The fewest that a dot takes, and a divisor of every BLOCK_N.
_CAREFUL_KEYS = tl.constexpr(16)


@triton.jit
def _load_rows(
    ptr, first, stride, length, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Rows first.. of a [length, D] matrix whose rows lie ``stride`` apart; 0 beyond D and, if MASKED, beyond
    the last row."""
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + first * stride.to(tl.int64) + (offs[:, None] * stride + offs_d[None, :])
    if MASKED and BLOCK_D == D:
        tile = tl.load(ptrs, mask=(first + offs < length)[:, None], other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=(first + offs < length)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tile  # [BLOCK, BLOCK_D]


@triton.jit
def _softmax_step(logits, factor, m_log2, total):
    """One step of the online softmax: the weights exp2(factor logits - pivot) of a tile, what the earlier
    weights are to be multiplied by, the new row maximum and the new sum of weights.

    factor > 0 or, if no logit is infinite, 0: so the maximum is found before the multiplication, which then
    is one instruction with the subtraction. The pivot is the maximum, of rows that have seen no key 0.
    """
    m_new = tl.maximum(m_log2, tl.max(logits, axis=1) * factor)  # [BLOCK_M]
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.math.exp2(tl.fma(logits, factor, -pivot[:, None]))  # [BLOCK_M, BLOCK_N]
    correction = tl.math.exp2(m_log2 - pivot)
    return weights, correction, m_new, total * correction + tl.sum(weights, axis=1)


@triton.jit
def _tile_logits(
    qk, start_n, bias_ptr, bias_stride_m, bias_stride_n, slope, softcap, rows, numbers,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``tile_logits`` for the BLOCK_N keys from start_n on; the other arguments as in ``_attend_tile``."""
    position, mask_m, _ = rows
    length_k, left, right, scale, _, _ = numbers
    offs_n = start_n + tl.arange(0, BLOCK_N)
    inside = (offs_n < length_k)[None, :]
    bias_ptrs = None
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + (offs_n * bias_stride_n)[None, :]
        if bias_stride_m is not None:
            inside = inside & mask_m[:, None]
            bias_ptrs += (tl.arange(0, BLOCK_M) * bias_stride_m)[:, None]
    logits, _ = tile_logits(
        qk, bias_ptrs, inside, slope, position[:, None], offs_n[None, :], left, right, scale, softcap, MASKED
    )
    return logits


@triton.jit
def _attend_tile(
    acc, m_log2, total, start_n, q, keys, bias_ptr, bias_stride_m, bias_stride_n, slope, softcap, seed_ptr,
    rows, numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """acc, m_log2 and total after the BLOCK_N keys from start_n on.

    keys: pointers and row strides of k and v. rows: position, mask_m and row of the queries. numbers:
    length_k, left, right, scale, quads_per_row, threshold. MASKED: as in ``tile_logits``. CAREFUL: with
    ``dot_of_visible``.
    """
    k_ptr, k_stride_n, v_ptr, v_stride_n = keys
    length_k, _, _, scale, quads_per_row, threshold = numbers
    k = _load_rows(k_ptr, start_n, k_stride_n, length_k, BLOCK_N, D, BLOCK_D, MASKED)
    v = _load_rows(v_ptr, start_n, v_stride_n, length_k, BLOCK_N, DV, BLOCK_DV, MASKED)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    factor = scale * LOG2E
    if MASKED or softcap is not None or slope is not None:
        logits = _tile_logits(
            logits, start_n, bias_ptr, bias_stride_m, bias_stride_n, slope, softcap, rows, numbers,
            BLOCK_M, BLOCK_N, MASKED,
        )  # fmt: skip
        factor = 1.0
    weights, correction, m_log2, total = _softmax_step(logits, factor, m_log2, total)
    acc = acc * correction[:, None]
    if seed_ptr is not None:
        kept = kept_by_dropout(seed_ptr, rows[2], start_n, 4 * quads_per_row, threshold, BLOCK_M, BLOCK_N)
        weights = tl.where(kept, weights, 0.0)
    if CAREFUL:
        acc = dot_of_visible(weights.to(v.dtype), logits, v, acc, PRECISION)
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_log2, total


@triton.jit(
    do_not_specialize=[
        *("q_stride_b", "q_stride_h", "q_stride_m", "k_stride_b", "k_stride_h", "k_stride_n"),
        *("v_stride_b", "v_stride_h", "v_stride_n", "out_stride_b", "out_stride_h", "out_stride_m"),
        *("bias_stride_b", "bias_stride_h", "slope_stride_b", "tiles", "heads", "group"),
        *("length_q", "length_k", "bottom_right", "left", "right", "quads_per_row", "threshold"),
    ]
)
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, slope_ptr, sink_ptr, seed_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_m, k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n, out_stride_b, out_stride_h, out_stride_m,
    bias_stride_b, bias_stride_h, bias_stride_m, bias_stride_n, slope_stride_b,
    tiles, heads, group, length_q, length_k, bottom_right, left, right, scale, softcap,
    quads_per_row, threshold, kept_scale,
    VEC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = dropout(softmax(logits)) v and the logsumexp of the logits, of BLOCK_M queries of one head.

    Program ``tile + tiles * (sequence * heads + head)`` owns a tile of queries; where keys to the right are
    hidden the last tile, which has the most work, comes first. It walks over the keys that any of its queries
    sees, first the tiles that each of them sees whole, then those that the mask cuts, and keeps the weighted
    sum of values, the maximum of the logits and the sum of their weights, which starts with the sink.

    length_q, length_k: of packed sequences the number of all tokens. bias_stride_m: None for a bias of one
    row; bias_stride_n: 1, or 0 of one column.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    tile = tl.where(right < _UNLIMITED, tiles - 1 - tile, tile)
    head = (pid // tiles % heads).to(tl.int64)
    sequence = (pid // tiles // heads).to(tl.int64)
    start_q, found_q = sequence_bounds(cu_seqlens_q_ptr, sequence, length_q)
    start_k, found_k = sequence_bounds(cu_seqlens_k_ptr, sequence, length_k)
    start_m = tile * BLOCK_M
    if start_m >= found_q:
        return
    batch = sequence if cu_seqlens_q_ptr is None else tl.zeros_like(sequence)

    q_stride_m = known_multiple(q_stride_m, VEC)
    k_stride_n = known_multiple(k_stride_n, VEC)
    v_stride_n = known_multiple(v_stride_n, VEC)
    out_stride_m = known_multiple(out_stride_m, VEC)
    q_ptr += batch * known_multiple(q_stride_b, VEC) + head * known_multiple(q_stride_h, VEC)
    k_ptr += batch * known_multiple(k_stride_b, VEC) + head // group * known_multiple(k_stride_h, VEC)
    v_ptr += batch * known_multiple(v_stride_b, VEC) + head // group * known_multiple(v_stride_h, VEC)
    out_ptr += batch * known_multiple(out_stride_b, VEC) + head * known_multiple(out_stride_h, VEC)
    q_ptr += (start_q + start_m) * q_stride_m
    k_ptr += start_k * k_stride_n
    v_ptr += start_k * v_stride_n
    out_ptr += (start_q + start_m) * out_stride_m
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + head * bias_stride_h
        if bias_stride_m is not None:
            bias_ptr += start_m.to(tl.int64) * bias_stride_m
    slope = None
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + sequence * slope_stride_b + head)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < found_q
    # Of lse, which is contiguous, and of the mask of dropout.
    row = (batch * heads + head) * length_q + start_q + offs_m  # int64 [BLOCK_M]
    offset = bottom_right * (found_k - found_q)
    q = _load_rows(q_ptr, 0, q_stride_m, found_q - start_m, BLOCK_M, D, BLOCK_D, True)
    # _softmax_step wants a positive scale.
    q = tl.where(scale < 0, -q, q)
    scale = tl.abs(scale)

    first_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    first_total = tl.zeros([BLOCK_M], tl.float32)
    if sink_ptr is not None:
        first_m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sink_ptr + head) * LOG2E
        first_total = first_total + 1.0
    low, full_low, full_high, high = tile_range(
        start_m + offset, tl.minimum(start_m + BLOCK_M, found_q) - 1 + offset, left, right, found_k, BLOCK_N
    )
    if bias_ptr is not None:
        full_high = full_low
    keys = (k_ptr, k_stride_n, v_ptr, v_stride_n)
    rows = (offs_m + offset, mask_m, row)
    numbers = (found_k, left, right, scale, quads_per_row, threshold)
    acc, m_log2, total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), first_m, first_total
    for start_n in tl.range(full_low, full_high, BLOCK_N, num_stages=STAGES):
        acc, m_log2, total = _attend_tile(
            acc, m_log2, total, start_n, q, keys, None, None, None, slope, softcap, seed_ptr, rows, numbers,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, False, False,
        )  # fmt: skip
    for index in tl.range(0, (high - low - (full_high - full_low)) // BLOCK_N, num_stages=STAGES):
        start_n = cut_tile(index, low, full_low, full_high, BLOCK_N)
        acc, m_log2, total = _attend_tile(
            acc, m_log2, total, start_n, q, keys, bias_ptr, bias_stride_m, bias_stride_n, slope, softcap,
            seed_ptr, rows, numbers,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, True, False,
        )  # fmt: skip

    if tl.max((tl.abs(acc) < float("inf")).to(tl.int32) ^ 1) > 0:
        # Rare: some value is NaN or infinite, and times a weight of 0 became NaN in rows that do not see it.
        # The whole walk again, apart from the loops above, which stay free of registers and work for this.
        acc, m_log2, total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), first_m, first_total
        for start_n in tl.range(low, high, _CAREFUL_KEYS, num_stages=1):
            acc, m_log2, total = _attend_tile(
                acc, m_log2, total, start_n, q, keys, bias_ptr, bias_stride_m, bias_stride_n, slope, softcap,
                seed_ptr, rows, numbers,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, _CAREFUL_KEYS, PRECISION, True, True,
            )  # fmt: skip

    # Of a row that sees no key the logsumexp is -inf + log2(0) = -inf, or the sink.
    tl.store(lse_ptr + row, (m_log2 + tl.math.log2(total)) * _LN2, mask=mask_m)
    acc = acc * (kept_scale / tl.where(total == 0, 1.0, total))[:, None]  # of rows that see no key 0
    offs_d = tl.arange(0, BLOCK_DV)
    out_ptrs = out_ptr + (tl.arange(0, BLOCK_M)[:, None] * out_stride_m + offs_d[None, :])
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_d < DV)[None, :])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """reference.forward by the kernel of this module: same arguments, same results (out, lse)."""
    b, heads, length_q, head_dim = query.shape
    kv_heads, length_k, value_dim = value.shape[1:]
    out = new_rows(query, value_dim)
    lse = torch.empty((b, heads, length_q), dtype=torch.float32, device=query.device)
    sequences = b if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    if out.numel() == 0 or sequences == 0:
        return out, lse
    query, key, value = addressable(query), addressable(key), addressable(value)
    bias_strides: tuple[int | None, ...] = (0, 0, 0, 0)
    if bias is not None:
        bias = addressable(bias.view(torch.uint8) if bias.dtype == torch.bool else bias)
        bias_strides = tuple(
            0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)
        )
        if bias.shape[2] == 1:
            bias_strides = (*bias_strides[:2], None, bias_strides[3])
    slope_stride_b = 0 if alibi_slopes is None or alibi_slopes.shape[0] == 1 else alibi_slopes.stride(0)
    block_d, block_dv = padded(head_dim), padded(value_dim)
    tile = tiles.FORWARD_INTERPRETED
    if not INTERPRETED:
        features = any(x is not None for x in (bias, alibi_slopes, seed)) or settings.softcap > 0
        tile = tiles.forward(
            max(block_d, block_dv), query.element_size(), architecture(query.device), features
        )
    query_tiles = -(-settings.max_seqlen_q // tile.block_m)
    strides = tuple(stride for tensor in (query, key, value, out) for stride in tensor.stride()[:3])
    with on_device(query):
        _attention_forward_kernel[(query_tiles * sequences * heads,)](
            query, key, value, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, out, lse,
            *strides, *bias_strides, slope_stride_b,
            query_tiles, heads, heads // kv_heads, length_q, length_k,
            int(settings.bottom_right), settings.left, settings.right, settings.scale,
            settings.softcap or None, -(-settings.max_seqlen_k // 4),
            dropout_threshold(settings.dropout_p), dropout_scale(settings.dropout_p),
            vector_width((query.dtype,), *strides), head_dim, value_dim, block_d, block_dv,
            tile.block_m, tile.block_n, tile.num_stages, dot_precision(query.dtype),
            num_warps=tile.num_warps,
        )  # fmt: skip
    return out, lse
