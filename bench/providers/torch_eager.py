"""torch without a compiler: what a model runs today."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import formulas
from ..case import Case, Function, Tensors
from .base import Provider, Unavailable

# Beyond it the scores of a formula that stores them do not fit beside those of the others.
LONGEST_STORED = 4096
# How torch says on a GPU and on a CPU that the chosen kernel does not serve a call.
_NO_KERNEL = ("No available kernel", "No viable backend")


class Torch(Provider):
    """Eager torch; of attention the kernel that scaled_dot_product_attention picks by itself."""

    name = "torch"
    on_cpu = True

    def _prepared(self, function: Any) -> Any:
        """What is run of a function or a module."""
        return function

    def layer_norm(self, case: Case) -> Function:
        return self._prepared(formulas.layer_norm)

    def rms_norm(self, case: Case) -> Function:
        return self._prepared(formulas.rms_norm)

    def add_layer_norm(self, case: Case) -> Function:
        variant: Any = case.variant
        return self._prepared(formulas.add_layer_norm(variant.dropout_p))

    def attention(self, case: Case) -> Function:
        variant: Any = case.variant
        if not variant.is_torchs and case.shape[1] > LONGEST_STORED:
            raise Unavailable(f"stores the scores: not beyond a length of {LONGEST_STORED}")
        return self._prepared(formulas.attention(variant))

    def attention_varlen(self, case: Case) -> Function:
        variant: Any = case.variant
        return self._prepared(formulas.attention_varlen(variant, variant.bounds(case.shape)))

    def attention_decode(self, case: Case) -> Function:
        return self._prepared(formulas.attention_decode(case.variant))

    def linear_activation(self, case: Case) -> Function:
        variant: Any = case.variant
        return self._prepared(formulas.linear_activation(variant.activation))

    def feed_forward(self, case: Case) -> Function:
        variant: Any = case.variant
        return self._prepared(formulas.feed_forward(variant.activation, variant.dropout_p))

    def encoder_layer(self, case: Case) -> Function:
        variant: Any = case.variant
        module = variant.module(torch.nn, case.dtype, case.device)
        return variant.function(module, self._prepared(module))

    def language_model(self, case: Case) -> Function:
        variant: Any = case.variant
        module = variant.module(torch.nn, case.shape[1], case.dtype, case.device)
        return variant.function(module, self._prepared(module))

    def generation(self, case: Case) -> Function:
        from ..models import cached  # not at the top: models name their providers

        variant: Any = case.variant
        module = variant.module(torch.nn, case.shape[1] + cached.SPARE, case.dtype, case.device)
        return cached.function(module, variant.heads, self._prepared)

    def sentence_encoder(self, case: Case) -> Function:
        variant: Any = case.variant
        module = variant.module(case.dtype, case.device)
        return variant.function(module, self._prepared(module))


class Compiled(Torch):
    """torch.compile of what Torch runs. Its own CUDA graphs are off: all is replayed as one anyway."""

    on_cpu = False

    def __init__(self, name: str, mode: str | None) -> None:
        self.name = name
        self.mode = mode

    def _prepared(self, function: Any) -> Any:
        return torch.compile(function, dynamic=False, mode=self.mode)

    def attention(self, case: Case) -> Function:
        variant: Any = case.variant
        if variant.is_torchs:
            raise Unavailable("compiles to the very kernel that torch runs eagerly")
        return super().attention(case)

    def attention_varlen(self, case: Case) -> Function:
        raise Unavailable("compiles to the very kernels that torch runs eagerly")


class Sdpa(Provider):
    """One kernel of scaled_dot_product_attention."""

    def __init__(self, name: str, kernel: SDPBackend, on_cpu: bool = False) -> None:
        self.name = name
        self.kernel = kernel
        self.on_cpu = on_cpu

    def attention(self, case: Case) -> Function:
        variant: Any = case.variant
        if not variant.is_torchs:
            raise Unavailable("scaled_dot_product_attention has no window, soft cap or sinks")
        if self.kernel == SDPBackend.MATH and case.shape[1] > LONGEST_STORED:
            raise Unavailable(f"stores the scores: not beyond a length of {LONGEST_STORED}")
        options = variant.options()

        def function(tensors: Tensors) -> Tensor:
            try:
                with sdpa_kernel(self.kernel):
                    return F.scaled_dot_product_attention(**tensors, **options)
            except RuntimeError as error:
                if str(error).startswith(_NO_KERNEL):
                    raise Unavailable("torch says that this kernel does not serve the call") from error
                raise

        return function


class Varlen(Provider):
    """torch.nn.attention.varlen, which torch has for GPUs since 2.10."""

    name = "torch varlen"
    distribution, module = "torch>=2.10", "torch.nn.attention.varlen"

    def attention_varlen(self, case: Case) -> Function:
        from torch.nn.attention.varlen import varlen_attn

        variant: Any = case.variant
        known = inspect.signature(varlen_attn).parameters
        if variant.group > 1 and "enable_gqa" not in known:
            raise Unavailable("this torch's varlen_attn has no grouped heads")
        options: dict[str, Any] = {"enable_gqa": True} if variant.group > 1 else {}
        if variant.causal:  # 2.10 has the one, later versions the other
            options |= {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        longest = case.shape[1]

        def function(tensors: Tensors) -> Tensor:
            query, key, value, bounds = (tensors[name] for name in ("query", "key", "value", "bounds"))
            return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)

        return function


class CublasLt(Provider):
    """cublasLt's epilogue of bias and activation, which torch offers without a gradient. (On a CPU the GELU
    of this function is the exact one.)"""

    name = "cublasLt epilogue"

    def linear_activation(self, case: Case) -> Function:
        return self._first_layer(case)

    def feed_forward(self, case: Case) -> Function:
        first = self._first_layer(case)

        def function(tensors: Tensors) -> Tensor:
            layer = {"input": tensors["input"], "weight": tensors["weight1"], "bias": tensors["bias1"]}
            with torch.no_grad():
                return F.linear(first(layer), tensors["weight2"], tensors["bias2"])

        return function

    def _first_layer(self, case: Case) -> Any:
        variant: Any = case.variant
        if variant.activation not in ("relu", "gelu_tanh") or variant.dropout_p > 0:
            raise Unavailable("has relu and the tanh GELU alone, without dropout")
        tanh = variant.activation == "gelu_tanh"

        def function(tensors: Tensors) -> Tensor:
            weight, bias = tensors["weight"].t(), tensors["bias"]
            with torch.no_grad():
                return torch._addmm_activation(bias, tensors["input"], weight, use_gelu=tanh)

        return function
