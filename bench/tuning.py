"""The search that all tune_*.py share: tile rows of Triton kernels timed on this GPU inside a time box.

Every candidate is held against the row of the table first, whose result the tests prove: one that differs by
more than rounding is not timed. Off the GPU it runs through Triton's interpreter at a tiny shape, which shows
that it works, and times nothing.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkernels import testing
from llmkernels.triton_support import architecture

from . import measure

Launch = Callable[[], tuple[Tensor, ...]]
Tile = Any  # a frozen dataclass of the op's tiles.py

_REPEATS = 10
_SHOWN = 3


class Timed(NamedTuple):
    """tile: None for the row that the table has; seconds: NaN off the GPU."""

    seconds: float
    tile: Tile | None


class Problem(abc.ABC):
    """One kernel on one shape, whose best row is sought."""

    @abc.abstractmethod
    def launch(self, dtype: torch.dtype, device: torch.device) -> Launch:
        """The launcher on random operands."""

    @abc.abstractmethod
    def candidates(self, dtype: torch.dtype, arch: int) -> Sequence[Tile]:
        """Rows worth a try, in any order."""

    @abc.abstractmethod
    def table_of(self, tile: Tile) -> contextlib.AbstractContextManager[None]:
        """Inside, every launch of this kernel takes the row."""

    def magnitude(self, expected: Tensor) -> float:
        """Of the intermediates whose rounding another order of sums may change, beside the largest result."""
        return 1.0


@contextlib.contextmanager
def replaced(module: ModuleType, **values: Any) -> Iterator[None]:
    """Inside, these names of a module are something else."""
    kept = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def _agrees(problem: Problem, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether two results differ by no more than the order of their sums."""
    for actual, right in zip(found, expected, strict=True):
        if right.numel() == 0:
            continue
        exact = right.double()
        magnitude = exact.abs().amax().cpu() * problem.magnitude(right)
        if not testing.measure(actual, exact, right, magnitude).passed:
            return False
    return True


def _seconds(launch: Launch, device: torch.device) -> float:
    return measure.median(launch, device, _REPEATS) if device.type == "cuda" else math.nan


def tune(problem: Problem, dtype: torch.dtype, device: torch.device, box_seconds: float) -> list[Timed]:
    """The table's row and the candidates that the time box had room for, fastest first."""
    torch.manual_seed(0)
    launch = problem.launch(dtype, device)
    expected = launch()
    timed = [Timed(_seconds(launch, device), None)]
    tiles = list(problem.candidates(dtype, architecture(device)))
    # An order that a short time box cuts off fairly.
    random.Random(0).shuffle(tiles)
    end = time.monotonic() + box_seconds
    for tile in tiles:
        if time.monotonic() > end:
            break
        with problem.table_of(tile):
            try:
                if _agrees(problem, launch(), expected):
                    timed.append(Timed(_seconds(launch, device), tile))
                else:
                    print(f"  WRONG RESULT: {tile}")
            except Exception as error:  # a row that does not compile or does not fit is passed over
                print(f"  {type(error).__name__}: {tile}")
    return sorted(timed, key=lambda entry: entry.seconds)


def _print(problem: Problem, timed: list[Timed]) -> None:
    (table,) = (entry.seconds for entry in timed if entry.tile is None)
    rows = [entry for entry in timed if entry.tile is not None]
    if math.isnan(table):
        print(f"{problem}: {len(rows)} rows agree with the table's; not timed off the GPU", flush=True)
        return
    print(f"{problem}: {len(rows)} rows timed, the table's own {table * 1e6:.1f} us")
    for seconds, tile in rows[:_SHOWN]:
        row = str(tile).replace("=inf", "=math.inf")  # as it may stand in tiles.py
        print(f"  {seconds * 1e6:10.1f} us, {table / seconds:.3f} x: {row}", flush=True)


def main(
    op: str,
    problems: Callable[[bool], Sequence[Problem]],
    unsupported: Callable[[torch.device, torch.dtype], list[str]],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command of one tune_*.py. problems: of whether the run is a quick one."""
    summary = f"Times tile rows of {op}'s Triton kernels and prints the best as rows for its tiles.py."
    parser = argparse.ArgumentParser(prog=f"python -m bench.tune_{op}", description=summary)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all problems together")
    parser.add_argument("--quick", action="store_true", help="one tiny shape; the default off the GPU")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    reasons = unsupported(device, dtype)
    if reasons:
        print("; ".join(reasons))
        return 1
    found = problems(options.quick or device.type != "cuda")
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        for problem in found:
            _print(problem, tune(problem, dtype, device, options.seconds / len(found)))
    return 0
