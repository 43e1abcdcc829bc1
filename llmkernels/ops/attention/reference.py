"""Softmax attention in pure PyTorch: forward and explicit backward.

The yardstick of every kernel, and the path of double backward: each function is differentiable by autograd,
and ``backward`` recomputes the probabilities from query and key so that it depends on them. Everything is in
float32, or in float64 for float64 inputs, and the [Lq, Lk] scores of every head are stored. Formulas: Dao et
al., FlashAttention (arXiv 2205.14135), with the logsumexp's gradient, sinks and bias added (README.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dropout import dropout_scale, dropout_threshold, philox_uint32
from .call import AttentionCall, Settings, arranged, autocast_is_on, new_rows

_INFINITY = float("inf")


def unsupported(call: AttentionCall) -> list[str]:
    """The reference serves every call that reaches it outside functorch."""
    return [] if call.obstacle is None else [call.obstacle]


class _Probabilities(NamedTuple):
    """Of every query and key, [B, Hq, Lq, Lk]: whether the key is visible, the derivative of the soft cap (or
    None), the probability; and the logsumexp [B, Hq, Lq]."""

    visible: Tensor
    slope: Tensor | None
    values: Tensor
    lse: Tensor


def dropout_mask(seed: Tensor, rows: Tensor, keys: int, quads_per_row: int, dropout_p: float) -> Tensor:
    """bool [*rows, keys], True = kept. Key j of row r takes word j % 4 of counter r * quads_per_row + j // 4;
    it is kept where the word's upper 31 bits are at least round(dropout_p * 2^31).

    rows: int64, (batch * Hq + head) * Lq + query, of packed sequences head * T + token. quads_per_row:
    ceil(max_seqlen_k / 4).
    """
    quads = rows[..., None] * quads_per_row + torch.arange((keys + 3) // 4, device=rows.device)
    words = philox_uint32(seed, quads).flatten(-2)[..., :keys]
    return (words >> 1) >= dropout_threshold(dropout_p)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _per_query_head(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values [B, Hkv, Lk, D] as [B, heads, Lk, D]: query head h reads head h // (heads / Hkv)."""
    return _wide(tensor).repeat_interleave(heads // max(tensor.shape[1], 1), dim=1)


def _visible(lq: int, lk: int, bias: Tensor | None, settings: Settings, device: torch.device) -> Tensor:
    """bool, broadcastable to [B, Hq, Lq, Lk]."""
    distance = _key_distance(lq, lk, settings, device)
    visible = (distance >= -settings.left) & (distance <= settings.right)
    if bias is None:
        return visible
    return visible & (bias if bias.dtype == torch.bool else bias.detach() != -_INFINITY)


def _key_distance(lq: int, lk: int, settings: Settings, device: torch.device) -> Tensor:
    """j - (i + offset), int64 [Lq, Lk]."""
    offset = lk - lq if settings.bottom_right else 0
    return torch.arange(lk, device=device) - (torch.arange(lq, device=device) + offset)[:, None]


def _finite(tensor: Tensor) -> Tensor:
    """``tensor`` with 0 for NaN and infinities: what stands in a masked slot meets a probability of 0."""
    return torch.where(tensor.isfinite(), tensor, 0.0)


def _probabilities(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    settings: Settings,
) -> _Probabilities:
    lq, lk = query.shape[2], key.shape[2]
    logits = query @ key.transpose(2, 3) * settings.scale
    slope = None
    if settings.softcap:
        capped = torch.tanh(logits / settings.softcap)
        logits, slope = settings.softcap * capped, 1 - capped.square()
    if bias is not None and bias.dtype != torch.bool:
        logits = logits + bias.to(logits.dtype)
    if alibi_slopes is not None:
        distance = _key_distance(lq, lk, settings, query.device).abs()
        logits = logits - alibi_slopes[..., None, None] * distance
    visible = _visible(lq, lk, bias, settings, query.device).expand(logits.shape)
    logits = torch.where(visible, logits, -_INFINITY)
    if sinks is not None:
        sink = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        terms = torch.cat((logits, sink), dim=3)
        # A sink of -inf leaves rows of nothing but -inf, of which logsumexp's gradient would be NaN.
        dead = (terms == -_INFINITY).all(dim=3)
        lse = torch.where(dead[..., None], 0.0, terms).logsumexp(dim=3).masked_fill(dead, -_INFINITY)
    elif lk > 0:
        lse = logits.logsumexp(dim=3)
    else:
        lse = logits.new_full(logits.shape[:3], -_INFINITY)
    return _Probabilities(visible, slope, torch.exp(logits - _pivot(lse)[..., None]), lse)


def _pivot(lse: Tensor) -> Tensor:
    """What logits are taken relative to: of a row of nothing but -inf the difference would be -inf - -inf."""
    return torch.where(lse == -_INFINITY, 0.0, lse)


def _part(tensor: Tensor, rows: slice) -> Tensor:
    """Those rows of [B, H, L, ...]; all of them are the tensor itself: not every vmap takes slices."""
    whole = rows.start == 0 and rows.stop == tensor.shape[2]
    return tensor if whole else tensor[:, :, rows]


def _weighted_sum(weights: Tensor, visible: Tensor, value: Tensor) -> Tensor:
    """weights @ value in which a value that a row can't see adds nothing to it, even NaN."""
    seen = visible.to(value.dtype) @ (~value.isfinite()).to(value.dtype) > 0
    return torch.where(seen, weights @ value, weights @ _finite(value))


def _reduced(gradient: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a tensor of ``shape`` that was broadcast to the gradient's."""
    return gradient.sum_to_size(shape)


def _sequences(
    query: Tensor,
    key: Tensor,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    settings: Settings,
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """The tokens of each sequence, as slices of the query's and the key's, and its dropout mask (None without
    dropout); the whole of both for dense tensors."""
    b, h, lq, _ = query.shape
    bounds_q = [0, lq] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    bounds_k = [0, key.shape[2]] if cu_seqlens_k is None else cu_seqlens_k.tolist()
    rows = torch.arange(b * h * lq, device=query.device).view(b, h, lq)
    quads = (settings.max_seqlen_k + 3) // 4
    for first_q, last_q, first_k, last_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        tokens, keys = slice(first_q, last_q), slice(first_k, last_k)
        mask = None
        if seed is not None:
            mask = dropout_mask(seed, _part(rows, tokens), last_k - first_k, quads, settings.dropout_p)
        yield tokens, keys, mask


def _slopes(alibi_slopes: Tensor | None, sequence: int, cu_seqlens_q: Tensor | None) -> Tensor | None:
    """ALiBi's slopes of one packed sequence, [1, Hq], or of a dense batch, as they are."""
    if alibi_slopes is None or cu_seqlens_q is None or alibi_slopes.shape[0] == 1:
        return alibi_slopes
    return alibi_slopes[sequence : sequence + 1]


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would have the matrix products in half precision."""

    @functools.wraps(function)
    def exact(*arguments: Any) -> Any:
        device = arguments[0].device
        if not autocast_is_on(device):
            return function(*arguments)
        with torch.autocast(device.type, enabled=False):
            return function(*arguments)

    return exact


@_without_autocast
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
    """out = dropout(softmax(logits)) value and its logsumexp, with

        logits = softcap * tanh(scale * query key^T / softcap) + bias - slope * |i + offset - j|

    and -inf for an invisible key (Settings; False or -inf in the bias).

    query: [B, Hq, Lq, D]; key: [B, Hkv, Lk, D]; value: [B, Hkv, Lk, Dv]; Hq a multiple of Hkv. bias: bool
    (True = visible) or floating, [B | 1, Hq | 1, Lq | 1, Lk | 1]. alibi_slopes: [B | 1, Hq], B being the
    number of sequences where packed, and sinks: [Hq], one more logit of each row that has no value: float32,
    or float64 for float64 inputs.
    seed: int64 [1], None without dropout. cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], the bounds of
    sequences that lie packed in B = 1; then there is no bias. Returns out [B, Hq, Lq, Dv] of query's dtype
    and lse [B, Hq, Lq], float32 (float64 for float64), of natural logarithms; a row that sees no key has out
    0 and the sink, or -inf, as lse.
    """
    outs, lses = [], []
    heads = query.shape[1]
    for i, (tokens, keys, kept) in enumerate(
        _sequences(query, key, seed, cu_seqlens_q, cu_seqlens_k, settings)
    ):
        p = _probabilities(
            _wide(_part(query, tokens)),
            _per_query_head(_part(key, keys), heads),
            bias,
            _slopes(alibi_slopes, i, cu_seqlens_q),
            sinks,
            settings,
        )
        weights = p.values
        if kept is not None:
            weights = torch.where(kept, weights * dropout_scale(settings.dropout_p), 0.0)
        outs.append(_weighted_sum(weights, p.visible, _per_query_head(_part(value, keys), heads)))
        lses.append(p.lse)
    if not outs:
        return new_rows(query, value.shape[3]), _wide(query).new_empty(query.shape[:3])
    return arranged(torch.cat(outs, dim=2).to(query.dtype), query), torch.cat(lses, dim=2)


@_without_autocast
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    settings: Settings,
    bias_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``forward``. With P the probabilities, K the kept ones of dropout and their scale:

        dV = (K P)^T dout                     dP = K (dout V^T)
        delta = rowsum(P dP) - dlse           dlogits = P (dP - delta),  of which dbias is the sum
        dS = dlogits * d(softcap)             dQ = scale dS K,  dK = scale dS^T Q
        dsinks = -sum of exp(sink - lse) delta

    dout: [B, Hq, Lq, Dv]; dlse: [B, Hq, Lq] or None. Returns dquery, dkey, dvalue and, empty if not wanted or
    not given, dbias (of the bias's shape and dtype) and dsinks (of the sinks'). out, lse and deterministic
    are for kernels: the reference makes its own, so that its result can be differentiated again.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    group = heads // max(kv_heads, 1)

    def of_groups(gradients: Tensor) -> Tensor:
        b, _, length, d = gradients.shape
        return gradients.reshape(b, kv_heads, group, length, d).sum(dim=2) if group != 1 else gradients

    dquery, dkey, dvalue = [], [], []
    wide_query = _wide(query)
    dbias = query.new_empty(0) if bias is None or not bias_grad else wide_query.new_zeros(bias.shape)
    dsinks = wide_query.new_empty(0) if sinks is None else wide_query.new_zeros(sinks.shape)
    for i, (tokens, keys, kept) in enumerate(
        _sequences(query, key, seed, cu_seqlens_q, cu_seqlens_k, settings)
    ):
        q = _part(wide_query, tokens)
        k, v = (_per_query_head(_part(tensor, keys), heads) for tensor in (key, value))
        p = _probabilities(q, k, bias, _slopes(alibi_slopes, i, cu_seqlens_q), sinks, settings)
        # A row that sees nothing has no gradient, whatever comes in for it.
        live = p.visible.any(dim=3, keepdim=True)
        grad = torch.where(live, _wide(_part(dout, tokens)), 0.0)
        dp = torch.where(p.visible, grad @ v.transpose(2, 3), 0.0)
        weights = p.values
        if kept is not None:
            scale = dropout_scale(settings.dropout_p)
            weights, dp = torch.where(kept, weights * scale, 0.0), torch.where(kept, dp * scale, 0.0)
        delta = (p.values * dp).sum(dim=3)
        if dlse is not None:
            delta = delta - _part(dlse, tokens)
        ds = torch.where(p.visible, p.values * (dp - delta[..., None]), 0.0)
        if bias is not None and bias_grad:
            dbias = dbias + _reduced(ds, bias.shape)
        if sinks is not None:
            dsinks = dsinks - (torch.exp(sinks[:, None] - _pivot(p.lse)) * delta).sum(dim=(0, 2))
        if p.slope is not None:
            ds = torch.where(p.visible, ds * p.slope, 0.0)
        dquery.append(ds @ _finite(k) * settings.scale)
        dk = ds.transpose(2, 3) @ torch.where(live, q, 0.0) * settings.scale
        dv = weights.transpose(2, 3) @ grad
        dkey.append(of_groups(dk))
        dvalue.append(of_groups(dv))
    if not dquery:
        dquery, dkey, dvalue = ([wide_query.new_zeros(t.shape)] for t in (query, key, value))
    return (
        arranged(torch.cat(dquery, dim=2).to(query.dtype), query),
        arranged(torch.cat(dkey, dim=2).to(key.dtype), key),
        arranged(torch.cat(dvalue, dim=2).to(value.dtype), value),
        dbias.to(bias.dtype) if bias is not None and bias_grad else dbias.to(query.dtype),
        dsinks,
    )
