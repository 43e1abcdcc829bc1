"""Attention over a key-value cache in pure PyTorch: the append and the attention, each without waiting for
the GPU.

The yardstick of the kernels. Scores, softmax and sums are in float32, or in float64 for float64 tensors.
Formulas: Vaswani et al., Attention Is All You Need (arXiv 1706.03762); grouped heads: Ainslie et al. (arXiv
2305.13245); ALiBi: Press et al. (arXiv 2108.12409); soft cap: Gemma 2 (arXiv 2408.00118); sinks: a logit
beside the keys', as in gpt-oss (arXiv 2508.10925).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import DecodeCall


def unsupported(call: DecodeCall) -> list[str]:
    """The reference serves every call that reaches it outside functorch."""
    return [] if call.obstacle is None else [call.obstacle]


def capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """The most tokens of a sequence: those of the cache, or of the pages that a row of the table can name."""
    if block_table is None:
        return cache.shape[2]
    return block_table.shape[1] * cache.shape[2] if cache.shape[0] > 0 else 0


def total_lengths(cache_seqlens: Tensor, new_tokens: int, limit: int) -> Tensor:
    """int64 [B]: the tokens of each sequence, the new ones included, as far as the cache holds them."""
    return (cache_seqlens.to(torch.int64).clamp(min=0) + new_tokens).clamp(max=limit)


def append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    """Writes key and value [B, Hkv, Lnew, D(v)] behind the tokens of their sequences, in place. What falls
    beyond the capacity, or on a page that the cache doesn't have, is dropped."""
    batch, heads, new_tokens, _ = key.shape
    blocks, _, page_size, _ = key_cache.shape
    limit = capacity(key_cache, block_table)
    if key.numel() == 0 or limit == 0:
        return
    steps = torch.arange(new_tokens, device=key.device)
    positions = cache_seqlens.to(torch.int64).clamp(min=0)[:, None] + steps  # [B, Lnew]
    kept = positions < limit
    positions = positions.clamp(max=limit - 1)
    if block_table is None:
        pages = torch.arange(batch, device=key.device)[:, None].expand_as(positions)
        slots = positions
    else:
        pages = block_table.to(torch.int64).gather(1, positions // page_size)
        kept = kept & (pages >= 0) & (pages < blocks)
        pages, slots = pages.clamp(0, blocks - 1), positions % page_size
    # A dropped token writes what another one writes, or, where all are dropped, what stands there: selecting
    # the kept ones would wait for the GPU.
    kept = kept.flatten()
    source = torch.where(kept, torch.arange(kept.numel(), device=key.device), kept.int().argmax())
    pages, slots, kept = pages.flatten()[source], slots.flatten()[source], kept[source]
    for cache, rows in ((key_cache, key), (value_cache, value)):
        new = rows.transpose(1, 2).reshape(batch * new_tokens, heads, -1)[source]
        cache[pages, :, slots] = torch.where(kept[:, None, None], new, cache[pages, :, slots])


def gathered(cache: Tensor, block_table: Tensor | None, reach: int) -> Tensor:
    """The first ``reach`` tokens of every sequence, [B, Hkv, reach, D]: a view of a contiguous cache, a copy
    out of the pages of a paged one."""
    if block_table is None:
        return cache[:, :, :reach]
    blocks, heads, page_size, head_dim = cache.shape
    pages = block_table[:, : -(-reach // page_size)].to(torch.int64).clamp(0, blocks - 1)
    tokens = cache[pages].transpose(1, 2)  # [B, Hkv, pages, page_size, D]
    return tokens.reshape(pages.shape[0], heads, pages.shape[1] * page_size, head_dim)[:, :, :reach]


def distances(totals: Tensor, query_length: int, reach: int) -> Tensor:
    """int64 [B, Lq, reach]: position of the key minus position of the query, which is T_b - Lq + i."""
    rows = torch.arange(query_length, device=totals.device)
    positions = totals[:, None] - query_length + rows  # [B, Lq]
    return torch.arange(reach, device=totals.device) - positions[:, :, None]


def visible(totals: Tensor, distance: Tensor, left: int, right: int) -> Tensor:
    """bool [B, Lq, reach]: the keys inside each query's window (-1 = no bound) that the sequence has."""
    seen = torch.arange(distance.shape[2], device=totals.device) < totals[:, None, None]
    seen = seen if left < 0 else seen & (distance >= -left)
    seen = seen if right < 0 else seen & (distance <= right)
    return seen.expand(distance.shape)


def alibi_bias(alibi_slopes: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """-slope * |distance| as [B or 1, Hq, Lq, reach]."""
    slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
    return -slopes.to(dtype)[:, :, None, None] * distance.abs()[:, None].to(dtype)


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
    """softmax(scores) @ values over the tokens of each sequence, and the logsumexp of the scores.

        out_i = sum_j exp(s_ij - lse_i) v_j        s_ij = cap(scale * q_i . k_j) - slope * |i - j|
        lse_i = log(e^sink + sum_j e^s_ij)         cap(s) = softcap * tanh(s / softcap)

    over the keys j that query i may see. query: [B, Hq, Lq, D]. Caches, cache_seqlens, block_table,
    alibi_slopes, sinks: as attention_decode takes them. new_tokens: how many of the cache's tokens
    cache_seqlens does not count. left, right: the window, -1 = no bound (causal: right = 0). softcap: 0 =
    none. num_splits concerns kernels alone. Returns out [B, Hq, Lq, Dv] and lse [B, Hq, Lq], float32
    (float64 of float64 queries). A query that sees no key gets 0 and -inf, or its sink.
    """
    batch, heads, query_length, head_dim = query.shape
    reach, kv_heads = capacity(key_cache, block_table), key_cache.shape[1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    totals = total_lengths(cache_seqlens, new_tokens, reach)
    distance = distances(totals, query_length, reach)
    mask = visible(totals, distance, left, right)
    # Memory that was never written may hold NaN, and 0 * NaN is NaN.
    seen = mask.any(dim=1)[:, None, :, None]
    keys, values = (
        torch.where(seen, gathered(cache, block_table, reach), 0).to(wide)
        for cache in (key_cache, value_cache)
    )

    grouped = query.to(wide).reshape(batch, kv_heads, heads // kv_heads * query_length, head_dim)
    scores = (grouped @ keys.transpose(2, 3)).reshape(batch, heads, query_length, reach) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes, distance, wide)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide)[None, :, None, None].expand(batch, heads, query_length, 1)
        scores = torch.cat((scores, sink), dim=3)
    if scores.shape[3] == 0:
        return query.new_zeros(*query.shape[:3], values.shape[3]), scores.new_full(
            query.shape[:3], -torch.inf
        )
    pivot = scores.amax(dim=3, keepdim=True)
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    weights = torch.exp(scores - pivot)
    total = weights.sum(dim=3, keepdim=True)
    lse = (pivot + torch.log(total)).squeeze(3)
    grouped = weights[..., :reach].reshape(batch, kv_heads, heads // kv_heads * query_length, reach)
    out = (grouped @ values).reshape(batch, heads, query_length, values.shape[3])
    return (out / total.masked_fill(total == 0, 1.0)).to(query.dtype), lse
