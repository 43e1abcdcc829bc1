"""Compiles csrc with nvcc for every supported architecture and reads what ptxas says of each kernel.

``python -m tests.csrc.compilation`` writes anew resources.json, which test_resources.py compares with.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = ("80", "90a", "100", "120")
_JOBS = 2

_KERNEL = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


class Kernel(NamedTuple):
    """What one kernel takes on one architecture. shared_bytes: the static ones, without the launch's."""

    architecture: str
    name: str
    registers: int
    shared_bytes: int
    spill_bytes: int


class Compilation(NamedTuple):
    """The kernels of all sources, every line in which a compiler or ptxas warned, and the shared libraries
    that a module of these objects, linked with a static cudart, needs at run time."""

    kernels: list[Kernel]
    warnings: list[str]
    libraries: list[str]


def find_nvcc() -> str | None:
    """The path of nvcc: CUDACXX, CUDA_HOME or PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    candidates = (
        os.environ.get("CUDACXX"),
        f"{home}/bin/nvcc" if home else None,
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    )
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


@functools.cache
def nvcc_release() -> str:
    """As "13.0": ptxas of another release allots other registers."""
    nvcc = find_nvcc()
    assert nvcc is not None
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    assert match is not None, text
    return match[1]


def _compile(source: Path, target: Path) -> str:
    nvcc = find_nvcc()
    assert nvcc is not None
    architectures = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-fPIC", *architectures]
    result = subprocess.run(
        [nvcc, *flags, "-c", str(source), "-o", str(target)], capture_output=True, text=True
    )
    log = result.stdout + result.stderr
    if result.returncode != 0:
        raise RuntimeError(f"nvcc could not compile {source.relative_to(CSRC)}:\n{log}")
    return log


def _libraries(objects: list[Path], target: Path) -> list[str]:
    nvcc = find_nvcc()
    assert nvcc is not None
    command = [nvcc, "-shared", "--cudart", "static", *map(str, objects), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    text = subprocess.run(["readelf", "-d", str(target)], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", text)


def demangled(names: list[str]) -> list[str]:
    """``layer_norm_forward_kernel<Float32, BlockRow<16, 1024>>``: without namespaces and arguments."""
    text = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout
    plain = (line.replace("llmkernels::", "").removeprefix("void ") for line in text.splitlines())
    return [re.sub(r"\s+>", ">", re.sub(r"\([^()]*\)$", "", line)) for line in plain]


def parse(log: str) -> list[Kernel]:
    """The kernels that ``ptxas -v`` reports."""
    found: list[tuple[str, str, int, int, int]] = []
    for section in re.split(r"(?=Compiling entry function)", log):
        kernel, spills, used = _KERNEL.search(section), _SPILLS.search(section), _USED.search(section)
        if kernel and spills and used:
            spilled = int(spills[2]) + int(spills[3])
            found.append((kernel[2], kernel[1], int(used[1]), int(used[2] or 0), spilled))
    names = demangled([row[1] for row in found]) if found else []
    return [Kernel(row[0], name, *row[2:]) for row, name in zip(found, names, strict=True)]


@functools.cache
def compile_all() -> Compilation:
    """Every .cu file of csrc, one call of nvcc a file. Raises RuntimeError where one does not compile."""
    sources = sorted(CSRC.rglob("*.cu"), key=lambda path: -path.stat().st_size)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_JOBS) as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        logs = list(pool.map(_compile, sources, objects))
        libraries = _libraries(objects, Path(folder) / "module.so")
    kernels = [kernel for log in logs for kernel in parse(log)]
    warnings = [line for log in logs for line in log.splitlines() if "warning" in line.lower()]
    return Compilation(sorted(kernels), warnings, libraries)


def as_table(compilation: Compilation) -> dict[str, object]:
    """Release of nvcc, and of each kernel [registers, static shared bytes] by architecture."""
    kernels: dict[str, dict[str, list[int]]] = {}
    for kernel in compilation.kernels:
        kernels.setdefault(kernel.name, {})[kernel.architecture] = [kernel.registers, kernel.shared_bytes]
    return {"nvcc": nvcc_release(), "kernels": kernels}


def _as_json(table: dict[str, object]) -> str:
    """A line a kernel, so that a change of one reads as one line."""
    kernels = table["kernels"]
    assert isinstance(kernels, dict)
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(kernels.items()))
    return f'{{\n  "nvcc": {json.dumps(table["nvcc"])},\n  "kernels": {{\n{lines}\n  }}\n}}\n'


if __name__ == "__main__":
    TABLE.write_text(_as_json(as_table(compile_all())))
    print(TABLE)
