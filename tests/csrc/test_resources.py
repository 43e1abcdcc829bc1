"""csrc compiles for every architecture without a warning or a spill, and takes what the table says.

After a deliberate change: ``python -m tests.csrc.compilation`` writes the table anew.
"""

from __future__ import annotations

import json

import pytest

from tests.csrc import compilation
from tests.csrc.compilation import Compilation

ANOTHER_LOG = """
ptxas info    : Compiling entry function '_ZN10llmkernels5probeEv' for 'sm_90a'
ptxas info    : Function properties for _ZN10llmkernels5probeEv
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def compiled() -> Compilation:
    if compilation.find_nvcc() is None:
        pytest.skip("there is no nvcc (CUDACXX, CUDA_HOME or PATH), so csrc can't be compiled")
    return compilation.compile_all()


def test_spills_are_read_from_the_log() -> None:
    kernel = compilation.Kernel("90a", "probe", registers=64, shared_bytes=128, spill_bytes=32)
    assert compilation.parse(ANOTHER_LOG) == [kernel]


def test_every_architecture_has_every_kernel(compiled: Compilation) -> None:
    names = {
        name: {k.name for k in compiled.kernels if k.architecture == name}
        for name in compilation.ARCHITECTURES
    }
    assert names["80"]
    for architecture, found in names.items():
        assert found == names["80"], architecture


def test_no_kernel_spills(compiled: Compilation) -> None:
    assert [kernel for kernel in compiled.kernels if kernel.spill_bytes] == []


def test_no_warning(compiled: Compilation) -> None:
    assert compiled.warnings == []


def test_the_driver_is_not_linked(compiled: Compilation) -> None:
    assert "libc.so.6" in compiled.libraries
    assert [name for name in compiled.libraries if name.startswith(("libcuda", "libcudart"))] == []


def test_resources_are_those_of_the_table(compiled: Compilation) -> None:
    table = json.loads(compilation.TABLE.read_text())
    if table["nvcc"] != compilation.nvcc_release():
        pytest.skip(f"the table is of nvcc {table['nvcc']}, here is {compilation.nvcc_release()}")
    assert compilation.as_table(compiled)["kernels"] == table["kernels"]
