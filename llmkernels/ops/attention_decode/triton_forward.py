"""Attention over the cache in Triton: split walks of the keys, and their merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import (
    architecture,
    dot_precision,
    known_multiple,
    on_device,
    padded,
    processors,
    tanh,
)
from . import tiles
from .triton_common import (
    common_vector_width,
    page_of,
    page_size,
    sequence_length,
    unit_rows,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# No bound of a window, and more than any position: sums of two such stay within int32.
_UNBOUNDED = 2**30


@triton.jit
def _pivot(m_log2):
    """The maximum to subtract; 0 where no key was seen, so that -inf - -inf never occurs."""
    return tl.where(m_log2 == float("-inf"), 0.0, m_log2)


@triton.jit
def _online_softmax_update(acc, m_log2, l_sum, scores_log2, v, PRECISION: tl.constexpr):
    """acc, m_log2 and l_sum with a tile of scores [BLOCK_M, BLOCK_N] and its values taken in."""
    m_new = tl.maximum(m_log2, tl.max(scores_log2, axis=1))
    pivot = _pivot(m_new)
    p = tl.exp2(scores_log2 - pivot[:, None])  # [BLOCK_M, BLOCK_N]
    alpha = tl.exp2(m_log2 - pivot)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l_sum * alpha + tl.sum(p, axis=1)


@triton.jit
def _finish(acc, m_log2, l_sum, sinks_ptr, heads):
    """out and lse (natural log) of the sums [ROWS, BLOCK_DV], [ROWS], [ROWS], each row's sink taken in; 0 and
    -inf for a row that saw nothing."""
    if sinks_ptr is not None:
        sink_log2 = tl.load(sinks_ptr + heads).to(tl.float32) * _LOG2_E
        pivot = _pivot(tl.maximum(m_log2, sink_log2))
        alpha = tl.exp2(m_log2 - pivot)
        acc = acc * alpha[:, None]
        l_sum = l_sum * alpha + tl.exp2(sink_log2 - pivot)
        m_log2 = pivot
    empty = l_sum == 0.0
    lse = tl.where(empty, float("-inf"), (m_log2 + tl.log2(l_sum)) * _LN_2)
    return acc / tl.where(empty, 1.0, l_sum)[:, None], lse


@triton.jit
def _tile_rows(
    table_ptr, sequence, start, positions, mask, BLOCKS, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Block and row, int64, of a tile's tokens in the cache. A tile inside one page takes one look into the
    table; entries that name no page are clamped, for reads must stay in the cache."""
    if table_ptr is None:
        blocks, slots = sequence, positions
    else:
        if PAGE_SIZE % BLOCK_N == 0:
            blocks = page_of(table_ptr, start, True, PAGE_SIZE)
        else:
            blocks = page_of(table_ptr, positions, mask, PAGE_SIZE)
        blocks = tl.minimum(tl.maximum(blocks, 0), BLOCKS - 1)
        slots = positions % PAGE_SIZE
    return blocks, slots.to(tl.int64)


