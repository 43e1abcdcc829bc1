"""The feed-forward blocks and residual norms of transformers' models, where they are modules of their own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import dispatch
from ...nn import _blocks
from ...ops.feed_forward.api import feed_forward, linear_activation
from .adapter import Inputs, drawn
from .transformers_classes import Replaced, TransformersAdapter, obstacle, same_code, width

_LINEAR = "torch.nn.modules.linear.Linear"
_CONV1D = "transformers.pytorch_utils.Conv1D"
_NORMS = ("torch.nn.modules.normalization.LayerNorm", "llmkernels.nn.layer_norm.LayerNorm")
_DROPOUT = "torch.nn.modules.dropout.Dropout"
# By class, not by the name in a model's configuration. Others that are called GELU are none of these: the
# quick one, the fast one with its shortened constant, the clipped one.
_ACTIVATIONS = {
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
}
_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _activation(module: Any) -> str | None:
    """The name that ops.feed_forward has for an activation, a module or a function; None if it has none."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return _ACTIVATIONS.get(_name(module)) if isinstance(module, nn.Module) else _FUNCTIONS.get(module)


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a Linear or a Conv1D, whose weight lies transposed."""
    parameters = module._parameters
    weight = parameters["weight"]
    return (weight if type(module) is nn.Linear else weight.t()), parameters["bias"]


# ------------ feed-forwards ------------


class Parts(NamedTuple):
    """The names of a feed-forward's children; dropout: of the one behind the activation, "" if there is none;
    second: "" where the block ends with the activation."""

    first: str
    activation: str
    second: str = ""
    dropout: str = ""


class FeedForward(Replaced):
    """A block that ops.feed_forward computes. Its children are called one by one where somebody hooked,
    wrapped or quantised one of them."""

    _llmkernels_parts: ClassVar[Parts]
    _llmkernels_method: ClassVar[str] = "forward"
    # Why blocks of this shape are left to transformers, which the report then says of each.
    _llmkernels_refusal: ClassVar[str | None] = None

    @classmethod
    def recognises(cls, kind: type[nn.Module]) -> bool:
        return same_code(getattr(kind, cls._llmkernels_method, None), cls._llmkernels_template)

    @staticmethod
    def _llmkernels_template(self: Any, *arguments: Any) -> Any:
        """The code of ``_llmkernels_method`` in the classes that are recognised."""
        raise NotImplementedError


def _why_not(module: nn.Module, parts: Parts) -> str | None:
    """Why the children of a feed-forward have to be called one by one, None if they need not be."""
    activation = getattr(module, parts.activation)
    if _activation(activation) is None:
        shown = type(activation).__name__ if isinstance(activation, nn.Module) else activation
        return f"there is no kernel for its activation {shown}"
    children: list[tuple[str, Sequence[str]]] = [(parts.first, (_LINEAR, _CONV1D))]
    if isinstance(activation, nn.Module):
        children.append((parts.activation, (_name(activation),)))
    if parts.second:
        children.append((parts.second, (_LINEAR, _CONV1D)))
    if parts.dropout:
        children.append((parts.dropout, (_DROPOUT,)))
    reason = obstacle(module, *children)
    if reason is None and parts.second:
        first, second = (getattr(module, name).weight.dtype for name in (parts.first, parts.second))
        if first != second:
            return f"{parts.first} is {first} and {parts.second} is {second}"
    return reason


def _fused(module: Any, x: Tensor) -> Tensor | None:
    """What a FeedForward computes as far as ops.feed_forward goes; None, with the reason in ``explain()``,
    where its children have to be called."""
    parts: Parts = module._llmkernels_parts
    reason = _why_not(module, parts)
    if reason is not None:
        dispatch.record_fallback(f"transformers.{type(module).__name__}", reason)
        return None
    name = _activation(getattr(module, parts.activation))
    assert name is not None
    weight1, bias1 = _linear(getattr(module, parts.first))
    if not parts.second:
        return linear_activation(x, weight1, bias1, name, backend=module.backend)
    weight2, bias2 = _linear(getattr(module, parts.second))
    dropout = getattr(module, parts.dropout) if parts.dropout else None
    return feed_forward(
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        name,
        0.0 if dropout is None else dropout.p,
        training=dropout is not None and dropout.training,
        backend=module.backend,
    )


class Intermediate(FeedForward):
    """BertIntermediate and its twins: the first half, by ops.feed_forward.linear_activation."""

    _llmkernels_parts = Parts("dense", "intermediate_act_fn")

    @staticmethod
    def _llmkernels_template(self: Any, hidden_states: Tensor) -> Tensor:
        hidden_states = self.dense(hidden_states)
        hidden_states = self.intermediate_act_fn(hidden_states)
        return hidden_states

    def forward(self, hidden_states: Tensor) -> Tensor:
        fused = _fused(self, hidden_states)
        return super().forward(hidden_states) if fused is None else fused


class PlainMLP(FeedForward):
    """ViTMLP and its twins."""

    _llmkernels_parts = Parts("fc1", "activation_fn", "fc2")

    @staticmethod
    def _llmkernels_template(self: Any, hidden_states: Tensor) -> Tensor:
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)
        return hidden_states

    def forward(self, hidden_states: Tensor) -> Tensor:
        fused = _fused(self, hidden_states)
        return super().forward(hidden_states) if fused is None else fused


class ConvolutionMLP(FeedForward):
    """GPT2MLP and its twins, whose weights lie transposed."""

    _llmkernels_parts = Parts("c_fc", "act", "c_proj")
    dropout: nn.Module

    @staticmethod
    def _llmkernels_template(self: Any, hidden_states: Tensor) -> Tensor:
        hidden_states = self.c_fc(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.c_proj(hidden_states)
        hidden_states = self.dropout(hidden_states)
        return hidden_states

    def forward(self, hidden_states: Tensor) -> Tensor:
        fused = _fused(self, hidden_states)
        return super().forward(hidden_states) if fused is None else self.dropout(fused)


class ChunkedFFN(FeedForward):
    """DistilBERT's FFN: its forward cuts the sequence in chunks, if it is configured to, and stays."""

    _llmkernels_parts = Parts("lin1", "activation", "lin2")
    _llmkernels_method = "ff_chunk"
    dropout: nn.Module

    @staticmethod
    def _llmkernels_template(self: Any, input: Tensor) -> Tensor:
        x = self.lin1(input)
        x = self.activation(x)
        x = self.lin2(x)
        x = self.dropout(x)
        return x

    def ff_chunk(self, input: Tensor) -> Tensor:
        fused = _fused(self, input)
        return super().ff_chunk(input) if fused is None else self.dropout(fused)  # type: ignore[misc]


