"""llmkernels.extension: which build is loaded, why none is, and on which GPUs it runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmkernels import extension


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing loaded yet, inside the test and after it."""
    extension.forget()
    yield
    extension.forget()


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["80"], (8, 0), True),
        (["80"], (8, 9), True),
        (["80"], (7, 5), False),
        (["80"], (9, 0), False),
        (["90a"], (9, 0), True),
        (["100a"], (10, 3), False),
        (["100"], (10, 3), True),
        (["120"], (12, 1), True),
        (["80", "120+PTX"], (13, 0), True),
        (["90a"], (12, 0), False),
        (["120"], (10, 0), False),
        ([], (9, 0), False),
    ],
)
def test_runs_on(architectures: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert extension.runs_on(architectures, capability) is runs


def test_runs_on_refuses_what_is_no_architecture() -> None:
    with pytest.raises(ValueError, match="architectures: expected names like '80' or '90a', got 'hopper'"):
        extension.runs_on(["hopper"], (9, 0))


@pytest.mark.usefixtures("fresh")
def test_a_missing_file_is_a_reason_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKERNELS_EXTENSION", "no/such/module.so")
    reason = extension.missing_reason()
    assert reason is not None and "can't be loaded" in reason and "no/such/module.so" in reason
    assert not extension.is_emulated()
    assert extension.device_obstacle(torch.device("cpu")) == reason
    with pytest.raises(RuntimeError, match="can't be loaded"):
        extension.load()


@pytest.mark.usefixtures("fresh")
def test_a_path_that_is_no_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKERNELS_EXTENSION", "module.txt")
    assert extension.missing_reason() == (
        "LLMKERNELS_EXTENSION: expected the path of an extension module, got 'module.txt'"
    )


def test_the_emulated_module_takes_cpu_tensors_only(cuda_kernels_missing: str | None) -> None:
    if cuda_kernels_missing is not None:
        pytest.skip(cuda_kernels_missing)
    if not extension.is_emulated():
        pytest.skip("the compiled module here runs on a GPU")
    assert extension.device_obstacle(torch.device("cpu")) is None
    assert extension.device_obstacle(torch.device("cuda", 0)) == (
        "the emulated CUDA C++ kernels take CPU tensors, not cuda"
    )
