"""Every row of the backward's tile table, compiled ahead of time for every architecture: no spills, shared
memory that fits, the matrix instructions of the architecture; and the rule by which a row is chosen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

from llmkernels.ops.attention import tiles
from tests.ahead_of_time import SHARED_LIMIT, Job, compile_all

_KERNELS = "llmkernels.ops.attention"
_EVERY_TILE = os.environ.get("LLMKERNELS_EVERY_TILE") == "1"
# Tiles narrower than 64 go through mma.sync on every architecture.
_MATRIX_INSTRUCTIONS = {
    80: ("mma_sync",),
    90: ("wgmma", "mma_sync"),
    100: ("tcgen05_mma", "mma_sync"),
    120: ("mma_sync",),
}
_DIMS = ("i32", "i32", "i32")
# The most that a call can ask for: of a row for calls with features a bias or, in both of its loops, packed
# sequences; of the others packed sequences.
_WITH_BIAS = {"bias": True, "alibi": True, "softcap": True, "dropout": True}
_PACKED = {"packed": True}
_PACKED_FEATURES = {"packed": True, "alibi": True, "softcap": True, "dropout": True}


def backward_job(
    kernel: str,
    tile: tiles.BackwardTile,
    architecture: int,
    bias: bool = False,
    packed: bool = False,
    alibi: bool = False,
    softcap: bool = False,
    dropout: bool = False,
) -> Job:
    """A kernel as ``backward`` launches it with a row's walk, by the walk's name, for its largest heads."""
    walk: tiles.Walk = getattr(tile, kernel)
    dtype = "*fp32" if tile.itemsize == 4 else "*bf16"
    head_dim = tile.max_head_dim
    name = {"single_pass": "keys"}.get(kernel, kernel)
    arguments: dict[str, Any] = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "dout_ptr"), dtype),
        **dict.fromkeys(("lse_log2_ptr", "delta_ptr"), "*fp32"),
        "bias_ptr": dtype if bias else None,
        "slopes_ptr": "*fp32" if alibi else None,
        "seed_ptr": "*i64" if dropout else None,
        **dict.fromkeys(("q_strides", "k_strides", "v_strides", "dout_strides"), _DIMS),
        "bias_strides": (*_DIMS, 1) if bias else (0, 0, 0, 0),
        **dict.fromkeys(("slopes_stride", "length_q", "length_k", "heads", "group"), "i32"),
        **dict.fromkeys(("left", "right", "bottom_right", "quads_per_row", "threshold"), "i32"),
        **dict.fromkeys(("kept_scale", "scale"), "fp32"),
        "softcap": "fp32" if softcap else None,
        "VEC": 8,
        **dict.fromkeys(("D", "DV", "BLOCK_D", "BLOCK_DV"), head_dim),
        "BLOCK_M": walk.block_m,
        "BLOCK_N": walk.block_n,
        "STAGES": walk.num_stages,
        "PRECISION": "ieee",
    }
    if name == "bias":
        arguments |= {"dbias_ptr": dtype, "ONE_ROW": False, "ONE_COLUMN": False}
        arguments |= dict.fromkeys(("batches", "bias_batches", "bias_heads"), "i32")
    else:
        outputs = ("dk", "dv") if name == "keys" else ("dq",)
        arguments |= dict.fromkeys(("cu_seqlens_q_ptr", "cu_seqlens_k_ptr"), "*i32" if packed else None)
        arguments |= {f"{output}_ptr": dtype for output in outputs}
        arguments |= {f"{output}_strides": _DIMS for output in outputs}
        arguments["tiles"] = "i32"
    if name == "keys":
        arguments["dq_sum_ptr"] = "*fp32" if kernel == "single_pass" else None
    module = "triton_backward_bias" if name == "bias" else "triton_backward"
    features = f"bias {bias}, packed {packed}, ALiBi {alibi}, soft cap {softcap}, dropout {dropout}"
    label = f"{kernel} of {head_dim} x {tile.itemsize} bytes: {walk}, {features}"
    return Job(
        f"{_KERNELS}.{module}:_attention_backward_{name}_kernel",
        arguments, architecture, walk.num_warps, label,
    )  # fmt: skip


def _jobs(architecture: int) -> list[Job]:
    """A row's walks in the heaviest call that it serves, those of a row for calls without features where they
    differ from the walks of the row for calls with them; with LLMKERNELS_EVERY_TILE=1 packed sequences,
    too."""
    jobs = []
    for tile in tiles.BACKWARD[architecture]:
        featured = tiles.backward(tile.max_head_dim, tile.itemsize, architecture, features=True)
        for kernel in ("keys", "queries", "single_pass", "bias"):
            if tile.features:
                calls = [_WITH_BIAS, _PACKED_FEATURES] if _EVERY_TILE and kernel != "bias" else [_WITH_BIAS]
            else:
                calls = [] if getattr(tile, kernel) == getattr(featured, kernel) else [_PACKED]
            jobs += [backward_job(kernel, tile, architecture, **call) for call in calls]
    return jobs


@pytest.mark.parametrize("architecture", tuple(tiles.BACKWARD))
def test_rows_fit(architecture: int, record_property: Callable[[str, object], None]) -> None:
    jobs, wrong = _jobs(architecture), []
    for job, report in zip(jobs, compile_all(jobs), strict=True):
        record_property(job.label, f"{report.registers} registers, {report.shared} bytes shared")
        matrix = job.arguments["q_ptr"] == "*fp32" or any(
            report.instructions.get(name) for name in _MATRIX_INSTRUCTIONS[architecture]
        )
        if report.error or report.spilled or report.shared > SHARED_LIMIT[architecture] or not matrix:
            wrong.append(f"{job.label}: {report}")
    assert not wrong, "\n".join(wrong)


def test_a_row_too_large_is_seen_to_spill() -> None:
    walk = tiles.Walk(block_m=128, block_n=128, num_warps=4, num_stages=2)
    tile = tiles.BackwardTile(
        max_head_dim=128, itemsize=2, keys=walk, single_pass=walk, queries=walk, bias=walk
    )
    (report,) = compile_all([backward_job("keys", tile, 90)])
    assert not report.error and report.spilled > 0


@pytest.mark.parametrize("architecture", (80, 86, 89, 90, 100, 103, 120, 121))
@pytest.mark.parametrize("itemsize", (2, 4))
def test_the_row_chosen_holds_the_call(architecture: int, itemsize: int) -> None:
    for head_dim in (16, 32, 64, 128, 256):
        plain, featured = (
            tiles.backward(head_dim, itemsize, architecture, wanted) for wanted in (False, True)
        )
        for tile in (plain, featured):
            assert tile.max_head_dim >= head_dim and tile.itemsize == itemsize
        assert featured.features
        # A dropout mask is made of whole counters, and a tile's rows may be read past the last one.
        for walk in (plain.keys, plain.single_pass, plain.queries, featured.bias):
            assert walk.block_n % 4 == 0 and walk.block_m <= 256
