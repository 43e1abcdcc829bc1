"""replace(): the public function."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import dispatch
from . import interpreted, randomness, timing
from .adapters import Inputs
from .capture import capture
from .copying import signature
from .report import REPLACED, ROLLED_BACK, SKIPPED, Report, Row
from .sites import Site, find, parts
from .verification import SYNTHETIC_ROWS, Check, Service, check, refusal, serving


def replace(
    model: nn.Module,
    *,
    verify: bool = True,
    backend: str | None = None,
    sample_inputs: Any = None,
    interpret: bool = True,
) -> Report:
    """Gives the layers of ``model`` that have kernels here our classes, in place, each one verified.

    A layer changes its class and nothing else: parameters, their ties and their optimizer, hooks, state_dict
    and isinstance stay. Layers that can't be seen through (a forward set on the instance, unknown subclasses,
    parametrized, quantised, sharded or tensor-subclass weights) stay as they are; the report says why, one
    by one. A layer that computes what those inside it compute, such as torch.nn.TransformerEncoderLayer, is
    one site with them; if it can't be taken over or does not hold, they are sites of their own. Call it
    before FSDP's fully_shard(). Wrappers (DistributedDataParallel, torch.compile) are seen through.

    verify: run a copy of every layer and compare outputs and all gradients with the original in float64,
        under the error budget of llmkernels.testing, and its dropout with the original's by statistics; one
        that fails keeps its class (status "rolled back"). Nothing of the model changes meanwhile: no
        gradient, mode, buffer or random state.
    backend: "cuda", "triton", "torch" or "reference" for every layer; those it can't serve are skipped, with
        the reasons. None: the automatic choice at each call.
    sample_inputs: arguments of one forward of the model (a mapping, a tuple, or the one argument), run in
        eval mode without gradients; layers are then verified on the inputs that they get there. None: on
        synthetic ones, as are the layers that this forward does not call; those that take none that are known
        are skipped.
    interpret: for layers on the CPU, which run through torch's own operators there, show every kernel through
        its interpreter too, on small shapes, once for layers of one kind and size. Where TRITON_INTERPRET=1
        is not set it starts a process for it.

    Returns the Report: print it; ``undo()`` takes all back, and so does the end of a ``with`` block.
    Raises TypeError (model is no module) or ValueError (unknown backend), and what the model raises on
    sample_inputs. Whatever it raises, the model is as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model: expected a torch.nn.Module, got {type(model).__name__}")
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"replace: backend: expected one of {', '.join(dispatch.BACKENDS)}, got {backend!r}")

    sites = find(model)
    with _isolated(sites):
        open_sites = [site for site in sites if not site.obstacles]
        captured = {} if sample_inputs is None else capture(model, open_sites, sample_inputs)
        show = verify and interpret and backend in (None, "torch", "reference")
        trials, notes = _decide(sites, captured, verify, backend, show)
        notes += _time(trials, backend)
    return _commit(trials, notes, backend)


class _Trial:
    """A site and what was found out about it: the making of its row."""

    def __init__(self, site: Site, status: str, reasons: list[str]) -> None:
        self.site = site
        self.status = status
        self.reasons = reasons
        self.service = Service()
        self.checks: list[Check] = []
        self.speed_up: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for trials of layers of one kind and size."""
        site = self.site
        return site.adapter, site.device, site.dtype, signature(site.module, site.adapter.ordinals)

    @property
    def covered(self) -> list[nn.Module]:
        """What the site's class computes, if it has or gets ours: no sites of their own."""
        ours = self.status == REPLACED or self.site.is_replaced
        return self.site.descendants if ours and self.site.adapter.covers_children else []

    def fail(self, reason: str) -> None:
        self.status = ROLLED_BACK
        self.reasons.append(reason)

    def judge(self, check: Check) -> None:
        self.checks.append(check)
        if not check.passed:
            self.fail(f"{check.backend}: {check.worst} errs by {check.budget_used:.3g} times its budget")

    def row(self) -> Row:
        return Row(
            self.site.names[0],
            tuple(self.site.names[1:]),
            type(self.site.module).__name__,
            self.status,
            str(self.service) or None,
            "; ".join(self.reasons) or None,
            tuple(self.checks),
            self.speed_up,
        )


def _decide(
    sites: Sequence[Site], captured: Mapping[int, Inputs], verify: bool, backend: str | None, show: bool
) -> tuple[list[_Trial], list[str]]:
    """The trial of every site that no other one covers, and notes. What a site covers is tried once that is
    found not to hold."""
    trials: dict[int, _Trial] = {}
    problems: dict[tuple[Any, ...], str | None] = {}
    notes: list[str] = []
    while True:
        covered: set[int] = set()
        new = []
        for site in sites:
            key = id(site.module)
            if key not in covered and key not in trials:
                trials[key] = _try(site, captured.get(key), verify, backend, problems)
                new.append(trials[key])
            if key in trials:
                covered.update(map(id, trials[key].covered))
        if show:
            notes += _show_kernels(new)
        if not new:
            return [trials[id(site.module)] for site in sites if id(site.module) in trials], notes


