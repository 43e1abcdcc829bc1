"""FlexAttention, compiled as torch asks for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..case import Case, Function, Tensors
from .base import Provider, Unavailable


@functools.lru_cache(maxsize=8)
def _block_mask(window: int, length: int, device: torch.device) -> Any:
    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - window) if window else j <= i

    return create_block_mask(visible, None, None, length, length, device=device)


@functools.lru_cache(maxsize=8)
def _modification(bias: Tensor | None, softcap: float) -> Any:
    """One function for as long as the bias is the same tensor: a new one would be compiled anew."""

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = softcap * torch.tanh(score / softcap) if softcap > 0 else score
        return score if bias is None else score + bias[0, h, i, j]

    return None if bias is None and softcap == 0 else modified


class Flex(Provider):
    name = "flex_attention"

    def attention(self, case: Case) -> Function:
        variant: Any = case.variant
        if variant.sinks or variant.dropout_p > 0:
            raise Unavailable("FlexAttention has neither dropout nor sinks with their gradient")
        compiled = torch.compile(flex_attention, dynamic=False)

        def function(tensors: Tensors) -> Tensor:
            query, key, value = (tensors[name] for name in ("query", "key", "value"))
            modified = _modification(tensors.get("attn_mask"), variant.softcap)
            mask = _block_mask(variant.window, query.shape[2], query.device) if variant.causal else None
            return compiled(query, key, value, modified, mask, enable_gqa=variant.group > 1)

        return function

    def attention_varlen(self, case: Case) -> Function:
        variant: Any = case.variant
        bounds = torch.tensor(variant.bounds(case.shape), device=case.device)
        tokens = int(bounds[-1])
        document = torch.searchsorted(bounds, torch.arange(tokens, device=case.device), right=True)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = document[i] == document[j]
            return same & (j <= i) if variant.causal else same

        mask = create_block_mask(visible, None, None, tokens, tokens, device=case.device)
        compiled = torch.compile(flex_attention, dynamic=False)

        def function(tensors: Tensors) -> Tensor:
            rows = [tensors[name].transpose(0, 1)[None] for name in ("query", "key", "value")]
            found = compiled(*rows, block_mask=mask, enable_gqa=variant.group > 1)
            return found[0].transpose(0, 1)

        return function
