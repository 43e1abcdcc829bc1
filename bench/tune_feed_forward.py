"""python -m bench.tune_feed_forward: times tile rows of the feed-forward's Triton kernels on this GPU inside
a time box and prints the best ones as rows for llmkernels/ops/feed_forward/tiles.py.

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

import torch
from torch import Tensor

from llmkernels import testing
from llmkernels.ops.feed_forward import tiles, triton_kernels
from llmkernels.ops.feed_forward.call import ACTIVATIONS, FeedForwardCall, product_kind
from llmkernels.ops.feed_forward.tiles import GemmTile
from llmkernels.triton_support import architecture

from .measure import percentiles, seconds

# The largest shared memory a block may have (CUDA C++ Programming Guide, technical specifications).
_SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
_ACCUMULATORS_A_THREAD = 128
_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Problem:
    """One kernel on one shape: M rows, d, hidden size."""

    direction: str  # forward, backward
    activation: str
    m: int
    d: int
    hidden: int

    @property
    def gated(self) -> bool:
        return ACTIVATIONS[self.activation][1]

    def runner(self, dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
        """The launch of the kernel alone, on random operands, all of its outputs wanted."""
        width = 2 * self.hidden if self.gated else self.hidden

        def draw(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, device=device) * columns**-0.5).to(dtype)

        if self.direction == "forward":
            x, weight = draw(self.m, self.d) * self.d**0.5, draw(width, self.d)
            bias = draw(1, width).view(-1)
            return lambda: triton_kernels.forward(x, weight, bias, None, self.activation, 0.0, True, True)
        dy, weight, pre = draw(self.m, self.d), draw(self.d, self.hidden), draw(self.m, width)
        return lambda: triton_kernels.backward(dy, weight, pre, None, self.activation, 0.0, True, True, True)


def problems(quick: bool) -> tuple[Problem, ...]:
    """Few and many rows of the sizes between which the best row changes."""
    shapes = ((20, 16, 32),) if quick else ((8192, 1024, 4096), (8192, 4096, 16384), (64, 4096, 16384))
    return tuple(
        Problem(direction, activation, *shape)
        for shape in shapes
        for activation in ("gelu", "swiglu")
        for direction in ("forward", "backward")
    )


def candidates(problem: Problem, kind: str, arch: int) -> list[GemmTile]:
    """Every row whose operands fit in shared memory and whose accumulators fit in registers, in an order that
    a short time box cuts off fairly."""
    products = 2 if problem.gated and problem.direction == "forward" else 1
    element_size, width = (2, 8) if kind == "half" else (4, 4)
    small, max_m = (16, 64) if problem.m <= 64 else (64, math.inf)
    found = []
    for block_m, block_n, block_k, warps, stages, strips, group in itertools.product(
        (small, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5), (1, 2, 4), (4, 8, 16)
    ):
        accumulators = products * block_m * block_n // (32 * warps)
        shared = stages * block_k * (block_m + products * block_n) * element_size
        if not 8 <= accumulators <= _ACCUMULATORS_A_THREAD or shared > _SHARED_BYTES[arch]:
            continue
        found.append(GemmTile(kind, max_m, block_m, block_n, block_k, warps, stages, strips, group, width))
    unique = list(dict.fromkeys(found))
    random.Random(0).shuffle(unique)
    return unique


@contextlib.contextmanager
def _table_of(tile: GemmTile) -> Iterator[None]:
    """Inside, every launch takes this row."""
    kept = tiles.forward, tiles.backward
    try:
        tiles.forward = tiles.backward = lambda *_: tile  # type: ignore[assignment]
        yield
    finally:
        tiles.forward, tiles.backward = kept


def _agrees(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether two results differ by no more than the order of their sums."""
    pairs = zip(found, expected, strict=True)
    return all(
        testing.measure(a, b.double(), b, b.double().abs().amax().cpu()).passed for a, b in pairs if b.numel()
    )


def tune(
    problem: Problem, dtype: torch.dtype, device: torch.device, box_seconds: float
) -> list[tuple[float, GemmTile | None]]:
    """Median seconds and rows, fastest first, until the time box is used up; None: the row of the table."""
    kind, arch = product_kind(dtype), tiles.known_architecture(architecture(device))
    torch.manual_seed(0)
    run = problem.runner(dtype, device)
    expected = run()
    timed: list[tuple[float, GemmTile | None]] = [(percentiles(seconds(run, device, _REPEATS))[0], None)]
    end = time.perf_counter() + box_seconds
    for tile in candidates(problem, kind, arch):
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
    parser = argparse.ArgumentParser(prog="python -m bench.tune_feed_forward", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all problems together")
    parser.add_argument("--quick", action="store_true", help="one tiny shape; the default off the GPU")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    reasons = triton_kernels.unsupported(FeedForwardCall("feed_forward", device, dtype))
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
                row = str(tile).replace("max_m=inf", "max_m=math.inf")
                print(f"  {median * 1e6:10.1f} us, {table / median:.3f} x: {row}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
