"""The sums of mma.sync: what Fasi et al. (PeerJ Computer Science 7:e330) and Khattak and Mikaitis
(arXiv 2512.07004) have measured on an A100, the coarsest of the GPUs that the kernels are for."""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType

import pytest
import torch
from torch import Tensor

from llmkernels.wrappers import _a_fragments, _accumulators, _as_int32, _b_fragments, _bits, _floats

from .build import build
from .conftest import built

DTYPES = {"mma_m16n8k16_f16": torch.float16, "mma_m16n8k16_bf16": torch.bfloat16, "mma_m16n8k8_tf32": None}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return built(build)


def multiply(module: ModuleType, name: str, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """D + A B as the emulated instruction gives it, [32, 4] as the lanes hold it."""
    dtype = DTYPES[name]
    words = torch.cat((_a_fragments(a, dtype), _b_fragments(b, dtype), _bits(_accumulators(d))), 1)
    input, output = _as_int32(words).contiguous(), torch.empty(32, 4, dtype=torch.int32)
    module.run_wrapper(name, input.data_ptr(), output.data_ptr(), 0, 0)
    return output.view(torch.float32).double()


def _first_row(depth: int, terms: list[float], start: float) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices whose product adds these terms to ``start`` in the upper left corner."""
    a, b, d = torch.zeros(16, depth).double(), torch.zeros(depth, 8).double(), torch.zeros(16, 8).double()
    a[0, : len(terms)] = torch.tensor(terms, dtype=torch.float64)
    b[:, 0] = 1.0
    d[0, 0] = start
    return a, b, d


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    ("terms", "start", "result"),
    (
        ([2.0**-24, 2.0**-24], 1.0, 1.0 + 2.0**-23),  # the bit below the last place is kept ...
        ([2.0**-24], 1.0, 1.0),  # ... and cut off at the end, not rounded
        ([2.0**-24] * 3, 1.0, 1.0 + 2.0**-23),
        ([2.0**-24] * 3, -1.0, -(1.0 - 2.0**-23 - 2.0**-24)),
        ([2.0**-14, 1.0, -1.0], 2.0**-20, 2.0**-14 + 2.0**-20),
    ),
)
def test_alignment(module: ModuleType, name: str, terms: list[float], start: float, result: float) -> None:
    a, b, d = _first_row(8 if DTYPES[name] is None else 16, terms, start)
    assert multiply(module, name, a, b, d)[0, 0].item() == result


@pytest.mark.parametrize("name", DTYPES)
def test_what_lies_below_the_extra_bit_is_lost(module: ModuleType, name: str) -> None:
    """Terms are cut off one by one, in each block: quarters of an ulp vanish, however many."""
    a, b, d = _first_row(8 if DTYPES[name] is None else 16, [0.0], 2.0)
    a[0, :], b[:, 0] = 2.0**-12, 2.0**-12
    assert multiply(module, name, a, b, d)[0, 0].item() == 2.0


def _cut(value: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(value / unit) * unit


def _exponent(value: float) -> int:
    return math.frexp(value)[1] - 1


def _model(a: list[float], b: list[float], start: float, block: int) -> float:
    """One element, in exact arithmetic."""
    for first in range(0, len(a), block):
        pairs = [
            (x, y) for x, y in zip(a[first : first + block], b[first : first + block], strict=True) if x * y
        ]
        exponents = [_exponent(x) + _exponent(y) for x, y in pairs] + ([_exponent(start)] if start else [])
        if not exponents:
            continue
        unit = Fraction(2) ** (max(exponents) - 24)
        total = _cut(Fraction(start), unit) + sum(_cut(Fraction(x) * Fraction(y), unit) for x, y in pairs)
        if total:
            total = _cut(total, Fraction(2) ** (_exponent(float(total)) - 23))
        start = float(total)
    return start


@pytest.mark.parametrize("name", DTYPES)
def test_random_sums_against_exact_arithmetic(module: ModuleType, name: str) -> None:
    dtype = DTYPES[name]
    depth, block = (8, 4) if dtype is None else (16, 8)
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        a, b, d = (torch.randn(shape, generator=random) for shape in ((16, depth), (depth, 8), (16, 8)))
        a = a * 2.0 ** torch.randint(-6, 6, a.shape, generator=random)
        if dtype is None:
            a, b = (_floats(_bits(matrix) & ~0x1FFF) for matrix in (a, b))
        else:
            a, b = a.to(dtype), b.to(dtype)
        a, b, d = a.double(), b.double(), d.double()
        expected = [
            [_model(a[i].tolist(), b[:, j].tolist(), d[i, j].item(), block) for j in range(8)]
            for i in range(16)
        ]
        assert torch.equal(multiply(module, name, a, b, d), _accumulators(torch.tensor(expected).double()))


def test_infinities_and_overflow(module: ModuleType) -> None:
    a, b, d = _first_row(16, [1.0, math.inf], 1.0)
    assert multiply(module, "mma_m16n8k16_f16", a, b, d)[0, 0].item() == math.inf
    b[1, 0] = 0.0
    assert math.isnan(multiply(module, "mma_m16n8k16_f16", a, b, d)[0, 0].item())
    largest = 2.0**127
    a, b, d = _first_row(16, [largest, largest] + [0.0] * 6 + [-largest], 0.0)
    assert multiply(module, "mma_m16n8k16_bf16", a, b, d)[0, 0].item() == math.inf


@pytest.mark.parametrize("name", DTYPES)
def test_other_sums_do_not_notice_a_nan(module: ModuleType, name: str) -> None:
    """Not to the bit: what a masked slot holds must not change its neighbours."""
    depth = 8 if DTYPES[name] is None else 16
    random = torch.Generator().manual_seed(7)
    a, b, d = (torch.randn(shape, generator=random) for shape in ((16, depth), (depth, 8), (16, 8)))
    a, b = (matrix.to(torch.bfloat16).double() for matrix in (a, b))
    clean = multiply(module, name, a, b, d)
    a[3, 5], b[2, 6] = math.nan, math.inf
    spoilt = multiply(module, name, a, b, d)
    places = torch.arange(16 * 8).view(16, 8)
    touched = torch.isin(_accumulators(places), torch.cat((places[3], places[:, 6])))
    assert torch.equal(clean[~touched], spoilt[~touched])
    assert not spoilt[touched].isfinite().any()
