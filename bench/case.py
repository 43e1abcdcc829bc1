"""What is measured: a variant of an op at a shape, and how its result is judged."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmkernels import testing

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensor | Outputs]
Shape = tuple[int, ...]


class Work(NamedTuple):
    """The least that a call has to do: bytes read and written once each, floating-point operations where
    these bound it, tokens that it trains on or generates where a user counts those."""

    bytes: int
    flops: int | None = None
    tokens: int | None = None


class Verdict(NamedTuple):
    match: bool
    detail: str


class Variant(abc.ABC):
    """One way to call an op. op: the method of a provider that computes it; every_shape: False for one that
    is measured at the first shape of the grid alone."""

    name: str
    op: str
    every_shape: bool = True

    @abc.abstractmethod
    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        """Random inputs; those that require grad are the leaves of the backward."""

    @abc.abstractmethod
    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """direction: forward, backward or both."""

    @abc.abstractmethod
    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        """Holds a provider's results, gradients too where it has them, to the error budget against
        float64."""

    def small(self) -> Variant:
        """What stands for it on a CPU, where its kernels are interpreted."""
        return self


@dataclass(frozen=True)
class Case:
    """What a provider is asked to compute."""

    variant: Variant
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape))


def outputs_of(found: Tensor | Outputs) -> Outputs:
    return found if isinstance(found, tuple) else (found,)


def leaves_of(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def copied(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Leaves with the same values, those of floating point in another dtype where one is named."""

    def copy(tensor: Tensor) -> Tensor:
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        values = tensor.detach().to(cast)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(values, tensor.requires_grad)
        return values.requires_grad_(tensor.requires_grad)

    return {name: copy(tensor) for name, tensor in tensors.items()}


def results(function: Function, tensors: Tensors, gradients: Outputs, names: Iterable[str] = ()) -> Tensors:
    """The outputs of a call by "output 0", ..., and the gradients of those inputs, if it has any."""
    outputs = outputs_of(function(tensors))
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    names = list(names)
    if names and outputs[0].requires_grad:
        given = [gradient.to(output.dtype) for gradient, output in zip(gradients, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, [tensors[name] for name in names], given)
        found |= {f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)}
    return found


def judged(
    actual: Tensors, exact: Tensors, own: Tensors, magnitudes: Callable[[str, Tensor], Tensor | None]
) -> Verdict:
    """Whether each result lies within its budget; own: torch's results in the same dtype, magnitudes: of a
    name and its exact value."""
    worst = ("", testing.Comparison(0.0, 0.0, 0.0, True, "nothing compared"))
    share = -1.0
    for name, result in actual.items():
        comparison = testing.measure(result, exact[name], own[name], magnitudes(name, exact[name]))
        found = comparison.error / max(comparison.allowed, torch.finfo(torch.float64).tiny)
        if not found <= share:  # a NaN is the worst of all
            worst, share = (name, comparison), found
    name, comparison = worst
    return Verdict(comparison.passed, f"{name}, {comparison}" if name else comparison.detail)


def largest(_: str, exact: Tensor) -> Tensor:
    """The magnitude of a sum of many terms, whose size the largest of all results speaks of."""
    return exact.abs().amax().cpu()


def kept_as_often_as_asked(kept: float, trials: int, dropout_p: float) -> Verdict:
    """Whether the share of kept elements is that of as many independent trials."""
    spread = testing.STANDARD_ERRORS * (dropout_p * (1 - dropout_p) / trials) ** 0.5
    return Verdict(abs(kept - (1 - dropout_p)) <= spread, f"{kept:.5f} of {trials} elements kept")


def both(first: Verdict, second: Verdict) -> Verdict:
    """The first that fails, else both."""
    for verdict in (first, second):
        if not verdict.match:
            return verdict
    return Verdict(True, f"{first.detail}; {second.detail}")
