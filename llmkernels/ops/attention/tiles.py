"""Tile tables of the Triton attention kernels: what a program holds, by architecture, head dim and dtype.

Provenance of every row: compiled ahead of time for its architecture by tests/ops/test_attention_tiles.py and
test_attention_backward_tiles.py, 0 spills in the calls that ask most of it; not yet timed on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ForwardTile:
    """max_head_dim: the largest padded head dim served, of queries or values; itemsize: of their dtype.

    A program owns ``block_m`` queries and takes ``block_n`` keys at a time, with the loads of
    ``num_stages`` - 1 tiles ahead of the one it computes. features: whether the row has registers for a call
    with a bias, dropout, a soft cap or ALiBi.
    """

    max_head_dim: int
    itemsize: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    features: bool = True


# Registers are what a program runs out of first, 255 a thread: its share of the sums [block_m, head dim], of
# the logits [block_m, block_n] and, but for wgmma, of the queries.
_FORWARD_PLAIN_64 = (
    # Sums and logits of 64 registers each. Two blocks a processor by shared memory and registers.
    ForwardTile(64, itemsize=2, block_m=128, block_n=64, num_warps=4, num_stages=3, features=False),
)
_FORWARD_PLAIN_64_SM_80 = (
    # Beside the queries, which mma.sync takes from registers, triton 3.9 spills at 4 warps.
    ForwardTile(64, itemsize=2, block_m=128, block_n=64, num_warps=8, num_stages=3, features=False),
)
_FORWARD_PLAIN = (
    # 64 and 32: the 8 warps are all that a processor has registers for.
    ForwardTile(128, itemsize=2, block_m=128, block_n=64, num_warps=8, num_stages=3, features=False),
    # Sums of 64; at 128 queries, or with 4 warps, of 128, which spill.
    ForwardTile(256, itemsize=2, block_m=64, block_n=32, num_warps=8, num_stages=2, features=False),
)
# Beside the logits a tile of biases, its addresses and the words of dropout.
_FORWARD_FEATURES_80 = (
    ForwardTile(64, itemsize=2, block_m=64, block_n=32, num_warps=8, num_stages=2),
    ForwardTile(128, itemsize=2, block_m=64, block_n=32, num_warps=8, num_stages=2),
    ForwardTile(256, itemsize=2, block_m=64, block_n=16, num_warps=8, num_stages=2),
)
_FORWARD_FEATURES_90 = (
    ForwardTile(64, itemsize=2, block_m=128, block_n=32, num_warps=8, num_stages=2),
    # At 128 queries just enough for triton 3.6; 3.9 spills.
    ForwardTile(128, itemsize=2, block_m=64, block_n=32, num_warps=8, num_stages=2),
    # Fewer queries than wgmma takes: at 64 all else spills.
    ForwardTile(256, itemsize=2, block_m=32, block_n=32, num_warps=8, num_stages=2),
)
_FORWARD_FEATURES_100 = (
    ForwardTile(64, itemsize=2, block_m=64, block_n=64, num_warps=8, num_stages=2),
    ForwardTile(128, itemsize=2, block_m=64, block_n=32, num_warps=8, num_stages=2),
    ForwardTile(256, itemsize=2, block_m=64, block_n=16, num_warps=8, num_stages=2),
)
# True float32 runs on the FMA units, whose operands lie in registers, too.
_FORWARD_FLOAT32_64 = (ForwardTile(64, itemsize=4, block_m=32, block_n=32, num_warps=8, num_stages=2),)
_FORWARD_FLOAT32_128 = (ForwardTile(128, itemsize=4, block_m=16, block_n=32, num_warps=8, num_stages=2),)
# sm_120's assembler spills 24 bytes of the tile above.
_FORWARD_FLOAT32_128_SM_120 = (
    ForwardTile(128, itemsize=4, block_m=16, block_n=16, num_warps=8, num_stages=2),
)
# The smallest tile of all; unrolled over 256 columns true float32 spills about 1 KB a thread, tf32 nothing.
_FORWARD_FLOAT32_256 = (ForwardTile(256, itemsize=4, block_m=16, block_n=16, num_warps=8, num_stages=1),)
_FORWARD_FLOAT32 = _FORWARD_FLOAT32_64 + _FORWARD_FLOAT32_128 + _FORWARD_FLOAT32_256
_FORWARD_FLOAT32_SM_120 = _FORWARD_FLOAT32_64 + _FORWARD_FLOAT32_128_SM_120 + _FORWARD_FLOAT32_256

FORWARD: dict[int, tuple[ForwardTile, ...]] = {
    80: _FORWARD_PLAIN_64_SM_80 + _FORWARD_PLAIN + _FORWARD_FEATURES_80 + _FORWARD_FLOAT32,
    90: _FORWARD_PLAIN_64 + _FORWARD_PLAIN + _FORWARD_FEATURES_90 + _FORWARD_FLOAT32,
    100: _FORWARD_PLAIN_64 + _FORWARD_PLAIN + _FORWARD_FEATURES_100 + _FORWARD_FLOAT32,
    120: _FORWARD_PLAIN_64 + _FORWARD_PLAIN + _FORWARD_FEATURES_80 + _FORWARD_FLOAT32_SM_120,
}

# Under Triton's interpreter: so small that the shapes of tests cross the borders of tiles on both axes.
FORWARD_INTERPRETED = ForwardTile(256, itemsize=4, block_m=32, block_n=16, num_warps=4, num_stages=1)


def known_architecture(architecture: int) -> int:
    """The newest architecture of the tables that is no newer than this one."""
    return max((known for known in FORWARD if known <= architecture), default=min(FORWARD))


@functools.lru_cache(maxsize=1024)
def forward(head_dim: int, itemsize: int, architecture: int, features: bool) -> ForwardTile:
    """The row for a padded head dim (the larger of query's and value's) and a dtype of ``itemsize`` bytes;
    features: whether the call has a bias, dropout, a soft cap or ALiBi."""
    return next(
        tile
        for tile in FORWARD[known_architecture(architecture)]
        if head_dim <= tile.max_head_dim and itemsize == tile.itemsize and (tile.features or not features)
    )


@dataclass(frozen=True)
class Walk:
    """How a kernel of the backward goes over the scores: ``block_m`` queries by ``block_n`` keys at a time,
    with the loads of ``num_stages`` - 1 tiles ahead of the one it computes."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BackwardTile:
    """max_head_dim, itemsize, features: as ForwardTile. keys: of the kernel that owns keys and makes dk and
    dv, single_pass: of the same kernel where it makes dq too; queries: of the one that owns queries and makes
    dq; bias: of the one that makes dbias."""

    max_head_dim: int
    itemsize: int
    keys: Walk
    single_pass: Walk
    queries: Walk
    bias: Walk
    features: bool = True


