"""This package, by backend."""

from __future__ import annotations

from typing import Any

import torch

import llmkernels
from llmkernels import dispatch, extension
from llmkernels.ops.attention import api as attention_api
from llmkernels.ops.attention.call import AttentionCall
from llmkernels.ops.attention_decode import api as decode_api
from llmkernels.ops.attention_decode.call import DecodeCall
from llmkernels.ops.feed_forward import api as feed_forward_api
from llmkernels.ops.feed_forward.call import FeedForwardCall
from llmkernels.ops.layer_norm import api as layer_norm_api
from llmkernels.ops.layer_norm.call import NormCall

from ..case import Case, Function
from .base import Provider, Unavailable


class Ours(Provider):
    """backend: None for what a call takes by default."""

    on_cpu = True

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self.name = "llmkernels" if backend is None else f"llmkernels {backend}"

    def missing(self) -> str | None:
        return extension.missing_reason() if self.backend == "cuda" else None

    def is_interpreted(self, device: torch.device) -> bool:
        return self.backend is not None and device.type == "cpu"

    def _check(self, call: Any, kernels: tuple[tuple[str, str], ...]) -> None:
        if self.backend is not None:
            reasons = dispatch.reasons_against(self.backend, call, dict(kernels))
            if reasons:
                raise Unavailable("; ".join(reasons))

    def layer_norm(self, case: Case) -> Function:
        return self._norm("layer_norm", case)

    def rms_norm(self, case: Case) -> Function:
        return self._norm("rms_norm", case)

    def add_layer_norm(self, case: Case) -> Function:
        return self._norm("add_layer_norm", case)

    def _norm(self, op: str, case: Case) -> Function:
        variant: Any = case.variant
        residual = (variant.residual_dtype or case.dtype) if op == "add_layer_norm" else None
        parameters = (case.dtype, None if op == "rms_norm" else case.dtype)
        self._check(
            NormCall(op, case.device, case.dtype, *parameters, residual, residual), layer_norm_api.KERNELS
        )
        options = {"dropout_p": variant.dropout_p} if op == "add_layer_norm" else {}
        function = getattr(llmkernels, op)
        return lambda tensors: function(
            **tensors, normalized_shape=tensors["input"].shape[-1:], backend=self.backend, **options
        )

    def attention(self, case: Case) -> Function:
        variant: Any = case.variant
        self._check(
            AttentionCall("attention", case.device, case.dtype, gradients=True), attention_api.KERNELS
        )
        options = variant.options() | {"deterministic": variant.deterministic, "backend": self.backend}
        return lambda tensors: llmkernels.attention(**tensors, **options)

    def attention_varlen(self, case: Case) -> Function:
        variant: Any = case.variant
        call = AttentionCall("attention_varlen", case.device, case.dtype, varlen=True, gradients=True)
        self._check(call, attention_api.KERNELS)
        if self.backend is None and case.device.type == "cpu":
            raise Unavailable("on a CPU it computes the sequences one by one, as torch does")
        longest = case.shape[1]
        options = {"is_causal": variant.causal, "enable_gqa": variant.group > 1, "backend": self.backend}

        def function(tensors: dict[str, torch.Tensor]) -> Any:
            query, key, value, bounds = (tensors[name] for name in ("query", "key", "value", "bounds"))
            return llmkernels.attention_varlen(query, key, value, bounds, bounds, longest, longest, **options)

        return function

    def attention_decode(self, case: Case) -> Function:
        self._check(DecodeCall("attention_decode", case.device, case.dtype), decode_api.KERNELS)
        return lambda tensors: llmkernels.attention_decode(**tensors, backend=self.backend)

    def linear_activation(self, case: Case) -> Function:
        variant: Any = case.variant
        self._check_products("linear_activation", case)
        return lambda tensors: llmkernels.linear_activation(
            **tensors, activation=variant.activation, backend=self.backend
        )

    def feed_forward(self, case: Case) -> Function:
        variant: Any = case.variant
        self._check_products("feed_forward", case)
        options = {"recompute": variant.recompute, "backend": self.backend}
        return lambda tensors: llmkernels.feed_forward(
            **tensors, activation=variant.activation, dropout_p=variant.dropout_p, **options
        )

    def encoder_layer(self, case: Case) -> Function:
        variant: Any = case.variant
        module = variant.module(llmkernels.nn, case.dtype, case.device)
        return self._preferring(variant.function(module, self._prepared(module)))

    def language_model(self, case: Case) -> Function:
        variant: Any = case.variant
        module = variant.module(llmkernels.nn, case.shape[1], case.dtype, case.device)
        return self._preferring(variant.function(module, self._prepared(module)))

    def generation(self, case: Case) -> Function:
        from ..models import generation  # not at the top: models name their providers

        variant: Any = case.variant
        module = variant.module(llmkernels.nn, case.shape[1] + generation.SPARE, case.dtype, case.device)
        return self._preferring(generation.function(module, variant.heads))

    def sentence_encoder(self, case: Case) -> Function:
        variant: Any = case.variant
        module = variant.module(case.dtype, case.device)
        llmkernels.replace(module, verify=False)
        return self._preferring(variant.function(module, self._prepared(module)))

    def _prepared(self, module: Any) -> Any:
        """What is run of a module."""
        return module

    def _preferring(self, function: Function) -> Function:
        """A model's calls are many, some of which a backend may lack: a preference, not an order."""
        if self.backend is None:
            return function

        def preferring(tensors: dict[str, torch.Tensor]) -> Any:
            with llmkernels.use_backend(self.backend):
                return function(tensors)

        return preferring

    def _check_products(self, op: str, case: Case) -> None:
        self._check(FeedForwardCall(op, case.device, case.dtype), feed_forward_api.KERNELS)


class OursCompiled(Ours):
    """Our layers and models under torch.compile."""

    on_cpu = False

    def __init__(self) -> None:
        super().__init__(None)
        self.name = "llmkernels, torch.compile"

    def _prepared(self, module: Any) -> Any:
        return torch.compile(module, dynamic=False)

    def generation(self, case: Case) -> Function:
        raise Unavailable("a cache counts its tokens on the host, step by step")
