"""Every kernel of csrc/layer_norm under the race detector, on guarded tensors."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from .build import build
from .conftest import IN_ORDER, SCHEDULES, built, kernels
from .layer_norm_calls import Case, problems

# The least N of each tile of csrc/layer_norm/tiles.h, forward and backward: test_every_kernel sees to it.
SHORT = (8, 72, 264, 1032, 2056)
LONG = (8200, 16392)
ODD = (1, 3, 33, 129, 2049, 4097)  # no vectors


def cases() -> list[Case]:
    every = [Case(70, 8), Case(70, 7, add=True)]  # partial rows of several rows each
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        every += [Case(9, n, dtype, add=i % 2 == 0, rms=i % 3 == 2) for i, n in enumerate(SHORT)]
        every += [Case(2, n, dtype, add=i % 2 == 1, rms=i % 3 == 1) for i, n in enumerate(LONG)]
        every += [Case(9, n, dtype, add=i % 2 == 1, rms=i % 3 == 1) for i, n in enumerate(ODD)]
        every += [Case(5, 64, dtype, add=True, misaligned=True), Case(5, 512, dtype, misaligned=True)]
    return every


@pytest.fixture(scope="module")
def watched() -> ModuleType:
    return built(lambda: build(race=True))


def test_every_kernel(watched: ModuleType) -> None:
    """Threads in order; and each instantiation of a kernel in csrc/layer_norm is among what was launched."""
    for case in cases():
        assert problems(watched, case, IN_ORDER) == [], case
    found = kernels(watched, "layer_norm")
    assert len(found) > 20
    assert [name for name, launched in found.items() if not launched] == []


@pytest.mark.parametrize("case", cases(), ids=str)
def test_random_schedules(watched: ModuleType, case: Case) -> None:
    for options in SCHEDULES[1 : 3 if case.n < LONG[0] else 2]:
        assert problems(watched, case, options) == []