class DenseActDense(FeedForward):
    """T5DenseActDense and its twins: dropout behind the activation."""

    _llmkernels_parts = Parts("wi", "act", "wo", "dropout")

    @staticmethod
    def _llmkernels_template(self: Any, hidden_states: Tensor) -> Tensor:
        hidden_states = self.wi(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.dropout(hidden_states)
        if (
            isinstance(self.wo.weight, torch.Tensor)
            and hidden_states.dtype != self.wo.weight.dtype
            and self.wo.weight.dtype != torch.int8
        ):
            hidden_states = hidden_states.to(self.wo.weight.dtype)
        hidden_states = self.wo(hidden_states)
        return hidden_states

    def forward(self, hidden_states: Tensor) -> Tensor:
        fused = _fused(self, hidden_states)
        return super().forward(hidden_states) if fused is None else fused


class Gated(FeedForward):
    """LlamaMLP, T5DenseGatedActDense and their twins: known, and left as they are."""

    _llmkernels_refusal = (
        "its gate and up projections are two weights where the kernel reads one: joining them would be a "
        "copy at every call, or a change of the parameters"
    )

    @classmethod
    def recognises(cls, kind: type[nn.Module]) -> bool:
        return any(same_code(kind.forward, template) for template in (_as_llama, _as_gated_t5))


def _as_llama(self: Any, x: Tensor) -> Tensor:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _as_gated_t5(self: Any, hidden_states: Tensor) -> Tensor:
    hidden_gelu = self.act(self.wi_0(hidden_states))
    hidden_linear = self.wi_1(hidden_states)
    hidden_states = hidden_gelu * hidden_linear
    hidden_states = self.dropout(hidden_states)
    if (
        isinstance(self.wo.weight, torch.Tensor)
        and hidden_states.dtype != self.wo.weight.dtype
        and self.wo.weight.dtype != torch.int8
    ):
        hidden_states = hidden_states.to(self.wo.weight.dtype)
    hidden_states = self.wo(hidden_states)
    return hidden_states


class Inlined(FeedForward):
    """OPTDecoderLayer, WhisperEncoderLayer, WhisperDecoderLayer and the like: known, and left as they are. To
    write out their forward here would be to follow each change that transformers makes to it."""

    _llmkernels_refusal = (
        "fc1, its activation and fc2 stand amid the layer's own forward, which goes on to call them one by "
        "one; its attention and norms are sites of their own"
    )

    @classmethod
    def recognises(cls, kind: type[nn.Module]) -> bool:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        return code is not None and {"self_attn", "fc1", "activation_fn", "fc2"} <= set(code.co_names)


class FeedForwardAdapter(TransformersAdapter):
    """Blocks of one or two linear layers with an activation behind the first."""

    mixins = (Intermediate, PlainMLP, ConvolutionMLP, ChunkedFFN, DenseActDense, Gated, Inlined)
    kernels = ("triton", "cuda")

    def obstacles(self, module: nn.Module) -> list[str]:
        mixin = next(mixin for mixin in self.mixins if mixin.recognises(type(module)))
        reason = mixin._llmkernels_refusal or _why_not(module, mixin._llmkernels_parts)
        return [] if reason is None else [reason]

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        first = next(child for child in module.children() if _name(child) in (_LINEAR, _CONV1D))
        return [Inputs((drawn((1, rows, width(first)), dtype, device, 0),), {})]


# ------------ residual norms ------------


class ResidualNorm(Replaced):
    """BertSelfOutput, BertOutput and their twins: the linear layer is called, dropout, the addition of the
    residual and LayerNorm are one kernel of ops.layer_norm.add_layer_norm."""

    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.Module

    @classmethod
    def recognises(cls, kind: type[nn.Module]) -> bool:
        return same_code(kind.forward, _as_bert_output)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        hidden_states = self.dense(hidden_states)
        name = f"transformers.{type(self).__name__}"
        return _blocks.add_norm(
            name, hidden_states, input_tensor, self.dropout, self.LayerNorm, self.backend
        )[0]


def _as_bert_output(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    hidden_states = self.dense(hidden_states)
    hidden_states = self.dropout(hidden_states)
    hidden_states = self.LayerNorm(hidden_states + input_tensor)
    return hidden_states


class ResidualNormAdapter(TransformersAdapter):
    """A linear layer, dropout, and LayerNorm of the sum with the residual."""

    mixins = (ResidualNorm,)
    kernels = ("triton", "cuda")
    covers_children = True

    def obstacles(self, module: nn.Module) -> list[str]:
        reason = obstacle(module, ("dropout", (_DROPOUT,)), ("LayerNorm", _NORMS))
        return [] if reason is None else [reason]

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        layer: Any = module
        hidden = drawn((1, rows, width(layer.dense)), dtype, device, 0)
        residual = drawn((1, rows, *layer.LayerNorm.normalized_shape), dtype, device, 1)
        return [Inputs((hidden, residual), {})]
