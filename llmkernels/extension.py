"""The compiled module ``llmkernels._C``: loaded at first use, and the reason where there is none.

The environment variable LLMKERNELS_EXTENSION is the path of another build of it: that of tests/emulator,
whose kernels run on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from . import build

# csrc/common/dtype.h.
DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@functools.cache
def _load() -> ModuleType | str:
    path = os.environ.get("LLMKERNELS_EXTENSION")
    try:
        built = path or build.find_module()
        if built is None:
            return f"the CUDA C++ kernels are not there: {build.why_missing()}"
        return module_at(str(built))
    except ValueError as error:
        return f"LLMKERNELS_EXTENSION: {error}"
    except (ImportError, OSError) as error:
        return f"the CUDA C++ kernels can't be loaded: {error}"


@functools.cache
def module_at(path: str) -> ModuleType:
    """The extension module in this file, initialised once in a process, which pybind11 refuses to do again.

    Raises ValueError where it is no such file, ImportError or OSError where it can't be loaded.
    """
    # Named after its folder (llmkernels, if installed): pybind11 takes two modules of one name for one.
    spec = importlib.util.spec_from_file_location(f"{Path(path).parent.name}._C", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected the path of an extension module, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load() -> ModuleType:
    """The compiled module. Raises RuntimeError with the reason where there is none."""
    module = _load()
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


def missing_reason() -> str | None:
    """Why there is no compiled module; None if there is one."""
    module = _load()
    return module if isinstance(module, str) else None


def is_emulated() -> bool:
    """Whether the compiled module is one whose kernels run on the CPU, on CPU tensors."""
    module = _load()
    return not isinstance(module, str) and module.is_emulated()


def runs_on(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` ("80", "90a", "120+PTX") runs on a GPU of this compute capability.

    Machine code runs on later minor versions of its major one, that of an architecture ending in "a" on no
    other; PTX is compiled by the driver for every later one.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", architecture)
        if match is None:
            raise ValueError(f"architectures: expected names like '80' or '90a', got {architecture!r}")
        compiled = int(match[1]), int(match[2])
        if compiled == capability:
            return True
        if match[3] == "a" or compiled > capability:
            continue
        if compiled[0] == capability[0] or (match[4] and not match[3]):
            return True
    return False


@functools.cache
def device_obstacle(device: torch.device) -> str | None:
    """Why the compiled module can't run on tensors of ``device``; None if it can."""
    module = _load()
    if isinstance(module, str):
        return module
    if module.is_emulated():
        return (
            None
            if device.type == "cpu"
            else f"the emulated CUDA C++ kernels take CPU tensors, not {device.type}"
        )
    if device.type != "cuda":
        return f"the input is on {device.type}, not on a GPU"
    if torch.version.cuda is None:
        return "this build of torch is not for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(module.architectures(), capability):
        built = ", ".join(module.architectures())
        return f"the kernels were compiled for sm {built}; the GPU is sm {capability[0]}{capability[1]}"
    return None


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _streams() -> Callable[[int], int]:
    """The emulator has no streams."""
    if is_emulated():
        return lambda device: 0
    # What current_stream() wraps in an object, at a tenth of its cost.
    return getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)


def current_stream(device: int) -> int:
    """The handle of the current stream of the device with this index, as the module's functions take it."""
    return _streams()(device)


def forget() -> None:
    """Loads anew at the next use; for tests that change LLMKERNELS_EXTENSION."""
    for cache in (_load, device_obstacle, _streams):
        cache.cache_clear()
