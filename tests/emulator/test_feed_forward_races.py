"""Every kernel of csrc/feed_forward under the race detector, on guarded tensors."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from .build import build
from .conftest import IN_ORDER, SCHEDULES, built, kernels
from .feed_forward_calls import Case, problems

HALF = (torch.float16, torch.bfloat16)


def cases() -> list[Case]:
    """Each tile of csrc/feed_forward/tiles.h, by the number of large ones, with weights either way: that none
    is missing test_every_kernel sees to."""
    every = []
    for transposed in (False, True):
        for dtype in HALF:
            every.append(Case(70, 72, 72, 40, dtype, "geglu", transposed))
            every.append(Case(70, 40, 390, 35, dtype, "gelu", transposed))
        every.append(Case(70, 40, 70, 24, activation="swiglu", transposed=transposed))
        every.append(Case(70, 24, 70, 20, activation="gelu_tanh", transposed=transposed, tf32=True))
        every.append(Case(131, 20, 130, 24, activation="geglu", transposed=transposed, tf32=True))
        # Rows at multiples of 4 and of 2 bytes.
        every += [Case(5, 19, 26, 12, offset=1, activation="relu", transposed=transposed)]
        every += [Case(5, 45, 26, 13, HALF[i], "swiglu", transposed, 1 + i) for i in range(2)]
    # More tiles than blocks, of all sizes of a step.
    every += [
        Case(3, 40, 900, 12),
        Case(3, 70, 1200, 12, torch.float16),
        Case(3, 20, 600, 33, HALF[1], "swiglu"),
    ]
    # No product; no terms; one of everything.
    for dtype in (*HALF, torch.float32):
        every += [Case(70, 20, n, n, dtype, "swiglu", weight2=False) for n in (24, 131)]
    every += [Case(5, 0, 9, 7, activation="geglu"), Case(1, 1, 1, 1, torch.bfloat16, "swiglu")]
    return every


@pytest.fixture(scope="module")
def watched() -> ModuleType:
    return built(lambda: build(race=True))


def test_every_kernel(watched: ModuleType) -> None:
    """Threads in order; and each instantiation of a kernel in csrc/feed_forward is among what was
    launched."""
    for case in cases():
        assert problems(watched, case, IN_ORDER) == [], case
    found = kernels(watched, "linear_activation", "activation_backward", "bias_gradient")
    assert len(found) > 20
    assert [name for name, launched in found.items() if not launched] == []


@pytest.mark.parametrize("case", cases(), ids=str)
def test_random_schedules(watched: ModuleType, case: Case) -> None:
    for options in SCHEDULES[1 : 3 if case.m * case.n < 10_000 else 2]:
        assert problems(watched, case, options) == []
