"""Tries a layer out away from its model: which kernels serve it, and how far it errs from float64.

Everything here runs on copies (Adapter.copy): no hook fires, and no gradient, mode or parameter changes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import testing
from ..dispatch import Decision, explain, use_backend
from .adapters import Adapter, Inputs
from .sites import swap

SYNTHETIC_ROWS = 64
# Interpreted rows are slow; more than one, so that a kernel can mix them up.
INTERPRETED_ROWS = 6
# How often torch's error is drawn again where ours exceeds what the first draw allows.
_DRAWS = 4
# What float64 leaves of terms that cancel, as a share of the largest gradient.
_CANCELLED = 2**10 * torch.finfo(torch.float64).eps


@dataclasses.dataclass(frozen=True)
class Check:
    """One choice of kernels at one site against float64."""

    backend: str
    interpreted: bool  # run on the CPU through the Triton interpreter or the CUDA emulator, on small shapes
    max_error: float  # largest |ours - float64| of the outputs
    torch_error: float  # the same of torch, computing in the site's dtype
    budget_used: float  # share of what llmkernels.testing allows; the worst of outputs and all gradients
    worst: str  # which one that is: "output", "gradient of weight", ...

    @property
    def passed(self) -> bool:
        return self.budget_used <= 1


@dataclasses.dataclass(frozen=True)
class Service:
    """What serves the calls of one layer here."""

    kernels: tuple[tuple[str, str], ...] = ()  # (op, backend), each once, in the order of the calls
    remarks: tuple[str, ...] = ()  # what the layer computes by torch's functions, and why
    reasons: tuple[str, ...] = ()  # why the backend that was asked for can't serve all of it

    def __str__(self) -> str:
        """The backend of the only op, else each backend with its ops."""
        if len({op for op, _ in self.kernels}) == 1:
            return " + ".join(backend for _, backend in self.kernels)
        by_backend: dict[str, list[str]] = {}
        for op, backend in self.kernels:
            by_backend.setdefault(backend, []).append(op)
        return "; ".join(f"{backend}: {' + '.join(ops)}" for backend, ops in by_backend.items())


def serving(adapter: Adapter, module: nn.Module, inputs: Inputs, backend: str | None) -> Service:
    """What a call of the replacement would run on, in the module's mode; with gradients where that is train
    mode, which may take other kernels. backend: what it can't serve of the call are ``reasons``."""
    copy = adapter.copy(module)
    swap(adapter, copy, None)
    with torch.set_grad_enabled(module.training), explain() as decisions:
        if backend is None:
            copy(*inputs.args, **inputs.kwargs)
        else:
            # As a preference it runs in any case, and the decisions carry the reasons.
            with use_backend(backend):
                copy(*inputs.args, **inputs.kwargs)
    return summary(decisions, backend)


def refusal(
    adapter: Adapter, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
) -> str | None:
    """What the original itself raises on the adapter's synthetic inputs, which then say nothing about its
    replacement; None if it takes them."""
    try:
        with torch.no_grad():
            for inputs in adapter.synthetic_inputs(module, dtype, device, rows):
                adapter.copy(module).eval()(*inputs.args, **inputs.kwargs)
    except Exception as error:
        return f"no inputs are known to try {type(module).__name__} on ({type(error).__name__}: {error})"
    return None


def summary(decisions: Sequence[Decision], backend: str | None) -> Service:
    """The decisions of one call or several; backend: the one that was preferred, if any."""
    # A layer's own decision, to do without an op, is recorded by the layer's name: nn.MultiheadAttention.
    kernels = [decision for decision in decisions if "." not in decision.op]
    remarks = [f"{each.op}: {each.reason}" for each in decisions if "." in each.op]
    refusals = [] if backend is None else remarks.copy()
    for decision in kernels:
        if decision.backend != backend:
            refusals += [why for name, reasons in decision.passed_over if name == backend for why in reasons]
    served = dict.fromkeys((decision.op, decision.backend) for decision in kernels)
    return Service(tuple(served), tuple(dict.fromkeys(remarks)), tuple(dict.fromkeys(refusals)))


