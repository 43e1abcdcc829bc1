"""python -m bench.report: what lies under bench/results/ as the tables and plots of the READMEs.

Between the markers of a README stands what this module makes of the results and nothing else; --check says
whether it does, and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import goals
from .record import Record, load

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
READMES = (ROOT / "README.md", ROOT / "bench" / "README.md")
OVERHEAD = "host_overhead.json"
NOTHING = "Nothing has been measured on a GPU yet."
_MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
_ROW = tuple[str, str, str, str, str]  # op, variant, shape, dtype, direction


@dataclass
class Device:
    """What one GPU's newest run of each op and dtype found. overhead: of each group of host overhead the
    median of torch over that of ours."""

    name: str
    records: list[Record] = field(default_factory=list)
    sources: list[Path] = field(default_factory=list)
    environments: list[dict[str, object]] = field(default_factory=list)
    overhead: dict[str, float] = field(default_factory=dict)


def _overhead(path: Path) -> dict[str, float]:
    """Torch's median over ours by group, of what pytest-benchmark wrote."""
    medians: dict[str, dict[str, float]] = {}
    for found in json.loads(path.read_text())["benchmarks"]:
        medians.setdefault(found["group"], {})[found["params"]["path"]] = found["stats"]["median"]
    return {
        group: by_path["torch"] / by_path["automatic"]
        for group, by_path in medians.items()
        if {"torch", "automatic"} <= by_path.keys()
    }


def gather(results: Path = RESULTS) -> list[Device]:
    """The GPUs of which there are results. Runs on a CPU and of small shapes say nothing of a GPU and are
    passed over."""
    newest: dict[tuple[str, str], tuple[str, Path]] = {}
    for path in sorted(results.rglob("*.json")):
        if path.name == OVERHEAD:
            continue
        environment, _ = load(path)
        if environment["timed_on"] != "cuda" or environment["mode"] != "published grid":
            continue
        key = str(environment["device"]), path.name
        newest[key] = max(newest.get(key, ("", path)), (str(environment["date"]), path))
    devices: dict[str, Device] = {}
    for (name, _), (_, path) in sorted(newest.items()):
        device = devices.setdefault(name, Device(name))
        environment, records = load(path)
        device.records += records
        device.sources.append(path)
        device.environments.append(environment)
        if (path.parent / OVERHEAD).exists():
            device.overhead = _overhead(path.parent / OVERHEAD)
    return list(devices.values())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _about(device: Device) -> str:
    """Commit, versions and date of the runs, which may be several."""
    said = []
    for environment in device.environments:
        versions = environment["versions"]
        assert isinstance(versions, dict)
        named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
        changed = " with uncommitted changes" if environment["uncommitted_changes"] else ""
        commit = str(environment["commit"] or "unknown")[:12]
        said.append(f"{str(environment['date'])[:10]}, {named}, commit {commit}{changed}")
    return f"{device.name}; " + "; ".join(dict.fromkeys(said)) + "."


def _microseconds(record: Record | None, named: bool = False) -> str:
    if record is None or record.median_seconds is None:
        return ""
    time = f"{record.median_seconds * 1e6:.1f}"
    return f"{time} ({record.provider})" if named else time


def _fastest(records: Iterable[Record]) -> Record | None:
    timed = [record for record in records if record.match and record.median_seconds is not None]
    return min(timed, key=lambda record: record.median_seconds or 0.0, default=None)


def _share(record: Record | None) -> str:
    if record is None:
        return ""
    if record.share_of_matmul is not None:
        return f"{record.share_of_matmul:.2f} of matmul"
    return "" if record.share_of_copy is None else f"{record.share_of_copy:.2f} of copy"


