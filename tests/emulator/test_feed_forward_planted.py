"""Bugs planted into copies of csrc/feed_forward: each shows under every schedule, in a report or a result."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from .build import Patch, build
from .conftest import SCHEDULES, built
from .feed_forward_calls import Case, problems

# Only the unit that shows a bug is compiled with it.
FORWARD, BACKWARD = "feed_forward/forward_float16.cu", "feed_forward/backward_float16.cu"
FLOAT32 = "feed_forward/forward_float32.cu"
HOST = "feed_forward/feed_forward.cu"

PRODUCT, OPERANDS = "feed_forward/product.cuh", "feed_forward/operands.cuh"
EPILOGUE, QUAD = "feed_forward/epilogue.cuh", "feed_forward/quad.cuh"
FORWARD_KERNEL, BACKWARD_KERNEL = "feed_forward/forward.cuh", "feed_forward/backward.cuh"
GRADIENT, FRAGMENTS, SWIZZLE = "feed_forward/gradient.cuh", "sm80/fragments.cuh", "common/swizzle.cuh"

HALF = torch.float16
PLAIN = Case(5, 200, 24, 12, HALF)  # seven steps of K, more than there are stages
GATED = Case(5, 40, 24, 200, HALF, "swiglu")


class Plant(NamedTuple):
    name: str
    patch: Patch
    unit: str
    case: Case
    shown_by: str  # how a report or a wrong result begins


PLANTS = (
    # Copies and barriers.
    Plant(
        "a step is multiplied while its copies are under way",
        (PRODUCT, "cp_async_wait_group<Tile::kStages - 2>", "cp_async_wait_group<Tile::kStages - 1>"),
        FORWARD,
        PLAIN,
        "race: ",
    ),
    Plant(
        "no barrier before a step",
        (PRODUCT, "__syncthreads();", ""),
        FORWARD,
        PLAIN,
        "race: ",
    ),
    Plant(
        "copies into a stage that is being multiplied",
        (
            PRODUCT,
            "__syncthreads();\n      operands.start_next();",
            "operands.start_next();\n      __syncthreads();",
        ),
        FORWARD,
        PLAIN,
        "race: ",
    ),
    Plant(
        "a barrier for one lane of each warp",
        (PRODUCT, "__syncthreads();", "if (threadIdx.x % 32 == 0) __syncthreads();"),
        FORWARD,
        PLAIN,
        "linear_activation_forward: CUDA error 719 (deadlock: ",
    ),
    Plant(
        "a step's copies in no group of their own",
        (OPERANDS, "    cp_async_commit_group();", "    if (stage_ != 0) cp_async_commit_group();"),
        FORWARD,
        PLAIN,
        "race: ",
    ),
    Plant(
        "the stages of the copies and of the product get out of step",
        (PRODUCT, "stage = stage + 1 == Tile::kStages", "stage = stage + 1 == Tile::kStages - 1"),
        FORWARD,
        PLAIN,
        "race: ",
    ),
    Plant(
        "no barrier between writing a strip and reading it",
        (
            EPILOGUE,
            "    __syncwarp();\n#pragma unroll\n    for (int i = 1;",
            "#pragma unroll\n    for (int i = 1;",
        ),
        FORWARD,
        PLAIN,
        "race: ",
    ),
    Plant(
        "no barrier between reading a strip and writing the next",
        (EPILOGUE, "    __syncwarp();  // everyone has read the strip before\n", ""),
        FORWARD,
        Case(40, 24, 24, 12, HALF),
        "race: ",
    ),
    # Layouts.
    Plant(
        "fragments in another order of rows than copies",
        (OPERANDS, "swizzled<kRowBytes>(row(), chunk())", "swizzled<kRowBytes>(row() ^ 1, chunk())"),
        FORWARD,
        PLAIN,
        "hidden: ",
    ),
    Plant(
        "accumulators staged in another order than they are read",
        (EPILOGUE, "8 * j + accumulator_column(e)", "8 * (j ^ 1) + accumulator_column(e)"),
        FORWARD,
        PLAIN,
        "hidden: ",
    ),
    Plant(
        "a strip that is not moved up",
        (EPILOGUE, "acc[i - 1][j][e] = acc[i][j][e]", "acc[i - 1][j][e] = acc[i - 1][j][e]"),
        FORWARD,
        Case(40, 24, 24, 12, HALF),
        "hidden: ",
    ),
    Plant(
        "gate and up exchanged",
        (
            FORWARD_KERNEL,
            "finish_forward_quad<Element>(p, lane_rows + r, column, gate, up)",
            "finish_forward_quad<Element>(p, lane_rows + r, column, up, gate)",
        ),
        FORWARD,
        GATED,
        "hidden: ",
    ),
    # Bounds.
    Plant(
        "no mask of rows in the copies",
        (OPERANDS, "i < rows ? valid_bytes : 0", "i < kRows ? valid_bytes : 0"),
        FORWARD,
        PLAIN,
        "out of bounds: ",
    ),
    Plant(
        "no mask of K in the copies",
        (OPERANDS, "elements_bytes(p_.k - k));", "elements_bytes(p_.k));"),
        FORWARD,
        PLAIN,
        "out of bounds: ",
    ),
    Plant(
        "up's columns are those after gate's",
        (OPERANDS, "p_.paired ? p_.n + origin_.column : origin_.column + kHalf", "origin_.column + kHalf"),
        FORWARD,
        GATED,
        "out of bounds: ",
    ),
    Plant(
        "no mask of rows at the end",
        (FORWARD_KERNEL, "if (lane_rows + r >= p.product.m || column", "if (column"),
        FORWARD,
        PLAIN,
        "out of bounds: ",
    ),
    Plant(
        "no mask of single columns at the end",
        (
            QUAD,
            "store_values<1>(matrix_, row, Slot{column + j, column + j < end}",
            "store_values<1>(matrix_, row, Slot{column + j, true}",
        ),
        FORWARD,
        Case(1, 8, 26, 12, HALF),
        "out of bounds: ",
    ),
    Plant(
        "the last tile left out",
        (PRODUCT, "tile < tile_count<Tile>(p); tile +=", "tile < tile_count<Tile>(p) - 1; tile +="),
        FORWARD,
        PLAIN,
        "hidden: ",
    ),
    Plant(
        "tiles of two blocks",
        (PRODUCT, "tile = blockIdx.x; tile < tile_count", "tile = blockIdx.x / 2; tile < tile_count"),
        FORWARD,
        Case(5, 24, 100, 12, HALF),
        "race between blocks: ",
    ),
    # Arithmetic.
    Plant(
        "the activation of the unrounded pre-activation",
        (
            QUAD,
            "  pack(Element::dtype({}), values, raw);\n  unpack(Element::dtype({}), raw, values);",
            "  pack(Element::dtype({}), values, raw);",
        ),
        FORWARD,
        PLAIN,
        "remade: ",
    ),
    Plant(
        "no correction for what tf32 leaves of float32",
        (PRODUCT, "mma_m16n8k8_tf32(sum, a.small, b.words[pair], b.words[pair + 1]);", ""),
        FLOAT32,
        Case(5, 40, 24, 12),
        "hidden: ",
    ),
    Plant(
        "operands that are not rounded to tf32",
        (PRODUCT, "split_to_tf32(words, small);", "small[0] = small[1] = small[2] = small[3] = 0;"),
        FLOAT32,
        Case(5, 40, 24, 12),
        "linear_activation_forward: CUDA error 719 (bad operand: ",
    ),
    Plant(
        "dropout's rows share counters",
        (
            "common/dropout.cuh",
            "(static_cast<uint32_t>(columns) + 3) / 4",
            "static_cast<uint32_t>(columns) / 4",
        ),
        FORWARD,
        Case(5, 24, 26, 12, HALF),
        "hidden: ",
    ),
    # Backward.
    Plant(
        "no mask of rows of pre",
        (GRADIENT, "row < p.product.m ? p.product.n : 0", "p.product.n"),
        BACKWARD,
        GATED,
        "out of bounds: ",
    ),
    Plant(
        "no mask of columns of pre",
        (
            QUAD,
            "llmkernels::load(matrix_, matrix_.dtype, row, Slot{column, column < end}, raw)",
            "llmkernels::load(matrix_, matrix_.dtype, row, Slot{column, true}, raw)",
        ),
        BACKWARD,
        Case(1, 8, 24, 12, HALF),
        "out of bounds: ",
    ),
    Plant(
        "a sum over half of the lanes",
        (BACKWARD_KERNEL, "away = lanes; away < kWarpThreads;", "away = lanes; away < kWarpThreads / 2;"),
        BACKWARD,
        Case(40, 24, 24, 12, HALF, "swiglu"),
        "dbias: ",
    ),
    Plant(
        "a partial row for two warps",
        (
            BACKWARD_KERNEL,
            "store_sums(p, warp_rows / Tile::kWarpM,",
            "store_sums(p, warp_rows / Tile::kBlockM,",
        ),
        BACKWARD,
        Case(40, 24, 24, 12, HALF, "swiglu"),
        "race: ",
    ),
    Plant(
        "the bias gradient of what the activation has not been applied to",
        (GRADIENT, "sums.gate[j] += gate[j];", "sums.gate[j] += dhidden[j];"),
        BACKWARD,
        GATED,
        "dbias: ",
    ),
    Plant(
        "no barrier before the sums of the warps are added up",
        (HOST, "__syncthreads();", ""),
        HOST,
        Case(70, 8, 24, 24, HALF, "swiglu", weight2=False),
        "race: ",
    ),
    Plant(
        "a warp left out of the sums",
        (HOST, "other < kElementwiseWarps;", "other < kElementwiseWarps - 1;"),
        HOST,
        Case(70, 8, 24, 24, HALF, "swiglu", weight2=False),
        "dbias: ",
    ),
    Plant(
        "more rows than a partial row has",
        (HOST, "i < kElementwiseRows / kElementwiseWarps;", "i <= kElementwiseRows / kElementwiseWarps;"),
        HOST,
        Case(70, 8, 24, 24, HALF, "swiglu", weight2=False),
        "race between blocks: ",
    ),
    Plant(
        "copies wider than the rows are aligned to",
        (HOST, "bits % 16 == 0 ? 16", "bits % 4 == 0 ? 16"),
        HOST,
        Case(5, 24, 24, 12, HALF, offset=2),
        "linear_activation_forward: CUDA error 719 (misaligned: ",
    ),
)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_bug(plant: Plant) -> None:
    module = built(lambda: build(race=True, patches=[plant.patch], patched_units=[plant.unit]))
    for options in SCHEDULES[:3]:
        found = problems(module, plant.case, options)
        assert any(problem.startswith(plant.shown_by) for problem in found), (options, found)
