"""What the terminal shows: a line a measurement, above a bar of how many cases are done."""

from __future__ import annotations

import sys
from typing import Any

from .record import Record

CPU_MODE = (
    "CPU mode: small shapes. Times are a CPU's clock around whole calls, which is what a call costs on the "
    "host and no speed of a kernel; kernels that run here through an interpreter or an emulator are checked "
    "against float64 (match) and never timed."
)
_HEADER = (
    f"{'variant':30} {'shape':>12} {'direction':9} {'provider':26} {'match':5} "
    f"{'median':>15} {'p20 .. p80':>20} {'rate':>15} {'of ceiling':>15} {'peak':>10}"
)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def _rate(record: Record) -> tuple[str, str]:
    if record.tokens_per_second is not None:
        return f"{record.tokens_per_second:.0f} token/s", ""
    if record.share_of_matmul is not None and record.teraflops_per_second is not None:
        return f"{record.teraflops_per_second:.1f} TFLOP/s", f"{record.share_of_matmul:.3f} of matmul"
    if record.share_of_copy is not None and record.gigabytes_per_second is not None:
        return f"{record.gigabytes_per_second:.0f} GB/s", f"{record.share_of_copy:.3f} of copy"
    return "", ""


def line(record: Record) -> str:
    """One measurement in columns."""
    start = (
        f"{record.variant:30} {record.shape:>12} {record.direction:9} {record.provider:26} "
        f"{'yes' if record.match else 'NO':5} "
    )
    if record.median_seconds is None:
        return start + (record.clock if record.match else f"{record.clock}: {record.match_detail}")
    spread = f"{_time(record.p20_seconds)} .. {_time(record.p80_seconds)}"
    rate, share = _rate(record)
    peak = "" if record.peak_bytes is None else f"{record.peak_bytes / 2**20:.0f} MiB"
    unit = "us" if record.clock != "host" else "us host"
    median = f"{_time(record.median_seconds)} {unit}"
    return f"{start}{median:>15} {spread:>20} {rate:>15} {share:>15} {peak:>10}".rstrip()


class _Plain:
    """Without a library for bars, or where nobody looks at a terminal: the lines alone."""

    def begin(self, name: str, total: int) -> None:
        return None

    def write(self, text: str) -> None:
        print(text, flush=True)

    def advance(self) -> None:
        return None

    def end(self) -> None:
        return None


class _Rich(_Plain):
    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task: Any = None

    def begin(self, name: str, total: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task(name, total=total)

    def write(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def end(self) -> None:
        self._progress.stop()


class _Tqdm(_Plain):
    def __init__(self, tqdm: Any) -> None:
        self._tqdm = tqdm
        self._bar: Any = None

    def begin(self, name: str, total: int) -> None:
        self._bar = self._tqdm(total=total, desc=name, unit="case", file=sys.stderr)

    def write(self, text: str) -> None:
        self._tqdm.write(text)

    def advance(self) -> None:
        self._bar.update()

    def end(self) -> None:
        self._bar.close()


def new() -> _Plain:
    """With rich's bar if it is installed, else tqdm's, else none."""
    if not sys.stderr.isatty():
        return _Plain()
    try:
        from rich.progress import Progress

        return _Rich(Progress(transient=True))
    except ImportError:
        pass
    try:
        from tqdm import tqdm

        return _Tqdm(tqdm)
    except ImportError:
        return _Plain()


def header() -> str:
    return _HEADER