def check(
    adapter: Adapter,
    module: nn.Module,
    examples: Sequence[Inputs],
    backend: str | None,
    label: str,
    interpreted: bool = False,
) -> Check:
    """Runs outputs and all gradients of every example three times: the original in float64, the original, the
    replacement. In eval mode, which switches dropout off (randomness.check tries it).

    label: the backend's name in the result. Raises what the layer raises.
    """
    original, replaced, exact = (adapter.copy(module, dtype).eval() for dtype in (None, None, torch.float64))
    swap(adapter, replaced, backend)
    checks = []
    for inputs in examples:
        baseline, gradients = results(adapter, original, inputs, None)
        exact_inputs = inputs.map(_to_float64)
        expected, exact_gradients = results(adapter, exact, exact_inputs, gradients)
        actual, _ = results(adapter, replaced, inputs, gradients)
        of_outputs = gradients, exact_gradients
        band = _Band(adapter, original, exact, inputs, exact_inputs, of_outputs, expected, baseline)
        budget_used, worst = _compare(actual, expected, baseline, band)
        floating = [name for name in baseline if name.startswith("output") and _is_real(baseline[name])]
        checks.append(
            Check(
                label,
                interpreted,
                max((_max_distance(actual[name], expected[name]) for name in floating), default=0.0),
                max((_max_distance(baseline[name], expected[name]) for name in floating), default=0.0),
                budget_used,
                worst,
            )
        )
    return max(checks, key=lambda each: each.budget_used)


class _Band:
    """What widens the budget of a result that exceeds the plain one, found only where it is needed: the
    adapter's magnitudes or, where it knows none, torch's error as the largest of several draws."""

    def __init__(
        self,
        adapter: Adapter,
        original: nn.Module,
        exact: nn.Module,
        inputs: Inputs,
        exact_inputs: Inputs,
        gradients: tuple[Sequence[Tensor], Sequence[Tensor]],  # of the outputs: as torch's, in float64
        expected: Mapping[str, Tensor],
        baseline: Mapping[str, Tensor],
    ) -> None:
        self._magnitudes = functools.cache(lambda: adapter.magnitudes(exact, exact_inputs, gradients[1]))
        self._baseline = functools.cache(
            lambda: redrawn(adapter, original, inputs, gradients[0], expected, baseline)
        )
        self._plain = baseline
        self._expected = expected

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The baseline and the magnitude of a result."""
        magnitude = self._magnitudes().get(name)
        baseline = (self._baseline() if magnitude is None else self._plain)[name]
        return self._beside_cancelled(name, baseline), magnitude

    def _beside_cancelled(self, name: str, baseline: Tensor) -> Tensor:
        """The baseline, off by at least a unit in the last place of the largest gradient in those rows of a
        gradient whose terms cancel: the query's and key's where only one key is seen, which are 0 in exact
        arithmetic and in torch's order of summation, and the rounding of their terms in any other."""
        expected = self._expected[name]
        if not name.startswith("gradient") or expected.numel() == 0:
            return baseline
        sizes = [
            grad.abs().amax()
            for key, grad in self._expected.items()
            if key.startswith("gradient") and grad.numel()
        ]
        largest = torch.stack([size.to(expected.device, torch.float64) for size in sizes]).amax()
        cancelled = expected.abs().amax(-1, keepdim=True) <= _CANCELLED * largest
        unit = torch.finfo(self._plain[name].dtype).eps * largest
        baseline = baseline.to(torch.float64)
        smaller = (baseline - expected).abs() < unit
        return torch.where(cancelled & smaller, expected + unit, baseline)


def _compare(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
    band: _Band,
) -> tuple[float, str]:
    """The largest share of its budget that a result takes, and which one."""
    if missing := baseline.keys() - actual.keys():
        raise RuntimeError(f"no {', no '.join(sorted(missing))} where torch gives one")
    if further := actual.keys() - baseline.keys():
        raise RuntimeError(f"a {', a '.join(sorted(further))} where torch gives none")
    budget_used, worst = -1.0, ""
    for name, theirs in baseline.items():
        ours = actual[name]
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            got, want = (f"{list(tensor.shape)} {tensor.dtype}" for tensor in (ours, theirs))
            raise TypeError(f"{name} is {got} where torch gives {want}")
        if not _is_real(theirs):
            used = 0.0 if torch.equal(ours, theirs) else float("inf")
        else:
            comparison = testing.measure(ours, expected[name], theirs)
            if not comparison.passed:
                comparison = testing.measure(ours, expected[name], *band.of(name))
            used = 0.0 if comparison.error == 0 else comparison.error / comparison.allowed
        if used > budget_used:
            budget_used, worst = used, name
    return budget_used, worst


