"""Bugs planted into copies of csrc/layer_norm: each shows under every schedule, in a report or a result."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from .build import Patch, build
from .conftest import SCHEDULES, built
from .layer_norm_calls import Case, problems

# Only the unit that shows a bug is compiled with it; kernels without vectors compile fastest.
FORWARD = "layer_norm/forward_unaligned.cu"
BACKWARD = "layer_norm/backward_unaligned.cu"
FINALIZE = "layer_norm/layer_norm.cu"

ROW_SUM, MOMENTS = "common/reduce.cuh", "layer_norm/moments.cuh"
FORWARD_KERNELS, BACKWARD_KERNELS = "layer_norm/forward.cuh", "layer_norm/backward.cuh"
COLUMN_SUMS, PARTIAL_ROWS = "layer_norm/column_sums.cuh", "common/partial_rows.cuh"
ROW_MASK = "const int n = row < p.m ? p.n : 0;"


class Plant(NamedTuple):
    name: str
    patch: Patch
    unit: str
    case: Case
    shown_by: str  # how a report or a wrong result begins


PLANTS = (
    Plant(
        "no barrier between the warps of a sum",
        (ROW_SUM, "__syncthreads();", ""),
        FORWARD,
        Case(3, 129),
        "race: ",
    ),
    Plant(
        "a barrier for one lane of each warp",
        (ROW_SUM, "__syncthreads();", "if (lane == 0) __syncthreads();"),
        FORWARD,
        Case(3, 129),
        "layer_norm_forward: CUDA error 719 (deadlock: ",
    ),
    Plant(
        "one scratch row for sum after sum",
        (ROW_SUM, "odd_ ^= 1;", ""),
        FORWARD,
        Case(3, 129),
        "race: ",
    ),
    Plant(
        "sums of warps that the block does not have",
        (
            ROW_SUM,
            "turn[k * kWarpThreads + lane] : 0.0f",
            "1.0f * turn[k * kWarpThreads + lane] : turn[lane]",
        ),
        FORWARD,
        Case(3, 129),
        "uninitialised: ",
    ),
    Plant(
        "a butterfly that stops early",
        (ROW_SUM, "offset > 0; offset /= 2) {\n    value +=", "offset > 1; offset /= 2) {\n    value +="),
        FORWARD,
        Case(3, 33),
        "y: ",
    ),
    Plant(
        "no barrier between the moments of warps",
        (MOMENTS, "__syncthreads();", ""),
        FORWARD,
        Case(3, 4097),
        "race: ",
    ),
    Plant(
        "moments merged with the other side's share",
        (MOMENTS, "share = b.count / both.count", "share = a.count / both.count"),
        FORWARD,
        Case(3, 4097),
        "y: ",
    ),
    Plant(
        "a wrong divisor of the mean",
        (FORWARD_KERNELS, "count = static_cast<float>(p.n);", "count = static_cast<float>(p.n + 1);"),
        FORWARD,
        Case(3, 129),
        "y: ",
    ),
    Plant(
        "no column mask",
        ("common/vector.cuh", "first < n}", "0 < n}"),
        FORWARD,
        Case(1, 129),
        "out of bounds: ",
    ),
    Plant(
        "no row mask, forward",
        (FORWARD_KERNELS, ROW_MASK, "const int n = p.n;"),
        FORWARD,
        Case(3, 33),
        "out of bounds: ",
    ),
    Plant(
        "blocks whose rows overlap",
        (FORWARD_KERNELS, "int64_t{blockIdx.x} * Tile::kRows", "int64_t{blockIdx.x} * (Tile::kRows - 1)"),
        FORWARD,
        Case(8, 33),
        "race between blocks: ",
    ),
    Plant(
        "dropout's rows share counters",
        ("common/dropout.cuh", "(columns) + 3) / 4", "(columns)) / 4"),
        FORWARD,
        Case(3, 33, add=True),
        "z: ",
    ),
    Plant(
        "no row mask, backward",
        (BACKWARD_KERNELS, ROW_MASK, "const int n = p.n;"),
        BACKWARD,
        Case(3, 33),
        "out of bounds: ",
    ),
    Plant(
        "a partial row for two blocks",
        (
            COLUMN_SUMS,
            "blockIdx.x, slot_of<kColumns>(i, Tile::threads(), thread,",
            "blockIdx.x / 2, slot_of<kColumns>(i, Tile::threads(), thread,",
        ),
        BACKWARD,
        Case(9, 33),
        "race between blocks: ",
    ),
    Plant(
        "no barrier before the rows of a block are added up",
        (COLUMN_SUMS, "__syncthreads();", ""),
        BACKWARD,
        Case(3, 33),
        "race: ",
    ),
    Plant(
        "a row of a block left out",
        (COLUMN_SUMS, "row < Tile::kRows;", "row < Tile::kRows - 1;"),
        BACKWARD,
        Case(9, 33),
        "dweight: ",
    ),
    Plant(
        "a row left out of a strip",
        (BACKWARD_KERNELS, "row = blockIdx.y; row < p.m;", "row = blockIdx.y; row < p.m - 1;"),
        BACKWARD,
        Case(3, 2049),
        "dweight: ",
    ),
    Plant(
        "a wrong divisor, backward",
        (BACKWARD_KERNELS, "mean_g_xhat = sums[0] / count;", "mean_g_xhat = sums[0] / (count + 1.0f);"),
        BACKWARD,
        Case(3, 33),
        "dx: ",
    ),
    Plant(
        "a partial row too few",
        (PARTIAL_ROWS, "row < rows;", "row < rows - 1;"),
        FINALIZE,
        Case(9, 33),
        "dweight: ",
    ),
    Plant(
        "a partial row too many",
        (PARTIAL_ROWS, "row < rows;", "row <= rows;"),
        FINALIZE,
        Case(9, 33),
        "out of bounds: ",
    ),
    Plant(
        "no barrier between the steps of the last sum",
        (PARTIAL_ROWS, "+= sums[line + half][lane];\n    __syncthreads();", "+= sums[line + half][lane];"),
        FINALIZE,
        Case(9, 33),
        "race: ",
    ),
)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_bug(plant: Plant) -> None:
    module = built(lambda: build(race=True, patches=[plant.patch], patched_units=[plant.unit]))
    for options in SCHEDULES[:3]:
        found = problems(module, plant.case, options)
        assert any(problem.startswith(plant.shown_by) for problem in found), (options, found)
