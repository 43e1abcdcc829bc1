"""Tile tables of the Triton feed-forward kernels: what a program holds, by rows, kind of product and
architecture.

A product of 16-bit operands is bound by the tensor cores, so tiles are as large as accumulators and what is
made of them at the end leave registers for: 255 a thread on all four architectures. The operands in flight
lie in shared memory, of which sm_120 has 99 KiB a block, sm_80 163 KiB, sm_90 and sm_100 227 KiB. Provenance
of every row: compiled ahead of time for its architecture by tests/ops/test_feed_forward_tiles.py, 0 spills in
the calls that ask most of it, tensor-core instructions seen; not yet timed on a GPU, which is what
bench/tune_feed_forward.py is for.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

# Row tiles a program of the elementwise backward takes at least, so that its partials stay small beside what
# it reads.
_TILES_PER_PROGRAM = 4


@dataclass(frozen=True)
class GemmTile:
    """kind: "half" for float16 and bfloat16, "tf32" or "ieee" for float32. max_m: the most rows served. A
    program owns ``block_m`` x ``block_n`` of the result, gated of both halves, and takes ``block_k`` of the
    sum at a time, with the loads of ``num_stages`` - 1 further ones under way. It finishes its tile in
    ``strips`` strips of columns. Column tiles are taken ``group_m`` row tiles at a time. min_width: the
    shortest vector of elements, by alignment, at which the row has registers enough; gated: whether it has
    them for a gated forward, which accumulates two products."""

    kind: str
    max_m: float
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    strips: int
    group_m: int = 8
    min_width: int = 1
    gated: bool = True


@dataclass(frozen=True)
class ElementwiseTile:
    """A program owns ``block_n`` columns of row tiles of ``block_m``; a processor has room for
    ``per_processor`` of them."""

    block_m: int
    block_n: int
    num_warps: int
    per_processor: int

    def row_programs(self, m: int, n: int, processors: int) -> int:
        """How many programs share the M rows, which is the number of partial rows of dbias."""
        strips = -(-n // self.block_n)
        most = self.per_processor * processors // strips
        return max(1, min(-(-m // (self.block_m * _TILES_PER_PROGRAM)), most))


@dataclass(frozen=True)
class FinalizeTile:
    """A program sums ``block_n`` columns of partials, ``block_p`` rows at a time."""

    block_p: int
    block_n: int
    num_warps: int


# A few rows: nothing but the weight's bytes counts, and small tiles bring more programs to read them.
_FEW_ROWS = (
    GemmTile("half", 16, 16, 64, 64, num_warps=4, num_stages=5, strips=1, min_width=8),
    GemmTile("half", 64, 64, 64, 64, num_warps=4, num_stages=4, strips=4, min_width=8),
)
_LARGE = GemmTile("half", math.inf, 128, 128, 64, num_warps=8, num_stages=3, strips=4, min_width=8)
# Two accumulators beside the fragments that mma.sync reads into registers: half as many columns. wgmma and
# tcgen05 read shared memory instead.
_LARGE_NOT_GATED = GemmTile(
    "half", math.inf, 128, 128, 64, num_warps=8, num_stages=3, strips=4, min_width=8, gated=False
)
_LARGE_GATED = GemmTile("half", math.inf, 128, 64, 64, num_warps=8, num_stages=3, strips=2, min_width=8)
_FLOAT32 = (
    GemmTile("tf32", math.inf, 128, 64, 32, num_warps=8, num_stages=3, strips=2, min_width=4),
    # Multiplied and added by the ordinary units, from registers.
    GemmTile("ieee", math.inf, 64, 64, 32, num_warps=8, num_stages=3, strips=4, min_width=4),
)
# Element by element: as many addresses and predicates as elements, and no asynchronous copies of 16 bits.
_UNALIGNED = (
    GemmTile("half", math.inf, 64, 64, 32, num_warps=8, num_stages=2, strips=4),
    GemmTile("tf32", math.inf, 64, 64, 32, num_warps=8, num_stages=2, strips=4),
    GemmTile("ieee", math.inf, 64, 32, 32, num_warps=8, num_stages=2, strips=2),
)

_MMA_SYNC = (*_FEW_ROWS, _LARGE_NOT_GATED, _LARGE_GATED, *_FLOAT32, *_UNALIGNED)
_FROM_SHARED_MEMORY = (*_FEW_ROWS, _LARGE, *_FLOAT32, *_UNALIGNED)
FORWARD: dict[int, tuple[GemmTile, ...]] = {
    80: _MMA_SYNC,
    90: _FROM_SHARED_MEMORY,
    100: _FROM_SHARED_MEMORY,
    120: _MMA_SYNC,
}
# One product, gated or not.
_BACKWARD = (*_FEW_ROWS, _LARGE, *_FLOAT32, *_UNALIGNED)
BACKWARD: dict[int, tuple[GemmTile, ...]] = dict.fromkeys(FORWARD, _BACKWARD)
ELEMENTWISE = ElementwiseTile(block_m=16, block_n=128, num_warps=4, per_processor=4)
# 128 bytes of a row, a whole line, and 128 loads under way at once.
FINALIZE = FinalizeTile(block_p=128, block_n=32, num_warps=8)


def known_architecture(architecture: int) -> int:
    """The newest architecture of the tables that is no newer than this one."""
    return max((known for known in FORWARD if known <= architecture), default=min(FORWARD))


@functools.lru_cache(maxsize=1024)
def forward(m: int, kind: str, gated: bool, width: int, architecture: int) -> GemmTile:
    """The row for M rows, read in vectors of ``width`` elements."""
    return next(
        tile
        for tile in FORWARD[known_architecture(architecture)]
        if tile.kind == kind and m <= tile.max_m and width >= tile.min_width and (tile.gated or not gated)
    )


@functools.lru_cache(maxsize=1024)
def backward(m: int, kind: str, width: int, architecture: int) -> GemmTile:
    """The row for M rows, read in vectors of ``width`` elements."""
    return next(
        tile
        for tile in BACKWARD[known_architecture(architecture)]
        if tile.kind == kind and m <= tile.max_m and width >= tile.min_width
    )
