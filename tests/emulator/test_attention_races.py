"""Every kernel of csrc/attention under the race detector, on guarded tensors."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from .attention_calls import Case, problems
from .build import build
from .conftest import IN_ORDER, SCHEDULES, built, kernels

_HALF = (torch.float16, torch.bfloat16)


def cases() -> list[Case]:
    """For each tile of csrc/attention/tiles.h lengths that end inside a tile, and two steps at least."""
    every = []
    for dtype in (*_HALF, torch.float32):
        features = (False, True) if dtype in _HALF else (True,)
        for d, lk in ((24, 70), (72, 70), (136, 35)):
            every += [Case(19, lk, d, d - 8, dtype, right=3, features=found) for found in features]
    return [
        *every,
        Case(70, 21, 16, 16, torch.bfloat16, heads=2, right=0),
        Case(35, 40, 16, 20, torch.float16, left=5, right=2, packed=True, features=True),
        Case(20, 35, 13, 7, torch.float32, bias=(1, 35), features=True, tf32=True),
        Case(20, 35, 16, 16, torch.float16, bias=(20, 1), features=True),
        Case(40, 70, 16, 16, torch.bfloat16, right=0, spoilt=True),
        Case(150, 20, 16, 16, torch.float16, left=5),  # queries and keys that nothing is visited for
    ]


@pytest.fixture(scope="module")
def watched() -> ModuleType:
    return built(lambda: build(race=True))


def test_every_kernel(watched: ModuleType) -> None:
    """Threads in order; and each instantiation of a kernel in csrc/attention is among what was launched."""
    for case in cases():
        assert problems(watched, case, IN_ORDER) == [], case
    found = kernels(watched, "attention_forward", "attention_backward")
    assert len(found) > 40
    assert [name for name, launched in found.items() if not launched] == []


@pytest.mark.parametrize("case", cases(), ids=str)
def test_random_schedules(watched: ModuleType, case: Case) -> None:
    for options in SCHEDULES[1 : 3 if case.d <= 64 else 2]:
        assert problems(watched, case, options) == []
