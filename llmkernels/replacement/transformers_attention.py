"""llmkernels.attention as an attention implementation of the transformers library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.attention.api import attention

NAME = "llmkernels"
# What the attention layers that replace() took over ask transformers for: their model's configuration, and so
# the masks that reach them, stay those of "sdpa" or "eager".
SITE_OF_SDPA, SITE_OF_EAGER = "llmkernels in place of sdpa", "llmkernels in place of eager"


def register_attention() -> str:
    """Makes "llmkernels" an attention implementation of transformers (>= 4.53); returns that name.

    >>> model.set_attn_implementation(llmkernels.replacement.register_attention())

    Masks are those of transformers' "sdpa"; the backend of each call is chosen by llmkernels.attention. Goes
    back by ``model.set_attn_implementation("sdpa")``. Raises ImportError without transformers.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionInterface.register(SITE_OF_SDPA, _in_place_of_sdpa)
    AttentionInterface.register(SITE_OF_EAGER, _in_place_of_eager)
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
    *,
    backend: str | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The interface of transformers' attention functions.

    query: [B, Hq, Lq, D]; key, value: [B, Hkv, Lk, D]; attention_mask: as torch's, with any sliding window in
    it, or None; s_aux: sinks [Hq]; backend: of llmkernels.attention. Returns [B, Lq, Hq, D] and None for the
    weights, which are never stored.
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
        backend=backend,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _in_place_of_sdpa(module: Any, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """attention_forward for a replaced layer, by the backend that it insists on."""
    return attention_forward(module, *tensors, **options, backend=module.backend)  # type: ignore[arg-type]


def _in_place_of_eager(module: Any, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """The same beside the masks of "eager", which hold all that is masked: none means that all keys count."""
    options["is_causal"] = False
    return attention_forward(module, *tensors, **options, backend=module.backend)  # type: ignore[arg-type]
