"""Tile tables of the Triton norm kernels: what a program holds, by row length and architecture.

Registers are what a norm runs out of first: all four architectures have 65536 a processor, at most 255 a
thread, and 1024 threads a block, so they share most rows. The registers named are those of sm_90. Provenance
of every row: compiled ahead of time for its architecture by tests/ops/test_layer_norm_tiles.py, 0 spills in
the calls that ask most of it; not yet timed on a GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

# Row tiles a backward program takes at least, so that the partials it writes stay small beside what it reads.
_TILES_PER_PROGRAM = 4


@dataclass(frozen=True)
class ForwardTile:
    """max_n: the longest row served. A program owns ``rows`` rows, in one tile of ``block_n`` columns or,
    looped, in as many as a row needs. min_width: the shortest vector of elements, by alignment and dtypes, at
    which the row has registers enough; residual: whether it has them for a residual, too."""

    max_n: float
    rows: int
    block_n: int
    num_warps: int
    min_width: int = 1
    residual: bool = True
    looped: bool = False


@dataclass(frozen=True)
class BackwardTile:
    """max_n, rows, block_n, num_warps, min_width, residual: as ForwardTile. num_stages: 2 = the next tile's
    loads are in flight, in shared memory, while one is computed. per_processor: the persistent programs a
    processor has room for. Strips: a tile is a strip of the row, whose sums a kernel of ``sums_block_n``
    columns and ``sums_num_warps`` made before."""

    max_n: float
    rows: int
    block_n: int
    num_warps: int
    num_stages: int
    per_processor: int
    min_width: int = 1
    residual: bool = True
    sums_block_n: int = 0
    sums_num_warps: int = 0

    @property
    def strips(self) -> bool:
        return self.sums_block_n > 0

    def row_programs(self, m: int, n: int, processors: int) -> int:
        """How many programs share the M rows, which is the number of partial rows of dweight and dbias."""
        strips = -(-n // self.block_n)
        return max(
            1, min(-(-m // (self.rows * _TILES_PER_PROGRAM)), self.per_processor * processors // strips)
        )


@dataclass(frozen=True)
class FinalizeTile:
    """max_p: the most partial rows served. A program sums ``block_n`` columns of them, ``block_p`` rows at a
    time."""

    max_p: float
    block_p: int
    block_n: int
    num_warps: int


_FORWARD_TO_1024 = (
    # 16 values a thread, 8 blocks a processor and more; element by element their addresses and the words of
    # dropout cross threads, which at 16 rows of 128 is too much for sm_100.
    ForwardTile(max_n=16, rows=128, block_n=16, num_warps=4),
    ForwardTile(max_n=32, rows=64, block_n=32, num_warps=4),
    ForwardTile(max_n=64, rows=32, block_n=64, num_warps=4),
    ForwardTile(max_n=128, rows=16, block_n=128, num_warps=4, min_width=2),
    ForwardTile(max_n=128, rows=8, block_n=128, num_warps=4),
    ForwardTile(max_n=256, rows=8, block_n=256, num_warps=4),
    ForwardTile(max_n=512, rows=4, block_n=512, num_warps=4),
    ForwardTile(max_n=1024, rows=2, block_n=1024, num_warps=4),
)
_FORWARD_TO_2048 = (ForwardTile(max_n=2048, rows=1, block_n=2048, num_warps=4),)
# sm_120's assembler settles on 48 registers for 16 values a thread and then spills one of mixed dtypes.
_FORWARD_TO_2048_SM_120 = (ForwardTile(max_n=2048, rows=1, block_n=2048, num_warps=8),)
_FORWARD_TO_16384 = (
    # 32 values a thread: 64 registers leave 8 and 4 blocks a processor, more bytes in flight than 16 values
    # would.
    ForwardTile(max_n=4096, rows=1, block_n=4096, num_warps=4),
    ForwardTile(max_n=8192, rows=1, block_n=8192, num_warps=8),
    # One block a processor; 32 values a thread at 16 warps take over 64 registers and so bring no second one.
    ForwardTile(max_n=16384, rows=1, block_n=16384, num_warps=32, min_width=2),
)
# 64 registers, the most that 1024 threads can have: just enough for 16-bit rows in 16-byte vectors; not on
# sm_100 (triton 3.9) and sm_120.
_FORWARD_TO_32768 = (
    ForwardTile(max_n=32768, rows=1, block_n=32768, num_warps=32, min_width=8, residual=False),
)
# Two statistics a column slot beside the values.
_FORWARD_LOOPED = (ForwardTile(max_n=math.inf, rows=1, block_n=4096, num_warps=8, looped=True),)
_FORWARD = _FORWARD_TO_1024 + _FORWARD_TO_2048 + _FORWARD_TO_16384 + _FORWARD_TO_32768 + _FORWARD_LOOPED
_FORWARD_SM_100 = _FORWARD_TO_1024 + _FORWARD_TO_2048 + _FORWARD_TO_16384 + _FORWARD_LOOPED
_FORWARD_SM_120 = _FORWARD_TO_1024 + _FORWARD_TO_2048_SM_120 + _FORWARD_TO_16384 + _FORWARD_LOOPED

_BACKWARD_TO_4096 = (
    # 16 values a thread of each tensor and of both accumulators, 120 to 144 registers: 16 warps a processor.
    # Element by element some would spill, and have a second row.
    BackwardTile(max_n=16, rows=256, block_n=16, num_warps=8, num_stages=2, per_processor=2),
    BackwardTile(max_n=32, rows=128, block_n=32, num_warps=8, num_stages=2, per_processor=2),
    BackwardTile(max_n=64, rows=64, block_n=64, num_warps=8, num_stages=2, per_processor=2, min_width=2),
    BackwardTile(max_n=64, rows=32, block_n=64, num_warps=8, num_stages=1, per_processor=2),
    BackwardTile(max_n=128, rows=32, block_n=128, num_warps=8, num_stages=2, per_processor=2),
    BackwardTile(max_n=256, rows=16, block_n=256, num_warps=8, num_stages=2, per_processor=2, min_width=2),
    BackwardTile(max_n=256, rows=8, block_n=256, num_warps=8, num_stages=2, per_processor=2),
    BackwardTile(max_n=512, rows=8, block_n=512, num_warps=8, num_stages=2, per_processor=2),
    BackwardTile(max_n=1024, rows=4, block_n=1024, num_warps=8, num_stages=2, per_processor=2),
    BackwardTile(max_n=2048, rows=2, block_n=2048, num_warps=8, num_stages=2, per_processor=2),
    BackwardTile(max_n=4096, rows=1, block_n=4096, num_warps=8, num_stages=2, per_processor=2),
)
# 128 registers, the most that 512 threads can have; element by element the addresses take too many. Beside a
# residual and dropout none are left for loads ahead (triton 3.6 manages, 3.9 spills).
_BACKWARD_TO_8192 = (
    BackwardTile(
        max_n=8192, rows=1, block_n=8192, num_warps=16, num_stages=2, per_processor=1, min_width=4,
        residual=False,
    ),
    BackwardTile(max_n=8192, rows=1, block_n=8192, num_warps=32, num_stages=1, per_processor=1, min_width=4),
)  # fmt: skip
# sm_120's assembler is the other way round: it fits the loads ahead, and spills 8 bytes of float32 at 32
# warps.
_BACKWARD_TO_8192_SM_120 = (
    BackwardTile(max_n=8192, rows=1, block_n=8192, num_warps=16, num_stages=2, per_processor=1, min_width=4),
)
# On sm_100 8-byte vectors of 16-bit rows take too many as well.
_BACKWARD_TO_8192_SM_100 = (
    BackwardTile(max_n=8192, rows=1, block_n=8192, num_warps=16, num_stages=2, per_processor=1, min_width=8),
    BackwardTile(max_n=8192, rows=1, block_n=8192, num_warps=32, num_stages=1, per_processor=1, min_width=4),
)
# A whole row's accumulators no longer fit in a block; the rows are read once more, for their sums.
_BACKWARD_STRIPS = (
    BackwardTile(
        max_n=math.inf, rows=2, block_n=2048, num_warps=8, num_stages=2, per_processor=2,
        sums_block_n=4096, sums_num_warps=8,
    ),
)  # fmt: skip
_BACKWARD = _BACKWARD_TO_4096 + _BACKWARD_TO_8192 + _BACKWARD_STRIPS
_BACKWARD_SM_100 = _BACKWARD_TO_4096 + _BACKWARD_TO_8192_SM_100 + _BACKWARD_STRIPS
_BACKWARD_SM_120 = _BACKWARD_TO_4096 + _BACKWARD_TO_8192_SM_120 + _BACKWARD_STRIPS

FORWARD: dict[int, tuple[ForwardTile, ...]] = {
    80: _FORWARD,
    90: _FORWARD,
    100: _FORWARD_SM_100,
    120: _FORWARD_SM_120,
}
BACKWARD: dict[int, tuple[BackwardTile, ...]] = {
    80: _BACKWARD,
    90: _BACKWARD,
    100: _BACKWARD_SM_100,
    120: _BACKWARD_SM_120,
}
FINALIZE = (
    # Few rows of many columns, the strips: wide blocks that the rows fill.
    FinalizeTile(max_p=16, block_p=16, block_n=256, num_warps=8),
    # Many rows of few columns: 128 bytes of a row, a whole line, and 128 loads under way at once.
    FinalizeTile(max_p=math.inf, block_p=128, block_n=32, num_warps=8),
)


def known_architecture(architecture: int) -> int:
    """The newest architecture of the tables that is no newer than this one."""
    return max((known for known in FORWARD if known <= architecture), default=min(FORWARD))


@functools.lru_cache(maxsize=1024)
def forward(n: int, architecture: int, width: int, residual: bool) -> ForwardTile:
    """The row for rows of n, read in vectors of ``width`` elements, with or without a residual."""
    return next(
        tile
        for tile in FORWARD[known_architecture(architecture)]
        if n <= tile.max_n and width >= tile.min_width and (tile.residual or not residual)
    )


@functools.lru_cache(maxsize=1024)
def backward(n: int, architecture: int, width: int, residual: bool) -> BackwardTile:
    """The row for rows of n, read in vectors of ``width`` elements, with or without a residual."""
    return next(
        tile
        for tile in BACKWARD[known_architecture(architecture)]
        if n <= tile.max_n and width >= tile.min_width and (tile.residual or not residual)
    )


def finalize(programs: int) -> FinalizeTile:
    """The row for this many partial rows."""
    return next(tile for tile in FINALIZE if programs <= tile.max_p)