# Registers again, 255 a thread. The keys kernel holds two sums [block_n, head dim], of which a thread has 64
# to 128 registers, and twice the logits; it owns few keys where a bias, dropout, a soft cap and ALiBi, all at
# once, come on top. The other kernels hold one sum or none.
_BACKWARD_FEATURES = (
    BackwardTile(
        max_head_dim=64, itemsize=2, keys=Walk(16, 32, 4, 1), single_pass=Walk(16, 32, 4, 1),
        queries=Walk(64, 32, 8, 2), bias=Walk(32, 64, 8, 1),
    ),
    BackwardTile(
        max_head_dim=128, itemsize=2, keys=Walk(16, 32, 4, 1), single_pass=Walk(32, 32, 8, 1),
        queries=Walk(64, 16, 8, 2), bias=Walk(32, 64, 8, 1),
    ),
    BackwardTile(
        max_head_dim=256, itemsize=2, keys=Walk(16, 16, 8, 1), single_pass=Walk(16, 16, 8, 1),
        queries=Walk(32, 16, 8, 1), bias=Walk(16, 16, 4, 1),
    ),
)  # fmt: skip
# With 64 keys a tile of wgmma's own shape.
_BACKWARD_FEATURES_90 = (
    BackwardTile(
        max_head_dim=64, itemsize=2, keys=Walk(16, 64, 4, 1), single_pass=Walk(16, 64, 4, 1),
        queries=Walk(64, 32, 8, 2), bias=Walk(32, 64, 8, 1),
    ),
    BackwardTile(
        max_head_dim=128, itemsize=2, keys=Walk(16, 32, 4, 1), single_pass=Walk(16, 32, 4, 1),
        queries=Walk(64, 16, 8, 2), bias=Walk(32, 64, 8, 1),
    ),
    BackwardTile(
        max_head_dim=256, itemsize=2, keys=Walk(16, 32, 8, 1), single_pass=Walk(16, 32, 8, 1),
        queries=Walk(32, 16, 8, 1), bias=Walk(16, 16, 4, 1),
    ),
)  # fmt: skip
# True float32 runs on the FMA units, whose operands lie in registers, too.
_FLOAT32_TO_64 = Walk(16, 16, 4, 1)
_FLOAT32_TO_256 = Walk(16, 16, 8, 1)
_BACKWARD_FLOAT32 = (
    BackwardTile(64, 4, _FLOAT32_TO_64, _FLOAT32_TO_64, _FLOAT32_TO_64, _FLOAT32_TO_64),
    # With 8 warps some assemblers settle on 128 registers and then spill a few bytes of the queries kernel;
    # with 16 these are all there are.
    BackwardTile(256, 4, _FLOAT32_TO_256, _FLOAT32_TO_256, Walk(32, 16, 16, 1), _FLOAT32_TO_256),
)


