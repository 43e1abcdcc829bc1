"""The torch backend of attention: scaled_dot_product_attention where it has what is asked for, else the
reference's formulas under autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .call import UNLIMITED, Settings

_INFINITY = float("inf")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    settings: Settings,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Hq, Lq, Dv] and, if wanted, lse [B, Hq, Lq], of reference.forward's arguments without packed
    sequences; dropout draws from torch's generator."""
    if settings.softcap or sinks is not None or want_lse:
        seed = None
        if settings.dropout_p > 0:
            seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
        return reference.forward(query, key, value, bias, alibi_slopes, sinks, seed, None, None, settings)
    mask = _mask(query, key, bias, alibi_slopes, settings)
    causal = mask is None and settings.right == 0
    # Plain bools where torch.compile traces the sizes: the operator takes no symbolic ones.
    causal, grouped = (True if on else False for on in (causal, query.shape[1] != key.shape[1]))  # noqa: SIM210
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        settings.dropout_p,
        causal,
        scale=settings.scale,
        enable_gqa=grouped,
    )
    return out, None


def _mask(
    query: Tensor, key: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, settings: Settings
) -> Tensor | None:
    """All that decides on a logit but query and key, as one mask of torch's; None where is_causal says it."""
    lq, lk = query.shape[2], key.shape[2]
    offset = lk - lq if settings.bottom_right else 0
    unlimited = settings.left >= UNLIMITED and settings.right >= UNLIMITED
    if unlimited and alibi_slopes is None:
        return bias if bias is None or bias.dtype == torch.bool else _mask_dtype(bias, query)
    plain = settings.left >= UNLIMITED and bias is None and alibi_slopes is None
    if plain and settings.right == 0 and offset == 0:
        return None
    positions = torch.arange(lq, device=query.device)[:, None] + offset
    distance = torch.arange(lk, device=query.device) - positions
    visible = (distance >= -settings.left) & (distance <= settings.right)
    mask = bias
    if bias is not None and bias.dtype == torch.bool:
        visible, mask = visible & bias, None
    if alibi_slopes is not None:
        slopes = -alibi_slopes[..., None, None] * distance.abs()
        mask = slopes if mask is None else mask + slopes
    return visible if mask is None else _mask_dtype(torch.where(visible, mask, -_INFINITY), query)


def _mask_dtype(mask: Tensor, query: Tensor) -> Tensor:
    """A floating mask in the query's dtype or in float32: no other dtype goes with the query's. Beside
    float64 not even float32 does: torch's kernel on the CPU takes it, but reads its memory as float64."""
    if mask.dtype == query.dtype or (mask.dtype == torch.float32 and query.dtype != torch.float64):
        return mask
    return mask.to(query.dtype)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    settings: Settings,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """``attend`` of one packed sequence after the other: [1, H, T, D]. Reads their bounds on the host."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if len(bounds_q) == 1:
        # No sequence is as good as one without tokens, and has a gradient to give.
        bounds_q, bounds_k, alibi_slopes = [0, 0], [0, 0], None
    outs, lses = [], []
    for i in range(len(bounds_q) - 1):
        tokens, keys = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        slopes = alibi_slopes if alibi_slopes is None or len(alibi_slopes) == 1 else alibi_slopes[i : i + 1]
        out, lse = attend(
            query[:, :, tokens], key[:, :, keys], value[:, :, keys], None, slopes, sinks, settings, want_lse
        )
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs, dim=2)
    return out, torch.cat([lse for lse in lses if lse is not None], dim=2) if want_lse else None
