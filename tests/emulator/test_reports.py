"""Every kind of report: given for the kernel with the bug under every schedule, not for its twin."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from .conftest import SCHEDULES
from .guarded import GuardedMemory


class Twins(NamedTuple):
    """How to launch two kernels of kernels/twins.cu, and the kind of report that the bug must give."""

    name: str
    kind: str
    block: int = 64
    grid: int = 1
    shared: int = 0
    input_words: int = 64
    output_words: int = 64


MEMORY = (
    Twins("missing_barrier", "race", shared=256),
    Twins("missing_warp_sync", "race", shared=256),
    Twins("second_warp_sync_missing", "race", shared=256),
    Twins("write_after_reads", "race", shared=256),
    Twins("shuffle_for_a_barrier", "race", shared=256),
    Twins("reused_too_early", "race", shared=256),
    Twins("missing_wait", "race", shared=1024, input_words=256),
    Twins("wait_too_weak", "race", shared=2048, input_words=512),
    Twins("copy_overwritten", "race", shared=1024, input_words=256),
    Twins("copy_over_a_reader", "race", shared=1024, input_words=512),
    Twins("uninitialised", "uninitialised", shared=256),
    Twins("read_past_the_end", "out of bounds"),
    Twins("write_past_the_end", "out of bounds"),
    Twins("copy_past_the_end", "out of bounds", block=32, shared=512, input_words=110),
    Twins("shared_past_the_end", "out of bounds", shared=256),
    Twins("misaligned", "misaligned", block=1),
    Twins("global_race", "race"),
    Twins("blocks_write_one_word", "race between blocks", grid=4),
    Twins("block_reads_its_neighbour", "race between blocks", grid=4),
    Twins("matrix_without_warp_sync", "race", block=32, shared=512),
    Twins("matrix_without_barrier", "race", shared=1024),
    Twins("matrix_before_its_copy", "race", shared=1024, input_words=256),
    Twins("matrix_of_own_copies", "race", block=32, shared=512, input_words=128),
    Twins("copy_over_a_matrix", "race", shared=1024, input_words=256),
    Twins("zero_fill_forgotten", "uninitialised", block=32, shared=512),
    Twins("matrix_past_the_end", "out of bounds", block=32, shared=512),
    Twins("stored_matrix_read_too_early", "race", block=32, shared=512),
    Twins("tile_not_filled", "uninitialised", block=32, shared=512),
    Twins("stored_matrices_overlap", "race", block=32, shared=512),
)
PROGRESS = (
    Twins("divergent_barrier", "divergent barrier", block=32),
    Twins("deadlock", "deadlock"),
    Twins("divergent_warp", "divergent warp", block=32),
    Twins("inactive_lane", "inactive lane", block=32),
    Twins("wrong_mask", "bad mask", block=32),
    Twins("unmapped", "fault"),
    Twins("matrix_misaligned", "misaligned", block=32, shared=512),
    Twins("matrix_of_half_a_warp", "divergent warp", block=32, shared=512),
    Twins("two_kinds_of_matrix", "divergent warp", block=32, shared=512),
    Twins("stored_matrix_misaligned", "misaligned", block=32, shared=1024),
    Twins("product_of_half_a_warp", "divergent warp", block=32),
    Twins("two_kinds_of_product", "divergent warp", block=32),
    Twins("tf32_not_rounded", "bad operand", block=32),
    Twins("copy_4_misaligned", "misaligned", shared=256),
    Twins("copy_8_misaligned", "misaligned", shared=512),
    Twins("copy_to_a_misaligned_place", "misaligned", block=32, shared=1024),
)
# Nothing is wrong with these but their results.
WRONG_RESULT = (
    Twins("words_of_a_exchanged", "", block=32, shared=1024),
    Twins("words_of_b_exchanged", "", block=32, shared=1024),
)
BANK_CONFLICT = Twins("bank_conflict", "bank conflict", block=32, shared=4096)


def reports(
    module: ModuleType, twins: Twins, bug: bool, options: dict[str, Any], outputs: list[Tensor] | None = None
) -> list[str]:
    """What is reported, and asserted to be the error of the launch where it has one; what the kernel wrote is
    added to outputs."""
    module.emulator.options(**options)
    module.emulator.clear()
    error = None
    with GuardedMemory(module) as memory:
        input = memory.guarded(torch.arange(twins.input_words, dtype=torch.int32), "input")
        output = memory.empty((twins.output_words,), (1,), torch.int32, label="output")
        try:
            module.run(
                twins.name,
                bug=bug,
                input=input.data_ptr(),
                output=output.data_ptr(),
                count=twins.input_words,
                grid=twins.grid,
                block=twins.block,
                shared_bytes=twins.shared,
            )
        except RuntimeError as raised:
            error = str(raised)
        if outputs is not None:
            outputs.append(output.clone())
    lines: list[str] = module.emulator.report()
    module.emulator.clear()
    if error is not None:
        assert any(line.startswith(error.removeprefix(f"{twins.name}: ")) for line in lines)
    return lines


@pytest.mark.parametrize("twins", MEMORY + PROGRESS, ids=lambda twins: twins.name)
def test_race_build(race_probes: ModuleType, twins: Twins) -> None:
    for options in SCHEDULES:
        assert reports(race_probes, twins, False, options) == []
        found = reports(race_probes, twins, True, options)
        assert any(line.startswith(f"{twins.kind}: ") for line in found), (options, found)


@pytest.mark.parametrize("twins", PROGRESS, ids=lambda twins: twins.name)
def test_fast_build(fast_probes: ModuleType, twins: Twins) -> None:
    for options in SCHEDULES:
        assert reports(fast_probes, twins, False, options) == []
        found = reports(fast_probes, twins, True, options)
        assert any(line.startswith(f"{twins.kind}: ") for line in found), (options, found)


@pytest.mark.parametrize("twins", WRONG_RESULT, ids=lambda twins: twins.name)
def test_a_wrong_fragment_gives_a_wrong_result(probes: ModuleType, twins: Twins) -> None:
    for options in SCHEDULES:
        outputs: list[Tensor] = []
        for bug in (False, False, True):
            assert reports(probes, twins, bug, options, outputs) == []
        assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_bank_conflicts_are_reported_on_demand(probes: ModuleType) -> None:
    for options in SCHEDULES:
        asked = {**options, "bank_conflicts": True}
        assert reports(probes, BANK_CONFLICT, False, asked) == []
        assert reports(probes, BANK_CONFLICT, True, options) == []
        found = reports(probes, BANK_CONFLICT, True, asked)
        assert found and all(line.startswith("bank conflict: ldmatrix.x4") for line in found)


def test_fast_build_finds_a_write_when_its_buffer_is_freed(fast_probes: ModuleType) -> None:
    (twins,) = (twins for twins in MEMORY if twins.name == "write_past_the_end")
    assert reports(fast_probes, twins, False, {}) == []
    (line,) = reports(fast_probes, twins, True, {})
    assert line.startswith("out of bounds") and "0 bytes past the end of the 256 bytes of 'output'" in line


def test_sentences_name_the_place(race_probes: ModuleType) -> None:
    def sentence(name: str) -> str:
        (twins,) = (twins for twins in MEMORY + PROGRESS if twins.name == name)
        lines = reports(race_probes, twins, True, {})
        return next(line for line in lines if line.startswith(twins.kind))

    race = sentence("missing_barrier")
    assert "of shared memory" in race and "block (0, 0, 0)" in race and "thread 31" in race
    assert "[twins.cu:" in race
    for name in ("matrix_misaligned", "product_of_half_a_warp", "tf32_not_rounded", "copy_8_misaligned"):
        assert "[matrix_twins.cu:" in sentence(name)
    beyond = sentence("read_past_the_end")
    assert "load of 4 bytes by thread 63" in beyond
    assert "0 bytes past the end of the 256 bytes of 'input'" in beyond
    assert "byte 0 of 'output'" in sentence("blocks_write_one_word")
    assert re.search(r"\[fragments\.cuh:\d+ < matrix_twins\.cu:\d+", sentence("tile_not_filled"))
    divergent = sentence("divergent_barrier")
    assert "threads 0-15 wait at __syncthreads" in divergent and "threads 16-31 have exited" in divergent
    deadlock = sentence("deadlock")
    assert "threads 0-31 wait at barrier 1" in deadlock and "threads 32-63 wait at barrier 2" in deadlock


def test_a_freed_buffer_is_out_of_bounds(race_probes: ModuleType) -> None:
    race_probes.emulator.options()
    race_probes.emulator.clear()
    with GuardedMemory(race_probes) as memory:
        output = memory.empty((32,), (1,), torch.int32)
        gone = GuardedMemory(race_probes)
        address = gone.guarded(torch.zeros(32, dtype=torch.int32)).data_ptr()
        gone.free()
        race_probes.run("divergent_barrier", input=address, output=output.data_ptr(), count=32)
    (line,) = race_probes.emulator.report()
    race_probes.emulator.clear()
    assert "no buffer holds any more" in line


def test_only_a_race_build_can_be_asked_for_races(fast_probes: ModuleType) -> None:
    assert not fast_probes.emulator.race_build
    with pytest.raises(ValueError, match="race"):
        fast_probes.emulator.options(race=True)