def _try(
    site: Site,
    inputs: Inputs | None,
    verify: bool,
    backend: str | None,
    problems: dict[tuple[Any, ...], str | None],
) -> _Trial:
    """Decides on one site, on a copy: whether it is served, by what, and whether its results hold. problems:
    what was found of the dropout of layers of one kind and size, which share one trial of it."""
    if site.obstacles:
        return _Trial(site, SKIPPED, list(site.obstacles))
    adapter, module = site.adapter, site.module
    trial = _Trial(site, REPLACED, [] if site.remark is None else [site.remark])
    if site.device.type == "meta":
        trial.reasons.append("on the meta device: nothing to verify yet")
        return trial
    try:
        if inputs is None:
            examples = adapter.synthetic_inputs(module, site.dtype, site.device, SYNTHETIC_ROWS)
        else:
            examples = [inputs]
        service = serving(adapter, module, examples[0], backend)
        if service.reasons:
            return _Trial(
                site, SKIPPED, [f"backend {backend!r} can't serve it: {'; '.join(service.reasons)}"]
            )
        trial.service = service
        trial.reasons += service.remarks
        if verify:
            trial.judge(check(adapter, module, examples, backend, str(service)))
            key = trial.key
            if key not in problems:
                problems[key] = randomness.problem(adapter, module, examples[0], backend, site.device)
            if (problem := problems[key]) is not None:
                trial.fail(problem)
    except Exception as error:
        if inputs is None:
            refused = refusal(adapter, module, site.dtype, site.device, SYNTHETIC_ROWS)
            if refused is not None:
                return _Trial(site, SKIPPED, [f"{refused}: give replace() sample_inputs that reach it"])
        trial.fail(f"its trial raised {type(error).__name__}: {error}")
    return trial


def _show_kernels(trials: Sequence[_Trial]) -> list[str]:
    """Runs every kernel on the layers on the CPU, once for those of one kind and size; a wrong one rolls its
    sites back. Returns notes."""
    alike: dict[tuple[Any, ...], list[_Trial]] = {}
    for trial in trials:
        site = trial.site
        if trial.status == REPLACED and site.device.type == "cpu" and site.adapter.kernels:
            alike.setdefault(trial.key, []).append(trial)
    if not alike:
        return []
    sites = [group[0].site for group in alike.values()]
    jobs = [interpreted.Job(site.adapter, site.adapter.copy(site.module), site.dtype) for site in sites]
    try:
        outcomes = interpreted.verify(jobs)
    except interpreted.Unavailable as error:
        return [f"no kernel could be shown through its interpreter: {error}"]
    notes = []
    for group, each in zip(alike.values(), outcomes, strict=True):
        for outcome in each:
            for trial in group:
                if outcome.check is not None:
                    trial.judge(outcome.check)
                elif outcome.failure is not None:
                    trial.fail(f"{outcome.backend}: {outcome.failure}")
            if outcome.unavailable:
                notes.append(f"{outcome.backend}: not shown: {outcome.unavailable}")
    return list(dict.fromkeys(notes))


def _time(trials: Sequence[_Trial], backend: str | None) -> list[str]:
    """The speed-up of the layers that a kernel serves on a GPU; layers of one kind and size share one
    measurement. Returns notes on those that could not be measured, which says nothing against them."""
    measured: dict[tuple[Any, ...], float | None] = {}
    notes = []
    for trial in trials:
        site = trial.site
        served_by = {name for _, name in trial.service.kernels}
        if trial.status != REPLACED or site.device.type != "cuda" or served_by <= {"torch"}:
            continue
        if trial.key not in measured:
            measured[trial.key] = None
            try:
                measured[trial.key] = timing.speed_up(
                    site.adapter, site.module, site.dtype, site.device, backend
                )
            except Exception as error:
                notes.append(f"{site.names[0]}: not timed: {type(error).__name__}: {error}")
        trial.speed_up = measured[trial.key]
    return notes


@contextlib.contextmanager
def _isolated(sites: Sequence[Site]) -> Iterator[None]:
    """Gradients on; autocast, inference mode and torch's fused encoder layer, which bypasses its children,
    off; and the random state of every device put back at the end."""
    kinds = {"cpu"} | {site.device.type for site in sites}
    gpus = {site.device.index for site in sites if site.device.type == "cuda"}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.random.fork_rng(devices=[index for index in gpus if index is not None]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in sorted(kinds - {"meta"}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _commit(trials: Sequence[_Trial], notes: Sequence[str], backend: str | None) -> Report:
    """Swaps the classes, all or none."""
    swaps = []
    taken: set[int] = set()
    for site in (trial.site for trial in trials if trial.status == REPLACED):
        prefix = site.names[0]
        together = [
            (f"{prefix}.{name}".strip("."), adapter, module)
            for name, adapter, module in parts(site.adapter, site.module)
            if id(module) not in taken
        ]
        taken.update(id(module) for *_, module in together)
        swaps.append(together)
    report = Report([trial.row() for trial in trials], notes, swaps)
    try:
        for _, adapter, module in itertools.chain(*swaps):
            adapter.swap(module, backend)
        return report
    except BaseException:
        report.undo()
        raise
