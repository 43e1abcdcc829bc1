"""Each wrapper compiles to the instruction that the table of wrappers names."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from llmkernels.wrappers import INSTRUCTIONS
from tests.csrc import compilation

SOURCE = compilation.CSRC / "wrappers" / "wrappers.cu"


@pytest.mark.parametrize("architecture", ("80", "90a"))
def test_every_row_holds_its_instruction(architecture: str, tmp_path: Path) -> None:
    nvcc = compilation.find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc (CUDACXX, CUDA_HOME or PATH), so csrc can't be compiled")
    target = tmp_path / "wrappers.ptx"
    flags = ["-std=c++17", "-O3", "-ptx", f"-arch=sm_{architecture}", "-o", str(target)]
    subprocess.run([nvcc, *flags, str(SOURCE)], check=True, capture_output=True)
    entries = re.split(r"\.entry (\w+)\(", target.read_text())
    kernels = dict(zip(compilation.demangled(entries[1::2]), entries[2::2], strict=True))
    for instruction in INSTRUCTIONS:
        name = re.compile(rf"[&:](Run_)?{instruction.name}>")
        (ptx,) = (body for kernel, body in kernels.items() if name.search(kernel))
        mnemonic = instruction.mnemonic
        if mnemonic.startswith("stmatrix") and architecture == "80":
            mnemonic = "shfl.sync.idx.b32"  # what it falls back to
        assert mnemonic in ptx, instruction.name