def redrawn(
    adapter: Adapter,
    original: nn.Module,
    inputs: Inputs,
    output_gradients: Sequence[Tensor],
    expected: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """``expected`` off by torch's error, each element by its largest one of several draws.

    How torch's roundings fall in one run is chance: whether one sum comes out below 0, say, decides whether a
    ReLU hides a token from a row of a gradient. They fall otherwise if what the layer is given is off by one
    unit in the last place, at random: no way to compute it can tell the two apart.
    """
    generator = torch.Generator().manual_seed(2)

    def nudged(tensor: Tensor) -> Tensor:
        if not _is_real(tensor):
            return tensor
        signs = torch.randint(0, 2, tensor.shape, generator=generator, device="cpu") * 2 - 1
        step = signs.to(tensor.device, torch.float64) * torch.finfo(tensor.dtype).eps / 2
        return (tensor.to(torch.float64) * (1 + step)).to(tensor.dtype)

    def distance(name: str, values: Tensor) -> Tensor:
        return (values.to(torch.float64) - expected[name]).abs().nan_to_num(posinf=0.0)

    names = [name for name, values in baseline.items() if _is_real(values)]
    largest = {name: distance(name, baseline[name]) for name in names}
    for _ in range(_DRAWS):
        layer = adapter.copy(original)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(nudged(parameter))
        found, _ = results(
            adapter, layer, inputs.map(nudged), [nudged(gradient) for gradient in output_gradients]
        )
        for name in names:
            largest[name] = torch.maximum(largest[name], distance(name, found[name]))
    return {name: expected[name] + largest[name] for name in names}


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _max_distance(tensor: Tensor, expected: Tensor) -> float:
    values = tensor.to(torch.float64)
    same = (values == expected) | (values.isnan() & expected.isnan())  # where both overflow, say
    distance = torch.where(same, 0.0, (values - expected).abs()).nan_to_num(nan=torch.inf)
    return float(distance.max()) if distance.numel() else 0.0


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def results(
    adapter: Adapter, module: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name ("output", "gradient of query", "gradient of in_proj_weight"; outputs are
    numbered where there are several), and the gradients of the outputs that they were computed from.

    A tensor that is several arguments is one leaf, named after the first. output_gradients: these, taken to
    the outputs' dtypes; None draws them, the same ones each time.
    """
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        """Of its own for every run, so that one run's in-place change or graph can't reach the next."""
        leaves.append(tensor.detach().clone())
        return leaves[-1]

    args, kwargs = inputs.map(leaf)
    wanted = differentiable(adapter, module, Inputs(args, kwargs))
    outputs = list(tensors_of(module(*args, **kwargs)))
    if output_gradients is None:
        generator = torch.Generator().manual_seed(1)
        given = [_draw(output, generator) for output in outputs]
    elif len(outputs) != len(output_gradients):
        raise RuntimeError(f"{len(outputs)} outputs where torch gives {len(output_gradients)}")
    else:
        given = [grad.to(output.dtype) for grad, output in zip(output_gradients, outputs, strict=True)]
    pairs = [pair for pair in zip(outputs, given, strict=True) if pair[0].requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs and wanted:
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            list(wanted.values()),
            [gradient for _, gradient in pairs],
            allow_unused=True,
        )
    found = {
        "output" if len(outputs) == 1 else f"output {index}": output.detach()
        for index, output in enumerate(outputs)
    }
    found.update({name: grad for name, grad in zip(wanted, gradients, strict=True) if grad is not None})
    return found, given


def differentiable(adapter: Adapter, module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """What gets a gradient of a call, by its name in ``results``: the module's parameters, and the arguments
    but for the adapter's constants, which are made to require it."""
    wanted: dict[str, Tensor] = {
        f"gradient of {name}": parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    positional = inspect.signature(module.forward).bind_partial(*inputs.args).arguments
    for argument, given in {**positional, **inputs.kwargs}.items():
        if argument in adapter.constants:
            continue
        for path, value in pytree.tree_flatten_with_path(given)[0]:
            known = any(value is other for other in wanted.values())
            if isinstance(value, Tensor) and _is_real(value) and not known:
                wanted[f"gradient of {argument}{pytree.keystr(path)}"] = value.requires_grad_()
    return wanted


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors of what a layer returns: one, or containers of them, None and other things left out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from tensors_of(getattr(output, field.name))


def _draw(output: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(output.device, output.dtype) if _is_real(output) else values
