"""What barriers, shuffles, votes, reductions and cp.async give in kernels that use them rightly."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import IN_ORDER, SCHEDULES
from .guarded import GuardedMemory


def run(
    module: ModuleType,
    name: str,
    input: Tensor,
    output_words: int,
    *,
    block: int,
    grid: int = 1,
    shared: int = 0,
) -> Tensor:
    """The output of a kernel of int32 words in guarded memory; asserts that nothing was reported."""
    with GuardedMemory(module) as memory:
        source = memory.guarded(input.to(torch.int32), "input")
        output = memory.empty((output_words,), (1,), torch.int32, label="output")
        module.run(
            name,
            input=source.data_ptr(),
            output=output.data_ptr(),
            count=input.numel(),
            grid=grid,
            block=block,
            shared_bytes=shared,
        )
        result = output.clone()
    assert module.emulator.report() == []
    return result


def test_shuffles(probes: ModuleType) -> None:
    values = torch.randint(2**31, (32,))
    lane = torch.arange(32)
    rows = [
        torch.full((32,), 5),
        lane // 8 * 8 + 3,
        lane ^ 9,
        torch.where(lane % 8 < 4, lane, lane ^ 4),  # of a pair of segments, only the higher reaches the lower
        torch.where(lane + 4 < 32, lane + 4, lane),
        torch.where(lane % 16 + 4 < 16, lane + 4, lane),
        torch.where(lane % 8 >= 3, lane - 3, lane),
        lane ^ 15,
    ]
    for options in SCHEDULES:
        probes.emulator.options(**options)
        shuffled = run(probes, "shuffles", values, 8 * 32, block=32).view(8, 32)
        for row, source in zip(shuffled, rows, strict=True):
            assert row.tolist() == values[source].tolist()


def test_wide_shuffles(probes: ModuleType) -> None:
    output = run(probes, "wide_shuffles", torch.zeros(32), 64, block=32)
    assert output[:32].view(torch.float32).tolist() == [496.0] * 32
    lane = torch.arange(32)
    following = torch.where(lane < 31, lane + 1, lane)
    assert output[32:].tolist() == (following + 100 + following).tolist()


@pytest.mark.parametrize("pattern", (0, 0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x12345678))
def test_votes(probes: ModuleType, pattern: int) -> None:
    bits = torch.tensor([pattern >> lane & 1 for lane in range(32)])
    ballot, any_half, all_half, ballot_half, active = run(probes, "votes", bits, 160, block=32).view(5, 32)
    halves = [pattern & 0xFFFF] * 16 + [pattern & 0xFFFF0000] * 16
    assert [word & 0xFFFFFFFF for word in ballot.tolist()] == [pattern] * 32
    assert any_half.tolist() == [int(half != 0) for half in halves]
    assert all_half.tolist() == [int(half in (0xFFFF, 0xFFFF0000)) for half in halves]
    assert [word & 0xFFFFFFFF for word in ballot_half.tolist()] == halves
    assert [word & 0xFFFFFFFF for word in active[7:].tolist()] == [0xFFFFFF80] * 25


def test_reductions(probes: ModuleType) -> None:
    values = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32)
    halves = [values[:16].tolist(), values[16:].tolist()]
    functions: list[Callable[[list[int]], int]] = [
        lambda half: sum(half),
        lambda half: min(value & 0xFFFFFFFF for value in half),
        lambda half: min(half),
        lambda half: max(half),
        lambda half: functools.reduce(operator.and_, half),
        lambda half: functools.reduce(operator.xor, half),
    ]
    output = run(probes, "reductions", values, 7 * 32, block=32).view(7, 32)
    for row, function in zip(output[:6].tolist(), functions, strict=True):
        expected = [function(half) & 0xFFFFFFFF for half in halves for _ in range(16)]
        assert [word & 0xFFFFFFFF for word in row] == expected
    assert [word & 0xFFFFFFFF for word in output[6, 7:].tolist()] == [0xFFFFFF80] * 25


@pytest.mark.parametrize("block", (1, 32, 33, 256, 1024))
def test_block_barriers(probes: ModuleType, block: int) -> None:
    values = torch.arange(3 * block)
    for options in SCHEDULES[:3]:
        probes.emulator.options(**options)
        output = run(probes, "reverse", values, 3 * block, block=block, grid=3, shared=4 * block)
        assert output.tolist() == (values + 1).tolist()


def test_named_barriers(probes: ModuleType) -> None:
    values = torch.arange(128) * 3
    for options in SCHEDULES:
        probes.emulator.options(**options)
        output = run(probes, "named_barriers", values, 128, block=128, shared=512).view(4, 32)
        assert output[1].tolist() == values[:32].tolist()
        assert output[3].tolist() == values[64:96].tolist()


def test_copies_fill_with_zeros(probes: ModuleType) -> None:
    valid = torch.tensor([0, 4, 8, 12, 16, 16, 1, 2])
    words = torch.randint(2**31, (8, 4), dtype=torch.int32)
    expected = words.view(torch.uint8).clone()
    expected[torch.arange(16) >= valid[:, None]] = 0
    for options in SCHEDULES:
        probes.emulator.options(**options)
        output = run(probes, "zero_fill", torch.cat((valid.int(), words.flatten())), 32, block=8, shared=128)
        assert torch.equal(output.view(torch.uint8), expected.flatten())


def test_copies_of_two_groups(probes: ModuleType) -> None:
    words = torch.arange(2 * 64 * 4)
    expected = words.view(2, 64, 4)[:, :, 0].flip(1)
    for options in SCHEDULES:
        probes.emulator.options(**options)
        output = run(probes, "groups", words, 128, block=64, shared=2048)
        assert output.tolist() == expected.flatten().tolist()


def test_copies_stay_in_flight(fast_probes: ModuleType) -> None:
    """Copies land at the wait where threads run in order, at any time where they run at random."""
    words = torch.arange(4 * 32) + 1
    fast_probes.emulator.options()
    assert run(fast_probes, "before_the_wait", words, 32, block=32, shared=512).tolist() == [-1] * 32
    fast_probes.emulator.options(seed=1, random_schedule=True)
    landed = run(fast_probes, "before_the_wait", words, 32, block=32, shared=512)
    assert 0 < (landed == words[::4]).sum() < 32 and ((landed == -1) | (landed == words[::4])).all()
    fast_probes.emulator.options()


def test_seeds_decide_the_order(fast_probes: ModuleType) -> None:
    def order(options: dict[str, Any]) -> list[int]:
        fast_probes.emulator.options(**options)
        return run(fast_probes, "order", torch.zeros(64), 64, block=64, shared=4).tolist()

    orders = [order(options) for options in SCHEDULES]
    assert orders == [order(options) for options in SCHEDULES]
    assert len({tuple(one) for one in orders}) == len(SCHEDULES)
    assert all(sorted(one) == list(range(64)) for one in orders)
    assert order(IN_ORDER) == order({"seed": 5})


def test_coordinates(probes: ModuleType) -> None:
    output = run(probes, "coordinates", torch.zeros(1), 12 * 24, block=1).view(2, 3, 2, 3, 2, 4)
    axes = [torch.arange(size) for size in (2, 3, 2, 3, 2, 4)]
    bz, by, bx, tz, ty, tx = torch.meshgrid(*axes, indexing="ij")
    assert torch.equal(output, (tx | ty << 4 | tz << 8 | bx << 12 | by << 16 | bz << 20).int())


@pytest.mark.parametrize(("grid", "block", "shared"), [(0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, 232449)])
def test_launch_limits(probes: ModuleType, grid: int, block: int, shared: int) -> None:
    with pytest.raises(RuntimeError, match="invalid"):
        run(probes, "reverse", torch.zeros(1), 1, block=block, grid=grid, shared=shared)
