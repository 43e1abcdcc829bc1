"""Calls of csrc/layer_norm on guarded tensors, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from llmkernels import extension, testing
from llmkernels.ops.layer_norm import cuda_kernels, reference

from .guarded import GuardedMemory

EPS = 1e-5
Tensors = tuple[Tensor, ...]


class Case(NamedTuple):
    """A forward and a backward call on [m, n]."""

    m: int
    n: int
    dtype: torch.dtype = torch.float32
    add: bool = False  # with a residual, dropout, and a gradient of the new residual
    rms: bool = False
    misaligned: bool = False  # rows and parameters start one element after a 16-byte boundary

    def tensor(self, memory: GuardedMemory, name: str, *shape: int) -> Tensor:
        layout = "misaligned" if self.misaligned else "contiguous"
        seed = sum(map(ord, name))
        return memory.guarded(testing.random_tensor(shape, self.dtype, "cpu", seed, layout=layout), name)


def problems(module: ModuleType, case: Case, options: dict[str, Any]) -> list[str]:
    """What the emulator reports of the calls under a schedule, and which of their results are wrong."""
    module.emulator.options(**options)
    module.emulator.clear()
    try:
        with GuardedMemory(module) as memory, memory.guarded_outputs(), _serving(module):
            wrong = _wrong_results(memory, case)
    except RuntimeError as error:
        wrong = [str(error)]
    return [*module.emulator.report(), *wrong]


@contextmanager
def _serving(module: ModuleType) -> Iterator[None]:
    """cuda_kernels calls this module while it lasts."""
    caches = (extension._streams, cuda_kernels._partial_rows)
    with mock.patch.object(extension, "_load", return_value=module):
        for cache in caches:
            cache.cache_clear()
        try:
            yield
        finally:
            for cache in caches:
                cache.cache_clear()


def _wrong_results(memory: GuardedMemory, case: Case) -> list[str]:
    m, n, dtype = case.m, case.n, case.dtype
    x, dy = case.tensor(memory, "x", m, n), case.tensor(memory, "dy", m, n)
    weight, bias = case.tensor(memory, "weight", n), case.tensor(memory, "bias", n)
    residual = dz = seed = None
    if case.add:
        residual, dz = case.tensor(memory, "residual", m, n), case.tensor(memory, "dz", m, n)
        seed = memory.guarded(torch.tensor([77]), "seed")
    norm: tuple[Any, Any, Any, Any] = (seed, EPS, 0.25 if case.add else 0.0, case.rms)

    y, z, mean, rstd = cuda_kernels.forward(x, residual, weight, bias, *norm, dtype, dtype)
    stored = z if case.add else x  # what the statistics and the gradients are of
    wanted: tuple[Any, ...] = (True, dtype, dtype if case.add else None, True, dtype)
    gradients = cuda_kernels.backward(dy, dz, stored, weight, mean, rstd, *norm, *wanted)

    wide = torch.float64
    exact = reference.forward(_wide(x), _wide(residual), _wide(weight), _wide(bias), *norm, wide, wide)
    own = reference.forward(x, residual, weight, bias, *norm, dtype, dtype)
    no_dropout: tuple[Any, Any, Any, Any] = (None, EPS, 0.0, case.rms)
    exact_statistics = reference.forward(_wide(stored), None, None, None, *no_dropout, wide, wide)[2:]
    wide_wanted: tuple[Any, ...] = (True, wide, wide if case.add else None, True, wide)
    saved = (_wide(stored), _wide(weight), _wide(mean), _wide(rstd))
    exact_gradients = reference.backward(_wide(dy), _wide(dz), *saved, *norm, *wide_wanted)
    own_gradients = reference.backward(dy, dz, stored, weight, mean, rstd, *norm, *wanted)
    return [
        *_outside_budget("y z", (y, z), exact[:2], own[:2]),
        *_outside_budget("mean rstd", (mean, rstd), exact_statistics, own[2:]),
        *_outside_budget("dx dresidual dweight dbias", gradients, exact_gradients, own_gradients),
    ]


def _wide(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.double()


def _outside_budget(names: str, actual: Tensors, expected: Tensors, own: Tensors) -> list[str]:
    """A line for each result whose error is too large; `own`: the reference's in the dtype of the call."""
    lines = []
    for name, result, exact, baseline in zip(names.split(), actual, expected, own, strict=True):
        # Gradients inherit the rounding of terms larger than themselves.
        magnitude = 8 * exact.abs().amax().expand(exact.shape) if exact.numel() else exact
        comparison = testing.measure(result, exact, baseline.to(result.dtype), magnitude)
        if not comparison.passed:
            lines.append(f"{name}: {comparison}")
    return lines
