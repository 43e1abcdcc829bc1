"""Which backend serves a call, and why the others were passed over.

An op hands over a *call*, a NamedTuple of what the choice may depend on (dtypes, device, features; never
sizes or tensors, so that a choice can be cached and made once under torch.compile), and the modules of its
kernels. Each kernel module exports ``unsupported(call) -> list[str]``: sentences, none if it can serve.

Order of authority: ``backend=`` of the call (raises if it can't serve), then ``use_backend()``, then the
environment variable LLMKERNELS_BACKEND (both are preferences: a call they can't serve goes on to torch, as
explain() shows), then the op's own automatic rule.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "torch", "reference")


class Decision(NamedTuple):
    """The backend that serves a call and, for every backend passed over, its reasons."""

    op: str
    backend: str
    reason: str
    passed_over: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.passed_over]
        return "\n".join(lines)


class Explanation(list[Decision]):
    """The decisions recorded by ``explain()``, in call order; prints as one block a call."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no call was recorded"


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# The process-wide preference and the open recordings: plain globals, which torch.compile can guard on.
_preferred: str | None = None
if os.environ.get("LLMKERNELS_BACKEND"):
    _preferred = _checked(os.environ["LLMKERNELS_BACKEND"], "LLMKERNELS_BACKEND")
_recordings: list[Explanation] = []


class use_backend(contextlib.ContextDecorator):
    """Sets the default backend of the process, at once; as a context manager it puts the old one back at its
    end.

    ``None`` returns to the automatic rule. The default is a preference: a call that it can't serve runs
    through torch, with the reason in ``explain()``; ``backend=`` of a call is an order instead and raises.
    It is one setting for all threads.
    """

    def __init__(self, name: str | None) -> None:
        global _preferred
        self._name = None if name is None else _checked(name, "use_backend")
        # What each open block puts back; the construction itself counts as the opening of the first.
        self._before = [_preferred]
        self._first_is_open = True
        _preferred = self._name

    def __call__(self, function: Any) -> Any:
        """As a decorator the setting holds inside the function, not from its definition on."""
        global _preferred
        _preferred = self._before.pop()
        self._first_is_open = False
        return super().__call__(function)

    def __enter__(self) -> use_backend:
        global _preferred
        if self._first_is_open:
            self._first_is_open = False
        else:
            self._before.append(_preferred)
            _preferred = self._name
        return self

    def __exit__(self, *_: object) -> None:
        global _preferred
        _preferred = self._before.pop()


@contextlib.contextmanager
def explain() -> Iterator[Explanation]:
    """Records, for each call of an op inside the block, the backend that served it and why the others did
    not.

    >>> with llmkernels.explain() as calls:
    ...     model(batch)
    >>> print(calls)

    A region under torch.compile is recorded when it is traced, not each time it runs.
    """
    recording = Explanation()
    _recordings.append(recording)
    try:
        yield recording
    finally:
        # By identity: two nested recordings are equal lists until a call tells them apart.
        del _recordings[next(i for i, open_one in enumerate(_recordings) if open_one is recording)]


@functools.cache
def load(module: str) -> ModuleType | str:
    """The kernel module, or the reason why it can't be imported here (triton has no wheel for every
    platform)."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return f"{module.rsplit('.', 1)[-1]} can't be imported: {error}"


def kernels(package: str, backend: str) -> Any:
    """The kernel module of a backend that ``choose`` named; imported here where a saved torch.export program
    is the first of its process to ask for it."""
    name = f"{package}.{backend}" if backend == "reference" else f"{package}.{backend}_kernels"
    return sys.modules.get(name) or importlib.import_module(name)


def reasons_against(backend: str, call: Any, modules: Mapping[str, str]) -> tuple[str, ...]:
    """Why a backend can't serve ``call`` of the op that has these modules by backend; empty if it can."""
    if backend not in modules:
        return (f"this op has no {backend} kernels",)
    kernels = load(modules[backend])
    return (kernels,) if isinstance(kernels, str) else tuple(kernels.unsupported(call))


