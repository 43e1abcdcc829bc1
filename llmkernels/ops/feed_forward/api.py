"""linear_activation and feed_forward: argument checks, autocast, the choice of a backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, overrides
from torch.utils.checkpoint import checkpoint

from ... import checks, dispatch, tracing
from . import autograd
from .call import ACTIVATIONS, FeedForwardCall

_PACKAGE = __name__.rsplit(".", 1)[0]
KERNELS = (
    ("cuda", f"{_PACKAGE}.cuda_kernels"),
    ("triton", f"{_PACKAGE}.triton_kernels"),
    ("reference", f"{_PACKAGE}.reference"),
)
# Fastest first (README.md, "Which backend"): empty until a kernel has been timed against torch on a GPU.
AUTOMATIC: tuple[str, ...] = ()


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast makes a linear layer's tensors, None where it is off."""
    kind = input.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _autocast(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of ``tensor`` as a linear layer takes it: autocast leaves float64 alone."""
    return tensor.dtype if dtype is None or tensor.dtype == torch.float64 else dtype


def _check_activation(op: str, activation: object) -> None:
    if not isinstance(activation, str):
        checks.fail(TypeError, op, "activation", "a string", type(activation).__name__)
    if activation not in ACTIVATIONS:
        checks.fail(ValueError, op, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))


def _check_linear(
    op: str,
    names: tuple[str, str],
    weight: Tensor,
    bias: Tensor | None,
    in_features: int,
    of: str,
    input: Tensor,
) -> None:
    """A linear layer's weight [*, in_features], whose columns answer to ``of``, and bias [*], on the input's
    device and of its dtype. Asks for each property once: this is most of what a call on a CPU tensor adds to
    torch's own time."""
    checks.check_tensor(op, names[0], weight)
    shape, dtype, device = weight.shape, input.dtype, input.device
    if len(shape) != 2 or shape[1] != in_features:
        checks.fail(RuntimeError, op, names[0], f"a shape of [*, {in_features}] ({of})", list(shape))
    if weight.dtype != dtype or weight.device != device:
        _check_like_input(op, names[0], weight, input)
    if bias is not None:
        checks.check_tensor(op, names[1], bias)
        if bias.dim() != 1 or bias.shape[0] != shape[0]:
            expected = f"a shape of [{shape[0]}] (rows of {names[0]})"
            checks.fail(RuntimeError, op, names[1], expected, list(bias.shape))
        if bias.dtype != dtype or bias.device != device:
            _check_like_input(op, names[1], bias, input)


def _check_like_input(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    checks.check_device(op, name, tensor, input)
    if tensor.dtype == input.dtype:
        return
    checks.check_floating(op, name, tensor)
    autocast = _autocast_dtype(input)
    if _autocast(tensor, autocast) != _autocast(input, autocast):
        checks.fail(RuntimeError, op, name, f"{input.dtype} (as input)", tensor.dtype)


def linear_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear layer and its activation in one pass: act(input @ weight.T + bias).

    input: [*, in_features], float16, bfloat16, float32 or float64. weight: [out_features, in_features], as
    torch.nn.Linear's. bias: [out_features]. All of one dtype, or autocast makes them so, and of any strides:
    a transposed weight is read where it lies. activation: "relu", "gelu" (exact, by erf), "gelu_tanh" (its
    approximation by tanh), or "swiglu" and "geglu", which take the first half of the weight's rows as the
    gate and the second as what it multiplies: silu(gate) * up, gelu(gate) * up. Returns [*, out_features],
    gated [*, out_features / 2], of the dtype computed in. At infinity the activations of the kernels have
    their limits; those of the torch backend are torch's, NaN. backend: see llmkernels.dispatch.

    Raises TypeError (no tensor, no string), ValueError (unknown activation or backend) or RuntimeError
    (shapes that don't chain, dtypes or devices that don't match; a backend that can't serve).
    """
    if not isinstance(input, Tensor) and overrides.has_torch_function_unary(input):
        return overrides.handle_torch_function(
            linear_activation, (input,), input, weight, bias, activation, backend=backend
        )
    op = "linear_activation"
    return _call(op, input, weight, bias, None, None, activation, 0.0, False, backend)


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    *,
    recompute: bool = False,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The feed-forward block of a Transformer: dropout(act(input @ weight1.T + bias1)) @ weight2.T + bias2.

    input: [*, d]. weight1: [hidden, d], or [2 * hidden, d] where the activation is gated, gate rows first.
    weight2: [out, hidden]. Dtypes, strides, activation, backend and errors: as linear_activation. dropout_p:
    the probability of a zero behind the activation, applied while training; the mask comes from torch's
    generator (torch.manual_seed reproduces it, activation checkpointing replays it) and is made again in
    backward instead of being stored. recompute: saves nothing of the hidden size for backward, which makes
    the first product once more; the result is bitwise the same. Returns [*, out]. ValueError for a dropout_p
    outside [0, 1].
    """
    if not isinstance(input, Tensor) and overrides.has_torch_function_unary(input):
        arguments = (input, weight1, bias1, weight2, bias2, activation, dropout_p)
        options = {"recompute": recompute, "training": training, "backend": backend}
        return overrides.handle_torch_function(feed_forward, (input,), *arguments, **options)
    op = "feed_forward"
    checks.check_tensor(op, "weight2", weight2)
    checks.check_dropout(op, dropout_p)
    p = float(dropout_p) if training else 0.0
    return _call(op, input, weight1, bias1, weight2, bias2, activation, p, recompute, backend)


def _call(
    op: str,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    activation: str,
    dropout_p: float,
    recompute: bool,
    backend: str | None,
) -> Tensor:
    tensors = (input, weight1, bias1, weight2, bias2)
    checks.check_tensor(op, "input", input)
    _check_activation(op, activation)
    if input.is_nested and type(input) is Tensor:
        # Of strided layout, which has no shape to check: torch does.
        call = FeedForwardCall(op, input.device, input.dtype, "the input is a nested tensor")
        dispatch.choose(call, KERNELS, AUTOMATIC, backend)
        return _torch(*tensors, activation, dropout_p)
    checks.check_floating(op, "input", input)
    shape = input.shape
    if not shape:
        checks.fail(RuntimeError, op, "input", "at least one dimension", list(shape))
    first = ("weight", "bias") if weight2 is None else ("weight1", "bias1")
    _check_linear(op, first, weight1, bias1, shape[-1], "input's last dimension", input)
    hidden = weight1.shape[0]
    if ACTIVATIONS[activation][1]:
        if hidden % 2:
            expected = f"an even number of rows for {activation}, gate and up"
            checks.fail(RuntimeError, op, first[0], expected, hidden)
        hidden //= 2
    if weight2 is not None:
        _check_linear(op, ("weight2", "bias2"), weight2, bias2, hidden, "the hidden size", input)

    if not dispatch.leaves_to_torch(input, backend):
        autocast = _autocast_dtype(input)
        call = FeedForwardCall(op, input.device, _autocast(input, autocast), tracing.obstacle(*tensors))
        chosen = dispatch.choose(call, KERNELS, AUTOMATIC, backend)
        if chosen != "torch":
            if autocast is not None:
                tensors = tuple(None if t is None else t.to(_autocast(t, autocast)) for t in tensors)  # type: ignore[assignment]
            return _kernels(*tensors, activation, dropout_p, recompute, chosen)
    if recompute and torch.is_grad_enabled() and tracing.obstacle(*tensors) is None:
        return checkpoint(
            _torch, *tensors, activation, dropout_p, use_reentrant=False, preserve_rng_state=dropout_p > 0
        )
    return _torch(*tensors, activation, dropout_p)


def _kernels(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    activation: str,
    dropout_p: float,
    recompute: bool,
    backend: str,
) -> Tensor:
    """By the kernels of ``backend``, through autograd."""
    # On the input's device: CUDA graphs replay the generator's advance, and nothing waits for the GPU.
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=input.device) if dropout_p > 0 else None
    return autograd.apply(
        input,
        tracing.distinct(weight1, input),
        tracing.distinct(bias1, input),
        tracing.distinct(weight2, input, weight1),
        tracing.distinct(bias2, input, bias1),
        seed,
        activation,
        dropout_p,
        recompute,
        backend,
    )


def _torch(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    activation: str,
    dropout_p: float,
) -> Tensor:
    """The same by torch's own operators."""
    function, gated = ACTIVATIONS[activation]
    pre = F.linear(input, weight1, bias1)
    gate, up = pre.chunk(2, dim=-1) if gated else (pre, None)
    if function == "relu":
        hidden = torch.relu(gate)
    elif function == "silu":
        hidden = F.silu(gate)
    else:
        hidden = F.gelu(gate, approximate="tanh" if function == "gelu_tanh" else "none")
    if up is not None:
        hidden = hidden * up
    if dropout_p > 0:
        hidden = torch.dropout(hidden, dropout_p, True)
    return hidden if weight2 is None else F.linear(hidden, weight2, bias2)
