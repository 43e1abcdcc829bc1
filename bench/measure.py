"""Clocks, ceilings and the record of one measurement."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Record:
    """One provider on one shape: the shares are of the rates that the same run measured, None off the GPU. An
    op bound by arithmetic has the last three, too."""

    op: str
    variant: str
    direction: str  # forward, backward, both
    provider: str
    rows: int
    columns: int
    dtype: str
    match: bool
    match_detail: str
    median_seconds: float
    p20_seconds: float
    p80_seconds: float
    floor_bytes: int
    gigabytes_per_second: float
    share_of_copy_rate: float | None
    peak_bytes: int | None
    floor_flops: int | None = None
    teraflops_per_second: float | None = None
    share_of_matmul_rate: float | None = None


def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Twice the L2 of any GPU so far: writing it turns every cached input out."""
    return torch.empty(256 << 20, dtype=torch.int8, device=device)


def seconds_on_gpu(run: Run, device: torch.device, repeats: int = 50) -> list[float]:
    """One time per replay of ``run`` as a CUDA graph, L2 cold, so that neither the host nor the cache is
    measured.

    Call it under a stream that is not the default one, and make the autograd graph of a backward under it
    too: a capture takes one stream. Falls back to plain launches where ``run`` can't be captured.
    """
    flush = _flush_buffer(device)
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            run()
        replay: Run = graph.replay
    except RuntimeError:
        torch.cuda.synchronize(device)
        replay = run
    events = []
    for _ in range(repeats + 3):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events[3:]]


def seconds_on_cpu(run: Run, repeats: int = 20) -> list[float]:
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[2:]


def seconds(run: Run, device: torch.device, repeats: int = 50) -> list[float]:
    return seconds_on_gpu(run, device, repeats) if device.type == "cuda" else seconds_on_cpu(run)


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """The 50th, 20th and 80th."""
    fifths = statistics.quantiles(times, n=5)
    return statistics.median(times), fifths[0], fifths[3]


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Bytes that ``run`` allocates at its peak beyond what was held before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_rate(device: torch.device) -> float | None:
    """Bytes per second, read and written, of a 2 GiB device-to-device copy of random data: the ceiling of
    every memory-bound op, measured in the same run. None off the GPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(1 << 29, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    median, _, _ = percentiles(seconds_on_gpu(lambda: target.copy_(source), device, 20))
    return 2 * source.nbytes / median


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations per second of torch's product of two random 8192 x 8192 matrices: the
    ceiling of every op bound by arithmetic, measured in the same run. None off the GPU."""
    if device.type != "cuda":
        return None
    size = 8192
    a, b = (torch.empty(size, size, dtype=dtype, device=device).normal_() for _ in range(2))
    median, _, _ = percentiles(seconds_on_gpu(lambda: a @ b, device, 20))
    return 2 * size**3 / median


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The rates of this run that shares are of; None off the GPU."""

    copy: float | None
    matmul: float | None = None


def directions(
    function: Callable[[dict[str, Tensor]], Tensor | tuple[Tensor, ...]], tensors: dict[str, Tensor]
) -> dict[str, Run]:
    """What is timed of a function: forward and, of one that has a gradient, backward over one forward, and
    both."""
    leaves = list(tensors.values())
    found = function(tensors)
    outputs = found if isinstance(found, tuple) else (found,)
    gradients = [torch.randn_like(y) for y in outputs]

    def forward() -> object:
        with torch.no_grad():
            return function(tensors)

    def backward() -> object:
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    def both() -> object:
        again = function(tensors)
        return torch.autograd.grad(again if isinstance(again, tuple) else (again,), leaves, gradients)

    trained = {"backward": backward, "both": both} if outputs[0].requires_grad else {}
    return {"forward": forward, **trained}


def measured(
    op: str,
    variant: str,
    direction: str,
    provider: str,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    verdict: tuple[bool, str],
    run: Run,
    device: torch.device,
    ceilings: Ceilings,
    floor_bytes: int,
    floor_flops: int | None = None,
    repeats: int = 50,
) -> Record:
    """The record of ``run``, timed if its verdict is a match. sizes: rows and columns."""
    match, detail = verdict
    median, p20, p80 = percentiles(seconds(run, device, repeats) if match else [float("nan")] * 5)
    return Record(
        op=op,
        variant=variant,
        direction=direction,
        provider=provider,
        rows=sizes[0],
        columns=sizes[1],
        dtype=str(dtype).removeprefix("torch."),
        match=match,
        match_detail=detail,
        median_seconds=median,
        p20_seconds=p20,
        p80_seconds=p80,
        floor_bytes=floor_bytes,
        gigabytes_per_second=floor_bytes / median / 1e9,
        share_of_copy_rate=floor_bytes / median / ceilings.copy if ceilings.copy else None,
        peak_bytes=peak_bytes(run, device) if match else None,
        floor_flops=floor_flops,
        teraflops_per_second=None if floor_flops is None else floor_flops / median / 1e12,
        share_of_matmul_rate=floor_flops / median / ceilings.matmul
        if floor_flops is not None and ceilings.matmul
        else None,
    )


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def environment(device: torch.device) -> dict[str, object]:
    """What a figure means nothing without: commit, device, versions, date."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
    }
