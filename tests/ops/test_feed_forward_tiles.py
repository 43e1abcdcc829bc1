"""Every row of the feed-forward's tile tables, compiled ahead of time for every architecture: no spills,
shared memory that fits, tensor cores and asynchronous copies in use; the rule by which a row is chosen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

from llmkernels.ops.feed_forward import tiles
from llmkernels.ops.feed_forward.call import ACTIVATIONS
from tests.ahead_of_time import SHARED_LIMIT, Compiled, Job, compile_all

_KERNELS = "llmkernels.ops.feed_forward"
_ARCHITECTURES = tuple(tiles.FORWARD)
_EVERY_TILE = os.environ.get("LLMKERNELS_EVERY_TILE") == "1"
# The instruction that multiplies on each architecture's tensor cores.
_TENSOR_CORE = {80: "mma_sync", 90: "wgmma", 100: "tcgen05_mma", 120: "mma_sync"}


def _gemm_arguments(
    tile: tiles.GemmTile, width: int, activation: str, along_k: bool, dtype: str, dropout: bool
) -> dict[str, Any]:
    """What forward and backward have in common."""
    function, gated = ACTIVATIONS[activation]
    return {
        "seed_ptr": "*i64" if dropout else None,
        **dict.fromkeys(("weight_ptr", "pre_ptr", "hidden_ptr"), f"*{dtype}"),
        **dict.fromkeys(("weight_stride", "M", "N", "K", "threshold"), "i32"),
        "scale": "fp32",
        "FUNCTION": function,
        "GATED": gated,
        "WEIGHT_ALONG_K": along_k,
        "PRECISION": "tf32" if tile.kind == "tf32" else "ieee",
        "VEC": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "STAGES": tile.num_stages,
        "STRIPS": tile.strips,
    }


def forward_job(
    tile: tiles.GemmTile,
    architecture: int,
    width: int,
    activation: str,
    along_k: bool = True,
    dropout: bool = True,
) -> Job:
    """The forward kernel as ``forward`` launches it, everything wanted."""
    dtype = "bf16" if tile.kind == "half" else "fp32"
    arguments = _gemm_arguments(tile, width, activation, along_k, dtype, dropout)
    arguments |= {**dict.fromkeys(("x_ptr", "bias_ptr"), f"*{dtype}"), "x_stride": "i32"}
    name = f"{_KERNELS}.triton_forward:_linear_activation_forward_kernel"
    label = f"forward {tile} for width {width}, {activation}, along K {along_k}, dropout {dropout}"
    return Job(name, arguments, architecture, tile.num_warps, label)


def backward_job(
    tile: tiles.GemmTile,
    architecture: int,
    width: int,
    activation: str,
    along_k: bool = False,
    dropout: bool = True,
) -> Job:
    """The backward kernel as ``backward`` launches it, everything wanted."""
    dtype = "bf16" if tile.kind == "half" else "fp32"
    arguments = _gemm_arguments(tile, width, activation, along_k, dtype, dropout)
    arguments |= {**dict.fromkeys(("dy_ptr", "dpre_ptr"), f"*{dtype}"), "dy_stride": "i32"}
    arguments["dbias_partial_ptr"] = "*fp32"
    name = f"{_KERNELS}.triton_backward:_linear_activation_backward_kernel"
    label = f"backward {tile} for width {width}, {activation}, along K {along_k}, dropout {dropout}"
    return Job(name, arguments, architecture, tile.num_warps, label)


def elementwise_job(architecture: int, width: int, dtype: str) -> Job:
    tile = tiles.ELEMENTWISE
    arguments: dict[str, Any] = {
        **dict.fromkeys(("dy_ptr", "pre_ptr", "dpre_ptr"), f"*{dtype}"),
        "dbias_partial_ptr": "*fp32",
        **dict.fromkeys(("dy_stride", "M", "N"), "i32"),
        "FUNCTION": "gelu",
        "GATED": True,
        "VEC": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    name = f"{_KERNELS}.triton_backward:_activation_backward_kernel"
    return Job(name, arguments, architecture, tile.num_warps, f"elementwise, width {width}, {dtype}")


def finalize_job(architecture: int, width: int) -> Job:
    tile = tiles.FINALIZE
    arguments: dict[str, Any] = {
        "partial_ptr": "*fp32",
        "dbias_ptr": "*bf16",
        **dict.fromkeys(("P", "N"), "i32"),
        "VEC": width,
        "BLOCK_P": tile.block_p,
        "BLOCK_N": tile.block_n,
    }
    name = f"{_KERNELS}.triton_backward:_bias_gradient_kernel"
    return Job(name, arguments, architecture, tile.num_warps, f"finalize, width {width}")


def _calls(tile: tiles.GemmTile, gated: bool) -> list[dict[str, Any]]:
    """The calls a row is compiled for: exact GELU with dropout, gated where the row is, is what asks most of
    its registers, at the widest vectors of an aligned row and element by element of another. With
    LLMKERNELS_EVERY_TILE=1 every activation, width and layout that the row may get."""
    widest = 8 if tile.kind == "half" else 4
    if not _EVERY_TILE:
        width = widest if tile.min_width > 1 else 1
        return [{"width": width, "activation": "geglu" if gated else "gelu"}]
    return [
        {"width": width, "activation": activation, "along_k": along_k, "dropout": dropout}
        for width in (1, 2, 4, 8)
        for activation in ACTIVATIONS
        for along_k in (False, True)
        for dropout in (False, True)
        if tile.min_width <= width <= widest and (gated or not ACTIVATIONS[activation][1])
    ]


def _forward_jobs(architecture: int) -> list[Job]:
    return [
        forward_job(tile, architecture, **call)
        for tile in tiles.FORWARD[architecture]
        for call in _calls(tile, tile.gated)
    ]


def _backward_jobs(architecture: int) -> list[Job]:
    jobs = [finalize_job(architecture, 4), elementwise_job(architecture, 1, "fp32")]
    return jobs + [
        backward_job(tile, architecture, **call)
        for tile in tiles.BACKWARD[architecture]
        for call in _calls(tile, gated=True)
    ]


def _spills(job: Job, report: Compiled) -> bool:
    """Whether the row makes it spill. Below the most registers that its threads can have the assembler may
    still give up a few bytes of its own accord, for another block a processor; it does in a few of the
    combinations that are compiled on demand."""
    most = min(255, 65536 // (32 * job.num_warps))
    return report.spilled > (64 if _EVERY_TILE and report.registers < most else 0)


def _multiplies(job: Job, report: Compiled) -> bool:
    """Whether the kernel has the instructions that its products are meant for."""
    precision, dtype = job.arguments.get("PRECISION"), job.arguments.get("weight_ptr")
    if precision is None or (precision == "ieee" and dtype == "*fp32"):
        return True
    # wgmma and tcgen05 take 64 rows and more.
    small = job.arguments["BLOCK_M"] < 64
    return report.instructions["mma_sync" if small else _TENSOR_CORE[job.architecture]] > 0


def _assert_fits(jobs: list[Job], record_property: Callable[[str, object], None]) -> None:
    wrong = []
    for job, report in zip(jobs, compile_all(jobs), strict=True):
        uses = f"{report.registers} registers, {report.shared} bytes shared"
        record_property(f"sm_{job.architecture} {job.label}", uses)
        fits = not _spills(job, report) and report.shared <= SHARED_LIMIT[job.architecture]
        if report.error or not fits or not _multiplies(job, report):
            wrong.append(f"{job.label}: {report}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_forward_rows_fit(architecture: int, record_property: Callable[[str, object], None]) -> None:
    _assert_fits(_forward_jobs(architecture), record_property)


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_backward_rows_fit(architecture: int, record_property: Callable[[str, object], None]) -> None:
    _assert_fits(_backward_jobs(architecture), record_property)


def test_a_row_too_large_is_seen() -> None:
    many_values = tiles.GemmTile("half", 1, 128, 64, 32, num_warps=4, num_stages=2, strips=1)
    many_stages = tiles.GemmTile("half", 1, 64, 64, 64, num_warps=8, num_stages=16, strips=4)
    jobs = [backward_job(many_values, 90, 8, "geglu"), backward_job(many_stages, 90, 8, "gelu")]
    spilling, large = compile_all(jobs)
    assert spilling.spilled > 0 and large.shared > SHARED_LIMIT[90]


@pytest.mark.parametrize("architecture", (80, 90))
def test_operands_come_in_asynchronous_copies(architecture: int) -> None:
    """16 bytes each, as many stages ahead as the row says, whichever way the weight lies; pre, hidden and
    dpre are written in 16-byte stores."""
    row = tiles.backward(4096, "half", 8, architecture)
    jobs = [backward_job(row, architecture, 8, "gelu", along_k, dropout=False) for along_k in (False, True)]
    copies = (row.block_m + row.block_n) * row.block_k // 8 // (32 * row.num_warps)
    stores = row.block_m * row.block_n // 8 // (32 * row.num_warps)
    for report in compile_all(jobs):
        assert report.instructions["copy_async_128"] == row.num_stages * copies
        assert report.instructions["global_store_128"] == 2 * stores


@pytest.mark.parametrize("architecture", (*_ARCHITECTURES, 86, 89, 103, 121, 130))
@pytest.mark.parametrize("width", (1, 2, 4, 8))
def test_the_row_chosen_holds_the_call(architecture: int, width: int) -> None:
    for m in (1, 16, 17, 64, 65, 128, 4096, 2**30):
        for kind in ("half", "tf32", "ieee"):
            for gated in (False, True):
                tile = tiles.forward(m, kind, gated, width, architecture)
                assert tile.kind == kind and m <= tile.max_m and width >= tile.min_width
                assert tile.gated or not gated
            tile = tiles.backward(m, kind, width, architecture)
            assert tile.kind == kind and m <= tile.max_m and width >= tile.min_width


def test_every_row_is_chosen_for_some_call() -> None:
    for architecture in _ARCHITECTURES:
        calls = [(m, kind, w) for m in (1, 64, 4096) for kind in ("half", "tf32", "ieee") for w in (1, 4, 8)]
        forward = {
            tiles.forward(m, kind, gated, w, architecture) for m, kind, w in calls for gated in (False, True)
        }
        assert forward == set(tiles.FORWARD[architecture])
        assert {tiles.backward(*call, architecture) for call in calls} == set(tiles.BACKWARD[architecture])


def test_an_unlisted_architecture_takes_the_newest_before_it() -> None:
    known = [tiles.known_architecture(a) for a in (80, 86, 89, 90, 100, 103, 120, 121, 200)]
    assert known == [80, 80, 80, 90, 100, 100, 120, 120, 120]


def test_partials_of_the_elementwise_backward_are_few() -> None:
    """No more than the processors keep busy, nor than rows enough pay for, and at least one."""
    tile = tiles.ELEMENTWISE
    for n in (1, 128, 4096, 2**20):
        for m in (1, 7, 4096, 10**6):
            programs = tile.row_programs(m, n, 132)
            strips = -(-n // tile.block_n)
            assert 1 <= programs <= max(1, m // tile.block_m)
            assert programs * strips <= max(tile.per_processor * 132, strips)
