"""Rules of csrc that a compiler does not check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(path for suffix in ("*.h", "*.cuh", "*.cu", "*.cpp") for path in CSRC.rglob(suffix))
PTX_FOLDERS = {"common", "sm80", "sm90"}
DEVICE_HEADERS = re.compile(r"#\s*include\s*<(cuda|cooperative_groups|mma|device_|cooperative)[\w/.]*>")
MAX_KERNEL_LINES = 150
MAX_INSTRUCTION_HEADER_LINES = 150
FUNCTION = re.compile(r"__forceinline__ \w+ (\w+)\(.*?\) \{(.*?)^\}", re.DOTALL | re.MULTILINE)
MNEMONIC = re.compile(r'\basm\b(?: volatile)?\(\s*"([a-z0-9]+)\.')


def _code(path: Path) -> str:
    """The source without comments."""
    return re.sub(r"//.*", "", path.read_text())


def _kernels(text: str) -> list[str]:
    """The text of each __global__ function, from that word to the brace that closes it."""
    return [part[: part.index("\n}")] for part in text.split("__global__")[1:]]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
class TestEverySource:
    def test_inline_assembly_stays_in_the_instruction_headers(self, path: Path) -> None:
        if path.relative_to(CSRC).parts[0] not in PTX_FOLDERS:
            assert re.search(r"\basm\b", _code(path)) is None

    def test_no_header_of_torch(self, path: Path) -> None:
        assert re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', path.read_text()) is None

    def test_cuda_headers_only_through_the_platform(self, path: Path) -> None:
        if path.name != "platform.cuh":
            assert DEVICE_HEADERS.search(path.read_text()) is None

    def test_shared_memory_is_dynamic(self, path: Path) -> None:
        if path.name != "platform.cuh":
            assert "__shared__" not in _code(path)

    def test_kernels_are_short(self, path: Path) -> None:
        for kernel in _kernels(path.read_text()):
            assert kernel.count("\n") <= MAX_KERNEL_LINES, kernel.split("(")[0]

    def test_driver_functions_are_not_called(self, path: Path) -> None:
        # A call of cuLaunchKernel and its like would link libcuda, which only a driver brings.
        assert re.search(r"\bcu[A-Z]\w+\s*\(", _code(path)) is None


HEADERS = [path for path in SOURCES if path.relative_to(CSRC).parts[0] in PTX_FOLDERS]


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.relative_to(CSRC).as_posix())
class TestInstructionHeaders:
    def test_one_function_is_one_instruction_and_has_its_name(self, path: Path) -> None:
        code = _code(path)
        bodies = FUNCTION.findall(code)
        assert sum(len(re.findall(r"\basm\b", body)) for _, body in bodies) == len(
            re.findall(r"\basm\b", code)
        )
        for name, body in bodies:
            instructions = re.findall(r"\basm\b", body)
            assert len(instructions) <= 1, name
            if instructions:
                mnemonic = MNEMONIC.search(body)
                assert mnemonic is not None and name.startswith(f"{mnemonic[1]}_"), name

    def test_headers_are_short(self, path: Path) -> None:
        assert path.read_text().count("\n") < MAX_INSTRUCTION_HEADER_LINES
