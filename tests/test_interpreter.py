"""bfloat16 in Triton kernels is the arithmetic of torch.bfloat16: through the interpreter, and on a GPU where
there is one.

Expected values are torch's on the CPU, compared bit by bit (any NaN equals any other). Where a GPU may order
a sum as it likes the values are small integers, whose sums are exact in every order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from llmkernels import interpreter  # noqa: E402

if interpreter.active():
    interpreter.install()

_BLOCK = 1024


@triton.jit
def _binary_kernel(a_ptr, b_ptr, out_ptr, size, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    a = tl.load(a_ptr + offs, mask=mask, other=0.0)
    b = tl.load(b_ptr + offs, mask=mask, other=0.0)
    if OP == "add":
        out = a + b
    elif OP == "subtract":
        out = a - b
    elif OP == "multiply":
        out = a * b
    elif OP == "divide":
        out = a / b
    elif OP == "maximum":
        out = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "less":
        out = a < b
    elif OP == "where":
        out = tl.where(a < b, a, -b)
    tl.store(out_ptr + offs, out, mask=mask)


@triton.jit
def _fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.fma(tl.load(a_ptr + offs), tl.load(b_ptr + offs), tl.load(c_ptr + offs)))


@triton.jit
def _cast_kernel(a_ptr, out_ptr, size, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs, mask=offs < size, other=0)
    tl.store(out_ptr + offs, a.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=offs < size)


@triton.jit
def _reduce_kernel(a_ptr, out_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offs_m = tl.arange(0, ROWS)
    a = tl.load(a_ptr + offs_m[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    if OP == "sum":
        tl.store(out_ptr + offs_m, tl.sum(a, axis=1))
    elif OP == "max":
        tl.store(out_ptr + offs_m, tl.max(a, axis=1))
    elif OP == "min":
        tl.store(out_ptr + offs_m, tl.min(a, axis=1))
    elif OP == "argmax":
        tl.store(out_ptr + offs_m, tl.argmax(a, axis=1))
    elif OP == "sum_of_all":
        tl.store(out_ptr, tl.sum(a))


@triton.jit
def _cumsum_kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.cumsum(tl.load(a_ptr + offs), axis=0))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offs_m = tl.arange(0, SIZE)
    tile = offs_m[:, None] * SIZE + offs_m[None, :]  # [SIZE, SIZE]
    out = tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile))
    tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _constant_kernel(out_ptr, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.full([BLOCK], VALUE, dtype=tl.bfloat16))


def _bits(values: list[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limit = 1 << (8 * dtype.itemsize - 1)
    return torch.tensor([v - 2 * limit if v >= limit else v for v in values], dtype=integers).view(dtype)


def _operands() -> tuple[Tensor, Tensor]:
    """Pairs of edge cases (each with each) and of random values over the whole range of exponents."""
    # Both zeros, ones, smallest and largest denormal, smallest normal, largest finite, infinities, NaN, odd
    # mantissas.
    edges = _bits(
        [
            0x0000,
            0x8000,
            0x3F80,
            0xBF80,
            0x0001,
            0x807F,
            0x0080,
            0x7F7F,
            0xFF7F,
            0x7F80,
            0xFF80,
            0x7FC0,
            0x3F81,
            0x3B7F,
        ]
    )
    a, b = (grid.reshape(-1) for grid in torch.meshgrid(edges, edges, indexing="ij"))
    generator = torch.Generator().manual_seed(0)
    random = (
        torch.randint(-(2**15), 2**15, (2, 4000), generator=generator).to(torch.int16).view(torch.bfloat16)
    )
    near = torch.randn((2, 4000), generator=generator).bfloat16()
    return torch.cat((a, random[0], near[0])), torch.cat((b, random[1], near[1]))


def _assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    actual = actual.cpu()
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if expected.is_floating_point():
        numbers = ~expected.isnan()
        assert torch.equal(actual.isnan(), expected.isnan())
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
        actual, expected = actual[numbers].view(integers), expected[numbers].view(integers)
    assert torch.equal(actual, expected)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.subtract,
    "multiply": torch.multiply,
    "divide": torch.divide,
    "maximum": torch.maximum,
    "less": lambda a, b: torch.less(a, b).to(torch.int8),
    "where": lambda a, b: torch.where(a < b, a, 0 - b),
}


@pytest.mark.parametrize("op", _BINARY)
def test_elementwise(op: str, device: torch.device) -> None:
    a, b = _operands()
    if op == "divide" and not interpreter.active():
        a, b = a[-4000:], b[-4000:]  # a GPU divides approximately at the ends of the range
    expected = _BINARY[op](a, b)
    out = torch.empty_like(expected, device=device)
    grid = (triton.cdiv(a.numel(), _BLOCK),)
    _binary_kernel[grid](a.to(device), b.to(device), out, a.numel(), op, _BLOCK)
    if (
        op == "where"
    ):  # -b and 0 - b differ in the sign of a zero, and Triton's releases in which one they make
        out, expected = out + 0.0, expected + 0.0
    _assert_same_bits(out, expected)


def test_fma_rounds_the_float32_result_once(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn((3, _BLOCK), generator=generator).bfloat16()
    out = torch.empty_like(a, device=device)
    _fma_kernel[(1,)](a.to(device), b.to(device), c.to(device), out, _BLOCK)
    _assert_same_bits(out, torch.addcmul(c.float(), a.float(), b.float()).bfloat16())


def _cast(source: Tensor, dtype: torch.dtype, device: torch.device, rounding: str | None = None) -> Tensor:
    out = torch.empty(source.shape, dtype=dtype, device=device)
    grid = (triton.cdiv(source.numel(), 16 * _BLOCK),)
    _cast_kernel[grid](source.to(device), out, source.numel(), rounding, 16 * _BLOCK)
    return out


_EVERY_16_BITS = torch.arange(2**16).to(torch.int16)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64), ids=str)
def test_every_bfloat16_widens(dtype: torch.dtype, device: torch.device) -> None:
    source = _EVERY_16_BITS.view(torch.bfloat16)
    _assert_same_bits(_cast(source, dtype, device), source.to(dtype))


def _rounding_cases() -> Tensor:
    """Float32 around every kind of boundary: each upper half with lower halves below, at and above the
    tie."""
    upper = torch.arange(0, 2**16, 7).to(torch.int32).repeat_interleave(6) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    patterns = upper | lower.repeat(upper.numel() // 6)
    # Every exponent's edge, where a carry leaves the mantissa; NaN whose payload lies in the lower half
    # alone.
    edges = [0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0xFF7FFFFF, 0x7F800000, 0x7F800001, 0xFF800001, 0x7FFFFFFF]
    edges += [0x00000001, 0x00008000, 0x00018000, 0x007F8000, 0x007FFFFF, 0x80008001]
    return torch.cat((patterns.view(torch.float32), _bits(edges, torch.float32)))


def test_float32_rounds_to_nearest_even(device: torch.device) -> None:
    source = _rounding_cases()
    _assert_same_bits(_cast(source, torch.bfloat16, device), source.bfloat16())


def test_rounding_toward_zero_can_be_asked_for(device: torch.device) -> None:
    source = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    expected = (source.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    _assert_same_bits(_cast(source, torch.bfloat16, device, "rtz"), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.int32, torch.int16), ids=str)
def test_other_numbers_become_bfloat16(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.int32:
        source = torch.randint(-(2**24), 2**24, (_BLOCK,), generator=torch.Generator().manual_seed(0)).to(
            dtype
        )
    else:
        source = _EVERY_16_BITS.view(dtype)
    _assert_same_bits(_cast(source, torch.bfloat16, device), source.to(torch.bfloat16))


def test_bfloat16_becomes_an_integer(device: torch.device) -> None:
    source = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 1000).bfloat16()
    _assert_same_bits(_cast(source, torch.int32, device), source.to(torch.int32))


def _small_integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(0)).bfloat16()


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda a: a.sum(dim=1),
    "max": lambda a: a.amax(dim=1),
    "min": lambda a: a.amin(dim=1),
    "argmax": lambda a: a.argmax(dim=1).to(torch.int32),
    "sum_of_all": lambda a: a.sum().reshape(1),
}


@pytest.mark.parametrize("op", _REDUCTIONS)
def test_reductions(op: str, device: torch.device) -> None:
    a = _small_integers(16, 32)
    expected = _REDUCTIONS[op](a)
    out = torch.empty_like(expected, device=device)
    _reduce_kernel[(1,)](a.to(device), out, op, 16, 32)
    _assert_same_bits(out, expected)


def test_cumsum(device: torch.device) -> None:
    a = _small_integers(32)
    out = torch.empty_like(a, device=device)
    _cumsum_kernel[(1,)](a.to(device), out, 32)
    _assert_same_bits(out, a.cumsum(dim=0))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_dot(dtype: torch.dtype, device: torch.device) -> None:
    # Multiples of 1/64: every product and every sum is exact in float32.
    a, b = (torch.randint(-64, 65, (2, 16, 16), generator=torch.Generator().manual_seed(0)) / 64).bfloat16()
    out = torch.empty((16, 16), dtype=dtype, device=device)
    _dot_kernel[(1,)](a.to(device), b.to(device), out, 16)
    _assert_same_bits(out, (a.float() @ b.float()).to(dtype))


def test_constant(device: torch.device) -> None:
    out = torch.empty(16, dtype=torch.bfloat16, device=device)
    _constant_kernel[(1,)](out, 1.2345, 16)
    _assert_same_bits(out, torch.full((16,), 1.2345, dtype=torch.bfloat16))


@pytest.mark.skipif(not interpreter.active(), reason="Triton compiles here")
def test_kernels_overflow_without_warnings(device: torch.device) -> None:
    source = torch.full((16,), 3.3e38)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _cast(source, torch.float16, device).isinf().all()


@pytest.mark.skipif(not interpreter.active(), reason="Triton compiles here")
def test_a_second_install_changes_nothing() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    before = dict(vars(InterpreterBuilder))
    interpreter.install()
    assert dict(vars(InterpreterBuilder)) == before


def test_narrow_and_widen_are_inverse() -> None:
    patterns = _EVERY_16_BITS.view(torch.bfloat16)
    values = interpreter.widen(_EVERY_16_BITS.numpy().view("uint16"))
    back = torch.from_numpy(interpreter.narrow(values).view("int16")).view(torch.bfloat16)
    _assert_same_bits(back, patterns)
