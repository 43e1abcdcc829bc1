"""Who may import whom, in Python and in csrc, read from the sources; what importing the package may load."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# What each module may import of the package, the first pattern that fits; {op} is the op's own folder. Top to
# bottom: the commands, what stands on the ops, the ops' own layers, and the ground, which imports nothing of
# the package.
ALLOWED: dict[str, tuple[str, ...]] = {
    "llmkernels": ("dispatch", "nn", "ops.*.api", "replacement"),
    "llmkernels.__main__": ("cli",),
    "llmkernels.cli": ("build", "doctor", "wrappers"),
    "llmkernels.doctor": ("build", "dispatch", "extension", "ops"),
    "llmkernels.wrappers": ("dropout", "extension"),
    "llmkernels.replacement*": (
        *("replacement", "replacement.*", "nn", "nn.*", "ops.*.api"),
        *("checks", "dispatch", "extension", "interpreter", "testing"),
    ),
    "llmkernels.nn*": ("nn", "nn.*", "ops.*.api", "checks", "dispatch", "tracing"),
    "llmkernels.ops": (),
    "llmkernels.ops.*.selfcheck": ("{op}.api", "{op}.call", "testing"),
    # The kernels are named to dispatch and loaded by it, so that a missing triton is a reason and not an
    # error.
    "llmkernels.ops.*.api": (
        *("{op}.autograd", "{op}.call", "{op}.reference", "{op}.torch_backend"),
        *("checks", "dispatch", "tracing"),
    ),
    "llmkernels.ops.*.autograd": ("{op}.call", "{op}.reference", "dispatch", "tracing"),
    "llmkernels.ops.*.torch_backend": ("{op}.call", "{op}.reference"),
    "llmkernels.ops.*.reference": ("{op}.call", "dropout"),
    "llmkernels.ops.*.cuda_*": ("{op}.cuda_*", "{op}.call", "{op}.tiles", "checks", "dropout", "extension"),
    "llmkernels.ops.*.triton_*": (
        *("{op}.triton_*", "{op}.call", "{op}.tiles"),
        *("checks", "dropout", "triton_support"),
    ),
    "llmkernels.ops.*": (),
    "llmkernels.extension": ("build",),
    "llmkernels.triton_support": ("interpreter",),
    "llmkernels.*": (),
}

# What beside torch and the standard library; nothing else of the package may need more than torch to be
# imported.
EXTERNAL: dict[str, set[str]] = {
    "llmkernels.build": {"ninja", "pybind11"},
    "llmkernels.interpreter": {"numpy", "torch", "triton"},
    "llmkernels.ops.*.triton_*": {"torch", "triton"},
    "llmkernels.triton_support": {"torch", "triton"},
    "llmkernels.replacement.transformers_attention": {"torch", "transformers"},
    "llmkernels.cli": set(),
    "llmkernels*": {"torch"},
}

PUBLIC_NAMES = {
    *("attention", "attention_decode", "attention_varlen"),
    *("feed_forward", "linear_activation"),
    *("add_layer_norm", "layer_norm", "rms_norm"),
    *("explain", "nn", "replace", "use_backend"),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for path in sorted((ROOT / "llmkernels").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The absolute names of all that a module imports, wherever in it stands the statement."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*outer, *([base] if base else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in known else base)
    return found


def rule(table: dict[str, object], name: str) -> object:
    """The entry of the first pattern that fits."""
    return next(entry for pattern, entry in table.items() if fnmatch.fnmatchcase(name, pattern))


def broken_rules(name: str, path: Path, known: set[str]) -> list[str]:
    """One sentence for each import of a module that the tables don't allow."""
    op = ".".join(name.split(".")[1:3]) if name.startswith("llmkernels.ops.") else ""
    allowed = [f"llmkernels.{pattern.format(op=op)}" for pattern in rule(ALLOWED, name)]  # type: ignore[attr-defined]
    external = rule(EXTERNAL, name)
    problems = []
    for imported in sorted(imports(name, path, known)):
        top = imported.partition(".")[0]
        if top == "llmkernels":
            if not any(fnmatch.fnmatchcase(imported, pattern) for pattern in allowed):
                problems.append(
                    f"{name} imports {imported}; allowed: {', '.join(allowed) or 'nothing of llmkernels'}"
                )
        elif top not in sys.stdlib_module_names and top not in external:  # type: ignore[operator]
            problems.append(f"{name} imports {imported}; allowed beside the standard library: {external}")
    return problems


@pytest.mark.parametrize("name", modules())
def test_imports_follow_the_layers(name: str) -> None:
    found = modules()
    assert broken_rules(name, found[name], set(found)) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    (
        ("llmkernels.ops.attention.api", "from ..layer_norm import api", "ops.layer_norm.api"),
        ("llmkernels.ops.layer_norm.api", "from . import triton_kernels", "triton_kernels"),
        ("llmkernels.ops.layer_norm.triton_kernels", "from .reference import forward", "reference"),
        ("llmkernels.ops.layer_norm.cuda_kernels", "import triton", "triton"),
        ("llmkernels.ops.layer_norm.tiles", "from ... import checks", "checks"),
        ("llmkernels.nn.layer_norm", "def f():\n    from ..ops.layer_norm import reference", "reference"),
        ("llmkernels.dispatch", "import numpy as np", "numpy"),
        ("llmkernels.build", "import torch", "torch"),
        ("llmkernels.cli", "import torch", "torch"),
    ),
)
def test_the_layers_can_be_broken(tmp_path: Path, name: str, source: str, complaint: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    problems = broken_rules(name, path, {*modules(), f"{name.rpartition('.')[0]}.triton_kernels"})
    assert len(problems) == 1 and complaint in problems[0]


def test_public_names() -> None:
    import llmkernels

    assert set(llmkernels.__all__) == PUBLIC_NAMES
    assert all(hasattr(llmkernels, name) for name in PUBLIC_NAMES)
    assert re.fullmatch(r"\d+\.\d+\.\d+", llmkernels.__version__)


# --- csrc


def kernel_sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".cu", ".cuh", ".h"})


