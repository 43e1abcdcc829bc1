"""python -m bench: measure, print a table, write JSON, CSV and plots."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch._functorch.config

from . import attention, attention_decode, feed_forward, layer_norm
from .measure import Record, environment

OPS = {
    "attention": attention,
    "attention_decode": attention_decode,
    "feed_forward": feed_forward,
    "layer_norm": layer_norm,
}


def _print_row(record: Record) -> None:
    rate, share = f"{record.gigabytes_per_second:8.1f} GB/s", ""
    if record.share_of_copy_rate is not None:
        share = f"{record.share_of_copy_rate:6.2f} of copy"
    if record.teraflops_per_second is not None:
        rate = f"{record.teraflops_per_second:7.2f} TFLOP/s"
        if record.share_of_matmul_rate is not None:
            share = f"{record.share_of_matmul_rate:6.2f} of matmul"
    time = "not timed" if math.isnan(record.median_seconds) else f"{record.median_seconds * 1e6:10.1f} us"
    match = "match" if record.match else f"NO MATCH ({record.match_detail})"
    print(
        f"{record.variant:30} {record.direction:9} {record.rows:6}x{record.columns:<7} {record.provider:18} "
        f"{time} {rate} {share} {match}",
        flush=True,
    )


def _plot(records: list[Record], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = sorted({record.variant for record in records})
    unit = "TFLOP/s" if any(record.teraflops_per_second for record in records) else "GB/s"
    directions = ("forward", "backward")
    figure, grid = plt.subplots(
        len(variants), len(directions), figsize=(11, 3.2 * len(variants)), squeeze=False, sharex=True
    )
    for axes_row, variant in zip(grid, variants, strict=True):
        for axes, direction in zip(axes_row, directions, strict=True):
            for provider in sorted({record.provider for record in records}):
                points = [
                    (r.columns, r.teraflops_per_second or r.gigabytes_per_second)
                    for r in records
                    if (r.variant, r.direction, r.provider) == (variant, direction, provider) and r.match
                ]
                if points:
                    axes.plot(*zip(*sorted(points), strict=True), marker="o", label=provider)
            axes.set(
                xscale="log",
                title=f"{variant}, {direction}",
                xlabel="columns",
                ylabel=f"{unit} of the floor",
            )
            axes.grid(True, alpha=0.3)
    grid[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmkernels bench", description=__doc__)
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--provider", action="append", default=[], help="only these; default: all that are here"
    )
    parser.add_argument("--quick", action="store_true", help="two small shapes; the default off the GPU")
    parser.add_argument(
        "--output", type=Path, default=Path("bench-results"), help="folder for JSON, CSV and PNG"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    found_environment = environment(device)
    # Backward is timed many times over one forward, which a compiled region allows only without this.
    torch._functorch.config.donated_buffer = False
    unmatched = 0
    for op in options.op or sorted(OPS):
        module = OPS[op]
        shapes = module.QUICK_SHAPES if options.quick or device.type != "cuda" else module.SHAPES
        dtype = getattr(torch, options.dtype)
        # A stream of our own, since the default one can't be captured into a CUDA graph.
        with (
            torch.cuda.stream(torch.cuda.Stream(device))
            if device.type == "cuda"
            else contextlib.nullcontext()
        ):
            records = module.run(device, dtype, shapes, tuple(options.provider), _print_row)
        stem = options.output / f"{op}-{options.dtype}-{str(found_environment['device']).replace(' ', '-')}"
        rows = [dataclasses.asdict(record) for record in records]
        stem.with_suffix(".json").write_text(
            json.dumps({"environment": found_environment, "records": rows}, indent=1) + "\n"
        )
        with stem.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[field.name for field in dataclasses.fields(Record)])
            writer.writeheader()
            writer.writerows(rows)
        try:
            _plot(records, stem.with_suffix(".png"), f"{op}, {options.dtype}, {found_environment['device']}")
            print(f"wrote {stem}.json, .csv and .png")
        except ModuleNotFoundError as error:
            print(f"wrote {stem}.json and .csv; the plot needs {error.name}: pip install 'llmkernels[bench]'")
        unmatched += sum(not record.match for record in records)
    return 1 if unmatched else 0


if __name__ == "__main__":
    raise SystemExit(main())
