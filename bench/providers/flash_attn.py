"""flash-attn 2 and 4, whose rows are [batch, length, heads, head_dim]."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Function, Tensors
from .base import Provider, Unavailable


def _heads_inside(tensors: Tensors, *names: str) -> list[Tensor]:
    return [tensors[name].transpose(1, 2) for name in names]


def _only_out(found: Any) -> Tensor:
    """Some versions return (out, logsumexp) unasked."""
    return found[0] if isinstance(found, tuple) else found


class FlashAttention(Provider):
    """version: 2 or 4; both are called by the same names."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = f"flash-attn {version}"
        self.distribution = "flash-attn" if version == 2 else "flash-attn-4"
        self.module = "flash_attn.flash_attn_interface" if version == 2 else "flash_attn.cute"

    def missing(self) -> str | None:
        reason = super().missing()
        if reason is None and not torch.cuda.is_available():
            return "installed, but it needs a GPU"
        return reason

    def _options(self, case: Case) -> dict[str, Any]:
        variant: Any = case.variant
        if case.dtype == torch.float32:
            raise Unavailable("takes float16 and bfloat16 alone")
        return {"causal": variant.causal}

    def attention(self, case: Case) -> Function:
        variant: Any = case.variant
        options = self._options(case)
        if variant.bias:
            raise Unavailable("has no bias")
        if variant.window:
            options["window_size"] = (variant.window, 0)
        if variant.softcap:
            options["softcap"] = variant.softcap
        if variant.sinks:
            raise Unavailable("has no sinks with their gradient in float32")
        if variant.dropout_p > 0:
            if self.version == 4:
                raise Unavailable("has no dropout")
            options["dropout_p"] = variant.dropout_p
        options["deterministic"] = variant.deterministic
        attend = importlib.import_module(self.module or "").flash_attn_func

        def function(tensors: Tensors) -> Tensor:
            rows = _heads_inside(tensors, "query", "key", "value")
            return _only_out(attend(*rows, **options)).transpose(1, 2)

        return function

    def attention_varlen(self, case: Case) -> Function:
        options = self._options(case) | {"deterministic": True}
        longest = case.shape[1]
        attend = importlib.import_module(self.module or "").flash_attn_varlen_func

        def function(tensors: Tensors) -> Tensor:
            bounds = tensors["bounds"]
            found = attend(
                *(tensors[name] for name in ("query", "key", "value")),
                cu_seqlens_q=bounds,
                cu_seqlens_k=bounds,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                **options,
            )
            return _only_out(found)

        return function

    def attention_decode(self, case: Case) -> Function:
        variant: Any = case.variant
        if self.version == 4:
            raise Unavailable("has no call for a key-value cache")
        if case.dtype == torch.float32:
            raise Unavailable("takes float16 and bfloat16 alone")
        if variant.page_size % 256 != 0:
            raise Unavailable("takes pages of a multiple of 256 tokens")
        attend = importlib.import_module(self.module or "").flash_attn_with_kvcache

        def function(tensors: Tensors) -> Tensor:
            rows = _heads_inside(tensors, "query", "key_cache", "value_cache")
            table, lengths = tensors.get("block_table"), tensors["cache_seqlens"]
            found = attend(*rows, cache_seqlens=lengths, block_table=table, causal=True)
            return _only_out(found).transpose(1, 2)

        return function