def layer(path: Path) -> str:
    """The folder of csrc that a file belongs to: common, sm80, sm90, an op's, or "" for the bindings."""
    return path.relative_to(CSRC).parts[0] if path.parent != CSRC else ""


def reachable_layers(path: Path) -> set[str]:
    """The folders a file may include from: bindings -> <op>.h -> *.cuh -> sm90 -> sm80 -> common."""
    own = layer(path)
    if own == "":
        return {folder.name for folder in CSRC.iterdir() if folder.is_dir()} - {"sm80", "sm90"}
    ground = ["common", "sm80", "sm90"]
    if own in ground:
        return set(ground[: ground.index(own) + 1])
    if path.suffix == ".h":
        return {own, "common"}
    return {own, *ground}


def include_problems(path: Path, source: str) -> list[str]:
    """One sentence for each include, instruction or declaration that stands in the wrong layer."""
    problems = []
    name = path.relative_to(CSRC)
    for bracket, included in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', source, re.MULTILINE):
        if bracket == '"' and not included.startswith("emulator"):
            target = (path.parent / included).resolve()
            if not target.is_file():
                target = CSRC / included
            if not target.is_file():
                problems.append(f"{name} includes {included}, which is not there")
            elif layer(target) not in reachable_layers(path):
                problems.append(f"{name} includes {included} of another layer")
            elif layer(path) == "" and target.suffix != ".h" and layer(target) != "common":
                problems.append(f"{name} includes {included}; the bindings see only the ops' .h contracts")
        elif (
            re.match(r"(cuda|cute|cutlass|mma\.h|emulator\.hpp)", included)
            and name.as_posix() != "common/platform.cuh"
        ):
            problems.append(f"{name} includes {included}; only common/platform.cuh knows CUDA's own headers")
        elif re.match(r"(torch|ATen|c10)/", included):
            problems.append(f"{name} includes {included}, a header of torch")
        elif included.startswith("pybind11") and layer(path) != "":
            problems.append(f"{name} includes {included}; only the bindings know Python")
    code = re.sub(r"//.*|/\*.*?\*/", "", source)
    if re.search(r"\basm\b", code) and layer(path) not in {"common", "sm80", "sm90"}:
        problems.append(f"{name} has inline assembly; instructions are wrapped in common, sm80 or sm90")
    if "__shared__" in code and name.as_posix() != "common/platform.cuh":
        problems.append(f"{name} declares shared memory; LLMKERNELS_SHARED does, which the emulator knows")
    return problems


@pytest.mark.parametrize("path", kernel_sources(), ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes_follow_the_layers(path: Path) -> None:
    assert include_problems(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    (
        ("bindings.cpp", "#include <torch/extension.h>", "header of torch"),
        ("bindings.cpp", '#include "layer_norm/forward.cuh"', "only the ops' .h contracts"),
        ("layer_norm/forward.cuh", "#include <cuda_runtime.h>", "only common/platform.cuh"),
        ("layer_norm/forward.cuh", "#include <pybind11/pybind11.h>", "only the bindings"),
        ("layer_norm/layer_norm.h", '#include "../sm80/cp_async.cuh"', "of another layer"),
        ("common/vector.cuh", '#include "../sm80/cp_async.cuh"', "of another layer"),
        ("common/vector.cuh", '#include "../layer_norm/layer_norm.h"', "of another layer"),
        ("layer_norm/forward.cuh", 'asm volatile("bar.sync 0;");', "inline assembly"),
        ("layer_norm/forward.cuh", "__shared__ float sums[32];", "shared memory"),
        ("layer_norm/forward.cuh", '#include "nothing.cuh"', "not there"),
    ),
)
def test_the_include_layers_can_be_broken(path: str, source: str, complaint: str) -> None:
    problems = include_problems(CSRC / path, source)
    assert len(problems) == 1 and complaint in problems[0]


# --- importing


def run_python(program: str) -> str:
    """What a program prints in an interpreter of its own, without pytest's environment for Triton."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_importing_the_package_loads_no_kernel() -> None:
    """Neither triton, nor the compiled module, nor anything heavier than what torch itself loads."""
    program = """
        import sys, torch
        before = set(sys.modules)
        import llmkernels
        loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(loaded - set(sys.stdlib_module_names) - {"llmkernels", "torch"}))
        print(*[name for name in sys.modules if name.endswith(("_kernels", "._C")) and "llmkernels" in name])
    """
    assert run_python(program).split() == []


def test_without_triton_torch_serves() -> None:
    """Where triton has no wheel the package imports, computes and gives the missing triton as the reason."""
    program = """
        import importlib.abc, sys

        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocked())
        import torch, llmkernels
        from llmkernels.ops.layer_norm import api, selfcheck

        x = torch.randn(4, 8)
        assert torch.equal(llmkernels.layer_norm(x, (8,)), torch.nn.functional.layer_norm(x, (8,)))
        with llmkernels.explain() as calls, llmkernels.use_backend("triton"):
            llmkernels.layer_norm(x, (8,))
        assert calls[0].backend == "torch"
        print(calls)
        try:
            llmkernels.layer_norm(x, (8,), backend="triton")
        except RuntimeError as error:
            print(error)
    """
    said = run_python(program)
    assert said.count("triton_kernels can't be imported: No module named 'triton'") == 2
