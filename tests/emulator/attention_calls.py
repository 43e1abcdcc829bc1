"""Calls of csrc/attention on guarded tensors, and what is wrong with them."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from llmkernels import extension, testing
from llmkernels.ops.attention import cuda_kernels, reference
from llmkernels.ops.attention.call import UNLIMITED, Settings

from .guarded import GuardedMemory

# A row, where each of its elements may carry an ulp of the largest of its terms.
_TERMS = 8


class Case(NamedTuple):
    """A forward and a backward call. packed: two sequences of these lengths behind each other. features: with
    a bias and its gradient (packed: without), a soft cap, ALiBi's slopes, sinks and dropout."""

    lq: int
    lk: int
    d: int = 16
    dv: int = 16
    dtype: torch.dtype = torch.float32
    heads: int = 1
    kv_heads: int = 1
    left: int = UNLIMITED
    right: int = UNLIMITED
    packed: bool = False
    features: bool = False
    bias: tuple[int, int] | None = None  # sizes of the rows and columns that are not shared, else 1
    spoilt: bool = False  # a value that is NaN and that not all queries see
    tf32: bool = False

    def settings(self) -> Settings:
        return Settings(
            self.d**-0.5,
            3.0 if self.features else 0.0,
            0.25 if self.features else 0.0,
            self.left,
            self.right,
            False,
            self.lq,
            self.lk,
        )

    def tensors(self, memory: GuardedMemory) -> dict[str, Tensor | None]:
        """The arguments of reference.backward from dout to cu_seqlens_k, without out and lse."""
        sequences = 2 if self.packed else 1

        def draw(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            seed = sum(map(ord, name))
            return memory.guarded(testing.random_tensor(shape, dtype, "cpu", seed), name)

        def rows(name: str, heads: int, length: int, size: int) -> Tensor:
            return draw(name, 1, heads, sequences * length, size, dtype=self.dtype)

        def bounds(length: int, name: str) -> Tensor | None:
            if not self.packed:
                return None
            return memory.guarded(torch.tensor([0, length, 2 * length], dtype=torch.int32), name)

        value = rows("value", self.kv_heads, self.lk, self.dv)
        if self.spoilt:
            value[0, 0, self.lk // 2, 0] = torch.nan
        full = self.features and not self.packed
        shape = self.bias or (self.lq, self.lk)
        return {
            "dout": rows("dout", self.heads, self.lq, self.dv),
            "dlse": draw("dlse", 1, self.heads, sequences * self.lq) if self.features else None,
            "query": rows("query", self.heads, self.lq, self.d),
            "key": rows("key", self.kv_heads, self.lk, self.d),
            "value": value,
            "bias": draw("bias", 1, 1, *shape, dtype=self.dtype) if full else None,
            "alibi_slopes": draw("slopes", 1, self.heads) if self.features else None,
            "sinks": draw("sinks", self.heads) if self.features else None,
            "seed": memory.guarded(torch.tensor([77]), "seed") if self.features else None,
            "cu_seqlens_q": bounds(self.lq, "cu_seqlens_q"),
            "cu_seqlens_k": bounds(self.lk, "cu_seqlens_k"),
        }


def problems(module: ModuleType, case: Case, options: dict[str, Any]) -> list[str]:
    """What the emulator reports of the calls under a schedule, and which of their results are wrong."""
    module.emulator.options(**options)
    module.emulator.clear()
    extension._streams.cache_clear()
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        with (
            GuardedMemory(module) as memory,
            memory.guarded_outputs(),
            mock.patch.object(extension, "_load", return_value=module),
        ):
            wrong = _wrong_results(memory, case)
    except RuntimeError as error:
        wrong = [str(error)]
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
        extension._streams.cache_clear()
    return [*module.emulator.report(), *wrong]


def _wrong_results(memory: GuardedMemory, case: Case) -> list[str]:
    tensors, settings = case.tensors(memory), case.settings()
    names = ("out", "lse", "dquery", "dkey", "dvalue", "dbias", "dsinks")
    actual = _results(cuda_kernels, tensors, settings)
    wide = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    exact, own = _results(reference, wide, settings), _results(reference, tensors, settings)
    lines = []
    for name, result, expected, baseline in zip(names, actual, exact, own, strict=True):
        if result.numel() == 0:
            continue
        # What is NaN in the one is to be NaN in the other, and is no error then.
        result, expected, baseline = (
            torch.where(expected.isnan() & result.isnan(), 0.0, t) for t in (result, expected, baseline)
        )
        coarse = torch.finfo(torch.bfloat16 if case.tf32 else case.dtype).eps / torch.finfo(torch.float32).eps
        scale = _TERMS * max(coarse / testing.ARITHMETIC_ULPS, 1.0)
        comparison = testing.measure(result, expected, baseline, scale * expected.abs().amax())
        if not comparison.passed:
            lines.append(f"{name}: {comparison}")
    return lines


def _results(kernels: Any, tensors: dict[str, Any], settings: Settings) -> tuple[Tensor, ...]:
    dout, dlse, query, key, value, *others = tensors.values()
    out, lse = kernels.forward(query, key, value, *others, settings)
    incoming = (dout, dlse, query, key, value, out, lse)
    return out, lse, *kernels.backward(*incoming, *others, settings, tensors["bias"] is not None, True)
