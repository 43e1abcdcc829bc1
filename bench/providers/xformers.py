"""xformers' memory_efficient_attention, whose rows are [batch, length, heads, head_dim]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..case import Case, Function, Tensors
from .base import Provider, Unavailable


class XFormers(Provider):
    name = "xformers"
    distribution, module = "xformers", "xformers.ops"

    def missing(self) -> str | None:
        reason = super().missing()
        if reason is None and not torch.cuda.is_available():
            return "installed, but it needs a GPU"
        return reason

    def attention(self, case: Case) -> Function:
        from xformers.ops import fmha

        variant: Any = case.variant
        if variant.softcap or variant.sinks or variant.bias:
            raise Unavailable("has no soft cap, no sinks and no gradient of a bias")
        if variant.group > 1:
            raise Unavailable("has no backward of grouped heads")
        mask = fmha.attn_bias.LowerTriangularMask() if variant.causal else None
        if variant.window:
            # Its window counts the query's own key.
            mask = fmha.attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(variant.window + 1)

        def function(tensors: Tensors) -> Tensor:
            rows = (tensors[name].transpose(1, 2) for name in ("query", "key", "value"))
            return fmha.memory_efficient_attention(*rows, mask, variant.dropout_p).transpose(1, 2)

        return function

    def attention_varlen(self, case: Case) -> Function:
        from xformers.ops import fmha

        variant: Any = case.variant
        if variant.group > 1:
            raise Unavailable("has no backward of grouped heads")
        bounds = variant.bounds(case.shape)
        lengths = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
        kinds = fmha.attn_bias
        kind = kinds.BlockDiagonalCausalMask if variant.causal else kinds.BlockDiagonalMask
        mask = kind.from_seqlens(lengths)

        def function(tensors: Tensors) -> Tensor:
            rows = (tensors[name][None] for name in ("query", "key", "value"))
            return fmha.memory_efficient_attention(*rows, mask)[0]

        return function
