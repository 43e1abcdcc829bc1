"""Who decides on the backend, what explain() records, and what happens where a backend is missing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmkernels
from llmkernels import dispatch
from llmkernels.ops.layer_norm import api as layer_norm

X = torch.randn(3, 8)
ROOT = Path(__file__).parents[1]


def served_by(**options: object) -> dispatch.Decision:
    with llmkernels.explain() as calls:
        llmkernels.layer_norm(X, (8,), **options)  # type: ignore[arg-type]
    assert len(calls) == 1
    return calls[0]


def test_automatic_rule_on_the_cpu_is_torch() -> None:
    decision = served_by()
    assert decision.backend == "torch"
    assert [name for name, _ in decision.passed_over] == ["triton"]
    assert "not on a GPU" in str(decision)


def test_call_beats_use_backend() -> None:
    with llmkernels.use_backend("reference"):
        assert served_by(backend="torch").backend == "torch"
        assert served_by().backend == "reference"
    assert served_by().backend == "torch"


def test_an_op_may_lack_a_backend() -> None:
    call = layer_norm.NormCall("layer_norm", X.device, X.dtype)
    modules = (("reference", "llmkernels.ops.layer_norm.reference"),)
    assert dispatch.support(call, dict(modules))["cuda"] == ("this op has no cuda kernels",)
    with pytest.raises(RuntimeError, match="got 'cuda': this op has no cuda kernels"):
        dispatch.choose(call, modules, (), "cuda")


def test_use_backend_nests_and_survives_errors() -> None:
    with llmkernels.use_backend("reference"):
        with contextlib.suppress(KeyError), llmkernels.use_backend("torch"):
            assert dispatch.preference() == "torch"
            raise KeyError
        assert dispatch.preference() == "reference"
        with llmkernels.use_backend(None):
            assert dispatch.preference() is None
    assert dispatch.preference() is None


def test_use_backend_as_a_plain_call_stays() -> None:
    try:
        llmkernels.use_backend("reference")
        assert served_by().backend == "reference"
    finally:
        llmkernels.use_backend(None)
    assert served_by().backend == "torch"


def test_use_backend_as_a_decorator() -> None:
    @llmkernels.use_backend("reference")
    def decorated() -> str:
        return served_by().backend

    assert served_by().backend == "torch"
    for _ in range(2):
        assert decorated() == "reference"
        assert served_by().backend == "torch"


@pytest.mark.parametrize("name", ("cudnn", "", 3))
def test_unknown_names_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="expected one of cuda, triton, torch, reference"):
        llmkernels.use_backend(name)  # type: ignore[arg-type]
    assert dispatch.preference() is None


def test_nested_recordings_each_see_their_calls() -> None:
    with llmkernels.explain() as outer:
        with llmkernels.explain() as inner:
            llmkernels.layer_norm(X, (8,))
        llmkernels.rms_norm(X, (8,))
    assert [call.op for call in inner] == ["layer_norm"]
    assert [call.op for call in outer] == ["layer_norm", "rms_norm"]
    llmkernels.layer_norm(X, (8,))
    assert len(outer) == 2
    assert str(dispatch.Explanation()) == "no call was recorded"


def test_a_layers_own_path_is_recorded() -> None:
    dispatch.record_fallback("nn.Layer", "nobody listens")

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        dispatch.record_fallback("nn.Layer", "weights are asked for")
        return x + 1

    with llmkernels.explain() as calls:
        compiled(X)
    assert [str(call) for call in calls] == ["nn.Layer: torch (weights are asked for)"]


def test_missing_module_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform without triton: the import fails, and the failure is what explain() and errors say."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("llmkernels.ops.layer_norm.triton_")]:
        monkeypatch.delitem(sys.modules, name)
    dispatch.forget()
    try:
        with pytest.raises(RuntimeError, match="triton_kernels can't be imported"):
            llmkernels.layer_norm(X, (8,), backend="triton")
        with llmkernels.use_backend("triton"):
            assert served_by().backend == "torch"
    finally:
        dispatch.forget()


@pytest.mark.parametrize(
    "value, outcome", (("reference", "reference"), ("cudnn", "LLMKERNELS_BACKEND: expected one of"))
)
def test_environment_variable(value: str, outcome: str) -> None:
    program = (
        "import torch, llmkernels\n"
        "with llmkernels.explain() as calls: llmkernels.layer_norm(torch.randn(2, 8), (8,))\n"
        "print(calls[0].backend)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LLMKERNELS_BACKEND": value, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert outcome in result.stdout + result.stderr
