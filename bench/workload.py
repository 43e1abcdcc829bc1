"""A workload runs its variants over its grid of shapes, with every provider side by side."""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import llmkernels

from . import measure
from .case import Case, Function, Shape, Tensors, Variant, Verdict, leaves_of, outputs_of
from .measure import Ceilings, Run, Times
from .providers import Provider, Unavailable
from .record import Record, record

_LONGEST_REASON = 160
NO_MATCH, INTERPRETED = "not timed: no match", "not timed: interpreted"


@dataclass
class Request:
    """What one run of the command asks for, and where it tells what it finds.

    shapes: None for the grid of the workload; wanted: patterns of providers' names, none for all that fit the
    device; seconds: what is begun after as many is left out; notes: who was not measured, by why.
    """

    device: torch.device
    dtype: torch.dtype
    small: bool = False
    shapes: Sequence[Shape] | None = None
    wanted: Sequence[str] = ()
    seconds: float | None = None
    report: Callable[[Record], None] = lambda record: None
    advance: Callable[[], None] = lambda: None
    notes: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def note(self, subject: str, reason: str) -> None:
        self.notes.setdefault(subject, reason)

    @property
    def mode(self) -> str:
        """ "published grid" of a run that the report may speak of."""
        if self.shapes or self.wanted:
            return "chosen shapes or providers"
        return "small shapes" if self.small else "published grid"

    @property
    def is_over(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.started > self.seconds


def directions(function: Function, tensors: Tensors, keeps_saved: bool) -> dict[str, Run]:
    """What is timed of a function: forward without a gradient and, of one that has one, backward over one
    forward, and both. keeps_saved: whether a backward leaves what it was given as it was, so that it may run
    again."""
    leaves = list(leaves_of(tensors).values())

    def forward() -> object:
        with torch.no_grad():
            return function(tensors)

    if not leaves:
        return {"forward": forward}
    outputs = outputs_of(function(tensors))
    if not outputs[0].requires_grad:
        return {"forward": forward}
    gradients = [torch.randn_like(output) for output in outputs]

    def backward() -> object:
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(outputs_of(function(tensors)), leaves, gradients)

    again = {"backward": backward} if keeps_saved else {}
    return {"forward": forward, **again, "both": both}


def _is_finite(found: object) -> bool:
    tensors = found if isinstance(found, tuple) else (found,)
    return all(bool(tensor.isfinite().all()) for tensor in tensors if isinstance(tensor, Tensor))


@contextlib.contextmanager
def _on_stream(device: torch.device) -> Iterator[None]:
    """Under a stream of our own, since the default one can't be captured into a CUDA graph."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


@dataclass
class Workload:
    """sizes: what the numbers of a shape are; swept: which of them a plot runs along; bound: "copy" or
    "matmul", the ceiling that its plots and tables are of."""

    name: str
    sizes: tuple[str, ...]
    swept: str
    bound: str
    variants: tuple[Variant, ...]
    shapes: tuple[Shape, ...]
    small_shapes: tuple[Shape, ...]
    providers: tuple[Provider, ...]
    repeats: int = 25
    small_repeats: int = 5

    def cases(self, request: Request) -> list[Case]:
        shapes = request.shapes or (self.small_shapes if request.small else self.shapes)
        variants = [variant.small() if request.small else variant for variant in self.variants]
        return [
            Case(variant, shape, request.dtype, request.device)
            for variant in variants
            for shape in (shapes if variant.every_shape else shapes[:1])
        ]

    def present(self, request: Request) -> list[Provider]:
        """The providers that were asked for and can run here; of the others a note says why they can't."""
        found = []
        for provider in self.providers:
            if request.wanted and not any(
                fnmatch.fnmatchcase(provider.name, pattern) for pattern in request.wanted
            ):
                continue
            reason = provider.missing()
            if reason is None and not (request.wanted or provider.on_cpu or request.device.type != "cpu"):
                reason = "not measured on a CPU unless --providers names it"
            if reason is None:
                found.append(provider)
            else:
                request.note(provider.name, reason)
        return found

    def run(self, request: Request) -> list[Record]:
        """All that is asked for. A provider whose result does not match is recorded and not timed."""
        providers = self.present(request)
        records: list[Record] = []
        with _on_stream(request.device):
            ceilings = measure.ceilings(request.device, request.dtype)
            for case in self.cases(request):
                subject = f"{case.variant.name} {case.label}"
                if request.is_over:
                    request.note(subject, "not begun: the time was up")
                    continue
                for found in self._measure(case, providers, request, ceilings):
                    records.append(found)
                    request.report(found)
                request.advance()
                _clean_up(request.device)
        return records

    def _measure(
        self, case: Case, providers: list[Provider], request: Request, ceilings: Ceilings
    ) -> Iterator[Record]:
        torch.manual_seed(0)
        try:
            tensors = case.variant.tensors(case.shape, case.dtype, case.device)
        except Unavailable as reason:
            request.note(case.variant.name, str(reason))
            return
        swept = case.shape[self.sizes.index(self.swept)]
        runs: dict[str, dict[str, Run]] = {}
        judged: dict[str, tuple[Verdict, str]] = {}

        def recorded(direction: str, name: str, clock: str, *measured: Any) -> Record:
            work = case.variant.work(case.shape, tensors, direction)
            return record(case, direction, name, swept, *judged[name], clock, work, *measured)

        for provider in providers:
            name, build = provider.name, getattr(provider, case.variant.op, None)
            if build is None:
                continue
            try:
                function = build(case)
                with llmkernels.explain() as calls:
                    verdict = case.variant.match(function, case.shape, tensors)
                judged[name] = verdict, ", ".join(sorted({call.backend for call in calls}))
                if verdict.match and not provider.is_interpreted(case.device):
                    keeps_saved = case.variant.op not in provider.overwrites_saved
                    runs[name] = directions(function, tensors, keeps_saved)
            except Unavailable as reason:
                request.note(f"{name}: {case.variant.name}", str(reason))
                continue
            except Exception as error:  # a provider that fails is a finding about it, not about the others
                judged[name] = Verdict(False, _said(error)), ""
            if name not in runs:
                clock = INTERPRETED if judged[name][0].match else NO_MATCH
                yield recorded("both" if leaves_of(tensors) else "forward", name, clock)

        for direction in ("forward", "backward", "both"):
            turn = {name: found[direction] for name, found in runs.items() if direction in found}
            repeats = self.small_repeats if case.device.type == "cpu" else self.repeats
            for name, times in measure.interleaved(turn, case.device, repeats).items():
                verdict = judged[name][0]
                if isinstance(times, Times) and not _is_finite(turn[name]()):
                    judged[name] = verdict._replace(match=False, detail="not finite at the shape timed"), ""
                    yield recorded(direction, name, NO_MATCH)
                elif isinstance(times, Times):
                    peak = measure.peak_bytes(turn[name], case.device)
                    yield recorded(direction, name, times.clock, times, ceilings, peak)
                else:
                    judged[name] = verdict._replace(match=False, detail=_said(times)), ""
                    yield recorded(direction, name, NO_MATCH)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_LONGEST_REASON]


def _clean_up(device: torch.device) -> None:
    """Nothing of a case is left to the next: neither memory nor what torch.compile has traced, of which it
    keeps a limited number and then runs eagerly without a word."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
