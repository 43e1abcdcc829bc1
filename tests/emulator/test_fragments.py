"""Whole products through the fragment loaders, the masks of dropout, and swizzles without bank conflicts."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from llmkernels.dropout import dropout_mask, dropout_threshold

from .conftest import SCHEDULES
from .test_features import run

PRODUCTS = {
    "product_f16": (torch.float16, False, False),
    "product_f16_trans_a": (torch.float16, True, False),
    "product_bf16_trans_b": (torch.bfloat16, False, True),
    "product_bf16_trans_both": (torch.bfloat16, True, True),
    "product_tf32": (torch.float32, False, False),
    "product_tf32_trans_a": (torch.float32, True, False),
    "product_3xtf32_trans_b": (torch.float32, False, True),
}


def _whole(rows: int, columns: int, size: int = 8) -> Tensor:
    """Whole numbers, so small that every dtype and every order of summation is exact."""
    return torch.randint(-size, size + 1, (rows, columns)).double()


def _words(*matrices: Tensor) -> Tensor:
    return torch.cat([matrix.contiguous().view(-1).view(torch.int32) for matrix in matrices])


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(probes: ModuleType, name: str) -> None:
    dtype, trans_a, trans_b = PRODUCTS[name]
    # 4097 takes 13 bits, two more than tf32 has: only the split product is exact.
    for sizes in ((64, 4097), (4097, 64)) if "3x" in name else ((8, 8),):
        a, b = _whole(32, 32, sizes[0]), _whole(32, 32, sizes[1])
        expected = ((a.T if trans_a else a) @ (b if trans_b else b.T))[:16, :16]
        for options in SCHEDULES[:3]:
            probes.emulator.options(**options, bank_conflicts=True)
            words, shared = _words(a.to(dtype), b.to(dtype)), 2 * 32 * 32 * dtype.itemsize
            output = run(probes, name, words, 256, block=32, shared=shared)
            assert torch.equal(output.view(torch.float32).view(16, 16).double(), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_accumulators_become_operands(probes: ModuleType, dtype: torch.dtype) -> None:
    a, b, c = _whole(16, 16, 2), _whole(16, 16, 2), _whole(16, 16, 2)
    name = {torch.float16: "chained_f16", torch.bfloat16: "chained_bf16", torch.float32: "chained_tf32"}[
        dtype
    ]
    words = _words(a.to(dtype), b.to(dtype), c.to(dtype))
    probes.emulator.options(bank_conflicts=True)
    output = run(probes, name, words, 256, block=32, shared=3 * 256 * dtype.itemsize)
    assert torch.equal(output.view(torch.float32).view(16, 16).double(), a @ b.T @ c)


def test_dropout_of_accumulators(probes: ModuleType) -> None:
    seed, columns, dropout_p = 0x123456789ABCDEF, 45, 0.4
    mask = dropout_mask(torch.tensor([seed]), 40, columns, dropout_p)
    for row, column in ((0, 0), (8, 16), (21, 28)):
        values = [seed & 0xFFFFFFFF, seed >> 32, dropout_threshold(dropout_p), columns, row, column]
        words = torch.tensor([value - 2**32 if value >= 2**31 else value for value in values])
        output = run(probes, "dropout_masks", words, 256 + 128, block=32)
        assert torch.equal(output[:256].view(16, 16).bool(), mask[row : row + 16, column : column + 16])
        assert torch.equal(output[256:].view(8, 16).bool(), mask[row : row + 8, column : column + 16])


def _places(probes: ModuleType, row_bytes: int) -> Tensor:
    """[16, chunks]: which of the eight 16-byte places of shared memory's 128-byte lines a chunk has."""
    chunks = row_bytes // 16
    offsets = run(probes, f"swizzles_{row_bytes}", torch.zeros(1), 16 * chunks, block=32)
    assert sorted(offsets.tolist()) == list(range(0, 16 * row_bytes, 16))
    assert (offsets.view(16, chunks) // row_bytes == torch.arange(16)[:, None]).all()
    return offsets.view(16, chunks) // 16 % 8


@pytest.mark.parametrize("row_bytes", (16, 32, 64, 96, 128, 192, 384, 512))
def test_a_column_of_chunks_meets_every_bank(probes: ModuleType, row_bytes: int) -> None:
    places = _places(probes, row_bytes)
    for rows in (places[:8], places[8:]):
        for column in rows.T:
            assert sorted(column.tolist()) == list(range(8))


@pytest.mark.parametrize("row_bytes", (64, 128, 192, 384, 512))
def test_two_chunks_of_four_rows_meet_every_bank(probes: ModuleType, row_bytes: int) -> None:
    """Accumulators of 32 bits, and 32-bit elements read down a column."""
    places = _places(probes, row_bytes)
    sets = [slice(0, 4), slice(4, 8)]
    if row_bytes % 128 == 0:
        sets += [slice(0, 8, 2), slice(1, 8, 2)]  # the order of accumulators
    for rows in sets:
        for first in range(0, row_bytes // 16, 2):
            assert sorted(places[rows, first : first + 2].flatten().tolist()) == list(range(8))
