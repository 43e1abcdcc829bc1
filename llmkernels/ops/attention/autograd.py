"""Attention behind torch.library and torch.autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import dispatch, tracing
from . import reference
from .call import Settings, new_rows

PACKAGE = __name__.rsplit(".", 1)[0]

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, {saved}Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, float softcap, float dropout_p, "
    "int left, int right, bool bottom_right, SymInt max_seqlen_q, SymInt max_seqlen_k, "
)
_library = torch.library.Library("llmkernels", "FRAGMENT")
_library.define(
    f"attention_forward({_INPUTS.format(saved='')}str backend) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, {_INPUTS.format(saved='Tensor out, Tensor lse, ')}"
    "bool bias_grad, bool deterministic, str backend) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias, Tensor dsinks)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
# Tensors before the numbers of Settings, in the schemas' order.
_FORWARD_TENSORS, _BACKWARD_TENSORS = 9, 13
_SETTINGS = len(Settings._fields)


def _kernels(backend: str) -> Any:
    return reference if backend == "reference" else dispatch.kernels(PACKAGE, backend)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *others, backend = arguments
    tensors, numbers = others[:_FORWARD_TENSORS], others[_FORWARD_TENSORS:]
    return _kernels(backend).forward(*tensors, Settings(*numbers))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *others, backend = arguments
    tensors, numbers = others[:_BACKWARD_TENSORS], others[_BACKWARD_TENSORS:]
    return _kernels(backend).backward(*tensors, Settings(*numbers[:_SETTINGS]), *numbers[_SETTINGS:])


for _key in ("CPU", "CUDA"):
    _library.impl("attention_forward", _forward, _key)
    _library.impl("attention_backward", _backward, _key)


def _statistics_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@torch.library.register_fake("llmkernels::attention_forward", lib=_library)
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=_statistics_dtype(query))
    return new_rows(query, value.shape[3]), lse


@torch.library.register_fake("llmkernels::attention_backward", lib=_library)
def _backward_fake(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    _, _, bias, _, sinks, *_, bias_grad, _, _ = others
    statistics = _statistics_dtype(query)
    return (
        *(new_rows(tensor, tensor.shape[3]) for tensor in (query, key, value)),
        bias.new_empty(bias.shape) if bias is not None and bias_grad else query.new_empty(0),
        query.new_empty(0 if sinks is None else sinks.shape, dtype=statistics),
    )


_forward_op = torch.ops.llmkernels.attention_forward.default
_backward_op = torch.ops.llmkernels.attention_backward.default


def _as_stored(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` with the values that its memory holds: kernels don't know of a lazy negation."""
    return None if tensor is None else tensor.resolve_neg()


class _Attention(torch.autograd.Function):
    """out and, differentiable too, lse; the arguments are those of reference.forward, the settings one by
    one, then ``deterministic`` and the backend.

    Saves the inputs, out and lse: neither the scores nor the dropout mask, which backward makes again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        *inputs, deterministic, backend = arguments
        forward = _forward_op if tracing.traced() else _forward
        out, lse = forward(*inputs, backend)
        query, key, value, *others = inputs[:_FORWARD_TENSORS]
        ctx.save_for_backward(query, key, value, out, lse, *others)
        ctx.settings = tuple(inputs[_FORWARD_TENSORS:])
        ctx.deterministic, ctx.backend = deterministic, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        count = _FORWARD_TENSORS + _SETTINGS + 2
        if dout is None and dlse is None:
            return (None,) * count
        saved = ctx.saved_tensors
        dout = torch.zeros_like(saved[3]) if dout is None else dout
        if torch.is_grad_enabled() or tracing.batched(dout) or tracing.batched(dlse):
            # The reference's backward is made of operations that torch can differentiate (create_graph=True)
            # and batch, the kernels' is not.
            backend, backward = "reference", _backward
        else:
            backend, backward = ctx.backend, _backward_op if tracing.traced() else _backward
        needs_bias, needs_sinks = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        incoming = (_as_stored(dout), _as_stored(dlse))
        gradients = backward(*incoming, *saved, *ctx.settings, needs_bias, ctx.deterministic, backend)
        dquery, dkey, dvalue, dbias, dsinks = gradients
        wanted = (dquery, dkey, dvalue, dbias, None, dsinks if needs_sinks else None)
        needed = zip(wanted, ctx.needs_input_grad, strict=False)
        return (*(gradient if need else None for gradient, need in needed), *(None,) * (count - 6))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    settings: Settings,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """reference.forward by the kernels of ``backend``; through autograd only where a gradient can be asked
    for."""
    inputs = (
        query,
        tracing.distinct(key, query),
        tracing.distinct(value, query, key),
        *(bias, alibi_slopes, sinks, seed, cu_seqlens_q, tracing.distinct(cu_seqlens_k, cu_seqlens_q)),
    )
    tensors = [_as_stored(tensor) for tensor in inputs]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Attention.apply(*tensors, *settings, deterministic, backend)
    forward = _forward_op if tracing.traced() else _forward
    return forward(*tensors, *settings, backend)
