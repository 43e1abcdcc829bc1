"""Compiles Triton kernels for GPUs that are not there and reports what they use of them.

Triton compiles either or interprets, by TRITON_INTERPRET at its import; a test process interprets. So
``compile_all`` hands its jobs to a second process, this file run as a program, which compiles them with the
compilers that the triton wheel carries: no GPU, driver or CUDA toolkit is needed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# The most shared memory one block may ask for, in bytes (CUDA C++ Programming Guide, technical
# specifications).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


@dataclass(frozen=True)
class Job:
    """One kernel with one set of argument types and constants, for one architecture.

    kernel: "module:name". arguments: by parameter name, the type of a runtime argument in Triton's notation
    ("*bf16", "i32", "fp32"), a number or any other string for a constexpr, None for a pointer that is not
    given, a tuple of these. Pointers are 16-byte aligned unless named in ``unaligned``.
    """

    kernel: str
    arguments: dict[str, Any]
    architecture: int
    num_warps: int
    label: str = ""
    unaligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What the compiled kernel uses: registers a thread, spilled bytes a thread (stores plus loads), shared
    memory bytes a block; how often its PTX holds certain instructions; or the error that kept it from
    compiling."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    error: str = ""


_INSTRUCTIONS = {
    "global_load": r"ld\.global",
    "global_load_128": r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64",
    "copy_async_128": r"cp\.async\.cg\.shared\.global[^;]*\b0x10\b",
    "global_store_128": r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64",
    "global_store": r"st\.global",
    "shared_load": r"ld\.shared|ldmatrix",
    "shared_store": r"st\.shared|stmatrix",
    "barrier": r"bar\.sync",
    "flush_to_zero": r"\.ftz\.",
    # Of sm_80 and sm_120, of sm_90, of sm_100.
    "mma_sync": r"mma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05_mma": r"tcgen05\.mma",
}


def compile_all(jobs: Iterable[Job], processes: int = 1) -> list[Compiled]:
    """The reports of the jobs, in their order."""
    jobs = list(jobs)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shares = [jobs[i::processes] for i in range(processes)]
    running = []
    for share in shares:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        assert process.stdin is not None
        json.dump([asdict(job) for job in share], process.stdin)
        process.stdin.close()
        running.append(process)
    reports: list[Compiled] = [Compiled(error="not compiled")] * len(jobs)
    for i, process in enumerate(running):
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        assert process.wait() == 0, f"the compiling process ended with {process.returncode}"
        reports[i::processes] = [Compiled(**json.loads(line)) for line in lines]
    return reports


def _is_type(argument: object) -> bool:
    return isinstance(argument, str) and re.fullmatch(r"\*?(i|u|fp|bf)\d+", argument) is not None


def _signature(argument: object) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(map(_signature, argument))
    return argument if _is_type(argument) else "constexpr"


def _compile(job: Job) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job.kernel.split(":")
    function = getattr(importlib.import_module(module), name)
    parameters = [parameter.name for parameter in function.params]
    if set(parameters) != set(job.arguments):
        raise ValueError(f"{name}: the job's arguments differ in {set(parameters) ^ set(job.arguments)}")
    types = {p: _signature(v) for p, v in job.arguments.items()}
    constants: dict[tuple[int, ...], Any] = {}
    for p, v in job.arguments.items():
        elements = enumerate(v) if isinstance(v, (list, tuple)) else [(None, v)]
        path = (parameters.index(p),)
        constants |= {path if i is None else (*path, i): x for i, x in elements if not _is_type(x)}
    aligned = [p for p in parameters if str(types[p]).startswith("*") and p not in job.unaligned]
    attributes = {(parameters.index(p),): [["tt.divisibility", 16]] for p in aligned}
    source = ASTSource(function, {p: types[p] for p in parameters}, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", job.architecture, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": job.num_warps})
    registers, stack = _resources(kernel.asm["cubin"])
    return Compiled(
        registers=registers,
        spilled=_spilled(kernel.asm["ptx"], job.architecture) if stack else 0,
        shared=kernel.metadata.shared,
        instructions={
            name: len(re.findall(pattern, kernel.asm["ptx"])) for name, pattern in _INSTRUCTIONS.items()
        },
    )


def _tools() -> Path:
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as the assembler recorded them in the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_tools() / "cuobjdump"), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", output)
    if found is None:
        raise RuntimeError(f"no resource usage in cuobjdump's output: {output}")
    return int(found[1]), int(found[2])


def _spilled(ptx: str, architecture: int) -> int:
    """Bytes of spill stores and loads a thread: a stack alone may also be an indexed local array."""
    from triton.backends.nvidia.compiler import get_ptxas

    name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(architecture).path, "-v", "--gpu-name", name, "-o", os.devnull, file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    if found is None:
        raise RuntimeError(f"no spill report in ptxas's output: {output}")
    return int(found[1]) + int(found[2])


def _reports() -> Iterator[Compiled]:
    for fields in json.load(sys.stdin):
        try:
            yield _compile(Job(**fields))
        except Exception as error:
            yield Compiled(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    for report in _reports():
        print(json.dumps(asdict(report)), flush=True)
