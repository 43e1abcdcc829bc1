"""Tile table of the Triton decode kernel and the number of splits: both from sizes alone, never from lengths.

A program walks its keys in tiles of ``block_n`` and is bound by memory, so a row wants many bytes in flight:
``num_stages`` tiles of keys and values in shared memory, for two programs a processor at once. Provenance
of every row: compiled ahead of time for its architecture by tests/ops/test_attention_decode_tiles.py, 0
spills in the calls that ask most of it; not yet timed on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

# What the shared memory of a row leaves room for.
PROGRAMS_PER_PROCESSOR = 2
# The fewest rows that a tensor core takes.
_SMALLEST_BLOCK_M = 16
# A split that is shorter than this many tiles costs more in the merge than it gains in parallelism.
_TILES_PER_SPLIT = 4
# A wave of programs that fills the processors this well, beside the best found, is good enough.
_GOOD_SHARE = 0.85
_MOST_SPLITS = 128
# New tokens that a program of the append writes at most.
APPEND_ROWS, APPEND_WARPS = 16, 4
# The merge takes this many splits at once, one tile of partial sums.
MERGE_SPLITS, MERGE_WARPS = 16, 4


@dataclass(frozen=True)
class DecodeTile:
    """max_d: the largest padded head dim served, of keys and values; item_size: bytes of an element;
    min_width: the shortest vector of elements, by alignment, at which the row has registers enough; max_m:
    the most rows of queries that a program holds; block_n: keys a tile."""

    max_d: int
    item_size: int
    min_width: int
    max_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def block_m(self, rows: int) -> int:
        """The rows that one program holds, of ``rows`` that share a key head."""
        return min(max(_SMALLEST_BLOCK_M, 1 << (rows - 1).bit_length()), self.max_m)

    def stages(self, paged: bool) -> int:
        """Of the loop: behind a load from the page table each stage of keys and values takes two."""
        return 2 * self.num_stages - 1 if paged else self.num_stages


# 32 KB a stage. Products of float32 are made without tensor cores, from registers, of which more than 16 rows
# would take too many.
_FLOAT32 = (
    DecodeTile(64, item_size=4, min_width=4, max_m=16, block_n=64, num_warps=8, num_stages=3),
    DecodeTile(128, item_size=4, min_width=1, max_m=16, block_n=32, num_warps=8, num_stages=3),
    DecodeTile(256, item_size=4, min_width=4, max_m=16, block_n=16, num_warps=8, num_stages=3),
)
_LARGE = (
    DecodeTile(64, item_size=2, min_width=8, max_m=64, block_n=128, num_warps=4, num_stages=3),
    DecodeTile(128, item_size=2, min_width=8, max_m=32, block_n=64, num_warps=4, num_stages=3),
    DecodeTile(256, item_size=2, min_width=8, max_m=32, block_n=32, num_warps=4, num_stages=3),
    *_FLOAT32,
)
# sm_80's assembler gives up a few bytes at more rows, for a third program a processor.
_SM_80 = (
    DecodeTile(64, item_size=2, min_width=8, max_m=16, block_n=128, num_warps=4, num_stages=3),
    DecodeTile(128, item_size=2, min_width=8, max_m=16, block_n=64, num_warps=4, num_stages=3),
    DecodeTile(256, item_size=2, min_width=8, max_m=32, block_n=32, num_warps=4, num_stages=3),
    *_FLOAT32,
)
# sm_86, sm_89 and sm_120 have 100 KB a processor: half the keys a tile.
_SMALL = (
    DecodeTile(64, item_size=2, min_width=8, max_m=32, block_n=64, num_warps=4, num_stages=3),
    DecodeTile(128, item_size=2, min_width=8, max_m=16, block_n=32, num_warps=4, num_stages=3),
    DecodeTile(256, item_size=2, min_width=8, max_m=16, block_n=16, num_warps=4, num_stages=3),
    DecodeTile(64, item_size=4, min_width=4, max_m=16, block_n=32, num_warps=4, num_stages=3),
    DecodeTile(128, item_size=4, min_width=1, max_m=16, block_n=16, num_warps=4, num_stages=3),
    DecodeTile(256, item_size=4, min_width=4, max_m=16, block_n=16, num_warps=4, num_stages=2),
)
# In vectors of less than 16 bytes addresses and predicates take registers of their own.
_NARROW = (
    DecodeTile(64, item_size=2, min_width=1, max_m=32, block_n=32, num_warps=4, num_stages=2),
    DecodeTile(128, item_size=2, min_width=1, max_m=16, block_n=16, num_warps=8, num_stages=2),
    DecodeTile(256, item_size=2, min_width=1, max_m=16, block_n=16, num_warps=4, num_stages=2),
    DecodeTile(64, item_size=4, min_width=1, max_m=16, block_n=32, num_warps=4, num_stages=2),
    DecodeTile(256, item_size=4, min_width=1, max_m=16, block_n=16, num_warps=4, num_stages=2),
)
TILES: dict[int, tuple[DecodeTile, ...]] = {
    80: _SM_80 + _NARROW,
    86: _SMALL + _NARROW,
    90: _LARGE + _NARROW,
    100: _LARGE + _NARROW,
    120: _SMALL + _NARROW,
}


def known_architecture(architecture: int) -> int:
    """The newest architecture of the table that is no newer than this one."""
    return max((known for known in TILES if known <= architecture), default=min(TILES))


@functools.lru_cache(maxsize=1024)
def decode(padded_head_dim: int, item_size: int, width: int, architecture: int) -> DecodeTile:
    """The row for heads padded to this many elements of this many bytes, read in vectors of ``width``."""
    return next(
        tile
        for tile in TILES[known_architecture(architecture)]
        if padded_head_dim <= tile.max_d and item_size == tile.item_size and width >= tile.min_width
    )


@functools.lru_cache(maxsize=4096)
def splits(programs: int, tiles: int, slots: int) -> int:
    """In how many parts to walk up to ``tiles`` tiles of keys, where ``programs`` programs without a split
    meet ``slots`` places to run at once: the fewest that fill whole waves nearly as well as any number
    does."""
    most = min(_MOST_SPLITS, max(1, tiles // _TILES_PER_SPLIT))
    if most == 1 or programs >= slots * _GOOD_SHARE:
        return 1
    shares = []
    for count in range(1, most + 1):
        waves = programs * count / slots
        shares.append(waves / -(-programs * count // slots))
    return next(i + 1 for i, share in enumerate(shares) if share >= _GOOD_SHARE * max(shares))
