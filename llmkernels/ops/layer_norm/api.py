"""layer_norm, add_layer_norm and rms_norm: argument checks, the choice of a backend, autograd and
torch.library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, overrides

from ... import checks, dispatch, tracing
from . import reference
from .call import NormCall

_PACKAGE = __name__.rsplit(".", 1)[0]
KERNELS = (
    ("cuda", f"{_PACKAGE}.cuda_kernels"),
    ("triton", f"{_PACKAGE}.triton_kernels"),
    ("reference", f"{_PACKAGE}.reference"),
)
# Fastest first (README.md, "Which backend"). The CUDA C++ kernels join once they have run on real hardware.
AUTOMATIC = ("triton",)

_library = torch.library.Library("llmkernels", "FRAGMENT")
_library.define(
    "layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps, "
    "float dropout_p, bool rms, ScalarType residual_dtype, ScalarType output_dtype, str backend) "
    "-> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "layer_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor? weight, Tensor mean, Tensor rstd, "
    "Tensor? seed, float eps, float dropout_p, bool rms, bool input_grad, ScalarType input_dtype, "
    "ScalarType? residual_dtype, bool weight_grad, ScalarType? bias_dtype, str backend) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _kernels(backend: str) -> Any:
    return reference if backend == "reference" else dispatch.kernels(_PACKAGE, backend)


def _forward_implementation(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernels(arguments[-1]).forward(*arguments[:-1])


def _backward_implementation(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernels(arguments[-1]).backward(*arguments[:-1])


for _key in ("CPU", "CUDA"):
    _library.impl("layer_norm_forward", _forward_implementation, _key)
    _library.impl("layer_norm_backward", _backward_implementation, _key)


@torch.library.register_fake("llmkernels::layer_norm_forward", lib=_library)
def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    rms: bool,
    residual_dtype: torch.dtype,
    output_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape
    statistics = torch.float64 if residual_dtype == torch.float64 else torch.float32  # z is of that dtype
    return (
        x.new_empty(m, n, dtype=output_dtype),
        x.new_empty(0, dtype=residual_dtype) if residual is None else x.new_empty(m, n, dtype=residual_dtype),
        x.new_empty(0 if rms else m, dtype=statistics),
        x.new_empty(m, dtype=statistics),
    )


@torch.library.register_fake("llmkernels::layer_norm_backward", lib=_library)
def _backward_fake(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    rms: bool,
    input_grad: bool,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_grad: bool,
    bias_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = z.shape
    empty = z.new_empty
    return (
        empty(m, n, dtype=input_dtype) if input_grad else empty(0),
        empty(m, n, dtype=residual_dtype) if input_grad and residual_dtype is not None else empty(0),
        empty(n, dtype=weight.dtype) if weight is not None and weight_grad else empty(0),
        empty(n, dtype=bias_dtype) if bias_dtype is not None else empty(0),
    )


_forward_op = torch.ops.llmkernels.layer_norm_forward.default
_backward_op = torch.ops.llmkernels.layer_norm_backward.default


def _rows(tensor: Tensor, n: int) -> Tensor:
    """[..., normalized_shape] as [M, n] with a unit last stride: a view where the strides allow, else a
    copy. A lazily negated tensor (of a conjugate's imaginary part) is computed: kernels see its memory."""
    tensor = tensor.resolve_neg()
    if tensor.dim() != 2 or tensor.shape[1] != n:
        tensor = tensor.reshape(-1, n) if tensor.numel() else tensor.reshape(tensor.numel() // max(n, 1), n)
    return tensor if n == 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _vector(parameter: Tensor | None) -> Tensor | None:
    """normalized_shape as a contiguous [n]."""
    if parameter is None:
        return None
    parameter = parameter.resolve_neg()
    if parameter.dim() == 1 and parameter.is_contiguous():
        return parameter
    return parameter.reshape(-1).contiguous()


def _shaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """``tensor``, contiguous, in another shape, and no view of it: an output of an autograd.Function that is
    a view refuses in-place operations."""
    return tensor if tensor.shape == shape else torch.ops.aten._unsafe_view.default(tensor, shape)


def _forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    n: int,
    eps: float,
    dropout_p: float,
    rms: bool,
    residual_dtype: torch.dtype,
    output_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """y, the new residual (None without one), mean and rstd, by the kernels of ``backend``."""
    forward = _forward_op if tracing.traced() else _forward_implementation
    rows = _rows(input, n)
    y, z, mean, rstd = forward(
        rows,
        None if residual is None else _rows(residual, n),
        _vector(weight),
        _vector(bias),
        seed,
        eps,
        dropout_p,
        rms,
        residual_dtype,
        output_dtype,
        backend,
    )
    return _shaped(y, input.shape), None if residual is None else _shaped(z, input.shape), mean, rstd


class _LayerNorm(torch.autograd.Function):
    """y = norm(z) * weight + bias, z = input or residual + dropout(input); the arguments of ``_forward``.

    Saves z (the input itself where there is no residual), weight, the row statistics and the dropout seed:
    neither the normalised rows nor the dropout mask, which backward makes again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        y, new_residual, mean, rstd = _forward(*arguments)
        input, residual, weight, bias, seed, n, eps, dropout_p, rms, _, _, backend = arguments
        ctx.save_for_backward(input if new_residual is None else new_residual, weight, mean, rstd, seed)
        ctx.settings = (n, eps, dropout_p, rms, backend)
        ctx.input_dtype = input.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.bias = None if bias is None else (bias.dtype, bias.shape)
        ctx.set_materialize_grads(False)
        return y if new_residual is None else (y, new_residual)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dy: Tensor | None, dz: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        z, weight, mean, rstd, seed = ctx.saved_tensors
        n, eps, dropout_p, rms, backend = ctx.settings
        needs_input, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        if dy is None:
            if dz is None:
                return (None,) * 12
            if seed is None:
                # The norm itself was not used, so that even a row of which it is NaN has a gradient.
                dx = dz.to(ctx.input_dtype) if needs_input else None
                return dx, dz.to(ctx.residual_dtype) if needs_residual else None, *(None,) * 10
            dy = torch.zeros_like(z)
        # Dropout or differing dtypes tell the two gradients apart; else one tensor is both. Not under
        # torch.compile, which would make two of its memory, to which autograd then adds twice.
        separate = needs_residual and (
            seed is not None or ctx.residual_dtype != ctx.input_dtype or torch.compiler.is_compiling()
        )
        if torch.is_grad_enabled() or tracing.batched(dy) or tracing.batched(dz):
            # The reference's backward is made of operations that torch can differentiate (create_graph=True)
            # and batch, the kernels' is not.
            backward = _reference_backward
        else:
            backward = _backward_op if tracing.traced() else _backward_implementation
        dx, dresidual, dweight, dbias = backward(
            _rows(dy, n),
            None if dz is None else _rows(dz, n),
            _rows(z, n),
            _vector(weight),
            mean,
            rstd,
            seed,
            eps,
            dropout_p,
            rms,
            needs_input or needs_residual,
            ctx.input_dtype,
            ctx.residual_dtype if separate else None,
            needs_weight,
            ctx.bias[0] if needs_bias else None,
            backend,
        )
        # Where one tensor is both gradients it has to be one object: autograd makes a tensor that nobody else
        # holds the leaf's .grad, and would add later gradients twice to memory that two of them share.
        dx = _shaped(dx, z.shape) if needs_input or needs_residual else dx
        return (
            dx if needs_input else None,
            (_shaped(dresidual, z.shape) if separate else dx) if needs_residual else None,
            _shaped(dweight, weight.shape) if needs_weight else None,
            _shaped(dbias, ctx.bias[1]) if needs_bias else None,
        ) + (None,) * 8


def _reference_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.backward(*arguments[:-1])


def _apply(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """y and the new residual; through autograd only where a gradient can be asked for."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in arguments[:4]
    ):
        outputs = _LayerNorm.apply(*arguments)
        return outputs if isinstance(outputs, tuple) else (outputs, None)
    return _forward(*arguments)[:2]


def _is_autocast(input: Tensor) -> bool:
    """Whether CUDA autocast is on for this input: it holds both norms in its float32 list."""
    return input.is_cuda and torch.is_autocast_enabled("cuda")


def _output_dtype(input: Tensor) -> torch.dtype:
    """The input's, or float32 under CUDA autocast, which leaves float64 alone."""
    return torch.float32 if _is_autocast(input) and input.dtype != torch.float64 else input.dtype


def _check_parameters(
    op: str, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], input: Tensor
) -> None:
    # torch's rms_norm takes weights of any dtype, and autocast casts all of a call to float32.
    any_dtype = op == "rms_norm" or _is_autocast(input)
    if weight is not None:
        checks.check_parameter(op, "weight", weight, shape, input, any_dtype)
    if bias is not None:
        checks.check_parameter(op, "bias", bias, shape, input, any_dtype)
        if not any_dtype:
            checks.check_same_dtype(op, weight, bias)


