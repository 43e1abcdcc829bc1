"""Makes the environment of the Makefile: a venv with torch, triton and this package, installed in place.

    python3 tools/install.py VENV [--triton newest | X.Y.Z] [--extras test]

Needs Python 3.10 or newer with venv, nothing else. Where nvidia-smi sees a GPU, torch is PyPI's build with
CUDA; elsewhere its CPU build, which is a tenth of the size and comes from wherever pip is configured to find
one, or from PyTorch's own index by way of uv, which knows it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TRITON = "3.6.0"
# The interpreter of Triton 3.6 indexes with arrays of one element, which numpy 2.4 refuses.
NUMPY_FOR_TRITON = "numpy<2.4"

_ASK_TORCH = "import torch; print(torch.__version__, torch.version.cuda)"
_ASK_TRITON_OF_TORCH = "import importlib.metadata as m; print('\\n'.join(m.requires('torch') or []))"


def run(*command: str | Path) -> bool:
    """Whether the command, shown as it starts, succeeded."""
    print("+", *command, flush=True)
    return subprocess.run(command).returncode == 0


def answer(python: Path, program: str) -> str:
    """What a one-line Python program prints; empty if it fails."""
    return subprocess.run([python, "-c", program], capture_output=True, text=True).stdout.strip()


def sees_gpu() -> bool:
    """Whether the NVIDIA driver is here and answers."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def make_venv(folder: Path) -> Path:
    """The Python of a venv in ``folder``."""
    python = folder / "bin" / "python"
    if not python.is_file() and not run(sys.executable, "-m", "venv", folder):
        shutil.rmtree(folder, ignore_errors=True)
        name = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        sys.exit(f"{sys.executable} can't make a venv; on Debian and Ubuntu: apt install {name}")
    return python


def install_torch(python: Path) -> None:
    """torch: the one already there, PyPI's where a GPU is seen, else a CPU build by the first way that
    works."""
    if answer(python, _ASK_TORCH):
        return
    pip = (python, "-m", "pip", "install")
    if sys.platform == "linux" and not sees_gpu():
        print("No NVIDIA GPU is seen: looking for a CPU build of torch.")
        if run(*pip, f"{TORCH}+cpu"):
            return
        uv = (python, "-m", "uv", "pip", "install", "--python", python)
        if run(*pip, "uv") and run(*uv, "--torch-backend=cpu", TORCH):
            return
        print("No CPU build is within reach: taking PyPI's, which brings CUDA along.")
    if not run(*pip, TORCH):
        sys.exit(f"torch could not be installed: see pip's message above. Needed: {TORCH} for this Python")


def triton_requirements(python: Path, asked: str) -> list[str]:
    """What to ask pip for. A torch with CUDA names the one triton that its compiler works with; a CPU build
    none."""
    if sys.platform != "linux":
        return []
    if asked == "newest":
        return ["triton"]
    pinned = re.search(r"^triton\s*\(?==\s*([\d.]+)", answer(python, _ASK_TRITON_OF_TORCH), re.MULTILINE)
    if asked == "default":
        asked = pinned[1] if pinned else TRITON
    return [f"triton=={asked}", NUMPY_FOR_TRITON]


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the environment that the Makefile's commands run in.")
    parser.add_argument("venv", type=Path)
    parser.add_argument(
        "--triton", default="default", help="newest, a version, or default: torch's own, else " + TRITON
    )
    parser.add_argument("--extras", default="test")
    arguments = parser.parse_args()

    python = make_venv(arguments.venv.absolute())
    install_torch(python)
    package = f"{ROOT}[{arguments.extras}]"
    requirements = triton_requirements(python, arguments.triton)
    if not sees_gpu():
        print("No NVIDIA GPU is seen: nvcc is left to `make build`; the tests emulate the CUDA C++ kernels.")
        os.environ.setdefault("LLMKERNELS_CUDA", "0")
    if not run(python, "-m", "pip", "install", *requirements, "--editable", package):
        sys.exit("the package could not be installed: see pip's message above")
    print("installed:", answer(python, _ASK_TORCH) or "torch is missing")


if __name__ == "__main__":
    main()
