"""One backend fixture for all tests: the same body runs on every backend, on the CPU and on a GPU alike.

Where there is no GPU, the Triton kernels run through Triton's interpreter and the CUDA C++ kernels through
the emulator (tests/emulator), both on CPU tensors.
"""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # Read when a kernel is decorated, so before anything imports triton.
    os.environ["TRITON_INTERPRET"] = "1"


def _offer_cuda_kernels() -> str | None:
    """Makes backend="cuda" usable here; returns the reason where that fails."""
    from llmkernels import dispatch, extension

    if not GPU and "LLMKERNELS_EXTENSION" not in os.environ:
        from tests.emulator.build import build

        try:
            os.environ["LLMKERNELS_EXTENSION"] = str(build())
        except RuntimeError as error:
            return str(error)
        # A test may have asked for the module before it was there.
        extension.forget()
        dispatch.forget()
        extension.load()  # what was built and can't be loaded is a failure, no reason to skip
    return extension.missing_reason()


@pytest.fixture(scope="session")
def cuda_kernels_missing() -> str | None:
    """Why backend="cuda" can't be tested here; None if it can."""
    return _offer_cuda_kernels()


@pytest.fixture(params=("reference", "torch", "triton", "cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here, one after the other."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cuda":
        reason = request.getfixturevalue("cuda_kernels_missing")
        if reason is not None:
            pytest.skip(reason)
    return request.param


@pytest.fixture(params=("triton", "cuda"))
def kernel_backend(request: pytest.FixtureRequest) -> str:
    """The backends with kernels of our own."""
    if request.param == "triton":
        pytest.importorskip("triton")
    elif (reason := request.getfixturevalue("cuda_kernels_missing")) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")
