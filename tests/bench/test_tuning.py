"""The search for tile rows: wrong rows are never timed, every tune_*.py runs through the interpreter."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from bench import tuning
from llmkernels.ops.layer_norm import tiles
from llmkernels.triton_support import INTERPRETED

CPU = torch.device("cpu")


class Fake(tuning.Problem):
    """A kernel that adds its row to its operand; "broken" does not compile."""

    def __init__(self) -> None:
        self.row: object = 0.0

    def launch(self, dtype: torch.dtype, device: torch.device) -> tuning.Launch:
        x = torch.randn(40, dtype=dtype, device=device)

        def run() -> tuple[torch.Tensor, ...]:
            if self.row == "broken":
                raise RuntimeError("out of resource: shared memory")
            return (x + self.row,)  # type: ignore[operator]

        return run

    def candidates(self, dtype: torch.dtype, arch: int) -> Sequence[tuning.Tile]:
        return [0.0, "broken", 1e-2]

    def table_of(self, tile: tuning.Tile) -> contextlib.AbstractContextManager[None]:
        @contextlib.contextmanager
        def taken() -> Iterator[None]:
            self.row, kept = tile, self.row
            try:
                yield
            finally:
                self.row = kept

        return taken()


def test_only_rows_that_agree_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter((3.0, 2.0))  # of the table's row, then of the one row that is right
    monkeypatch.setattr(tuning, "_seconds", lambda *_: next(seconds))
    timed = tuning.tune(Fake(), torch.float32, CPU, 60.0)
    assert timed == [(2.0, 0.0), (3.0, None)]
    said = capsys.readouterr().out
    assert "WRONG RESULT: 0.01" in said and "RuntimeError: broken" in said
    tuning._print(Fake(), timed)
    assert "1 rows timed, the table's own 3000000.0 us" in (said := capsys.readouterr().out)
    assert "1.500 x: 0.0" in said


def test_the_time_box_ends_the_search() -> None:
    assert [entry.tile for entry in tuning.tune(Fake(), torch.float32, CPU, -1.0)] == [None]


def test_off_the_gpu_nothing_is_timed() -> None:
    assert all(math.isnan(entry.seconds) for entry in tuning.tune(Fake(), torch.float32, CPU, 60.0))


def test_the_table_comes_back() -> None:
    before = tiles.forward
    with contextlib.suppress(KeyError), tuning.replaced(tiles, forward=None):
        assert tiles.forward is None
        raise KeyError
    assert tiles.forward is before


@pytest.mark.skipif(not INTERPRETED, reason="runs through Triton's interpreter")
@pytest.mark.parametrize("op", ("layer_norm", "attention", "attention_decode", "feed_forward"))
def test_every_search_runs(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[list[str]], int] = importlib.import_module(f"bench.tune_{op}").main
    assert main(["--device", "cpu", "--seconds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and not [line for line in lines if "rows agree with the table's; not timed" not in line]


@pytest.mark.skipif(not INTERPRETED, reason="runs through Triton's interpreter")
@pytest.mark.parametrize(
    ("op", "direction"),
    (("layer_norm", "forward"), ("feed_forward", "backward"), ("attention_decode", "decode")),
)
def test_a_row_reaches_the_kernel(op: str, direction: str) -> None:
    """Or all candidates would be the table's own row, and agree."""
    module = importlib.import_module(f"bench.tune_{op}")
    problem = next(
        found for found in module.problems(True) if getattr(found, "direction", direction) == direction
    )
    launch = problem.launch(torch.bfloat16, CPU)

    class Reached(Exception):
        pass

    class Row:
        def __getattr__(self, name: str) -> object:
            raise Reached

    with pytest.raises(Reached), problem.table_of(Row()):
        launch()
