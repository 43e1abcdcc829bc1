"""Every row of the decode kernel's tile table, compiled ahead of time for every architecture: no spills,
shared memory that fits, wide asynchronous loads; and how a row and a number of splits are chosen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

from llmkernels.ops.attention_decode import tiles
from tests.ahead_of_time import SHARED_LIMIT, Compiled, Job, compile_all

_KERNELS = "llmkernels.ops.attention_decode"
_EVERY_TILE = os.environ.get("LLMKERNELS_EVERY_TILE") == "1"
# sm_86 has the rows of sm_120, and is compiled with all the others on demand.
_ARCHITECTURES = tuple(known for known in tiles.TILES if known != 86 or _EVERY_TILE)


def _strides(tensors: str, dims: str) -> dict[str, str]:
    return {f"stride_{tensor}{dim}": "i32" for tensor in tensors.split() for dim in dims}


def decode_job(
    tile: tiles.DecodeTile,
    architecture: int,
    block_m: int | None = None,
    width: int | None = None,
    page_size: int = 0,
    everything: bool = False,
    merged: bool = False,
    tf32: bool = False,
) -> Job:
    """The decode kernel as ``forward`` launches it for the row's largest heads; everything: a soft cap, ALiBi
    and sinks; merged: one of several splits."""
    dtype = "bf16" if tile.item_size == 2 else "fp32"
    width = width or tile.min_width
    arguments: dict[str, Any] = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}"),
        "lengths_ptr": "*i32",
        "table_ptr": "*i32" if page_size else None,
        "slopes_ptr": "*fp32" if everything else None,
        "sinks_ptr": "*fp32" if everything and not merged else None,
        "out_ptr": "*fp32" if merged else f"*{dtype}",
        "lse_ptr": None if merged else "*fp32",
        **dict.fromkeys(("m_ptr", "l_ptr"), "*fp32" if merged else None),
        **_strides("q", "bhm"),
        **_strides("k v", "bhn"),
        **dict.fromkeys(("stride_tb", "stride_ab", "H", "GROUP", "LQ", "NEW", "BLOCKS", "CAPACITY"), "i32"),
        **dict.fromkeys(("LEFT", "RIGHT", "SPLITS"), "i32"),
        "scale": "fp32",
        "cap_log2": "fp32" if everything else None,
        "PAGE_SIZE": page_size,
        "VEC": width,
        "PRECISION": "tf32" if tf32 else "ieee",
        **dict.fromkeys(("D", "BLOCK_D", "DV", "BLOCK_DV"), tile.max_d),
        "BLOCK_M": block_m or tile.max_m,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.stages(page_size > 0),
    }
    features = f"width {width}, pages of {page_size}, everything {everything}, merged {merged}, tf32 {tf32}"
    name = f"{_KERNELS}.triton_forward:_attention_decode_kernel"
    label = f"{tile} {arguments['BLOCK_M']} rows, {features}"
    return Job(name, arguments, architecture, tile.num_warps, label)


def merge_job(architecture: int, value_dim: int = 256) -> Job:
    arguments: dict[str, Any] = {
        **dict.fromkeys(("acc_ptr", "m_ptr", "l_ptr", "lse_ptr"), "*fp32"),
        **dict.fromkeys(("sinks_ptr", "out_ptr"), "*bf16"),
        **dict.fromkeys(("HEADS", "LQ", "SPLITS"), "i32"),
        **dict.fromkeys(("DV", "BLOCK_DV"), value_dim),
        "BLOCK_S": tiles.MERGE_SPLITS,
    }
    name = f"{_KERNELS}.triton_forward:_attention_decode_merge_kernel"
    return Job(name, arguments, architecture, tiles.MERGE_WARPS, "merge")


def append_job(architecture: int, width: int, rows: int = tiles.APPEND_ROWS) -> Job:
    arguments: dict[str, Any] = {
        **dict.fromkeys(("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16"),
        **dict.fromkeys(("lengths_ptr", "table_ptr"), "*i32"),
        **_strides("k v kc vc", "bhn"),
        **dict.fromkeys(("stride_tb", "H", "NEW", "BLOCKS", "CAPACITY"), "i32"),
        "PAGE_SIZE": 16,
        "VEC": width,
        "ROWS": rows,
        **dict.fromkeys(("D", "BLOCK_D", "DV", "BLOCK_DV"), 256),
    }
    name = f"{_KERNELS}.triton_append:_attention_decode_append_kernel"
    return Job(name, arguments, architecture, tiles.APPEND_WARPS, f"append, width {width}")


def _jobs(architecture: int) -> list[Job]:
    """For each row the call that asks most of its registers, at its most rows of queries and its narrowest
    vectors: a page for each key, a soft cap, ALiBi, one of several splits. For rows of 16 bits the plainest
    too, which waits for nothing between its products. With LLMKERNELS_EVERY_TILE=1 every combination."""
    jobs = [merge_job(architecture), append_job(architecture, 1)]
    for tile in tiles.TILES[architecture]:
        jobs.append(decode_job(tile, architecture, page_size=1, everything=True, merged=True))
        if tile.min_width == 8:
            jobs.append(decode_job(tile, architecture))
        if _EVERY_TILE:
            jobs += [
                decode_job(tile, architecture, block_m, width, page_size, everything, merged, tf32)
                for block_m in sorted({16, tile.max_m})
                for width in sorted({tile.min_width, 16 // tile.item_size})
                for page_size in (0, 16)
                for everything, merged in ((False, False), (False, True), (True, False), (True, True))
                for tf32 in ((False, True) if tile.item_size == 4 else (False,))
            ]
    return jobs


def _matrix_products(report: Compiled) -> int:
    """How many products of the tensor cores a kernel has, of whatever generation."""
    return sum(report.instructions.get(kind, 0) for kind in ("mma_sync", "wgmma", "tcgen05_mma"))


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_rows_fit(architecture: int, record_property: Callable[[str, object], None]) -> None:
    jobs, wrong = _jobs(architecture), []
    for job, report in zip(jobs, compile_all(jobs), strict=True):
        uses = f"{report.registers} registers, {report.shared} bytes shared"
        record_property(f"sm_{architecture} {job.label}", uses)
        # Below the most registers that its threads can have the assembler may still give up a few bytes of
        # its own accord, for another block a processor; it does in some combinations compiled on demand.
        if job.arguments.get("q_ptr") == "*bf16" and not report.error:
            assert _matrix_products(report) > 0, job.label
        tolerated = 36 if _EVERY_TILE and report.registers < 255 else 0
        if report.error or report.spilled > tolerated or report.shared > SHARED_LIMIT[architecture]:
            wrong.append(f"{job.label}: {report}")
    assert not wrong, "\n".join(wrong)


def test_a_row_too_large_is_seen_to_spill() -> None:
    row = tiles.DecodeTile(256, item_size=2, min_width=8, max_m=64, block_n=64, num_warps=4, num_stages=2)
    (report,) = compile_all([decode_job(row, 90)])
    assert not report.error and report.spilled > 0


@pytest.mark.parametrize("architecture", (80, 120))
def test_keys_and_values_come_in_asynchronous_vectors(architecture: int) -> None:
    """16 bytes a copy, as many tiles ahead behind a page table as without one; and no load of keys or values
    that is not such a copy."""
    row = tiles.decode(128, 2, 8, architecture)
    reports = compile_all(
        [decode_job(row, architecture, page_size=size, block_m=16) for size in (0, 16, row.block_n)]
    )
    copies = 2 * row.block_n * row.max_d // 8 // (32 * row.num_warps)
    queries = 16 * row.max_d // 8 // (32 * row.num_warps)
    for report, paged in zip(reports, (False, True, True), strict=True):
        # Ahead of the loop and in it.
        assert report.instructions["copy_async_128"] == row.num_stages * copies
        assert report.instructions["global_load_128"] == queries
        # The length of the sequence, and the table's entries before the loop and in it.
        assert report.instructions["global_load"] <= queries + (1 if not paged else 1 + 2 * row.num_stages)


@pytest.mark.parametrize("architecture", (75, 80, 86, 87, 89, 90, 100, 103, 120, 121, 130))
def test_every_call_has_a_row(architecture: int) -> None:
    for item_size, widths in ((2, (1, 2, 4, 8)), (4, (1, 2, 4))):
        for width in widths:
            for head_dim in (16, 32, 64, 128, 256):
                row = tiles.decode(head_dim, item_size, width, architecture)
                assert head_dim <= row.max_d and width >= row.min_width and row.item_size == item_size
                for rows in (1, 16, 17, 33, 1000):
                    assert 16 <= row.block_m(rows) <= row.max_m
                    assert row.block_m(rows) >= min(rows, row.max_m)


def test_an_unlisted_architecture_takes_the_newest_before_it() -> None:
    expected = {75: 80, 80: 80, 86: 86, 89: 86, 90: 90, 103: 100, 121: 120, 200: 120}
    assert {a: tiles.known_architecture(a) for a in expected} == expected


def test_splits_fill_the_processors() -> None:
    """None where there are programs enough or keys too few; else whole waves, in parts of some length."""
    assert tiles.splits(1000, 512, 264) == tiles.splits(1, 4, 264) == tiles.splits(1, 0, 264) == 1
    for programs in (1, 8, 32, 100, 200):
        for key_tiles in (64, 512, 16384):
            count = tiles.splits(programs, key_tiles, 264)
            assert 1 <= count <= 128 and count <= max(1, key_tiles // 4)
            if key_tiles >= 512:
                full_waves = -(-programs * count // 264)
                assert programs * count >= 0.7 * 264 * full_waves or count > 100
    assert tiles.splits(8, 512, 264) > 16
