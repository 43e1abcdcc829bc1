"""Clocks: times of several runs in turn, the ceilings of a device, peak memory."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Run = Callable[[], object]

# More than twice the L2 of any GPU so far (126 MB on a B200): writing it turns every cached input out.
_FLUSH_BYTES = 256 << 20
_WARM_UPS = 3
_MATMUL_SIZE = 8192
_COPY_BYTES = 2 << 30


class Times(NamedTuple):
    """seconds: one a repetition; clock: "cuda graph" (replays), "launches" (of what can't be captured) or
    "host" (a CPU's clock around the call)."""

    seconds: list[float]
    clock: str

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p20(self) -> float:
        return statistics.quantiles(self.seconds, n=5)[0]

    @property
    def p80(self) -> float:
        return statistics.quantiles(self.seconds, n=5)[3]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What shares are of, measured in the same run; None off the GPU. copy: bytes read and written a second;
    matmul: floating-point operations a second."""

    copy: float | None = None
    matmul: float | None = None


def _captured(run: Run, pool: object) -> tuple[Run, str]:
    """A replay of ``run`` as a CUDA graph, so that the host is not measured, or ``run`` itself where it can't
    be captured. Nobody reads what a replay leaves behind, so that all graphs share one pool of memory."""
    for _ in range(_WARM_UPS):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        run()  # raises again what is no matter of the capture, too little memory say
        torch.cuda.synchronize()
        return run, "launches"
    return graph.replay, "cuda graph"


def _in_turn(names: list[str], round_: int) -> list[str]:
    """A different first one each round: no run is always the one after the same other."""
    start = round_ % len(names)
    return names[start:] + names[:start]


def _on_gpu(runs: Mapping[str, Run], repeats: int) -> dict[str, Times | Exception]:
    """Call it under a stream that is not the default one, and make the autograd graph of a backward under it
    too: a capture takes one stream."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    replays: dict[str, tuple[Run, str]] = {}
    found: dict[str, Times | Exception] = {}
    for name, run in runs.items():
        try:
            replays[name] = _captured(run, pool)
        except Exception as error:  # no memory, no kernel: the others are measured all the same
            found[name] = error
            torch.cuda.empty_cache()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    for round_ in range(repeats + _WARM_UPS if replays else 0):
        for name in _in_turn(list(replays), round_):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replays[name][0]()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    for name, pairs in events.items():
        seconds = [start.elapsed_time(end) / 1e3 for start, end in pairs[_WARM_UPS:]]
        found[name] = Times(seconds, replays[name][1])
    return found


def _on_cpu(runs: Mapping[str, Run], repeats: int) -> dict[str, Times | Exception]:
    found: dict[str, Times | Exception] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + _WARM_UPS if runs else 0):
        for name in _in_turn(list(runs), round_):
            if name in found:
                continue
            start = time.perf_counter()
            try:
                runs[name]()
            except Exception as error:
                found[name] = error
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(seconds[name][_WARM_UPS:], "host") for name in runs} | found


def interleaved(runs: Mapping[str, Run], device: torch.device, repeats: int) -> dict[str, Times | Exception]:
    """The times of each run, or what stopped it. In every round each run has its turn, with a cold L2, so
    that a drift of clocks or temperature hits all alike."""
    return _on_gpu(runs, repeats) if device.type == "cuda" else _on_cpu(runs, repeats)


def median(run: Run, device: torch.device, repeats: int) -> float:
    """Of one run alone; raises what stopped it."""
    (found,) = interleaved({"": run}, device, repeats).values()
    if isinstance(found, Exception):
        raise found
    return found.median


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Bytes that ``run`` allocates at its peak beyond what was held before it; None off the GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A device-to-device copy of 2 GiB and torch's product of two 8192 x 8192 matrices, both of random
    values."""
    if device.type != "cuda":
        return Ceilings()
    source = torch.empty(_COPY_BYTES // 4, device=device).normal_()
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median(lambda: target.copy_(source), device, 20)
    a, b = (torch.empty(_MATMUL_SIZE, _MATMUL_SIZE, dtype=dtype, device=device).normal_() for _ in range(2))
    return Ceilings(copy, 2 * _MATMUL_SIZE**3 / median(lambda: a @ b, device, 20))
