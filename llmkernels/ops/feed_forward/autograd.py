"""The feed-forward as a torch.autograd.Function over torch.library operators at the kernel boundary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch, tracing
from . import reference
from .call import ACTIVATIONS

_PACKAGE = __name__.rsplit(".", 1)[0]

_library = torch.library.Library("llmkernels", "FRAGMENT")
_library.define(
    "linear_activation_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? seed, str activation, "
    "float dropout_p, bool wants_pre, bool wants_hidden, str backend) -> (Tensor hidden, Tensor pre)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "linear_activation_backward(Tensor dy, Tensor? weight, Tensor pre, Tensor? seed, str activation, "
    "float dropout_p, bool wants_dpre, bool wants_hidden, bool wants_dbias, str backend) "
    "-> (Tensor dpre, Tensor hidden, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _kernels(backend: str) -> Any:
    return reference if backend == "reference" else dispatch.kernels(_PACKAGE, backend)


def _forward_implementation(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _kernels(arguments[-1]).forward(*arguments[:-1])


def _backward_implementation(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(arguments[-1]).backward(*arguments[:-1])


for _key in ("CPU", "CUDA"):
    _library.impl("linear_activation_forward", _forward_implementation, _key)
    _library.impl("linear_activation_backward", _backward_implementation, _key)


@torch.library.register_fake("llmkernels::linear_activation_forward", lib=_library)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    wants_pre: bool,
    wants_hidden: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    m, width = x.shape[0], weight.shape[0]
    hidden = width // 2 if ACTIVATIONS[activation][1] else width
    return (
        x.new_empty(m, hidden) if wants_hidden else x.new_empty(0),
        x.new_empty(m, width) if wants_pre else x.new_empty(0),
    )


@torch.library.register_fake("llmkernels::linear_activation_backward", lib=_library)
def _backward_fake(
    dy: Tensor,
    weight: Tensor | None,
    pre: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    wants_dpre: bool,
    wants_hidden: bool,
    wants_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    m, width = pre.shape
    hidden = width // 2 if ACTIVATIONS[activation][1] else width
    return (
        pre.new_empty(m, width) if wants_dpre else pre.new_empty(0),
        pre.new_empty(m, hidden) if wants_hidden else pre.new_empty(0),
        pre.new_empty(width) if wants_dbias else pre.new_empty(0),
    )


_forward_op = torch.ops.llmkernels.linear_activation_forward.default
_backward_op = torch.ops.llmkernels.linear_activation_backward.default


def _forward_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    return (_forward_op if tracing.traced() else _forward_implementation)(*arguments)


def _backward_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (_backward_op if tracing.traced() else _backward_implementation)(*arguments)


def _rows(tensor: Tensor) -> Tensor:
    """[..., n] as [M, n] with a unit last stride: a view where the strides allow, else a copy. A lazily
    negated tensor (of a conjugate's imaginary part) is computed: kernels see its memory."""
    tensor = tensor.resolve_neg()
    if tensor.dim() != 2:
        tensor = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor.unsqueeze(0)
    return tensor if tensor.shape[1] == 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _parameter(tensor: Tensor | None) -> Tensor | None:
    """A weight as it lies, a bias as a contiguous vector."""
    if tensor is None:
        return None
    tensor = tensor.resolve_neg()
    return tensor.contiguous() if tensor.dim() == 1 else tensor


def _shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """``rows``, contiguous, in another shape, and no view of it: an output of an autograd.Function that is
    a view refuses in-place operations."""
    return rows if rows.shape == shape else torch.ops.aten._unsafe_view.default(rows, shape)


def _forward(
    wants_pre: bool,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    recompute: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, hidden [M, H] (y itself without a second layer) and pre [M, W] (empty if not wanted)."""
    hidden, pre = _forward_kernel(
        _rows(input),
        _parameter(weight1),
        _parameter(bias1),
        seed,
        activation,
        dropout_p,
        wants_pre,
        True,
        backend,
    )
    y = hidden if weight2 is None else F.linear(hidden, weight2, bias2)
    return _shaped(y, (*input.shape[:-1], y.shape[1])), hidden, pre


class _FeedForward(torch.autograd.Function):
    """y = hidden @ weight2.T + bias2, or hidden itself without a second layer, with hidden =
    dropout(act(input @ weight1.T + bias1)); the arguments of ``_forward`` but the first.

    Saves the pre-activation, or with ``recompute`` nothing of its size; beside it what the gradients that are
    asked for need of input, parameters and seed. Where the first layer is frozen hidden is saved in its
    place. The pre-activation is an output too, so that a second derivative finds the graph that made it.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        input, weight1, bias1, weight2, _, seed, activation, dropout_p, recompute, backend = arguments
        needs_input, needs_weight1, needs_bias1, needs_weight2 = (
            tensor is not None and tensor.requires_grad for tensor in arguments[:4]
        )
        needs_pre = needs_input or needs_weight1 or needs_bias1
        makes_pre_again = recompute and (needs_pre or needs_weight2)
        saves_pre = needs_pre and not recompute
        y, hidden, pre = _forward(saves_pre, *arguments)
        ctx.save_for_backward(
            input if needs_weight1 or makes_pre_again else None,
            weight1 if needs_input or makes_pre_again else None,
            bias1 if makes_pre_again else None,
            weight2 if needs_pre else None,
            pre if saves_pre else None,
            hidden if needs_weight2 and not needs_pre and not recompute else None,
            seed,
        )
        ctx.settings = (activation, dropout_p, backend)
        ctx.input_shape = input.shape
        ctx.transposed = (_is_transposed(weight1), _is_transposed(weight2))
        ctx.set_materialize_grads(False)
        # Not under torch.compile, which has no second derivatives and makes a gradient of every output.
        return (y, pre) if saves_pre and not torch.compiler.is_compiling() else y

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dy: Tensor | None, dpre_alone: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """dpre_alone: the gradient that a second derivative has of the pre-activation itself."""
        if dy is None and dpre_alone is None:
            return (None,) * 10
        input, weight1, bias1, weight2, pre, hidden, seed = ctx.saved_tensors
        activation, dropout_p, backend = ctx.settings
        needs_input, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = ctx.needs_input_grad[:5]
        wants_dpre = needs_input or needs_weight1
        needs_pre = wants_dpre or needs_bias1
        forward, backward = _forward_kernel, _backward_kernel
        if torch.is_grad_enabled() or dpre_alone is not None or tracing.batched(dy):
            # The reference is made of operations that torch can differentiate (create_graph=True) and batch.
            forward, backward = _reference_forward, _reference_backward
        rows = None if input is None else _rows(input)
        settings = (seed, activation, dropout_p)
        if pre is None and hidden is None and (needs_pre or needs_weight2):
            # Again by the forward that made them: of both only the one that is needed.
            weight, bias = _parameter(weight1), _parameter(bias1)
            hidden, pre = forward(rows, weight, bias, *settings, needs_pre, not needs_pre, backend)

        dpre: Any = None
        dbias1 = dweight2 = dbias2 = None
        if dy is not None:
            dy = _rows(dy)
            if needs_pre:
                wanted = (wants_dpre, needs_weight2, needs_bias1)
                dpre, hidden, dbias1 = backward(
                    dy, _parameter(weight2), pre.contiguous(), *settings, *wanted, backend
                )
            dweight2 = _weight_gradient(dy, hidden, ctx.transposed[1]) if needs_weight2 else None
            dbias2 = dy.sum(dim=0) if needs_bias2 else None
        if dpre_alone is not None:
            dpre = dpre_alone if dy is None else dpre + dpre_alone if wants_dpre else None
            if needs_bias1:
                dbias_alone = dpre_alone.sum(dim=0)
                dbias1 = dbias_alone if dbias1 is None else dbias1 + dbias_alone
        return (
            _shaped(dpre @ weight1, ctx.input_shape) if needs_input else None,
            _weight_gradient(dpre, rows, ctx.transposed[0]) if needs_weight1 else None,
            dbias1 if needs_bias1 else None,
            dweight2,
            dbias2,
        ) + (None,) * 5


def _weight_gradient(dy: Any, x: Any, transposed: bool) -> Tensor:
    """dy.T @ x in the layout of its weight, which spares autograd a copy when it makes it the .grad."""
    return (x.t() @ dy).t() if transposed else dy.t() @ x


def _is_transposed(weight: Tensor | None) -> bool:
    return weight is not None and weight.stride(0) == 1 and weight.stride(1) != 1


def _reference_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return reference.forward(*arguments[:-1])


def _reference_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.backward(*arguments[:-1])


def apply(*arguments: Any) -> Tensor:
    """y; through autograd only where a gradient can be asked for."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in arguments[:5]
    ):
        outputs = _FeedForward.apply(*arguments)
        return outputs[0] if isinstance(outputs, tuple) else outputs
    return _forward(False, *arguments)[0]