def _backward_plain(
    keys_64: Walk, queries_64: Walk, keys_128: Walk, features: tuple[BackwardTile, ...]
) -> tuple[BackwardTile, ...]:
    """The rows of 16 bits for calls without features, where the walks of those with them are not the best."""
    to_64, to_128, to_256 = features
    return (
        replace(to_64, keys=keys_64, queries=queries_64, features=False),
        replace(to_128, keys=keys_128, queries=Walk(128, 32, 8, 2), features=False),
        # 64 registers of sums; 32 keys at 32 queries, or loads ahead, spill.
        replace(to_256, keys=Walk(16, 32, 8, 1), queries=Walk(64, 16, 8, 2), features=False),
    )


_BACKWARD = (
    # Sums of 64 registers.
    *_backward_plain(Walk(32, 64, 4, 2), Walk(128, 32, 8, 2), Walk(32, 64, 8, 2), _BACKWARD_FEATURES),
    *_BACKWARD_FEATURES,
    *_BACKWARD_FLOAT32,
)
_BACKWARD_90 = (
    # Sums of 32 and of 64 registers; with 128 keys of 128 columns triton 3.9 spills.
    *_backward_plain(Walk(64, 64, 8, 2), Walk(128, 64, 8, 2), Walk(32, 64, 8, 2), _BACKWARD_FEATURES_90),
    *_BACKWARD_FEATURES_90,
    *_BACKWARD_FLOAT32,
)
BACKWARD: dict[int, tuple[BackwardTile, ...]] = {
    80: _BACKWARD,
    90: _BACKWARD_90,
    100: _BACKWARD,
    120: _BACKWARD,
}

_BACKWARD_INTERPRETED_WALK = Walk(block_m=16, block_n=32, num_warps=4, num_stages=1)
# As FORWARD_INTERPRETED; each kernel owns the longer side.
BACKWARD_INTERPRETED = BackwardTile(
    max_head_dim=256,
    itemsize=4,
    keys=_BACKWARD_INTERPRETED_WALK,
    single_pass=_BACKWARD_INTERPRETED_WALK,
    queries=Walk(block_m=32, block_n=16, num_warps=4, num_stages=1),
    bias=_BACKWARD_INTERPRETED_WALK,
)


@functools.lru_cache(maxsize=1024)
def backward(head_dim: int, itemsize: int, architecture: int, features: bool) -> BackwardTile:
    """As ``forward``."""
    return next(
        tile
        for tile in BACKWARD[known_architecture(architecture)]
        if head_dim <= tile.max_head_dim and itemsize == tile.itemsize and (tile.features or not features)
    )
