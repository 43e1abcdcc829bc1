"""`llmkernels doctor`: what works here, why the rest does not, and each kernel against the reference.

The kernels of a backend run in a process of their own (``python -m llmkernels.doctor BACKEND``): Triton's
interpreter must be chosen before triton is imported, and a kernel that brings its process down must not take
the report along.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from . import build, dispatch, extension, ops

_TIME_LIMIT_SECONDS = 900


@dataclasses.dataclass(frozen=True)
class Run:
    """One kernel call and its worst tensor: errors against float64, of ours and of torch in the same
    dtype."""

    name: str
    error: float
    torch_error: float
    allowed: float
    passed: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Backend:
    """One backend of one op: where its kernels ran, or why they can't, and what came out."""

    op: str
    backend: str
    offered: bool  # the op has kernels of this backend
    automatic: bool  # tried by backend=None, for a tensor on a GPU
    where: str
    reasons: tuple[str, ...]  # against serving a call of that op there; none if it can
    runs: tuple[Run, ...]
    failure: str | None  # why the runs broke off

    @property
    def healthy(self) -> bool:
        return self.failure is None and all(run.passed for run in self.runs)


@dataclasses.dataclass(frozen=True)
class Report:
    """All that doctor says."""

    versions: Mapping[str, str]
    gpus: tuple[str, ...]
    module: str | None  # the compiled CUDA C++ module
    module_remarks: tuple[str, ...]
    chosen: Mapping[str, str]  # for each op what backend=None takes here, and why
    backends: tuple[Backend, ...]

    @property
    def healthy(self) -> bool:
        """Whether every kernel that could run passed."""
        return all(backend.healthy for backend in self.backends)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> dict[str, str]:
    found = {
        "llmkernels": build.version(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "CUDA of torch": torch.version.cuda or "none: this is a CPU build",
    }
    if torch.cuda.is_available():
        driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
        found["CUDA of the driver"] = f"{driver // 1000}.{driver % 1000 // 10}"
    return found


def _gpus() -> tuple[str, ...]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            f"{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    return tuple(found)


def _module() -> tuple[str | None, tuple[str, ...]]:
    """The compiled module's path, with its architectures and age, or None, with the reason."""
    reason = extension.missing_reason()
    if reason is not None:
        return None, (reason,)
    module = extension.load()
    path = str(module.__file__)
    if extension.is_emulated():
        return path, ("emulated: runs on the CPU, for tests",)
    remarks = [f"compiled for {', '.join(module.architectures())}"]
    if build.outdated(Path(path)):
        remarks.append("older than the sources beside it: run `llmkernels build`")
    return path, tuple(remarks)


def chosen_device() -> torch.device:
    """Where kernels are tried: the current GPU, or the CPU where torch sees none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _ops() -> dict[str, tuple[ModuleType, ModuleType]]:
    """Each op's api and selfcheck modules, by the op's name."""
    names = [entry.name for entry in pkgutil.iter_modules(ops.__path__) if entry.ispkg]
    return {
        name: (
            importlib.import_module(f"{ops.__name__}.{name}.api"),
            importlib.import_module(f"{ops.__name__}.{name}.selfcheck"),
        )
        for name in names
    }


def _choices() -> dict[str, str]:
    found = {}
    for op, (api, selfcheck) in _ops().items():
        with dispatch.explain() as calls:
            dispatch.choose(selfcheck.example_call(chosen_device()), api.KERNELS, api.AUTOMATIC, None)
        found[op] = f"{calls[0].backend} ({calls[0].reason})"
    return found


def _run_kernels(backend: str) -> None:
    """In a process of its own: prints one JSON line for each op's reasons and for each kernel call."""
    device = chosen_device()
    for op, (api, selfcheck) in _ops().items():
        reasons = dispatch.support(selfcheck.example_call(device), dict(api.KERNELS))[backend]
        print(json.dumps({"op": op, "reasons": reasons}), flush=True)
        if not reasons:
            for name, comparison in selfcheck.compare(backend, device):
                values = (comparison.error, comparison.baseline_error, comparison.allowed, comparison.passed)
                run = Run(name, *values, comparison.detail)
                print(json.dumps({"op": op, "run": dataclasses.asdict(run)}), flush=True)


def _examine_backend(backend: str) -> list[Backend]:
    environment = dict(os.environ)
    on_gpu = torch.cuda.is_available()
    where = "on the GPU" if on_gpu else "on the CPU"
    if backend == "triton" and not on_gpu:
        environment["TRITON_INTERPRET"] = "1"
        where = "on the CPU, through Triton's interpreter"
    if backend == "cuda" and not on_gpu:
        where = "on the CPU, through the emulator"
    # This package and no other: the process may have found it beside its working directory.
    search = [str(Path(__file__).resolve().parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    command = [sys.executable, "-m", __name__, backend]
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_TIME_LIMIT_SECONDS
        )
        output, errors, status = finished.stdout, finished.stderr, finished.returncode
    except subprocess.TimeoutExpired as error:
        output, errors, status = _text(error.stdout), f"no end after {_TIME_LIMIT_SECONDS} seconds", 1
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    found = []
    for op, (api, _) in _ops().items():
        of_op = [line for line in lines if line["op"] == op]
        reasons = tuple(reason for line in of_op for reason in line.get("reasons", ()))
        runs = tuple(Run(**line["run"]) for line in of_op if "run" in line)
        failure = None
        if status != 0 and (not of_op or lines[-1]["op"] == op):
            said = errors.strip().splitlines()[-1:] or ["no message"]
            failure = f"killed by signal {-status}" if status < 0 else said[0]
        offered, automatic = backend in dict(api.KERNELS), backend in api.AUTOMATIC
        found.append(Backend(op, backend, offered, automatic, where, reasons, runs, failure))
    return found


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def examine() -> Report:
    """Looks at the machine and runs every kernel that can run on it."""
    module, remarks = _module()
    backends = [found for name in ("cuda", "triton", "reference") for found in _examine_backend(name)]
    return Report(_versions(), _gpus(), module, remarks, _choices(), tuple(backends))


def as_json(report: Report) -> str:
    return json.dumps({**dataclasses.asdict(report), "healthy": report.healthy}, indent=2)


def _backend_lines(found: Backend) -> list[str]:
    if found.reasons:
        lines = [f"  {found.backend}: can't run here: {found.reasons[0]}"]
        lines += [f"    {reason}" for reason in found.reasons[1:]]
    else:
        lines = [f"  {found.backend}: runs {found.where}"]
    for run in found.runs:
        verdict = "ok" if run.passed else "FAILED"
        errors = f"error {run.error:8.2e}, torch's {run.torch_error:8.2e}, allowed {run.allowed:8.2e}"
        lines.append(f"    {run.name:24} {errors}: {verdict}")
        if not run.passed:
            lines.append(f"      worst: {run.detail}")
    if found.failure is not None:
        lines.append(f"    FAILED: {found.failure}")
    if found.backend == "cuda" and found.offered and not found.automatic:
        lines.append(
            "    Not chosen by default: it has not run on real hardware yet; backend='cuda' asks for it."
        )
    return lines


def as_text(report: Report) -> str:
    """The report for a person; its last line is the verdict."""
    width = max(map(len, report.versions))
    lines = [f"{name:{width}}  {version}" for name, version in report.versions.items()]
    lines += ["", "GPUs", *(f"  {gpu}" for gpu in report.gpus or ("none: torch sees no NVIDIA GPU",))]
    lines += [
        "",
        "CUDA C++ module",
        f"  {report.module or 'missing'}",
        *(f"  {r}" for r in report.module_remarks),
    ]
    previous = None
    for found in sorted(report.backends, key=lambda found: found.op):
        if found.op != previous:
            lines += ["", found.op, f"  backend=None takes {report.chosen[found.op]}"]
            previous = found.op
        lines += _backend_lines(found)
    failed = [f"{found.op} by {found.backend}" for found in report.backends if not found.healthy]
    ran = sum(len(found.runs) for found in report.backends)
    passed = f"All {ran} kernel checks passed: each error, against float64, is within its budget."
    if all(found.backend == "reference" for found in report.backends if found.runs):
        passed = f"No kernel can run here. The reference's {ran} checks passed."
    verdict = f"FAILED: {', '.join(failed)}" if failed else passed
    return "\n".join([*lines, "", verdict])


if __name__ == "__main__":
    _run_kernels(sys.argv[1])
