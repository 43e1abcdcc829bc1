"""The attention of transformers' models, layer by layer: every module that asks transformers' attention
interface for its function gets llmkernels.attention, and keeps its own forward otherwise."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ... import dispatch, testing
from ..transformers_attention import NAME, SITE_OF_EAGER, SITE_OF_SDPA, register_attention
from .adapter import Inputs, drawn
from .transformers_classes import Replaced, TransformersAdapter, width

# What a model is configured to and what its replaced layers ask for instead. Other implementations have masks
# that are none of ours: packed lengths, block masks.
_IN_PLACE_OF = {"sdpa": SITE_OF_SDPA, "eager": SITE_OF_EAGER, None: SITE_OF_EAGER, NAME: SITE_OF_SDPA}
# What forward methods hand to their attention function: understood by ours, or of no meaning beside a mask.
_UNDERSTOOD = frozenset(
    (
        *("query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "position_bias"),
        *("softcap", "s_aux", "cache", "sliding_window", "output_attentions", "head_mask", "use_cache"),
        *("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic"),
    )
)
# Arguments of forward methods that want more than the output.
_MORE = ("output_attentions", "head_mask", "layer_head_mask")
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_MASKS = ("attention_mask", "mask", "encoder_attention_mask")
# Attributes that hold how many features of a head are rotated; the first one that a layer has counts.
_ROTATED = ("rotary_ndims", "qk_rope_head_dim", "head_dim", "attention_head_size")
# An attribute of copies: the dtype of the layer that they are made of.
_ROUNDED_TO = "_llmkernels_rounded_to"


class _Config:
    """A model's configuration as a replaced layer's forward reads it: the same object's values, but for the
    attention implementation."""

    __slots__ = ("_config",)

    def __init__(self, config: Any) -> None:
        self._config = config

    @property
    def _attn_implementation(self) -> str | None:
        configured = self._config._attn_implementation
        return _IN_PLACE_OF.get(configured, configured)

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # not set yet: of an instance that is being copied
            raise AttributeError(name)
        return getattr(self._config, name)


class Attention(Replaced):
    """An attention layer whose softmax attention is ops.attention; projections, caches, rotations and
    reshapes stay those of the original forward.

    Where the attention weights are asked for, which no kernel stores, or the model was configured to another
    implementation since, the original does all of it.
    """

    def __init_subclass__(cls) -> None:
        register_attention()
        cls.forward = _forward(cls._llmkernels_original)  # type: ignore[method-assign]

    @classmethod
    def recognises(cls, kind: type[nn.Module]) -> bool:
        function = _function(kind)
        return function is not None and {"ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "config"} <= set(
            function.__code__.co_names
        )

    @property
    def config(self) -> Any:
        return _Config(self.__dict__["config"])

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value


def _function(kind: type[nn.Module]) -> types.FunctionType | None:
    """A class's forward without its decorators."""
    function = inspect.unwrap(kind.forward)
    return function if isinstance(function, types.FunctionType) else None


