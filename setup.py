"""What pyproject.toml can't say: the compiled module, and csrc and bench as parts of the package.

torch is not imported, so an isolated build works and the result fits every torch. LLMKERNELS_CUDA: unset
compiles the CUDA C++ kernels where nvcc is found and installs without them where it isn't or where it fails,
1 makes both an error, 0 leaves the kernels out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _load_build() -> ModuleType:
    """llmkernels/build.py by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("llmkernels_build", ROOT / "llmkernels" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()


def _say(message: str) -> None:
    frame = "*" * 100
    print(f"{frame}\nllmkernels: {message}\n{frame}", file=sys.stderr, flush=True)


def _cuda_setting() -> str:
    setting = os.environ.get("LLMKERNELS_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        sys.exit(f"LLMKERNELS_CUDA: expected 0, 1 or unset, got {setting!r}")
    return setting


def _extensions() -> list[Extension]:
    """The compiled module, or nothing where it is not wanted or can't be compiled here."""
    setting = _cuda_setting()
    if setting == "0":
        print("llmkernels: LLMKERNELS_CUDA=0, so the CUDA C++ kernels are left out", file=sys.stderr)
        return []
    try:
        build.find_nvcc()
    except build.BuildError as error:
        if setting == "1":
            sys.exit(f"llmkernels: LLMKERNELS_CUDA=1 asks for the CUDA C++ kernels, but {error}")
        _say(
            f"installing without the CUDA C++ kernels: {error}.\nWith a CUDA toolkit, run `llmkernels build`."
        )
        return []
    return [Extension("llmkernels._C", sources=[], optional=setting != "1")]


class BuildModule(build_ext):
    """Hands the one extension to llmkernels/build.py, which runs ninja over csrc."""

    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).absolute()
        try:
            build.compile_module(destination, Path(self.build_temp), build.ProgressLine())
        except (build.BuildError, OSError) as error:
            if not ext.optional:
                sys.exit(f"llmkernels: LLMKERNELS_CUDA=1 asks for the CUDA C++ kernels, but {error}")
            _say(f"INSTALLING WITHOUT THE CUDA C++ KERNELS: {error}\nOnce mended, run `llmkernels build`.")


def _packages() -> dict[str, str]:
    """Each package and its folder: the package itself, the CUDA C++ sources as its data, and the
    benchmarks."""
    packages = {
        name: name.replace(".", "/") for name in find_packages(include=["llmkernels", "llmkernels.*"])
    }
    packages["llmkernels.csrc"] = "csrc"
    if (ROOT / "bench" / "__init__.py").is_file():
        packages["llmkernels.bench"] = "bench"
        packages |= {
            f"llmkernels.bench.{name}": f"bench/{name.replace('.', '/')}" for name in find_packages("bench")
        }
    return packages


setup(
    packages=list(_packages()),
    package_dir=_packages(),
    package_data={
        "llmkernels": ["py.typed"],
        "llmkernels.csrc": ["**/*.cpp", "**/*.cu", "**/*.cuh", "**/*.h"],
        "llmkernels.bench": ["**/*.json"],
    },
    include_package_data=False,
    ext_modules=_extensions(),
    cmdclass={"build_ext": BuildModule},
)
