"""The torch backend of attention_decode: torch's own operator over a mask of each sequence's length and
window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


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
    return_lse: bool,
    longest: int | None,
) -> tuple[Tensor, Tensor | None]:
    """reference.forward by scaled_dot_product_attention, or by the reference itself for what torch's operator
    has not: a soft cap, ALiBi (a bias in 16 bits would round large distances), sinks, the logsumexp. longest:
    the longest sequence where it is known; the cache is read no further then."""
    if longest is not None and block_table is None:
        key_cache, value_cache = key_cache[:, :, :longest], value_cache[:, :, :longest]
    elif longest is not None and block_table is not None:
        block_table = block_table[:, : -(-longest // key_cache.shape[2])]
    if return_lse or softcap > 0 or alibi_slopes is not None or sinks is not None:
        held = (query, key_cache, value_cache, cache_seqlens, block_table, alibi_slopes, sinks)
        return reference.forward(*held, new_tokens, scale, left, right, softcap)
    reach = reference.capacity(key_cache, block_table)
    if reach == 0:
        return query.new_zeros(*query.shape[:3], value_cache.shape[3]), None
    totals = reference.total_lengths(cache_seqlens, new_tokens, reach)
    distance = reference.distances(totals, query.shape[2], reach)
    mask = reference.visible(totals, distance, left, right)  # [B, Lq, reach]
    # No mask would keep the NaN of memory that was never written out of the sums.
    seen = mask.any(dim=1)[:, None, :, None]
    keys, values = (
        torch.where(seen, reference.gathered(cache, block_table, reach), 0)
        for cache in (key_cache, value_cache)
    )
    out = F.scaled_dot_product_attention(query, keys, values, mask[:, None], scale=scale, enable_gqa=True)
    return out.masked_fill(~mask.any(dim=2)[:, None, :, None], 0.0), None