@triton.jit
def _load_rows(ptr, rows, mask_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile [BLOCK_N, BLOCK_D] of the rows at these offsets, 0 outside the mask."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + rows[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        *("stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn"),
        *("stride_vb", "stride_vh", "stride_vn", "stride_tb", "stride_ab"),
        *("H", "GROUP", "LQ", "NEW", "BLOCKS", "CAPACITY", "LEFT", "RIGHT", "SPLITS"),
    ]
)
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, slopes_ptr, sinks_ptr, out_ptr, lse_ptr, m_ptr, l_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_tb, stride_ab, H, GROUP, LQ, NEW, BLOCKS, CAPACITY, LEFT, RIGHT, SPLITS,
    scale, cap_log2,
    PAGE_SIZE: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = softmax(scores) @ v of the queries that share a key head, over one share of the keys.

    The GROUP query heads of a key head, LQ queries each, are GROUP * LQ rows, row r being query r // GROUP of
    head r % GROUP. Program i owns BLOCK_M rows (fastest, so that programs that read the same keys run
    together) and one of SPLITS equal shares, in whole tiles, of the keys that some row may see. scale takes
    q.k to base 2, or, with a cap, to the cap's argument. With lse_ptr the only split writes out and lse;
    without it each split writes its unnormalised acc to out_ptr, and m_log2 and l_sum, for the merge.
    """
    rows = GROUP * LQ
    row_tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    split = program // row_tiles % SPLITS
    kv_head = (program // row_tiles // SPLITS % H).to(tl.int64)
    sequence = (program // row_tiles // SPLITS // H).to(tl.int64)
    first_row = program % row_tiles * BLOCK_M

    offs_m = first_row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    heads = kv_head * GROUP + offs_m % GROUP  # int64 [BLOCK_M]
    queries = offs_m // GROUP
    length = sequence_length(lengths_ptr, sequence, NEW, CAPACITY)
    first_position = length - LQ
    positions = first_position + queries  # [BLOCK_M]
    # The keys that the first to the last row of the tile may see, in whole tiles, and this split's share.
    begin = tl.maximum(first_position + first_row // GROUP - LEFT, 0)
    last_query = (tl.minimum(first_row + BLOCK_M, rows) - 1) // GROUP
    end = tl.minimum(first_position + last_query + RIGHT + 1, length)
    first_tile = begin // BLOCK_N
    share = tl.cdiv(tl.maximum(tl.cdiv(end, BLOCK_N) - first_tile, 0), SPLITS)
    first_key = (first_tile + split * share) * BLOCK_N
    last_key = tl.minimum(first_key + share * BLOCK_N, end)

    stride_qb, stride_qh = known_multiple(stride_qb, VEC), known_multiple(stride_qh, VEC)
    stride_qm = known_multiple(stride_qm, VEC)
    stride_kb, stride_kn = known_multiple(stride_kb, VEC), known_multiple(stride_kn, VEC)
    stride_vb, stride_vn = known_multiple(stride_vb, VEC), known_multiple(stride_vn, VEC)
    k_ptr += kv_head * known_multiple(stride_kh, VEC)
    v_ptr += kv_head * known_multiple(stride_vh, VEC)
    if table_ptr is not None:
        table_ptr += sequence * stride_tb
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + sequence * stride_ab + heads, mask=mask_m, other=0.0)
        slopes_log2 = slopes.to(tl.float32) * _LOG2_E
    q_rows = sequence * stride_qb + heads * stride_qh + queries.to(tl.int64) * stride_qm
    q = _load_rows(q_ptr, q_rows, mask_m, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    m_log2 = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in tl.range(first_key, last_key, BLOCK_N, num_stages=STAGES):
        offs_n = start + tl.arange(0, BLOCK_N)
        # Every key in [begin, end) is seen by some row. What lies outside may be memory that was never
        # written, so its values must be 0: the 0 that p is there times NaN would be NaN.
        mask_n = (offs_n >= begin) & (offs_n < end)
        blocks, slots = _tile_rows(table_ptr, sequence, start, offs_n, mask_n, BLOCKS, PAGE_SIZE, BLOCK_N)
        k = _load_rows(k_ptr, blocks * stride_kb + slots * stride_kn, mask_n, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_N]
        if cap_log2 is not None:
            scores = tanh(scores) * cap_log2
        distance = offs_n[None, :] - positions[:, None]
        if slopes_ptr is not None:
            scores -= slopes_log2[:, None] * tl.abs(distance).to(tl.float32)
        visible = (distance >= -LEFT) & (distance <= RIGHT) & mask_n[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        v = _load_rows(v_ptr, blocks * stride_vb + slots * stride_vn, mask_n, DV, BLOCK_DV)
        acc, m_log2, l_sum = _online_softmax_update(acc, m_log2, l_sum, scores, v, PRECISION)

    # [SPLITS, B, Hq, LQ, DV], of which a final result has no first dimension.
    out_rows = (sequence * H * GROUP + heads) * LQ + queries
    offs_dv = tl.arange(0, BLOCK_DV)
    mask = mask_m[:, None] & (offs_dv < DV)[None, :]
    if lse_ptr is not None:
        acc, lse = _finish(acc, m_log2, l_sum, sinks_ptr, heads)
        tl.store(lse_ptr + out_rows, lse, mask=mask_m)
    else:
        out_rows += split.to(tl.int64) * (tl.num_programs(0) // (row_tiles * SPLITS)) * rows
        tl.store(m_ptr + out_rows, m_log2, mask=mask_m)
        tl.store(l_ptr + out_rows, l_sum, mask=mask_m)
        mask = mask & (l_sum != 0.0)[:, None]  # the merge reads no sums of nothing
    tl.store(out_ptr + out_rows[:, None] * DV + offs_dv[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["HEADS", "LQ", "SPLITS"])
def _attention_decode_merge_kernel(
    acc_ptr, m_ptr, l_ptr, sinks_ptr, out_ptr, lse_ptr, HEADS, LQ, SPLITS,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(m_s - m) acc_s / l with m = max_s m_s and l = sum_s 2^(m_s - m) l_s, then the sink.

    Program i owns row i of [B * Hq * LQ] and adds the splits up in their order, BLOCK_S at a time. The sums
    of a split are only read where it saw a key: else they were not written.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # int64 [1]
    total_rows = tl.num_programs(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_DV)
    m_log2 = tl.full([1], float("-inf"), dtype=tl.float32)
    for first in tl.range(0, SPLITS, BLOCK_S):
        splits = first + offs_s
        m_split = tl.load(m_ptr + splits * total_rows + row, mask=splits < SPLITS, other=float("-inf"))
        m_log2 = tl.maximum(m_log2, tl.max(m_split, axis=0))
    l_sum = tl.zeros([1], dtype=tl.float32)
    acc = tl.zeros([1, BLOCK_DV], dtype=tl.float32)
    for first in tl.range(0, SPLITS, BLOCK_S):
        splits = first + offs_s
        rows = splits * total_rows + row  # int64 [BLOCK_S]
        l_split = tl.load(l_ptr + rows, mask=splits < SPLITS, other=0.0)
        m_split = tl.load(m_ptr + rows, mask=splits < SPLITS, other=float("-inf"))
        weights = tl.exp2(m_split - _pivot(m_log2))
        mask = (l_split != 0.0)[:, None] & (offs_d < DV)[None, :]
        acc_split = tl.load(acc_ptr + rows[:, None] * DV + offs_d[None, :], mask=mask, other=0.0)
        acc += tl.sum(weights[:, None] * acc_split, axis=0)[None, :]
        l_sum += tl.sum(weights * l_split, axis=0)
    acc, lse = _finish(acc, m_log2, l_sum, sinks_ptr, row // LQ % HEADS)
    tl.store(lse_ptr + row, lse)
    out_ptrs = out_ptr + row[:, None] * DV + offs_d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_d < DV)[None, :])


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    new_tokens: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """reference.forward by the kernels of this module; num_splits: 0 = as the sizes suggest."""
    batch, heads, query_length, head_dim = query.shape
    blocks, kv_heads, cache_length, _ = key_cache.shape
    value_dim = value_cache.shape[3]
    out = torch.empty((batch, heads, query_length, value_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, query_length), dtype=torch.float32, device=query.device)
    if lse.numel() == 0:
        return out, lse
    query, cache_seqlens = unit_rows(query), cache_seqlens.contiguous()
    table, slopes, sinks = (
        None if tensor is None else tensor.contiguous() for tensor in (block_table, alibi_slopes, sinks)
    )
    limit = cache_length if table is None else cache_length * table.shape[1] if blocks > 0 else 0
    block_d, block_dv = padded(head_dim), padded(value_dim)
    width = common_vector_width(query, key_cache, value_cache)
    tile = tiles.decode(max(block_d, block_dv), query.element_size(), width, architecture(query.device))
    group = heads // kv_heads
    block_m = tile.block_m(group * query_length)
    programs = -(-group * query_length // block_m) * kv_heads * batch
    left, right = (_UNBOUNDED if bound < 0 else min(bound, _UNBOUNDED) for bound in (left, right))
    # From sizes alone: a sequence shorter than the cache is cut into as many, shorter parts.
    key_tiles = -(-min(limit, left + right + query_length) // tile.block_n)
    slots = tiles.PROGRAMS_PER_PROCESSOR * processors(query.device)
    splits = num_splits or tiles.splits(programs, key_tiles, slots)
    acc, m_log2, l_sum = out, None, None
    if splits > 1:
        acc = torch.empty((splits, *out.shape), dtype=torch.float32, device=query.device)
        m_log2, l_sum = torch.empty((2, splits, *lse.shape), dtype=torch.float32, device=query.device)
    with on_device(query):
        _attention_decode_kernel[(programs * splits,)](
            query, key_cache, value_cache, cache_seqlens, table, slopes,
            None if splits > 1 else sinks, acc, None if splits > 1 else lse, m_log2, l_sum,
            *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
            0 if table is None else table.shape[1], heads if slopes is not None and slopes.dim() == 2 else 0,
            kv_heads, group, query_length, new_tokens, blocks, limit, left, right, splits,
            scale / softcap if softcap > 0 else scale * _LOG2_E.value,
            softcap * _LOG2_E.value if softcap > 0 else None,
            page_size(key_cache, table), width, dot_precision(query.dtype),
            head_dim, block_d, value_dim, block_dv, block_m, tile.block_n, tile.stages(table is not None),
            num_warps=tile.num_warps,
        )  # fmt: skip
        if splits > 1:
            _attention_decode_merge_kernel[(lse.numel(),)](
                acc, m_log2, l_sum, sinks, out, lse, heads, query_length, splits,
                value_dim, block_dv, tiles.MERGE_SPLITS, num_warps=tiles.MERGE_WARPS,
            )  # fmt: skip
    return out, lse
