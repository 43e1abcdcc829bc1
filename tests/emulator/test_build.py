"""How the emulator's modules are built, patched and kept; and both ways to switch fibers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmkernels.extension import module_at

from . import build as building
from .build import EMULATOR, Patch, build
from .test_features import run

KERNELS = EMULATOR / "kernels"
VALUES = torch.arange(32)
PLUS_TWO: Patch = ("features.cu", "words[t] = value + 1;", "words[t] = value + 2;")


def reversed_twice(path: Path) -> list[int]:
    return run(module_at(str(path)), "reverse", VALUES, 32, block=32, shared=128).tolist()


def test_a_patch_changes_a_copy(fast_probes: ModuleType) -> None:
    original = build(sources=KERNELS)
    objects = building.CACHE / "objects"
    before = set(objects.iterdir())
    patched = build(patches=[PLUS_TWO], sources=KERNELS)
    added = {path.name.rpartition("-")[0] for path in set(objects.iterdir()) - before}
    assert added <= {"features"}  # nothing, if an earlier run has left the object
    assert reversed_twice(patched) == (VALUES + 2).tolist()
    assert reversed_twice(original) == (VALUES + 1).tolist()
    assert build(sources=KERNELS) == original == Path(str(fast_probes.__file__))


def test_only_the_named_units_are_patched(fast_probes: ModuleType) -> None:
    other = build(patches=[PLUS_TWO], patched_units=["twins.cu"], sources=KERNELS)
    assert reversed_twice(other) == (VALUES + 1).tolist()
    with pytest.raises(ValueError, match="no_unit.cu"):
        build(patches=[PLUS_TWO], patched_units=["no_unit.cu"], sources=KERNELS)


@pytest.mark.parametrize("text", ("no such text", "__syncthreads();"))
def test_a_patch_must_match_once(text: str) -> None:
    count = (KERNELS / "features.cu").read_text().count(text)
    with pytest.raises(ValueError, match=f"once in features.cu, found it {count} times"):
        build(patches=[("features.cu", text, "")], sources=KERNELS)


def test_defines_and_modes_reach_the_compiler() -> None:
    fast, race = (building._Compiler(race, ("ANSWER=42",)) for race in (False, True))
    for unit in (Path("kernel.cu"), Path("module.cpp")):
        assert "-DANSWER=42" in fast.flags_for(unit) and "-DANSWER=42" in race.flags_for(unit)
    assert "-fsanitize=thread" in race.flags_for(Path("kernel.cu"))
    assert "-fsanitize=thread" not in race.flags_for(Path("module.cpp")) + fast.flags_for(Path("kernel.cu"))


def test_an_error_in_the_sources_is_shown() -> None:
    wrong = (PLUS_TWO[0], PLUS_TWO[1], "words[t] = no_such_name;")
    with pytest.raises(RuntimeError, match=r"could not compile features.cu:[\s\S]*no_such_name"):
        build(patches=[wrong], sources=KERNELS)


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    building._gxx.cache_clear()
    with pytest.raises(RuntimeError, match="found no g\\+\\+ on PATH"):
        build(sources=KERNELS)


def test_missing_pybind11(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(RuntimeError, match="pip install pybind11"):
        build(sources=KERNELS)


PING_PONG = """
#include "engine/context.hpp"
using namespace llmkernels::emulator;
static Context outside, fibers[3];
static int running, visits;
static void entry() {
  volatile int kept = running;
  for (double weight = 1.0;; weight += 1.0) {
    visits += kept == running ? static_cast<int>(weight) : 1000;
    switch_context(fibers[kept], outside);
  }
}
int main() {
  for (int i = 0; i < 3; ++i) prepare_context(fibers[i], fiber_stack(i), kStackBytes, entry);
  for (int step = 0; step < 12; ++step) {
    running = step * 2 % 3;
    switch_context(outside, fibers[running]);
  }
  return visits == 3 * (1 + 2 + 3 + 4) ? 0 : 1;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("define", ([], ["-DLLMKERNELS_EMULATOR_UCONTEXT"]), ids=("own", "ucontext"))
def test_switching_fibers(tmp_path: Path, define: list[str]) -> None:
    source, program = tmp_path / "ping_pong.cpp", tmp_path / "ping_pong"
    source.write_text(PING_PONG)
    sources = [str(source), str(EMULATOR / "engine" / "context.cpp")]
    subprocess.run(["g++", "-std=c++17", f"-I{EMULATOR}", *define, *sources, "-o", str(program)], check=True)
    assert subprocess.run([program]).returncode == 0