def _element_count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the last dimensions, as torch.nn.functional.layer_norm.

        y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    input: [*, *normalized_shape], float16, bfloat16, float32 or float64, any strides. weight, bias:
    normalized_shape, of the input's dtype or, beside a float16 or bfloat16 input, float32. Statistics are
    float32, in two passes. Returns a tensor of input's shape and dtype (float32 under CUDA autocast, as
    torch). backend: see llmkernels.dispatch.

    Raises TypeError (not a tensor, not ints), ValueError (eps < 0, unknown backend) or RuntimeError (shapes,
    dtypes, devices that don't match; a backend that can't serve).
    """
    if not isinstance(input, Tensor) and overrides.has_torch_function_unary(input):
        return overrides.handle_torch_function(
            layer_norm, (input,), input, normalized_shape, weight, bias, eps, backend=backend
        )
    return _norm("layer_norm", input, normalized_shape, weight, bias, eps, backend)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Root-mean-square normalisation over the last dimensions, as torch.nn.functional.rms_norm.

        y = x / sqrt(mean(x^2) + eps) * weight

    input, backend, errors: as layer_norm. weight: normalized_shape, of any floating dtype. eps: None means
    the machine epsilon of float32 (of float64 for a float64 input), the one torch takes: it is that of the
    dtype computed in, not of the input's.
    """
    if not isinstance(input, Tensor) and overrides.has_torch_function_unary(input):
        return overrides.handle_torch_function(
            rms_norm, (input,), input, normalized_shape, weight, eps, backend=backend
        )
    if eps is None:
        checks.check_tensor("rms_norm", "input", input)
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    return _norm("rms_norm", input, normalized_shape, weight, None, eps, backend)


