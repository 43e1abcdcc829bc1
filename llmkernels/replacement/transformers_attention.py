"""llmkernels.attention as an attention implementation of the transformers library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.attention.api import attention

NAME = "llmkernels"


def register_attention() -> str:
    """Makes "llmkernels" an attention implementation of transformers (>= 4.53); returns that name.

    >>> model.set_attn_implementation(llmkernels.replacement.register_attention())

    Masks are those of transformers' "sdpa"; the backend of each call is chosen by llmkernels.attention. Goes
    back by ``model.set_attn_implementation("sdpa")``. Raises ImportError without transformers.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The interface of transformers' attention functions.

    query: [B, Hq, Lq, D]; key, value: [B, Hkv, Lk, D]; attention_mask: as torch's, with any sliding window in
    it, or None; s_aux: sinks [Hq]. Returns [B, Lq, Hq, D] and None for the weights, which are never stored.
    """
    if others.get("cache") is not None:
        raise ValueError("llmkernels: cache: expected None, got a paged cache, which attention_decode serves")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # Of a single query, which stands at the end of its cache, all keys are in the past.
    causal = attention_mask is None and query.shape[2] > 1 and bool(is_causal)
    if position_bias is not None:
        if attention_mask is None:
            attention_mask = position_bias
        elif attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, position_bias, float("-inf"))
        else:
            attention_mask = attention_mask + position_bias
    out = attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        query.shape[1] != key.shape[1],
        softcap=softcap,
        sinks=s_aux,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None
