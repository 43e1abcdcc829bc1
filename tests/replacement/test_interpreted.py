"""The kernels that replace() shows on a CPU, in this process and in one of their own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmkernels
from llmkernels.replacement import interpreted
from llmkernels.replacement.adapters.layer_norm import LayerNormAdapter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run on it")


def model() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(24), nn.LayerNorm((2, 5), dtype=torch.bfloat16))


def test_every_kernel_is_shown(kernel_backend: str) -> None:
    report = llmkernels.replace(model())
    assert len(report.replaced) == 2
    for row in report.rows:
        assert row.backend == "torch"
        shown = {check.backend: check.passed for check in row.checks if check.interpreted}
        assert shown[kernel_backend]
    assert f"{kernel_backend}*" in str(report)


def test_a_wrong_kernel_rolls_its_sites_back(monkeypatch: pytest.MonkeyPatch, kernel_backend: str) -> None:
    kernels = importlib.import_module(f"llmkernels.ops.layer_norm.{kernel_backend}_kernels")
    correct = kernels.backward

    def wrong(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        dx, *others = correct(dy, *arguments)
        return dx * (1 + 2**-6), *others

    monkeypatch.setattr(kernels, "backward", wrong)
    layers = model()
    report = llmkernels.replace(layers)
    assert [row.status for row in report.rows] == ["rolled back", "rolled back"]
    assert all(f"{kernel_backend}: gradient of input" in (row.reason or "") for row in report.rows)
    assert [type(layer) for layer in layers] == [nn.LayerNorm, nn.LayerNorm]


def test_a_process_of_its_own_shows_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    state = torch.get_rng_state()
    report = llmkernels.replace(model())
    shown = [check for row in report.rows for check in row.checks if check.backend == "triton"]
    assert len(shown) == 2, report
    assert all(check.interpreted and check.passed for check in shown)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            lambda *_, **__: subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: broken"),
            "ValueError: broken",
        ),
        (lambda *_, **__: subprocess.CompletedProcess([], -9, "", ""), "exit status -9"),
        (OSError("no such program"), "no such program"),
        (subprocess.TimeoutExpired([], 1), "took more than"),
    ],
    ids=["error", "killed", "not started", "too slow"],
)
def test_without_an_interpreter_the_layers_are_replaced_all_the_same(
    monkeypatch: pytest.MonkeyPatch, fault: Any, reason: str
) -> None:
    def start(*arguments: Any, **options: Any) -> Any:
        if isinstance(fault, Exception):
            raise fault
        return fault(*arguments, **options)

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(subprocess, "run", start)
    report = llmkernels.replace(model())
    assert len(report.replaced) == 2
    assert any(reason in note for note in report.notes), report.notes


def test_a_missing_triton_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmkernels.ops.layer_norm.triton_kernels", None)
    llmkernels.dispatch.forget()
    try:
        report = llmkernels.replace(model())
    finally:
        monkeypatch.undo()
        llmkernels.dispatch.forget()
    assert len(report.replaced) == 2
    assert any(note.startswith("triton: not shown") for note in report.notes), report.notes


def test_a_kernel_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch, kernel_backend: str) -> None:
    def fail(*_: Any) -> Any:
        raise ArithmeticError("broken")

    kernels = importlib.import_module(f"llmkernels.ops.layer_norm.{kernel_backend}_kernels")
    monkeypatch.setattr(kernels, "forward", fail)
    job = interpreted.Job(LayerNormAdapter(), nn.LayerNorm(8), torch.float32)
    outcomes = {
        outcome.backend: outcome for (outcomes,) in [interpreted.verify([job])] for outcome in outcomes
    }
    assert outcomes[kernel_backend].failure == "ArithmeticError: broken"
