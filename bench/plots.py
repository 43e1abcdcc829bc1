"""PNG plots of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .record import Record
from .workload import Workload

_DIRECTIONS = ("forward", "backward", "both")


def _value(record: Record, bound: str, timed_on: str) -> float | None:
    if not record.match or record.median_seconds is None:
        return None
    if timed_on != "cuda":
        return record.median_seconds * 1e6
    return record.teraflops_per_second if bound == "matmul" else record.share_of_copy


def _label(bound: str, timed_on: str) -> str:
    if timed_on != "cuda":
        return "us of a call on the host"
    return "TFLOP/s" if bound == "matmul" else "share of the copy rate"


def draw(path: Path, workload: Workload, records: Sequence[Record], environment: dict[str, object]) -> None:
    """TFLOP/s, or the share of bandwidth, along the size that the workload sweeps: a row of axes a variant, a
    column a direction, a line a provider. Of several shapes of one such size the fastest counts. Raises
    ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed_on = str(environment["timed_on"])
    variants = list(dict.fromkeys(record.variant for record in records))
    columns = [name for name in _DIRECTIONS if any(record.direction == name for record in records)]
    figure, grid = plt.subplots(
        max(len(variants), 1),
        max(len(columns), 1),
        figsize=(4.5 * max(len(columns), 1) + 2, 3.0 * max(len(variants), 1) + 0.8),
        squeeze=False,
    )
    providers = list(dict.fromkeys(record.provider for record in records))
    # Ten colours, then the same with another mark.
    looks: dict[str, Any] = {
        name: {"color": f"C{index % 10}", "marker": "os^"[index // 10 % 3], "label": name}
        for index, name in enumerate(providers)
    }
    for axes_row, variant in zip(grid, variants, strict=False):
        for axes, direction in zip(axes_row, columns, strict=False):
            for provider in providers:
                points: dict[int, float] = {}
                for record in records:
                    key = (record.variant, record.direction, record.provider)
                    value = _value(record, workload.bound, timed_on)
                    if key == (variant, direction, provider) and value is not None:
                        better = max if timed_on == "cuda" else min
                        points[record.swept] = better(value, points.get(record.swept, value))
                if points:
                    axes.plot(*zip(*sorted(points.items()), strict=True), **looks[provider])
            axes.set_xscale("log", base=2)
            axes.set(
                title=f"{variant}, {direction}",
                xlabel=workload.swept,
                ylabel=_label(workload.bound, timed_on),
            )
            axes.set_ylim(bottom=0)
            axes.grid(True, alpha=0.3)
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{workload.name}, {records[0].dtype if records else ''}, {environment['device']}")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)