def _norm(
    op: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str | None,
) -> Tensor:
    rms = op == "rms_norm"
    checks.check_tensor(op, "input", input)
    if input.is_nested and type(input) is Tensor and backend in (None, "torch"):
        # Of strided layout, which has no shape to check: torch does.
        shape = tuple(normalized_shape)
        return F.rms_norm(input, shape, weight, eps) if rms else F.layer_norm(input, shape, weight, bias, eps)
    checks.check_floating(op, "input", input)
    shape = checks.check_normalized_shape(op, normalized_shape, input)
    _check_parameters(op, weight, bias, shape, input)
    checks.check_eps(op, eps)
    if dispatch.leaves_to_torch(input, backend):
        chosen = "torch"
    else:
        call = NormCall(
            op,
            input.device,
            input.dtype,
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
            obstacle=tracing.obstacle(input, weight, bias),
        )
        chosen = dispatch.choose(call, KERNELS, AUTOMATIC, backend)
    if chosen == "torch":
        if rms:
            return F.rms_norm(input, shape, weight, eps)
        return _layer_norm_torch(input, shape, weight, bias, eps)
    n = _element_count(shape)
    output_dtype = _output_dtype(input)
    bias = tracing.distinct(bias, weight)
    y, _ = _apply(input, None, weight, bias, None, n, float(eps), 0.0, rms, input.dtype, output_dtype, chosen)
    return y


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    training: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, residual addition and layer normalisation in one pass: (layer_norm(z), z), z = residual +
    dropout(input).

    input, residual: one shape [*, *normalized_shape], each float16, bfloat16, float32 or float64.
    residual_dtype: the dtype that z is rounded to, None for the one of ``residual + input``; torch.float32
    keeps the residual stream of a half-precision model exact. The normalised output is of z as returned, in
    the input's dtype. dropout_p: the probability of a zero, applied while training; the mask comes from
    torch's generator (torch.manual_seed reproduces it, activation checkpointing replays it) and is made again
    in backward instead of being stored. weight, bias, eps, backend, errors: as layer_norm; ValueError for a
    dropout_p outside [0, 1].
    """
    if not isinstance(input, Tensor) and overrides.has_torch_function((input, residual)):
        options = {
            "dropout_p": dropout_p,
            "residual_dtype": residual_dtype,
            "training": training,
            "backend": backend,
        }
        return overrides.handle_torch_function(
            add_layer_norm, (input, residual), input, residual, normalized_shape, weight, bias, eps, **options
        )
    op = "add_layer_norm"
    checks.check_tensor(op, "input", input)
    checks.check_floating(op, "input", input)
    checks.check_tensor(op, "residual", residual)
    checks.check_floating(op, "residual", residual)
    if residual.shape != input.shape:
        checks.fail(
            RuntimeError, op, "residual", f"the shape of input {list(input.shape)}", list(residual.shape)
        )
    checks.check_device(op, "residual", residual, input)
    shape = checks.check_normalized_shape(op, normalized_shape, input)
    _check_parameters(op, weight, bias, shape, input)
    checks.check_eps(op, eps)
    checks.check_dropout(op, dropout_p)
    if residual_dtype is None:
        residual_dtype = torch.promote_types(input.dtype, residual.dtype)
    elif not isinstance(residual_dtype, torch.dtype) or not residual_dtype.is_floating_point:
        checks.fail(TypeError, op, "residual_dtype", "a floating-point torch.dtype or None", residual_dtype)
    if not training:
        dropout_p = 0.0
    call = NormCall(
        op,
        input.device,
        input.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        residual.dtype,
        residual_dtype,
        tracing.obstacle(input, residual, weight, bias),
    )
    chosen = dispatch.choose(call, KERNELS, AUTOMATIC, backend)
    output_dtype = _output_dtype(input)
    if chosen == "torch":
        return _add_layer_norm_torch(
            input, residual, shape, weight, bias, eps, dropout_p, residual_dtype, output_dtype
        )
    # On the input's device: CUDA graphs replay the generator's advance, and nothing waits for the GPU.
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=input.device) if dropout_p > 0 else None
    n = _element_count(shape)
    y, new_residual = _apply(
        input,
        tracing.distinct(residual, input),
        weight,
        tracing.distinct(bias, weight),
        seed,
        n,
        float(eps),
        float(dropout_p),
        False,
        residual_dtype,
        output_dtype,
        chosen,
    )
    assert new_residual is not None
    return y, new_residual


def _add_layer_norm_torch(
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    residual_dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    kept = F.dropout(input, dropout_p) if dropout_p > 0 else input
    z = (residual + kept).to(residual_dtype)
    return _layer_norm_torch(z, shape, weight, bias, eps).to(output_dtype), z


def _layer_norm_torch(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    parameter = bias if weight is None else weight
    if parameter is None or parameter.dtype == input.dtype:
        return F.layer_norm(input, shape, weight, bias, eps)
    # Of mixed dtypes torch takes one kind alone: half-precision rows with a float32 weight, on the CPU.
    if input.is_cpu and weight is not None and input.dtype in (torch.float16, torch.bfloat16):
        return F.layer_norm(input, shape, weight, bias, eps)
    wide = torch.promote_types(input.dtype, parameter.dtype)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(input.to(wide), shape, weight, bias, eps).to(_output_dtype(input))
