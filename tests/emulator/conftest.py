"""The emulator's own kernels (kernels/), built fast and built to watch memory."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmkernels.extension import module_at

from .build import EMULATOR, build

# What emulator.options() is given: threads in order, and in several random orders.
IN_ORDER: dict[str, Any] = {}
SCHEDULES: list[dict[str, Any]] = [IN_ORDER, *({"seed": seed, "random_schedule": True} for seed in range(4))]


def built(make: Callable[[], Path]) -> ModuleType:
    """The module that `make` builds; skips the test where g++ or pybind11 is missing."""
    try:
        return module_at(str(make()))
    except RuntimeError as error:
        if "the emulator needs" in str(error):
            pytest.skip(str(error))
        raise


def kernels(module: ModuleType, *prefixes: str) -> dict[str, bool]:
    """The module's kernels whose names begin with one of the prefixes, each instantiation by itself: whether
    it has been launched."""
    command = ["nm", "-C", str(module.__file__)]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    launched = module.emulator.launched()
    found = {}
    for line in symbols.splitlines():
        address, _, name = line.partition(" ")
        function = name[2:].partition("(")[0].partition("<")[0].rpartition("::")[2]
        # Lambdas within kernels have longer names.
        if function.startswith(prefixes) and function.endswith("_kernel") and name.endswith(")"):
            found[name[2:]] = int(address, 16) in launched
    return found


@pytest.fixture(scope="session")
def fast_probes() -> ModuleType:
    return built(lambda: build(sources=EMULATOR / "kernels"))


@pytest.fixture(scope="session")
def race_probes() -> ModuleType:
    return built(lambda: build(race=True, sources=EMULATOR / "kernels"))


@pytest.fixture(params=("fast", "race"))
def probes(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.getfixturevalue(f"{request.param}_probes")
    module.emulator.options()
    module.emulator.clear()
    return module
