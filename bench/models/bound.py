"""Modules as functions of tensors, so that layers and models are measured and judged as ops are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmkernels import testing

from ..case import Function, Outputs, Tensors, Verdict, copied, judged, outputs_of, results

# In the tensors of a call: dropout is off, as nothing else can be compared.
WITHOUT_DROPOUT = "without dropout"


class Bound:
    """call(module, tensors) with the module's parameters being those of the tensors that go by their names.
    On tensors that it has not seen last it binds and, for what depends on them, calls ``begin``."""

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[Tensors], Tensor],
        begin: Callable[[Tensors], None] = lambda tensors: None,
    ) -> None:
        self.module = module
        self._call = call
        self._begin = begin
        self._seen: Tensors | None = None

    def __call__(self, tensors: Tensors) -> Tensor:
        if tensors is not self._seen:
            for name in [name for name, _ in self.module.named_parameters()]:
                owner, _, leaf = name.rpartition(".")
                setattr(self.module.get_submodule(owner), leaf, tensors[name])
            self._seen = tensors
            self._begin(tensors)
        return self._call(tensors)


def parameters_of(module: nn.Module, trained: bool) -> Tensors:
    """By name, as new parameters of its initial values."""
    return {name: nn.Parameter(value.detach().clone(), trained) for name, value in module.named_parameters()}


def parameter_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, nn.Parameter))


def match_of_layers(function: Function, formula: Function, tensors: Tensors, layers: int) -> Verdict:
    """Outputs and gradients, each as one row: that of its largest element, and one rounding a layer, since
    each layer rounds what it hands on."""
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    dtype = next(tensor.dtype for tensor in tensors.values() if isinstance(tensor, nn.Parameter))
    exact = copied(tensors, torch.float64)
    with torch.no_grad():
        gradients: Outputs = tuple(torch.randn_like(output) for output in outputs_of(formula(exact)))

    def flat(call: Function, leaves: Tensors) -> Tensors:
        return {name: value.flatten() for name, value in results(call, leaves, gradients, names).items()}

    found, right, own = flat(function, copied(tensors)), flat(formula, exact), flat(formula, copied(tensors))

    def magnitude(name: str, value: Tensor) -> Any:
        return value.abs().amax().cpu() * roundings(dtype, layers)

    return judged(found, right, own, magnitude)


def roundings(dtype: torch.dtype, count: int) -> float:
    """How large float32 intermediates would be whose error is as many roundings to dtype."""
    half = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / testing.ARITHMETIC_ULPS
    return max(half, 1.0) * count
