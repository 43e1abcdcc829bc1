"""replace(): the public function."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import dispatch
from . import interpreted, timing
from .adapters import ADAPTERS, Inputs
from .capture import capture
from .report import REPLACED, ROLLED_BACK, SKIPPED, Report, Row
from .sites import Site, find
from .verification import SYNTHETIC_ROWS, Check, check, serving


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
    by one. Call it before FSDP's fully_shard(). Wrappers (DistributedDataParallel, torch.compile) are seen
    through.

    verify: run a copy of every layer and compare outputs and all gradients with the original in float64,
        under the error budget of llmkernels.testing; one that exceeds it keeps torch's class (status "rolled
        back"). Nothing of the model changes meanwhile: no gradient, mode, buffer or random state.
    backend: "cuda", "triton", "torch" or "reference" for every layer; those it can't serve are skipped, with
        the reasons. None: the automatic choice at each call.
    sample_inputs: arguments of one forward of the model (a mapping, a tuple, or the one argument), run in
        eval mode without gradients; layers are then verified on the inputs that they get there. None: on
        synthetic ones, as are the layers that this forward does not call.
    interpret: for layers on the CPU, which run through torch's own operator there, show every kernel through
        its interpreter too, on small shapes. Where TRITON_INTERPRET=1 is not set it starts a process for it.

    Returns the Report: print it; ``undo()`` takes all back, and so does the end of a ``with`` block.
    Raises TypeError (model is no module) or ValueError (unknown backend), and what the model raises on
    sample_inputs. Whatever it raises, the model is as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model: expected a torch.nn.Module, got {type(model).__name__}")
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"replace: backend: expected one of {', '.join(dispatch.BACKENDS)}, got {backend!r}")

    sites = find(model, ADAPTERS)
    notes: list[str] = []
    with _isolated(sites):
        open_sites = [site for site in sites if not site.obstacles]
        captured = {} if sample_inputs is None else capture(model, open_sites, sample_inputs)
        trials = [_try(site, captured.get(id(site.module)), verify, backend) for site in sites]
        if verify and interpret and backend in (None, "torch", "reference"):
            notes += _show_kernels(trials)
        _time(trials, backend)
    swapped = _commit([trial.site for trial in trials if trial.status == REPLACED], backend)
    return Report([trial.row() for trial in trials], notes, swapped)


class _Trial:
    """A site and what was found out about it: the making of its row."""

    def __init__(self, site: Site, status: str, reasons: list[str], backends: tuple[str, ...] = ()) -> None:
        self.site = site
        self.status = status
        self.reasons = reasons
        self.backends = backends
        self.checks: list[Check] = []
        self.speed_up: float | None = None

    def fail(self, reason: str) -> None:
        self.status = ROLLED_BACK
        self.reasons.append(reason)

    def judge(self, check: Check) -> None:
        self.checks.append(check)
        if not check.passed:
            self.fail(f"{check.backend}: {check.worst} errs by {check.budget_used:.3g} times its budget")

    def row(self) -> Row:
        module, names = self.site.module, self.site.names
        kind = type(module) if self.status != REPLACED else self.site.adapter.original
        return Row(
            names[0],
            tuple(names[1:]),
            kind.__name__,
            self.status,
            " + ".join(self.backends) or None,
            "; ".join(self.reasons) or None,
            tuple(self.checks),
            self.speed_up,
        )


def _try(site: Site, inputs: Inputs | None, verify: bool, backend: str | None) -> _Trial:
    """Decides on one site, on a copy: whether it is served, by what, and whether its results hold."""
    if site.obstacles:
        return _Trial(site, SKIPPED, list(site.obstacles))
    adapter, module = site.adapter, site.module
    remark = adapter.remark(module, site.parents)
    trial = _Trial(site, REPLACED, [] if remark is None else [remark])
    if site.device.type == "meta":
        trial.reasons.append("on the meta device: nothing to verify yet")
        return trial
    try:
        if inputs is None:
            inputs = adapter.synthetic_inputs(module, site.dtype, site.device, SYNTHETIC_ROWS)
        service = serving(adapter, module, inputs, backend)
        if service.reasons:
            return _Trial(
                site, SKIPPED, [f"backend {backend!r} can't serve it: {'; '.join(service.reasons)}"]
            )
        trial.backends = service.backends
        if verify:
            trial.judge(check(adapter, module, inputs, backend, " + ".join(service.backends)))
    except Exception as error:
        trial.fail(f"its trial raised {type(error).__name__}: {error}")
    return trial


def _show_kernels(trials: list[_Trial]) -> list[str]:
    """Runs every kernel on the layers on the CPU; a wrong one rolls its site back. Returns notes."""
    shown = [trial for trial in trials if trial.status == REPLACED and trial.site.device.type == "cpu"]
    if not shown:
        return []
    jobs = [interpreted.Job(t.site.adapter, t.site.adapter.copy(t.site.module), t.site.dtype) for t in shown]
    try:
        outcomes = interpreted.verify(jobs)
    except interpreted.Unavailable as error:
        return [f"no kernel could be shown through its interpreter: {error}"]
    notes = []
    for trial, outcome in (
        (trial, outcome) for trial, each in zip(shown, outcomes, strict=True) for outcome in each
    ):
        if outcome.check is not None:
            trial.judge(outcome.check)
        elif outcome.failure is not None:
            trial.fail(f"{outcome.backend}: {outcome.failure}")
        else:
            notes.append(f"{outcome.backend}: not shown: {outcome.unavailable}")
    return list(dict.fromkeys(notes))


def _time(trials: list[_Trial], backend: str | None) -> None:
    """The speed-up of the layers that a kernel serves on a GPU; layers of one kind and size share one
    measurement."""
    measured: dict[tuple[object, ...], float] = {}
    for trial in trials:
        site = trial.site
        if trial.status != REPLACED or site.device.type != "cuda" or set(trial.backends) <= {"torch"}:
            continue
        parameters = tuple((name, p.shape, p.dtype) for name, p in site.module.named_parameters())
        key = (site.adapter, site.device, site.dtype, parameters, site.module.extra_repr())
        if key not in measured:
            measured[key] = timing.speed_up(site.adapter, site.module, site.dtype, site.device, backend)
        trial.speed_up = measured[key]


@contextlib.contextmanager
def _isolated(sites: list[Site]) -> Iterator[None]:
    """Gradients on, autocast and inference mode off, and the random state of every device put back at the
    end."""
    kinds = {"cpu"} | {site.device.type for site in sites}
    gpus = {site.device.index for site in sites if site.device.type == "cuda"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[index for index in gpus if index is not None]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in sorted(kinds - {"meta"}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _commit(sites: list[Site], backend: str | None) -> list[tuple[str, Any, nn.Module]]:
    """Swaps the classes, all or none."""
    swapped: list[tuple[str, Any, nn.Module]] = []
    try:
        for site in sites:
            swapped.append((site.names[0], site.adapter, site.module))
            site.adapter.swap(site.module, backend)
    except BaseException:
        for _, adapter, module in swapped:
            adapter.restore(module)
        raise
    return swapped