@functools.lru_cache(maxsize=4096)
def _decide(
    call: Any,
    modules: tuple[tuple[str, str], ...],
    automatic: tuple[str, ...],
    asked: str | None,
    preferred: str | None,
) -> Decision:
    kernels = dict(modules)
    passed_over: list[tuple[str, tuple[str, ...]]] = []

    def serves(name: str) -> bool:
        if name == "torch":
            return True
        reasons = reasons_against(name, call, kernels)
        if reasons:
            passed_over.append((name, reasons))
        return not reasons

    def decision(name: str, reason: str) -> Decision:
        return Decision(call.op, name, reason, tuple(passed_over))

    if asked is not None:
        _checked(asked, f"{call.op}: backend")
        if serves(asked):
            return decision(asked, "asked for by backend=")
        reasons = "; ".join(passed_over[0][1])
        raise RuntimeError(
            f"{call.op}: backend: expected one that can serve this call, got {asked!r}: {reasons}"
        )
    if preferred is not None:
        if serves(preferred):
            return decision(preferred, "preferred by use_backend() or LLMKERNELS_BACKEND")
        return decision("torch", "the preferred backend can't serve this call")
    if call.device.type != "cuda":
        passed_over.extend(
            (name, (f"the input is on {call.device.type}, not on a GPU",)) for name in automatic
        )
        return decision("torch", "torch's own operator is the fastest off the GPU")
    for name in automatic:
        if serves(name):
            return decision(name, "first of the automatic rule that can serve")
    if not automatic:
        return decision("torch", "no kernel of ours has been timed against torch's for such a call yet")
    return decision("torch", "no kernel of the automatic rule can serve")


def _decide_and_record(kind: type, fields: tuple[Any, ...], *arguments: Any) -> str:
    """Of plain arguments and a plain result: torch.compile runs it while tracing and takes the result as a
    constant."""
    decision = _decide(kind(*fields), *arguments)
    for recording in _recordings:
        recording.append(decision)
    return decision.backend


# What torch.compiler.assume_constant_result sets; calling it would import the whole of torch._dynamo, and
# triton.
_decide_and_record._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(
    call: Any, modules: tuple[tuple[str, str], ...], automatic: tuple[str, ...], asked: str | None
) -> str:
    """The name of the backend that serves ``call``.

    modules: (backend, module name) pairs of the op; automatic: the backends of its measured rule, fastest
    first, tried for tensors on a GPU. Raises ValueError for an unknown name and RuntimeError, with every
    reason, where ``asked`` can't serve.
    """
    if _recordings or torch.compiler.is_compiling():
        return _decide_and_record(type(call), tuple(call), modules, automatic, asked, _preferred)
    return _decide(call, modules, automatic, asked, _preferred).backend


def _record(op: str, reason: str) -> None:
    for recording in _recordings:
        recording.append(Decision(op, "torch", reason, ()))


_record._dynamo_marked_constant = True  # type: ignore[attr-defined]


def record_fallback(op: str, reason: str) -> None:
    """Tells ``explain()`` that a layer computes a call by torch's functions, not by our ops, and why."""
    if _recordings:
        _record(op, reason)


def leaves_to_torch(input: Tensor, asked: str | None) -> bool:
    """Whether ``choose`` is sure to answer "torch" and nobody is listening: the short cut that keeps a call
    on a CPU tensor as cheap as torch's own."""
    return asked is None and not input.is_cuda and _preferred is None and not _recordings


def forget() -> None:
    """Empties the caches of decisions and modules; for tests that change what a backend can do."""
    _decide.cache_clear()
    load.cache_clear()


def preference() -> str | None:
    """The backend that use_backend() or LLMKERNELS_BACKEND prefers, None for the automatic rule."""
    return _preferred


def support(call: Any, modules: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """For each backend of an op the reasons against ``call``; what doctor and replace() print."""
    return {name: reasons_against(name, call, modules) for name in BACKENDS if name != "torch"}
