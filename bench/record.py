"""One measurement as it is kept, and what it means nothing without."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from .case import Case, Verdict, Work
from .measure import Ceilings, Times

# Packages whose version changes a figure.
_PACKAGES = (
    *("llmkernels", "torch", "triton", "transformers", "numpy"),
    *("liger-kernel", "quack-kernels", "flash-attn", "flash-attn-4", "xformers", "nvidia-cutlass-dsl"),
)
_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")


@dataclasses.dataclass(frozen=True)
class Record:
    """One provider on one case and direction; bench/README.md says what each column means. None where it was
    not measured, or where there is nothing that it could mean."""

    op: str
    variant: str
    direction: str  # forward, backward, both
    provider: str
    shape: str
    swept: int
    dtype: str
    match: bool
    match_detail: str
    served_by: str
    clock: str
    median_seconds: float | None = None
    p20_seconds: float | None = None
    p80_seconds: float | None = None
    floor_bytes: int | None = None
    floor_flops: int | None = None
    gigabytes_per_second: float | None = None
    teraflops_per_second: float | None = None
    tokens_per_second: float | None = None
    share_of_copy: float | None = None
    share_of_matmul: float | None = None
    peak_bytes: int | None = None


def _share(rate: float, ceiling: float | None) -> float | None:
    return rate / ceiling if ceiling else None


def record(
    case: Case,
    direction: str,
    provider: str,
    swept: int,
    verdict: Verdict,
    served_by: str,
    clock: str,
    work: Work,
    times: Times | None = None,
    ceilings: Ceilings | None = None,
    peak: int | None = None,
) -> Record:
    """times: None where it was not timed, for the reason that ``clock`` names."""
    base = Record(
        op=case.variant.op,
        variant=case.variant.name,
        direction=direction,
        provider=provider,
        shape=case.label,
        swept=swept,
        dtype=str(case.dtype).removeprefix("torch."),
        match=verdict.match,
        match_detail=verdict.detail,
        served_by=served_by,
        clock=clock,
        floor_bytes=work.bytes,
        floor_flops=work.flops,
    )
    if times is None:
        return base
    base = dataclasses.replace(
        base, median_seconds=times.median, p20_seconds=times.p20, p80_seconds=times.p80, peak_bytes=peak
    )
    if times.clock == "host":
        return base  # of a shape so small that rates would speak of nothing but the call itself
    assert ceilings is not None
    bytes_a_second = work.bytes / times.median
    flops_a_second = None if work.flops is None else work.flops / times.median
    return dataclasses.replace(
        base,
        gigabytes_per_second=bytes_a_second / 1e9,
        share_of_copy=_share(bytes_a_second, ceilings.copy),
        teraflops_per_second=None if flops_a_second is None else flops_a_second / 1e12,
        share_of_matmul=None if flops_a_second is None else _share(flops_a_second, ceilings.matmul),
        tokens_per_second=None if work.tokens is None else work.tokens / times.median,
    )


def _said_by(*command: str) -> str | None:
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_state(device: torch.device) -> dict[str, str]:
    """Clocks, temperature and power at this moment, as nvidia-smi reads them; empty without it."""
    if device.type != "cuda":
        return {}
    index = str(torch.cuda.current_device() if device.index is None else device.index)
    query = ("nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader", "-i", index)
    values = (_said_by(*query) or "").split(", ")
    return dict(zip(_CLOCKS, values, strict=True)) if len(values) == len(_CLOCKS) else {}


def environment(device: torch.device) -> dict[str, object]:
    """Commit, device, versions, date. A copy without .git says its commit by the variable COMMIT."""
    on_gpu = device.type == "cuda"
    commit = _said_by("git", "rev-parse", "HEAD")
    changes = _said_by("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or os.environ.get("COMMIT"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "timed_on": device.type,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine() + " CPU",
        "processors": torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def save(stem: Path, environment: dict[str, object], records: Sequence[Record]) -> None:
    """Writes stem.json, all of it, and stem.csv, the records."""
    rows = [dataclasses.asdict(row) for row in records]
    stem.with_suffix(".json").write_text(
        json.dumps({"environment": environment, "records": rows}, indent=1) + "\n"
    )
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Record)])
        writer.writeheader()
        writer.writerows(rows)


def load(path: Path) -> tuple[dict[str, object], list[Record]]:
    """What ``save`` wrote."""
    content = json.loads(path.read_text())
    return content["environment"], [Record(**row) for row in content["records"]]
