"""The table of instructions: complete, right through the emulator, and able to say that one is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmkernels import cli, extension, wrappers

from .emulator.build import Patch, build
from .emulator.conftest import built

CSRC = Path(__file__).resolve().parents[1] / "csrc"
UNIT = "wrappers/wrappers.cu"
CPU = torch.device("cpu")
FUNCTION = re.compile(r"__forceinline__ \w+ (\w+)\(.*?\) \{(.*?)^\}", re.DOTALL | re.MULTILINE)
WITHOUT_RESULT = {"cp_async_commit_group", "cp_async_wait_group"}  # run within the rows of cp_async


def _use(monkeypatch: pytest.MonkeyPatch, race: bool = False, patch: Patch | None = None) -> ModuleType:
    """Makes an emulated build of csrc, or of csrc with one bug, the compiled module."""
    module = built(
        lambda: build(race, patches=[patch] if patch else [], patched_units=[UNIT] if patch else [])
    )
    module.emulator.options()
    module.emulator.clear()
    monkeypatch.setattr(extension, "_load", lambda: module)
    extension.device_obstacle.cache_clear()
    return module


@pytest.fixture(autouse=True)
def forget_the_module() -> Iterator[None]:
    yield
    extension.device_obstacle.cache_clear()


def test_every_instruction_of_csrc_has_a_row() -> None:
    headers = [path for folder in ("common", "sm80", "sm90") for path in (CSRC / folder).glob("*.cuh")]
    found = [match for path in headers for match in FUNCTION.findall(path.read_text())]
    wrapped = {name for name, body in found if re.search(r"\basm\b", body)}
    assert len(wrapped) > 20
    assert wrapped - WITHOUT_RESULT <= {instruction.name for instruction in wrappers.INSTRUCTIONS}


@pytest.mark.parametrize("race", (False, True), ids=("fast", "watched"))
def test_every_instruction_through_the_emulator(monkeypatch: pytest.MonkeyPatch, race: bool) -> None:
    module = _use(monkeypatch, race)
    rows = {name: sizes for name, *sizes in module.wrappers()}
    assert list(rows) == [instruction.name for instruction in wrappers.INSTRUCTIONS]
    for instruction in wrappers.INSTRUCTIONS:
        threads, inputs, outputs = rows[instruction.name]
        for case in instruction.cases():
            assert case.input.shape == (threads, inputs) and case.expected.shape == (threads, outputs)
    for options in ({}, {"seed": 1, "random_schedule": True}):
        module.emulator.options(**options)
        assert [outcome for outcome in wrappers.check(CPU) if not outcome.passed] == []
        assert module.emulator.report() == []


WRONG: dict[str, Patch] = {
    "cvt_rn_f16x2_f32": (
        UNIT,
        "cvt_rn_f16x2_f32(as_float(in[0]), as_float(in[1]))",
        "cvt_rn_f16x2_f32(as_float(in[1]), as_float(in[0]))",
    ),
    "cvt_rna_tf32_f32": (
        UNIT,
        "out[0] = cvt_rna_tf32_f32(as_float(in[0]));",
        "out[0] = in[0] & ~0x1fffu;",
    ),
    "ex2_approx_ftz_f32": (
        UNIT,
        "= __float_as_uint(function(",
        "= __float_as_uint(1.000001f * function(",
    ),
    "bar_sync": (UNIT, "words[threadIdx.x ^ 32]", "words[threadIdx.x ^ 64]"),
    "cp_async_ca_4": (UNIT, "cp_async_wait_group<1>();", "cp_async_wait_group<2>();"),
    "ldmatrix_x1": (
        UNIT,
        "load(words, shared_address(shared + 16 * in[4]));",
        "load(words, shared_address(shared + 16 * threadIdx.x));",
    ),
    "stmatrix_x4": (
        UNIT,
        "{in[0], in[1], in[2], in[3]};\n    store",
        "{in[0], in[2], in[1], in[3]};\n    store",
    ),
    "mma_m16n8k16_f16": (
        UNIT,
        "multiply(d, a, in[4], in[5]);",
        "multiply(d, a, in[5], in[4]);",
    ),
    "mma_m16n8k16_bf16": (
        UNIT,
        "Multiply<mma_m16n8k16_bf16>",
        "Multiply<mma_m16n8k16_f16>",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_instruction_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _use(monkeypatch, patch=WRONG[name])
    wrong = {outcome.name: outcome for outcome in wrappers.check(CPU) if not outcome.passed}
    assert name in wrong
    assert "words differ" in wrong[name].detail or "CUDA error" in wrong[name].detail


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("doctor looks at the GPU here")
    _use(monkeypatch)
    assert cli.main(["doctor", "--wrappers"]) == 0
    text = capsys.readouterr().out
    assert "on the CPU, through the emulator" in text and "has not been run on a GPU yet" in text
    assert (
        text.splitlines()[-1] == f"All {len(wrappers.INSTRUCTIONS)} instructions give what the manuals say."
    )
    assert cli.main(["doctor", "--wrappers", "--json"]) == 0
    assert all(row["passed"] for row in json.loads(capsys.readouterr().out)["instructions"])
    _use(monkeypatch, patch=WRONG["bar_sync"])
    assert cli.main(["doctor", "--wrappers"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "WRONG: bar_sync"


def test_the_command_without_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "_load", lambda: "the CUDA C++ kernels are not there")
    extension.device_obstacle.cache_clear()
    assert cli.main(["doctor", "--wrappers"]) == 1
    assert capsys.readouterr().err == "llmkernels doctor --wrappers: the CUDA C++ kernels are not there\n"
