"""Bugs planted into copies of csrc/attention: each shows under every schedule, in a report or a result."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from .attention_calls import Case, problems
from .build import Patch, build
from .conftest import SCHEDULES, built

FORWARD, KEYS = "attention/forward_float32.cu", "attention/backward_keys_float32.cu"
QUERIES, BIAS, HOST = (
    "attention/backward_queries_float32.cu",
    "attention/backward_bias_float32.cu",
    "attention/attention.cu",
)

ROWS, WALK, LOGITS = "attention/rows.cuh", "attention/walk.cuh", "attention/logits.cuh"
PRODUCTS, GRADIENTS = "attention/products.cuh", "attention/gradients.cuh"
FORWARD_KERNEL, KEYS_KERNEL = "attention/forward.cuh", "attention/backward_keys.cuh"
QUERIES_KERNEL, BIAS_KERNEL = "attention/backward_queries.cuh", "attention/backward_bias.cuh"

# The one tile of the cases below stands in for the others, which then need not be compiled.
_WAIT, _BARRIER = "cp_async_wait_group<0>();\n      ", "__syncthreads();\n      "
_LOAD = "if (index + 1 < visits) load_keys(index + 1);"

ONE_TILE: dict[str, list[Patch]] = {
    FORWARD: [
        (FORWARD_KERNEL, f"typename Table::Forward{d},", "typename Table::Forward64,") for d in (128, 256)
    ],
    KEYS: [(KEYS_KERNEL, f"typename Table::Keys{d},", "typename Table::Keys64,") for d in (128, 256)],
    QUERIES: [
        (QUERIES_KERNEL, f"typename Table::Queries{d},", "typename Table::Queries64,") for d in (128, 256)
    ],
    BIAS: [],
    HOST: [],
}

CAUSAL = Case(40, 70, right=3)
GROUPED = Case(70, 40, heads=2, right=3)
FEATURES = Case(20, 35, features=True)
BROADCAST = Case(70, 35, features=True, bias=(1, 35))


class Plant(NamedTuple):
    name: str
    unit: str
    case: Case
    patch: Patch
    shown_by: str  # how a report or a wrong result begins


PLANTS = (
    Plant(
        "copies that are not waited for",
        FORWARD,
        CAUSAL,
        (FORWARD_KERNEL, _WAIT + _BARRIER, _BARRIER),
        "race: ",
    ),
    Plant(
        "no barrier after the copies",
        FORWARD,
        CAUSAL,
        (FORWARD_KERNEL, _WAIT + _BARRIER, _WAIT),
        "race: ",
    ),
    Plant(
        "the next step's copies before the barrier",
        FORWARD,
        Case(40, 135),
        (
            FORWARD_KERNEL,
            _WAIT + _BARRIER + _LOAD,
            _WAIT + _LOAD + _BARRIER,
        ),
        "race: ",
    ),
    Plant(
        "one stage for all keys",
        FORWARD,
        CAUSAL,
        (FORWARD_KERNEL, "smem.k[index % 2], k,", "smem.k[0], k,"),
        "race: ",
    ),
    Plant(
        "a group that is never closed",
        FORWARD,
        Case(150, 20, left=5),
        (FORWARD_KERNEL, "head.queries.length);\n  cp_async_commit_group();", "head.queries.length);"),
        "race: ",
    ),
    Plant(
        "values that are replaced without a barrier",
        FORWARD,
        Case(40, 70, right=0, spoilt=True),
        (ROWS, "(words.w));\n  }\n  __syncthreads();", "(words.w));\n  }"),
        "race: ",
    ),
    Plant(
        "a tile that is not swizzled where it is loaded",
        FORWARD,
        CAUSAL,
        (ROWS, "tile_smem + swizzled<kRowBytes>(row, chunk)", "tile_smem + row * kRowBytes + chunk * 16"),
        "out: ",
    ),
    Plant(
        "another swizzle on the way out",
        FORWARD,
        CAUSAL,
        (ROWS, "(tile_row + row, index % kChunks)", "(row + 1, index % kChunks)"),
        "race: ",
    ),
    Plant(
        "a row too many",
        FORWARD,
        CAUSAL,
        (ROWS, "position < high;", "position <= high;"),
        "out of bounds: ",
    ),
    Plant(
        "rows of out beyond the last",
        FORWARD,
        CAUSAL,
        (ROWS, "if (first + row >= length) continue;", ""),
        "out of bounds: ",
    ),
    Plant(
        "a window that is one key too wide",
        FORWARD,
        CAUSAL,
        (LOGITS, "distance > p.right ||", "distance > p.right + 1 ||"),
        "out: ",
    ),
    Plant(
        "keys beyond the last",
        FORWARD,
        Case(20, 35),
        (LOGITS, " || place.key(i, n, e) >= head.keys.length)", ")"),
        "out: ",
    ),
    Plant(
        "a walk that ends a key early",
        FORWARD,
        Case(20, 33),
        (WALK, "min(last + after + 1, length)", "min(last + after + 1, length - 1)"),
        "out: ",
    ),
    Plant(
        "sums that are not brought to the new maximum",
        FORWARD,
        Case(20, 70),
        (FORWARD_KERNEL, "total[i][half] *= correction;", ""),
        "lse: ",
    ),
    Plant(
        "dropout's rows share counters",
        FORWARD,
        FEATURES,
        (LOGITS, "quads = quads_of_row(p.max_seqlen_k);", "quads = 0;"),
        "out: ",
    ),
    Plant(
        "a bias read beyond its last column",
        FORWARD,
        FEATURES,
        (LOGITS, "inside ? bias_value(bias, offset) : -INFINITY", "bias_value(bias, offset)"),
        "out of bounds: ",
    ),
    Plant(
        "a product whose halves are exchanged",
        KEYS,
        GROUPED,
        (PRODUCTS, "(sums[i][d + 1], a[i], b, 1, is_exact);", "(sums[i][d + 1], a[i], b, 0, is_exact);"),
        "dkey: ",
    ),
    Plant(
        "statistics of the other stage",
        KEYS,
        GROUPED,
        (KEYS_KERNEL, "Statistics{smem.lse_log2[stage][query]", "Statistics{smem.lse_log2[stage ^ 1][query]"),
        "race: ",
    ),
    Plant(
        "a query head left out of its group",
        KEYS,
        GROUPED,
        (KEYS_KERNEL, "index < p.group * visits; ++index", "index < visits; ++index"),
        "dkey: ",
    ),
    Plant(
        "a mask that backward forgets",
        KEYS,
        GROUPED,
        (GRADIENTS, "if (is_cut) hide(p, head, place, scores);", ""),
        "dvalue: ",
    ),
    Plant(
        "a step too few",
        QUERIES,
        CAUSAL,
        (QUERIES_KERNEL, "index < visits; ++index", "index + 1 < visits; ++index"),
        "dquery: ",
    ),
    Plant(
        "no barrier, backward",
        QUERIES,
        CAUSAL,
        (QUERIES_KERNEL, "<0>();\n    __syncthreads();\n    if", "<0>();\n    if"),
        "race: ",
    ),
    Plant(
        "a soft cap without its derivative",
        QUERIES,
        FEATURES,
        (GRADIENTS, "if constexpr (kFeatures && !kOfLogits) {", "if constexpr (false) {"),
        "dquery: ",
    ),
    Plant(
        "a broadcast row that is read before it is there",
        BIAS,
        BROADCAST,
        (BIAS_KERNEL, "= sums[i][n][e];\n  });\n  __syncthreads();", "= sums[i][n][e];\n  });"),
        "race: ",
    ),
    Plant(
        "a tile of queries that a broadcast row misses",
        BIAS,
        BROADCAST,
        (BIAS_KERNEL, "high_query = walk.high();", "high_query = kBiasQueries;"),
        "dbias: ",
    ),
    Plant(
        "a delta without the logsumexp's gradient",
        HOST,
        FEATURES,
        (HOST, "if (p.dlse != nullptr) sum -= p.dlse[row];", ""),
        "dquery: ",
    ),
)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_bug(plant: Plant) -> None:
    patches = [*ONE_TILE[plant.unit], plant.patch]
    module = built(lambda: build(race=True, patches=patches, patched_units=[plant.unit]))
    for options in SCHEDULES[:2]:
        found = problems(module, plant.case, options)
        assert any(problem.startswith(plant.shown_by) for problem in found), (options, found)
