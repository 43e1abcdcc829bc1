"""The blocks of a Transformer layer: as few kernels where nobody could tell, else child by child."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dispatch
from ..ops.feed_forward.api import feed_forward
from ..ops.layer_norm.api import add_layer_norm
from ._calls import call, has_global_hooks, obstacle
from .kv_cache import KVCache
from .layer_norm import LayerNorm
from .multihead_attention import MultiheadAttention

# The activations that ops.feed_forward knows by name. A gated one multiplies the halves of its input.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}

_GLOBAL_HOOKS = "hooks of all modules are set"


def attend(
    module: Any,
    backend: str | None,
    cache: KVCache | None,
    query: Tensor,
    memory: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """What a layer's attention, always called as a module, makes of query and memory."""
    options: dict[str, Any] = {} if cache is None else {"cache": cache}
    return call(
        module,
        MultiheadAttention,
        backend,
        query,
        memory,
        memory,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        need_weights=False,
        is_causal=is_causal,
        **options,
    )[0]


def add_norm(
    layer: str, block: Tensor, residual: Tensor, dropout: Any, norm: Any, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(norm(z), z) of z = residual + dropout(block): ops.add_layer_norm, or the children called one by one,
    which ``explain()`` shows under the name ``layer``."""
    reason = _add_norm_obstacle(dropout, norm)
    if reason is None:
        if type(norm) is LayerNorm and norm.backend is not None:
            backend = norm.backend
        parameters = norm._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if dispatch.leaves_to_torch(block, backend):
            # As cheap as torch's own, and of its dtypes and errors.
            kept = torch.dropout(block, dropout.p, True) if dropout.training and dropout.p > 0 else block
            z = residual + kept
            return F.layer_norm(z, norm.normalized_shape, weight, bias, norm.eps), z
        reason = _addition_obstacle(block, residual)
        if reason is None:
            return add_layer_norm(
                block,
                residual,
                norm.normalized_shape,
                weight,
                bias,
                norm.eps,
                dropout_p=dropout.p,
                training=dropout.training,
                backend=backend,
            )
    dispatch.record_fallback(layer, reason)
    z = residual + dropout(block)
    return call(norm, LayerNorm, backend, z), z


def _add_norm_obstacle(dropout: nn.Module, norm: nn.Module) -> str | None:
    if has_global_hooks():
        return _GLOBAL_HOOKS
    return obstacle(dropout, nn.Dropout) or obstacle(norm, nn.LayerNorm, LayerNorm)


def _addition_obstacle(block: Tensor, residual: Tensor) -> str | None:
    if block.dtype != residual.dtype and not block.is_cuda:
        # Autocast on the CPU, which leaves norms alone: torch's result is of the sum's dtype.
        return f"{block.dtype} is added to {residual.dtype}"
    return "the addition broadcasts" if block.shape != residual.shape else None


def run_feed_forward(
    layer: str,
    x: Tensor,
    linear1: Any,
    activation: Any,
    dropout: Any,
    linear2: Any,
    backend: str | None,
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))): ops.feed_forward, or the children called one by one, which
    ``explain()`` shows under the name ``layer``. activation: a name, a function or a module."""
    name = activation if isinstance(activation, str) else _activation_name(activation)
    if name is None:
        reason: str | None = "there is no kernel for its activation"
    else:
        reason = _feed_forward_obstacle(linear1, activation, dropout, linear2)
        if reason is None:
            first, second = linear1._parameters, linear2._parameters
            return feed_forward(
                x,
                first["weight"],
                first["bias"],
                second["weight"],
                second["bias"],
                name,
                dropout.p,
                training=dropout.training,
                backend=backend,
            )
    dispatch.record_fallback(layer, str(reason))
    hidden = linear1(x)
    if not isinstance(activation, str):
        hidden = activation(hidden)
    elif activation in GATES:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = GATES[activation](gate) * up
    else:
        hidden = ACTIVATIONS[activation](hidden)
    return linear2(dropout(hidden))


def _feed_forward_obstacle(
    linear1: nn.Module, activation: Any, dropout: nn.Module, linear2: nn.Module
) -> str | None:
    if has_global_hooks():
        return _GLOBAL_HOOKS
    reason = obstacle(linear1, nn.Linear) or obstacle(dropout, nn.Dropout) or obstacle(linear2, nn.Linear)
    if reason is None and isinstance(activation, nn.Module):
        reason = obstacle(activation, nn.ReLU, nn.GELU)
    return reason


def _activation_name(activation: Any) -> str | None:
    """The name that ops.feed_forward has for a function or module, None if it has none."""
    if activation is F.relu or activation is torch.relu or isinstance(activation, nn.ReLU):
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if isinstance(activation, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    if isinstance(activation, functools.partial) and activation.func is F.gelu and not activation.args:
        return "gelu_tanh" if activation.keywords == {"approximate": "tanh"} else None
    return None
