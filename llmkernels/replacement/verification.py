"""Tries a layer out away from its model: which backend serves it, and how far it errs from float64.

Everything here runs on copies (Adapter.copy): no hook fires, and no gradient, mode or parameter changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import testing
from ..dispatch import explain, use_backend
from .adapters import Adapter, Inputs

SYNTHETIC_ROWS = 64
# Interpreted rows are slow; more than one, so that a kernel can mix them up.
INTERPRETED_ROWS = 6


@dataclasses.dataclass(frozen=True)
class Check:
    """One kernel at one site against float64."""

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
    """The backends that serve a layer here and, where the one asked for can't, why not."""

    backends: tuple[str, ...]
    reasons: tuple[str, ...] = ()


def serving(adapter: Adapter, module: nn.Module, inputs: Inputs, backend: str | None) -> Service:
    """Which backends a call of the replacement would run on; if ``backend`` is asked for and can't, why."""
    copy = adapter.copy(module)
    adapter.swap(copy, None)
    with torch.no_grad(), explain() as decisions:
        if backend is None:
            copy(*inputs.args, **inputs.kwargs)
        else:
            # As a preference it runs in any case, and the decisions carry the reasons.
            with use_backend(backend):
                copy(*inputs.args, **inputs.kwargs)
    backends = tuple(dict.fromkeys(decision.backend for decision in decisions))
    if backend is None or set(backends) <= {backend}:
        return Service(backends)
    refusals = (why for decision in decisions for name, why in decision.passed_over if name == backend)
    return Service(backends, tuple(dict.fromkeys(sentence for why in refusals for sentence in why)))


def check(
    adapter: Adapter,
    module: nn.Module,
    inputs: Inputs,
    backend: str | None,
    label: str,
    interpreted: bool = False,
) -> Check:
    """Runs outputs and all gradients three times: the original in float64, the original, the replacement.

    label: the backend's name in the result. Raises what the layer raises.
    """
    original, replaced = adapter.copy(module), adapter.copy(module)
    adapter.swap(replaced, backend)
    baseline, gradients = results(original, inputs, None)
    exact = adapter.copy(module, torch.float64)
    exact_inputs = Inputs(
        *pytree.tree_map_only(Tensor, _to_float64, (tuple(inputs.args), dict(inputs.kwargs)))
    )
    expected, exact_gradients = results(exact, exact_inputs, gradients)
    actual, _ = results(replaced, inputs, gradients)
    if missing := baseline.keys() - actual.keys():
        raise RuntimeError(f"no {', no '.join(sorted(missing))} where torch gives one")
    sizes = adapter.magnitudes(exact, exact_inputs, exact_gradients)
    budget_used, worst = -1.0, ""
    for name, theirs in baseline.items():
        ours = actual[name]
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            got, want = (f"{list(tensor.shape)} {tensor.dtype}" for tensor in (ours, theirs))
            raise TypeError(f"{name} is {got} where torch gives {want}")
        comparison = testing.measure(ours, expected[name], theirs, sizes.get(name))
        used = 0.0 if comparison.error == 0 else comparison.error / comparison.allowed
        if used > budget_used:
            budget_used, worst = used, name
    outputs = [name for name in baseline if name.startswith("output")]
    return Check(
        label,
        interpreted,
        max(_max_distance(actual[name], expected[name]) for name in outputs),
        max(_max_distance(baseline[name], expected[name]) for name in outputs),
        budget_used,
        worst,
    )


def _max_distance(tensor: Tensor, expected: Tensor) -> float:
    values = tensor.to(torch.float64)
    same = (values == expected) | (values.isnan() & expected.isnan())  # where both overflow, say
    distance = torch.where(same, 0.0, (values - expected).abs()).nan_to_num(nan=torch.inf)
    return float(distance.max()) if distance.numel() else 0.0


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor


def results(
    module: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name ("output", "gradient of input", "gradient of weight"; numbered where
    there are several outputs or inputs), and the gradients of the outputs that they were computed from.

    output_gradients: these, taken to the outputs' dtypes; None draws them, the same ones each time.
    """
    leaves, spec = pytree.tree_flatten((tuple(inputs.args), dict(inputs.kwargs)))
    leaves = [_leaf(leaf) for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    outputs = [leaf for leaf in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]
    if output_gradients is None:
        generator = torch.Generator().manual_seed(1)
        given = [_draw(output, generator) for output in outputs]
    else:
        given = [grad.to(output.dtype) for grad, output in zip(output_gradients, outputs, strict=True)]
    wanted: dict[str, Tensor] = {f"gradient of {name}": tensor for name, tensor in module.named_parameters()}
    differentiable = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    for index, leaf in enumerate(differentiable):
        wanted["gradient of input" if len(differentiable) == 1 else f"gradient of input {index}"] = leaf
    pairs = [pair for pair in zip(outputs, given, strict=True) if pair[0].requires_grad]
    gradients = torch.autograd.grad(
        [output for output, _ in pairs], list(wanted.values()), [grad for _, grad in pairs], allow_unused=True
    )
    found = {
        "output" if len(outputs) == 1 else f"output {index}": output.detach()
        for index, output in enumerate(outputs)
    }
    found.update({name: grad for name, grad in zip(wanted, gradients, strict=True) if grad is not None})
    return found, given


def _leaf(value: Any) -> Any:
    """A tensor of its own for every run, so that one run's in-place change or graph can't reach the next."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _draw(output: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(output.device, output.dtype)
