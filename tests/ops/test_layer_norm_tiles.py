"""Every row of the Triton tile tables, compiled ahead of time for every architecture: no spills, shared
memory that fits, wide loads; and the rule by which a row is chosen."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

from llmkernels.ops.layer_norm import tiles
from tests.ahead_of_time import SHARED_LIMIT, Compiled, Job, compile_all

_KERNELS = "llmkernels.ops.layer_norm"
_ARCHITECTURES = tuple(tiles.FORWARD)
_EVERY_TILE = os.environ.get("LLMKERNELS_EVERY_TILE") == "1"


def _pointer(dtype: str | None) -> str | None:
    return None if dtype is None else f"*{dtype}"


def forward_job(
    tile: tiles.ForwardTile,
    architecture: int,
    width: int,
    dtype: str = "bf16",
    parameters: str | None = "bf16",
    residual: str | None = None,
    dropout: bool = False,
    rms: bool = False,
) -> Job:
    """A forward kernel as ``forward`` launches it for these dtypes; residual is the dtype of it, in and
    out."""
    arguments: dict[str, Any] = {
        "x_ptr": _pointer(dtype),
        "residual_ptr": _pointer(residual),
        "weight_ptr": _pointer(parameters),
        "bias_ptr": None if rms else _pointer(parameters),
        "seed_ptr": _pointer("i64" if dropout else None),
        "y_ptr": _pointer(dtype),
        "z_ptr": _pointer(residual),
        "mean_ptr": _pointer(None if rms else "fp32"),
        "rstd_ptr": _pointer("fp32"),
        **dict.fromkeys(("x_stride", "residual_stride", "N", "threshold"), "i32"),
        **dict.fromkeys(("eps", "scale"), "fp32"),
        "VEC": width,
        "BLOCK_N": tile.block_n,
    }
    name = "_norm_forward_looped_kernel"
    if not tile.looped:
        name = "_norm_forward_kernel"
        arguments |= {"M": "i32", "ROWS": tile.rows}
    label = (
        f"{tile} for width {width}, {dtype}, parameters {parameters}, residual {residual}, dropout {dropout}"
    )
    return Job(f"{_KERNELS}.triton_forward:{name}", arguments, architecture, tile.num_warps, label)


def backward_job(
    tile: tiles.BackwardTile,
    architecture: int,
    width: int,
    dtype: str = "bf16",
    parameters: str | None = "bf16",
    residual: str | None = None,
    dropout: bool = False,
    rms: bool = False,
) -> Job:
    """The backward kernel as ``backward`` launches it for these dtypes, with every gradient asked for."""
    arguments: dict[str, Any] = {
        "dy_ptr": _pointer(dtype),
        "dz_ptr": _pointer(residual),
        "z_ptr": _pointer(residual or dtype),
        "weight_ptr": _pointer(parameters),
        "mean_ptr": _pointer(None if rms else "fp32"),
        "rstd_ptr": _pointer("fp32"),
        "seed_ptr": _pointer("i64" if dropout else None),
        "sums_ptr": _pointer("fp32" if tile.strips else None),
        "dx_ptr": _pointer(dtype),
        "dresidual_ptr": _pointer(residual),
        "dweight_partial_ptr": _pointer("fp32" if parameters else None),
        "dbias_partial_ptr": _pointer("fp32" if parameters and not rms else None),
        **dict.fromkeys(("dy_stride", "dz_stride", "z_stride", "M", "N", "threshold"), "i32"),
        "scale": "fp32",
        "VEC": width,
        "ROWS": tile.rows,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.num_stages,
    }
    label = (
        f"{tile} for width {width}, {dtype}, parameters {parameters}, residual {residual}, dropout {dropout}"
    )
    return Job(
        f"{_KERNELS}.triton_backward:_norm_backward_kernel", arguments, architecture, tile.num_warps, label
    )


def sums_job(tile: tiles.BackwardTile, architecture: int, width: int, dtype: str) -> Job:
    arguments: dict[str, Any] = {
        **dict.fromkeys(("dy_ptr", "z_ptr", "weight_ptr"), f"*{dtype}"),
        **dict.fromkeys(("mean_ptr", "rstd_ptr", "sums_ptr"), "*fp32"),
        **dict.fromkeys(("dy_stride", "z_stride", "N"), "i32"),
        "VEC": width,
        "BLOCK_N": tile.sums_block_n,
    }
    name = f"{_KERNELS}.triton_backward:_norm_backward_sums_kernel"
    return Job(
        name,
        arguments,
        architecture,
        tile.sums_num_warps,
        f"sums of {tile.sums_block_n}, width {width}, {dtype}",
    )


def finalize_job(tile: tiles.FinalizeTile, architecture: int, width: int) -> Job:
    arguments: dict[str, Any] = {
        **dict.fromkeys(("dweight_partial_ptr", "dbias_partial_ptr"), "*fp32"),
        **dict.fromkeys(("dweight_ptr", "dbias_ptr"), "*bf16"),
        **dict.fromkeys(("P", "N"), "i32"),
        "VEC": width,
        "BLOCK_P": tile.block_p,
        "BLOCK_N": tile.block_n,
    }
    name = f"{_KERNELS}.triton_backward:_norm_backward_finalize_kernel"
    return Job(
        name,
        arguments,
        architecture,
        tile.num_warps,
        f"finalize {tile.block_p} x {tile.block_n}, width {width}",
    )


# What a call may combine: dtype of x and y, of the parameters, of the residual in and out, dropout, RMSNorm.
_FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"rms": True},
    {"parameters": "fp32"},
    {"residual": "bf16"},
    {"residual": "bf16", "dropout": True},
    {"residual": "fp32", "parameters": "fp32", "dropout": True},
    {"dtype": "fp32", "parameters": "fp32"},
    {"dtype": "fp32", "parameters": "fp32", "residual": "fp32", "dropout": True},
)


def _calls(tile: Any, serves: Callable[[int, bool], bool]) -> list[dict[str, Any]]:
    """The calls a row is compiled for: those that ask most of its registers, everything at once, in 16 bits
    at its narrowest vectors (addresses and predicates of each element apart) and in float32. With
    LLMKERNELS_EVERY_TILE=1 every combination of features and widths that the row may get."""
    calls = []
    for features in _FEATURES:
        widest = 4 if "fp32" in features.values() else 8
        heavy = bool(features.get("dropout")) or not getattr(tile, "residual", True)
        for width in (1, 2, 4, 8):
            if width > widest or not serves(width, "residual" in features):
                continue
            narrowest = width == tile.min_width and widest == 8
            if _EVERY_TILE or heavy and (narrowest or width == widest == 4):
                calls.append({"width": width, **features})
    return calls


def _forward_jobs(architecture: int) -> list[Job]:
    jobs = []
    for tile in tiles.FORWARD[architecture]:
        n = 2**20 if tile.looped else tile.block_n
        calls = _calls(tile, lambda width, residual: tiles.forward(n, architecture, width, residual) is tile)  # noqa: B023
        assert calls, f"no call gets {tile}"
        jobs += [forward_job(tile, architecture, **call) for call in calls]
    return jobs


def _backward_jobs(architecture: int) -> list[Job]:
    jobs = [finalize_job(tile, architecture, width) for tile in tiles.FINALIZE for width in (1, 4)]
    for tile in tiles.BACKWARD[architecture]:
        n = 2**20 if tile.strips else tile.block_n
        calls = _calls(tile, lambda width, residual: tiles.backward(n, architecture, width, residual) is tile)  # noqa: B023
        assert calls, f"no call gets {tile}"
        jobs += [backward_job(tile, architecture, **call) for call in calls]
        if tile.strips:
            jobs += [
                sums_job(tile, architecture, width, dtype)
                for width, dtype in ((1, "bf16"), (8, "bf16"), (4, "fp32"))
            ]
    return jobs


def _spills(job: Job, report: Compiled) -> bool:
    """Whether the row makes it spill. Below the most registers that its threads can have the assembler may
    still give up a few bytes of its own accord, for another block a processor; it does at odd row lengths, in
    a few of the combinations that are compiled on demand."""
    most = min(255, 65536 // (32 * job.num_warps))
    return report.spilled > (32 if _EVERY_TILE and report.registers < most else 0)


def _assert_fits(jobs: list[Job], record_property: Callable[[str, object], None]) -> None:
    wrong = []
    for job, report in zip(jobs, compile_all(jobs), strict=True):
        uses = f"{report.registers} registers, {report.shared} bytes shared"
        record_property(f"sm_{job.architecture} {job.label}", uses)
        if report.error or _spills(job, report) or report.shared > SHARED_LIMIT[job.architecture]:
            wrong.append(f"{job.label}: {report}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_forward_rows_fit(architecture: int, record_property: Callable[[str, object], None]) -> None:
    _assert_fits(_forward_jobs(architecture), record_property)


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_backward_rows_fit(architecture: int, record_property: Callable[[str, object], None]) -> None:
    _assert_fits(_backward_jobs(architecture), record_property)


def test_a_row_too_large_is_seen_to_spill() -> None:
    row = tiles.ForwardTile(max_n=32768, rows=1, block_n=32768, num_warps=32)
    (report,) = compile_all([forward_job(row, 90, 1, residual="bf16", dropout=True)])
    assert not report.error and report.spilled > 0


def _same_exchange(a: Compiled, b: Compiled) -> bool:
    return all(
        a.instructions[kind] == b.instructions[kind] for kind in ("shared_load", "shared_store", "barrier")
    )


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_memory_is_reached_in_vectors(architecture: int) -> None:
    """Aligned rows move 16 bytes an instruction and cross threads through shared memory for their sums alone:
    not where dropout spreads its four words over columns, nor where 16-bit and 32-bit tensors meet."""
    row = tiles.forward(4096, architecture, 8, residual=False)
    bf16, fp32, dropped, mixed, unaligned = compile_all(
        [
            forward_job(row, architecture, 8),
            forward_job(row, architecture, 4, "fp32", "fp32"),
            forward_job(row, architecture, 8, residual="bf16", dropout=True),
            forward_job(row, architecture, 4, residual="fp32", parameters="fp32", dropout=True),
            forward_job(row, architecture, 1),
        ]
    )
    values = row.rows * row.block_n // (32 * row.num_warps)
    # x, weight and bias of a thread's values; y.
    for report, width in ((bf16, 8), (fp32, 4)):
        assert report.instructions["global_load_128"] == 3 * values // width
        assert report.instructions["global_load"] == report.instructions["global_load_128"]
        assert report.instructions["global_store_128"] == values // width
    assert dropped.instructions["global_load_128"] == 4 * values // 8  # and the residual
    assert dropped.instructions["global_store_128"] == 2 * values // 8  # and the new one
    assert _same_exchange(dropped, bf16) and _same_exchange(mixed, bf16)
    assert unaligned.instructions["global_load_128"] == 0
    assert all(report.instructions["flush_to_zero"] == 0 for report in (bf16, fp32, dropped, mixed))


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_backward_loads_the_next_tile_ahead(architecture: int) -> None:
    """dy and z come in 16-byte asynchronous copies, once before the loop and once in it."""
    row = tiles.backward(4096, architecture, 8, residual=False)
    (report,) = compile_all([backward_job(row, architecture, 8, parameters=None)])
    values = row.rows * row.block_n // (32 * row.num_warps)
    assert report.instructions["copy_async_128"] == 2 * 2 * values // 8
    assert report.instructions["global_store_128"] == values // 8


@pytest.mark.parametrize("architecture", (*_ARCHITECTURES, 86, 89, 103, 121, 130))
@pytest.mark.parametrize("width", (1, 2, 4, 8))
def test_the_row_chosen_holds_the_call(architecture: int, width: int) -> None:
    for n in (
        1,
        15,
        16,
        17,
        63,
        64,
        65,
        1000,
        1024,
        1025,
        8192,
        8193,
        16384,
        16385,
        32768,
        32769,
        262144,
        2**24,
    ):
        for residual in (False, True):
            tile = tiles.forward(n, architecture, width, residual)
            assert width >= tile.min_width and (tile.residual or not residual)
            assert n >= tile.block_n if tile.looped else n <= tile.block_n
            backward = tiles.backward(n, architecture, width, residual)
            assert width >= backward.min_width and (backward.residual or not residual)
            assert backward.strips or n <= backward.block_n


def test_an_unlisted_architecture_takes_the_newest_before_it() -> None:
    assert [tiles.known_architecture(a) for a in (80, 86, 89, 90, 100, 103, 120, 121, 200)] == [
        *(80, 80, 80),
        90,
        *(100, 100),
        *(120, 120, 120),
    ]


def test_partials_are_few() -> None:
    """The partials are no more than the processors keep busy, nor than rows enough pay for, and at least
    one."""
    for n in (64, 1024, 8192, 16384, 262144, 2**22):
        row = tiles.backward(n, 90, 8, residual=False)
        strips = math.ceil(n / row.block_n)
        for m in (1, 7, 4096, 10**6):
            programs = row.row_programs(m, n, 132)
            assert 1 <= programs <= max(1, m // row.rows)
            assert programs * strips <= max(row.per_processor * 132, strips)
    assert tiles.backward(1024, 90, 8, residual=False).row_programs(10**6, 1024, 132) == 264
