"""python -m bench.tune_attention: times tile rows of attention's Triton kernels on this GPU inside a time box
and prints the best ones as rows for llmkernels/ops/attention/tiles.py.

Every candidate is held against the row of the table first, whose result the tests prove: one that differs by
more than rounding is not timed. Off the GPU it runs through Triton's interpreter at a tiny shape, which shows
that it works and times nothing of meaning.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkernels import testing
from llmkernels.ops.attention import tiles, triton_kernels
from llmkernels.ops.attention.call import UNLIMITED, AttentionCall, Settings
from llmkernels.ops.attention.tiles import BackwardTile, ForwardTile, Walk
from llmkernels.triton_support import INTERPRETED, architecture

from .measure import percentiles, seconds

# Of forward a whole row; of backward one of its walks, the others as the table has them.
KERNELS = ("forward", "keys", "single_pass", "queries")
_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Problem:
    """One kernel on one shape; features: a soft cap and a bias that every tile reads."""

    kernel: str
    batch: int
    heads: int
    length: int
    head_dim: int
    features: bool

    def runner(self, dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
        """The launcher on random operands, causal."""
        shape = (self.batch, self.heads, self.length, self.head_dim)
        query, key, value, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
        bias = None
        if self.features:
            bias = torch.randn(1, self.heads, self.length, self.length, device=device).to(dtype)
        softcap = 30.0 if self.features else 0.0
        settings = Settings(
            1 / math.sqrt(self.head_dim), softcap, 0.0, UNLIMITED, 0, False, self.length, self.length
        )
        rest = (bias, None, None, None, None, None, settings)
        if self.kernel == "forward":
            return lambda: triton_kernels.forward(query, key, value, *rest)
        out, lse = triton_kernels.forward(query, key, value, *rest)
        deterministic = self.kernel != "single_pass"
        return lambda: triton_kernels.backward(
            dout, None, query, key, value, out, lse, *rest, False, deterministic
        )


def problems(quick: bool) -> tuple[Problem, ...]:
    """The head dims of the tables, at 16384 tokens."""
    sizes = ((1, 2, 48, 16),) if quick else ((4, 32, 4096, 64), (4, 16, 4096, 128), (4, 8, 4096, 256))
    return tuple(
        Problem(kernel, *size, features)
        for size in sizes
        for features in (False, True)
        for kernel in KERNELS
        if not (features and kernel == "single_pass")
    )


def _table_row(problem: Problem, itemsize: int, arch: int) -> Any:
    arguments = (max(16, problem.head_dim), itemsize, arch, problem.features)
    if problem.kernel == "forward":
        return tiles.FORWARD_INTERPRETED if INTERPRETED else tiles.forward(*arguments)
    return tiles.BACKWARD_INTERPRETED if INTERPRETED else tiles.backward(*arguments)


def candidates(problem: Problem, row: Any) -> list[ForwardTile | BackwardTile]:
    """Rows of every power of two that is no smaller than a dot, in an order that a short time box cuts off
    fairly."""
    found: list[ForwardTile | BackwardTile] = []
    for block_m, block_n, warps, stages in itertools.product(
        (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
    ):
        if problem.kernel == "forward":
            sizes = {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages}
            found.append(dataclasses.replace(row, **sizes))
        else:
            walk = Walk(block_m, block_n, warps, stages)
            found.append(dataclasses.replace(row, **{problem.kernel: walk}))
    random.Random(0).shuffle(found)
    return found


@contextlib.contextmanager
def _table_of(tile: ForwardTile | BackwardTile) -> Iterator[None]:
    """Inside, every launch of the tile's direction takes this row."""
    name = "forward" if isinstance(tile, ForwardTile) else "backward"
    constant = f"{name.upper()}_INTERPRETED"
    kept = getattr(tiles, name), getattr(tiles, constant)
    try:
        setattr(tiles, name, lambda *_: tile)
        setattr(tiles, constant, tile)
        yield
    finally:
        setattr(tiles, name, kept[0])
        setattr(tiles, constant, kept[1])


def _agrees(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether two results differ by no more than the order of their sums and the rounding of P and dS."""
    for actual, right in zip(found, expected, strict=True):
        half = torch.finfo(right.dtype).eps / torch.finfo(torch.float32).eps / testing.ARITHMETIC_ULPS
        if right.numel():
            magnitude = right.double().abs().amax().cpu() * max(half, 1.0)
            if not testing.measure(actual, right.double(), right, magnitude).passed:
                return False
    return True


def tune(
    problem: Problem, dtype: torch.dtype, device: torch.device, box_seconds: float
) -> list[tuple[float, ForwardTile | BackwardTile | None]]:
    """Median seconds of the launcher and rows, fastest first, until the time box is used up; None: the row of
    the table."""
    torch.manual_seed(0)
    run = problem.runner(dtype, device)
    expected = run()
    row = _table_row(problem, dtype.itemsize, architecture(device))
    timed: list[tuple[float, ForwardTile | BackwardTile | None]] = [
        (percentiles(seconds(run, device, _REPEATS))[0], None)
    ]
    end = time.perf_counter() + box_seconds
    for tile in candidates(problem, row):
        if time.perf_counter() > end:
            break
        with _table_of(tile):
            try:
                if _agrees(run(), expected):
                    timed.append((percentiles(seconds(run, device, _REPEATS))[0], tile))
                else:
                    print(f"  WRONG RESULT: {tile}")
            except Exception as error:  # a row that does not compile or does not fit is passed over
                print(f"  {type(error).__name__}: {tile}")
    return sorted(timed, key=lambda entry: entry[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune_attention", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all problems together")
    parser.add_argument("--quick", action="store_true", help="one tiny shape; the default off the GPU")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    reasons = triton_kernels.unsupported(AttentionCall("attention", device, dtype))
    if reasons:
        print("; ".join(reasons))
        return 1
    found = problems(options.quick or device.type != "cuda")
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        for problem in found:
            timed = tune(problem, dtype, device, options.seconds / len(found))
            table = next(median for median, tile in timed if tile is None)
            print(f"{problem}: {len(timed) - 1} rows timed, the table's own {table * 1e6:.1f} us")
            for median, tile in [entry for entry in timed if entry[1] is not None][:3]:
                print(f"  {median * 1e6:10.1f} us, {table / median:.3f} x: {tile}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
