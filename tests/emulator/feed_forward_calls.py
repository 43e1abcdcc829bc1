"""Calls of csrc/feed_forward on guarded tensors, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from llmkernels import extension, testing
from llmkernels.ops.feed_forward import cuda_kernels, reference
from llmkernels.ops.feed_forward.call import ACTIVATIONS

from .guarded import GuardedMemory


class Case(NamedTuple):
    """A forward call [m, k] -> [m, n] and the backward call from [m, out]."""

    m: int
    k: int
    n: int
    out: int
    dtype: torch.dtype = torch.float32
    activation: str = "gelu"
    transposed: bool = False  # weights as GPT-2's Conv1D keeps them
    offset: int = 0  # elements past a 16-byte boundary at which every row starts
    tf32: bool = False
    dropout: bool = True
    weight2: bool = True  # without: the activation's gradient alone

    @property
    def width(self) -> int:
        return 2 * self.n if ACTIVATIONS[self.activation][1] else self.n

    def tensor(
        self, memory: GuardedMemory, name: str, shape: tuple[int, ...], scale: float = 1.0, lies: bool = False
    ) -> Tensor:
        """Of values that tf32 holds, where products are made of it. lies: transposed in memory."""
        shape = shape[::-1] if lies else shape
        held = torch.bfloat16 if self.tf32 else self.dtype
        values = testing.random_tensor(shape, held, "cpu", sum(map(ord, name)), scale=scale).to(self.dtype)
        if self.offset:
            # A multiple of 16 bytes a row, of which ``offset`` elements stand before the first column.
            padded = -(-(shape[-1] + self.offset) // 8) * 8
            values = torch.nn.functional.pad(values, (self.offset, padded - shape[-1] - self.offset))
        copy = memory.guarded(values, name)[..., self.offset : self.offset + shape[-1]]
        return copy.t() if lies else copy


def problems(module: ModuleType, case: Case, options: dict[str, Any]) -> list[str]:
    """What the emulator reports of the calls under a schedule, and which of their results are wrong."""
    module.emulator.options(**options)
    module.emulator.clear()
    try:
        with GuardedMemory(module) as memory, memory.guarded_outputs(), _serving(module, case.tf32):
            wrong = _wrong_results(memory, case)
    except RuntimeError as error:
        wrong = [str(error)]
    return [*module.emulator.report(), *wrong]


@contextmanager
def _serving(module: ModuleType, tf32: bool) -> Iterator[None]:
    """cuda_kernels calls this module while it lasts, for torch's switch of float32 products as given."""
    before = torch.backends.cuda.matmul.fp32_precision
    with mock.patch.object(extension, "_load", return_value=module):
        extension._streams.cache_clear()
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
            extension._streams.cache_clear()


def _wrong_results(memory: GuardedMemory, case: Case) -> list[str]:
    m, k, n, out, width = case.m, case.k, case.n, case.out, case.width
    x = case.tensor(memory, "x", (m, k))
    weight = case.tensor(memory, "weight", (width, k), max(k, 1) ** -0.5, case.transposed)
    bias = case.tensor(memory, "bias", (width,))
    dy, weight2 = case.tensor(memory, "dy", (m, out)), None
    if case.weight2:
        weight2 = case.tensor(memory, "weight2", (out, n), out**-0.5, case.transposed)
    seed = memory.guarded(torch.tensor([77]), "seed") if case.dropout and case.weight2 else None
    settings: tuple[Any, Any, Any] = (seed, case.activation, 0.25 if seed is not None else 0.0)
    wanted = (True, case.weight2, True)

    hidden, pre = cuda_kernels.forward(x, weight, bias, *settings, True, True)
    gradients = cuda_kernels.backward(dy, weight2, pre, *settings, *wanted)

    exact = reference.forward(_wide(x), _wide(weight), _wide(bias), *settings, True, True)
    own = reference.forward(x, weight, bias, *settings, True, True)
    exact_gradients = reference.backward(_wide(dy), _wide(weight2), _wide(pre), *settings, *wanted)
    own_gradients = reference.backward(dy, weight2, pre, *settings, *wanted)
    remade = gradients[1]
    return [
        *([] if not case.weight2 or torch.equal(hidden, remade) else ["remade: differs from hidden"]),
        *_outside_budget("hidden pre", (hidden, pre), exact, own),
        *_outside_budget("dpre remade dbias", gradients, exact_gradients, own_gradients),
    ]


def _wide(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.double()


def _outside_budget(
    names: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], own: tuple[Tensor, ...]
) -> list[str]:
    """A line for each result whose error is too large; `own`: the reference's in the dtype of the call."""
    lines = []
    for name, result, exact, baseline in zip(names.split(), actual, expected, own, strict=True):
        # Results inherit the rounding of terms larger than themselves.
        magnitude = 8 * exact.abs().amax().expand(exact.shape) if exact.numel() else exact
        comparison = testing.measure(result, exact, baseline.to(result.dtype), magnitude)
        if not comparison.passed:
            lines.append(f"{name}: {comparison}")
    return lines