def _comparison(key: _ROW, records: list[Record]) -> list[str]:
    op, variant, shape, dtype, direction = key
    ours = _fastest(r for r in records if goals.is_ours(r))
    eager = _fastest(r for r in records if r.provider == "torch")
    compiled = _fastest(r for r in records if r.provider.startswith("torch.compile"))
    known = ("llmkernels", "torch.compile")
    other = _fastest(r for r in records if r.provider != "torch" and not r.provider.startswith(known))
    rival = _fastest(r for r in (eager, compiled, other) if r is not None)
    speed_up = ""
    if ours is not None and rival is not None and ours.median_seconds and rival.median_seconds:
        speed_up = f"{rival.median_seconds / ours.median_seconds:.2f}"
    figures = [_microseconds(ours, named=True), _microseconds(eager), _microseconds(compiled)]
    rest = [_microseconds(other, named=True), speed_up, _share(ours)]
    return [f"{op}: {variant}", shape, dtype, direction, *figures, *rest]


def tables(devices: Sequence[Device], beside: Path) -> str:
    """Every figure of the README: microseconds of the fastest of ours and of what would serve otherwise.
    beside: the folder of the README, from which plots are linked."""
    if not devices:
        return NOTHING
    header = (
        *("op", "shape", "dtype", "direction", "ours, us", "torch, us", "torch.compile, us"),
        *("fastest other, us", "against the fastest", "of the ceiling"),
    )
    parts = []
    for device in devices:
        rows: dict[_ROW, list[Record]] = {}
        for record in device.records:
            key = (record.op, record.variant, record.shape, record.dtype, record.direction)
            rows.setdefault(key, []).append(record)
        plots = [path.with_suffix(".png") for path in device.sources]
        images = [
            f"![{plot.stem}]({plot.relative_to(beside).as_posix()})"
            for plot in plots
            if plot.exists() and plot.is_relative_to(beside)
        ]
        table = _table(header, (_comparison(key, found) for key, found in rows.items()))
        parts.append("\n\n".join([_about(device), table, *images]))
    return "\n\n".join(parts)


def _host_overhead(device: Device) -> list[str]:
    if not device.overhead:
        return [goals.HOST_OVERHEAD, "1.00 x", "", "not measured"]
    group, ratio = min(device.overhead.items(), key=lambda item: item[1])
    verdict = f"met by {100 * (ratio - 1):.1f} %" if ratio >= 1 else f"missed by {100 * (1 - ratio):.1f} %"
    return [goals.HOST_OVERHEAD, "1.00 x", f"{ratio:.2f} x ({group})", verdict]


def goals_table(devices: Sequence[Device]) -> str:
    """Every goal: met, missed by how much, or not measured."""
    parts = []
    for device in devices or [Device("no GPU")]:
        rows = []
        for goal in goals.GOALS:
            found = goals.outcome(goal, device.records)
            value = "" if found.value is None else f"{found.value:.2f} {goal.unit}"
            rows.append([goal.what, f"{goal.target:.2f} {goal.unit}", value, found.verdict])
        table = _table(("goal", "at least", device.name, ""), [*rows, _host_overhead(device)])
        parts.append(table if not devices else f"{_about(device)}\n\n{table}")
    return "\n\n".join(parts)


def rendered(text: str, devices: Sequence[Device], beside: Path) -> str:
    """A README with what stands between its markers made anew: <!-- bench:tables -->, <!-- bench:goals -->,
    each up to its own with a slash."""
    made = {"tables": lambda: tables(devices, beside), "goals": lambda: goals_table(devices)}

    def replaced(found: re.Match[str]) -> str:
        return f"{found[1]}{made[found[2]]()}\n{found[3]}"

    return _MARKED.sub(replaced, text)


def unmarked(text: str) -> str:
    """What of a README is not made by this module."""
    return _MARKED.sub("", text)


def main(arguments: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").splitlines()[0].partition(": ")[2]
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=summary)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: bench/results")
    parser.add_argument("--readme", type=Path, action="append", help="default: the project's and bench's")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a README differs")
    options = parser.parse_args(arguments)
    devices = gather(options.results.resolve())
    print(goals_table(devices))
    differing = []
    for path in options.readme or READMES:
        text = path.read_text()
        new = rendered(text, devices, path.resolve().parent)
        if new != text:
            differing.append(path)
            if not options.check:
                path.write_text(new)
    for path in differing:
        print(f"{path}: {'differs from the results' if options.check else 'written'}", file=sys.stderr)
    return 1 if differing and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