def _forward(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward of the subclass made for ``original``, with its signature."""
    run: Callable[..., Any] = original.forward
    parameters = list(inspect.signature(run).parameters)[1:]
    more = [(name, parameters.index(name) if name in parameters else None) for name in _MORE]
    op = f"transformers.{original.__name__}"

    @functools.wraps(run)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(self, Attention):
            # Undone since: transformers 4 leaves bound methods on the instances whose outputs it collected.
            return run(self, *arguments, **options)
        reason = None
        for name, position in more:
            given = options.get(name)
            if given is None and position is not None and position < len(arguments):
                given = arguments[position]
            if given is not None and given is not False:
                reason = f"{name} is given, which no kernel serves"
        if reason is None and _weights_are_collected():
            reason = "the attention weights are collected, which no kernel stores"
        if reason is None:
            configured = self.__dict__["config"]._attn_implementation
            if configured in _IN_PLACE_OF:
                return run(self, *arguments, **options)
            reason = f"the model was set to {configured!r}, whose masks no kernel takes"
        dispatch.record_fallback(op, reason)
        return run(_unreplaced(self), *arguments, **options)

    return forward


def _unreplaced(module: Attention) -> nn.Module:
    """The module as it was: another object of the original class with the very same attributes."""
    view = object.__new__(module._llmkernels_original)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view


def _weights_are_collected() -> bool:
    """Whether transformers (>= 5) has hooks take the attention weights out of the layers' outputs."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    if collector is None:
        return False
    # Under torch.compile transformers keeps it in a plain attribute, for a context variable can't be traced.
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return collected is not None and any("attentions" in name for name in collected)


class AttentionAdapter(TransformersAdapter):
    """Every attention layer that goes through transformers' attention interface."""

    mixins = (Attention,)
    kernels = ("triton", "cuda")
    constants: ClassVar[frozenset[str]] = frozenset((*_MASKS, "position_embeddings"))

    def obstacles(self, module: nn.Module) -> list[str]:
        config: Any = module.__dict__.get("config")
        if not hasattr(config, "_attn_implementation"):
            return ["it holds no configuration that names its attention implementation"]
        function = _function(type(module))
        assert function is not None
        interface = function.__globals__.get("ALL_ATTENTION_FUNCTIONS")
        if type(interface).__name__ != "AttentionInterface" or getattr(interface, "_local_mapping", None):
            return ["its model has attention functions of its own in place of transformers' interface"]
        configured = config._attn_implementation
        if configured not in _IN_PLACE_OF:
            first = 'model.set_attn_implementation("sdpa") comes first'
            return [f"it is set to {configured!r}, whose masks no kernel here takes: {first}"]
        given = _arguments(function)
        if unknown := sorted(given - _UNDERSTOOD):
            return [f"it hands its attention function what is unknown here: {', '.join(unknown)}"]
        if _IN_PLACE_OF[configured] == SITE_OF_EAGER and not _has_sdpa(function) and "s_aux" not in given:
            return ["its model has no other attention than 'eager', whose formula may be its own"]
        return []

    def copy(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        copied = super().copy(module, dtype)
        copied.register_forward_hook(_without_weights)
        copied.__dict__[_ROUNDED_TO] = next(module.parameters()).dtype
        return copied

    def captured(self, module: nn.Module, inputs: Inputs) -> Inputs:
        """Without a cache that was empty when the layer was called."""
        bound = inspect.signature(module.forward).bind(*inputs.args, **inputs.kwargs)
        for arguments in (bound.arguments, bound.arguments.get("kwargs", {})):
            for name in set(_CACHES) & arguments.keys():
                if type(arguments[name]).__name__ in ("DynamicCache", "EncoderDecoderCache"):
                    arguments[name] = None
        return Inputs(bound.args, bound.kwargs)

    def magnitudes(
        self, module: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        # What is added up over tokens, for a bias or for the entries of a table, inherits the rounding of its
        # terms: of random signs, it grows with the root of the sum of squares. That of a key's bias cancels
        # altogether, since a softmax does not see what its logits have in common.
        terms: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
            terms[name] = output

        with contextlib.ExitStack() as hooks:
            for name, child in module.named_children():
                summed = "weight" if isinstance(child, nn.Embedding) else "bias"
                if isinstance(getattr(child, summed, None), Tensor):
                    handle = child.register_forward_hook(functools.partial(keep, f"{name}.{summed}"))
                    hooks.callback(handle.remove)
            outputs = module(*inputs.args, **inputs.kwargs)
        if not terms:
            return {}
        differentiable = [each for each in pytree.tree_leaves(outputs) if isinstance(each, Tensor)]
        gradients = torch.autograd.grad(differentiable, list(terms.values()), output_gradients)
        # The terms are stored, by torch and by us: in half precision that rounds more coarsely than float32
        # arithmetic does.
        stored = torch.finfo(module.__dict__[_ROUNDED_TO]).eps * testing.ROUNDING_ULPS_MAX
        coarser = max(1.0, stored / (torch.finfo(torch.float32).eps * testing.ARITHMETIC_ULPS))
        return {
            f"gradient of {name}": gradient.flatten(0, -2).square().sum(0).sqrt() * coarser
            for name, gradient in zip(terms, gradients, strict=True)
        }

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        layer: Any = module
        parameters = inspect.signature(module.forward).parameters
        # Enough that how single terms are rounded averages out.
        length = max(rows // 2, 8)
        projections = (child for child in module.children() if not isinstance(child, nn.Embedding))
        features = width(next(child for child in projections if list(child.parameters())))
        given: dict[str, Any] = {"hidden_states": drawn((2, length, features), dtype, device, 0)}
        masks = [name for name in _MASKS if name in parameters]
        keys = length
        causal = getattr(module, "is_causal", False)
        if "encoder_hidden_states" in parameters and getattr(module, "is_cross_attention", not causal):
            keys = length + 2
            given["encoder_hidden_states"] = drawn((2, keys, features), dtype, device, 1)
            masks.reverse()  # that of the encoder's states comes first
        if "position_embeddings" in parameters:
            rotated = next((getattr(layer, name) for name in _ROTATED if hasattr(layer, name)), 0)
            angles = drawn((1, length, rotated), torch.float64, device, 2)
            given["position_embeddings"] = (angles.cos().to(dtype), angles.sin().to(dtype))
        if not masks:
            return [Inputs((), given)]
        visible = torch.ones(2, 1, length, keys, dtype=torch.bool, device=device)
        visible[1, :, :, keys - keys // 3 :] = False
        if causal and keys == length:
            visible &= visible.new_ones(length, keys).tril()
        mask = visible
        if _IN_PLACE_OF[module.__dict__["config"]._attn_implementation] == SITE_OF_EAGER:
            least = torch.finfo(dtype).min
            mask = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, least)
        return [Inputs((), {**given, masks[0]: value}) for value in (mask, None)]


def _arguments(function: types.FunctionType) -> set[str]:
    """The names of the arguments that a forward hands to its attention function, as far as the code shows."""
    names = (each for each in function.__code__.co_consts if isinstance(each, tuple))
    return {name for each in names if "scaling" in each or "dropout" in each for name in each}


def _has_sdpa(function: types.FunctionType) -> bool:
    """Whether transformers holds torch's attention to be the same as the model's own."""
    return any(
        getattr(value, "_supports_sdpa", False)
        for value in function.__globals__.values()
        if isinstance(value, type) and value.__module__ == function.__module__
    )


def _without_weights(module: nn.Module, arguments: Any, output: Any) -> Any:
    """What can be compared of an attention layer: all but the weights, the last of several results."""
    return output[:-1] if isinstance(output, tuple) and len(output) > 1 else output
