"""Every row of the forward's tile tables, compiled ahead of time: no spills, shared memory that fits, tensor
core instructions and wide copies; and the rule by which a row is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

from llmkernels.ops.attention import tiles
from tests.ahead_of_time import SHARED_LIMIT, Compiled, Job, compile_all

_ARCHITECTURES = tuple(tiles.FORWARD)
_KERNEL = "llmkernels.ops.attention.triton_forward:_attention_forward_kernel"


def forward_job(
    tile: tiles.ForwardTile,
    architecture: int,
    *,
    features: bool,
    head_dim: int | None = None,
    width: int | None = None,
    precision: str = "ieee",
) -> Job:
    """The kernel as ``forward`` launches it; features: with a full bias, ALiBi, sinks, dropout and a soft cap
    at once."""
    dtype = "bf16" if tile.itemsize == 2 else "fp32"
    head_dim = head_dim or tile.max_head_dim
    arguments: dict[str, Any] = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}"),
        "lse_ptr": "*fp32",
        "bias_ptr": f"*{dtype}" if features else None,
        "slope_ptr": "*fp32" if features else None,
        "sink_ptr": "*fp32" if features else None,
        "seed_ptr": "*i64" if features else None,
        **dict.fromkeys(("cu_seqlens_q_ptr", "cu_seqlens_k_ptr"), None),
        **dict.fromkeys(("q_stride_b", "q_stride_h", "q_stride_m"), "i32"),
        **dict.fromkeys(("k_stride_b", "k_stride_h", "k_stride_n"), "i32"),
        **dict.fromkeys(("v_stride_b", "v_stride_h", "v_stride_n"), "i32"),
        **dict.fromkeys(("out_stride_b", "out_stride_h", "out_stride_m"), "i32"),
        **dict.fromkeys(("bias_stride_b", "bias_stride_h", "bias_stride_m"), "i32"),
        "bias_stride_n": 1,
        "slope_stride_b": "i32",
        **dict.fromkeys(("tiles", "heads", "group", "length_q", "length_k", "bottom_right"), "i32"),
        **dict.fromkeys(("left", "right", "quads_per_row", "threshold"), "i32"),
        **dict.fromkeys(("scale", "kept_scale"), "fp32"),
        "softcap": "fp32" if features else None,
        "VEC": width or 16 // tile.itemsize,
        **dict.fromkeys(("D", "DV"), head_dim),
        **dict.fromkeys(("BLOCK_D", "BLOCK_DV"), tile.max_head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.num_stages,
        "PRECISION": precision,
    }
    label = f"{tile}, features {features}, head dim {head_dim}, {precision}"
    return Job(_KERNEL, arguments, architecture, tile.num_warps, label)


def _precision(tile: tiles.ForwardTile) -> str:
    return "tf32" if (tile.itemsize, tile.max_head_dim) == (4, 256) else "ieee"


def _dots(report: Compiled) -> int:
    return sum(report.instructions[kind] for kind in ("mma_sync", "wgmma", "tcgen05_mma"))


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_rows_fit(architecture: int, record_property: Callable[[str, object], None]) -> None:
    """In the call that asks most of it: everything at once, or, of a row for plain calls, a plain one."""
    jobs = [
        # True float32 of 256 columns spills in every tile (tiles.py): there only tf32 can be held to it.
        forward_job(tile, architecture, features=tile.features, precision=_precision(tile))
        for tile in tiles.FORWARD[architecture]
    ]
    wrong = []
    for job, report in zip(jobs, compile_all(jobs), strict=True):
        uses = f"{report.registers} registers, {report.shared} bytes shared"
        record_property(f"sm_{architecture} {job.label}", uses)
        fits = not report.error and not report.spilled and report.shared <= SHARED_LIMIT[architecture]
        # Where tensor memory does not suffice the compiler has been seen to leave an empty kernel.
        if not fits or not _dots(report):
            wrong.append(f"{job.label}: {report}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_keys_and_values_come_in_wide_asynchronous_copies(architecture: int) -> None:
    """16 bytes a thread where strides and head dim allow, by the architecture's own tensor core instruction;
    from unaligned rows no copy is wider than an element."""
    row = tiles.forward(128, 2, architecture, features=False)
    aligned, odd = compile_all(
        [
            forward_job(row, architecture, features=False, head_dim=80),
            forward_job(row, architecture, features=False, head_dim=80, width=1),
        ]
    )
    own = {80: "mma_sync", 90: "wgmma", 100: "tcgen05_mma", 120: "mma_sync"}[architecture]
    assert aligned.instructions[own] > 0
    # Of K and V: in each loop one tile, and before each loop those that are ahead.
    copies = row.block_n * 128 // 8 // (32 * row.num_warps)
    assert aligned.instructions["copy_async_128"] >= 2 * 2 * row.num_stages * copies
    assert aligned.instructions["global_load"] == aligned.instructions["global_load_128"]
    assert odd.instructions["copy_async_128"] == odd.instructions["global_load_128"] == 0


def test_a_row_too_large_is_seen_to_spill() -> None:
    row = tiles.ForwardTile(128, itemsize=2, block_m=128, block_n=128, num_warps=4, num_stages=2)
    (report,) = compile_all([forward_job(row, 80, features=True)])
    assert not report.error and report.spilled > 0


@pytest.mark.parametrize("architecture", (*_ARCHITECTURES, 86, 89, 103, 121, 130))
@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("features", (False, True))
def test_the_row_chosen_holds_the_call(architecture: int, itemsize: int, features: bool) -> None:
    for head_dim in (16, 32, 64, 128, 256):
        tile = tiles.forward(head_dim, itemsize, architecture, features)
        assert head_dim <= tile.max_head_dim and tile.itemsize == itemsize
        assert tile.features or not features


def test_an_unlisted_architecture_takes_the_newest_before_it() -> None:
    known = [tiles.known_architecture(a) for a in (80, 86, 89, 90, 100, 103, 120, 121, 200)]
    assert known == [80, 80, 80, 90, 100, 100, 120, 120, 120]
