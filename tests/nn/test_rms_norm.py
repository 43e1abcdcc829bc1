"""llmkernels.nn.RMSNorm against torch.nn.RMSNorm."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import llmkernels
from llmkernels.testing import random_tensor

from .exact import assert_exact
from .torch_layers import assert_alike, ours_like, randomised


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [(8,), (2, 4)], ids=str)
def test_results(shape: tuple[int, ...], options: dict[str, Any], backend: str) -> None:
    theirs = randomised(nn.RMSNorm(shape, **options))
    input = random_tensor((3, *shape), torch.float32, "cpu", 0, requires_grad=True)
    assert_alike(ours_like(theirs), theirs, (input,))
    assert_exact(theirs, (input,), {}, backend, {"rms_norm"})


def test_errors_have_torchs_types() -> None:
    theirs, ours = nn.RMSNorm(8), llmkernels.nn.RMSNorm(8)
    for bad in (torch.randn(2, 7), torch.ones(2, 8, dtype=torch.int64)):
        with pytest.raises(RuntimeError):
            theirs(bad)
        with pytest.raises(RuntimeError):
            ours(bad)


def test_copies_and_backends() -> None:
    ours = llmkernels.nn.RMSNorm(8)
    assert "backend" not in vars(ours)
    ours.backend = "reference"
    input = torch.randn(2, 8)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with llmkernels.explain() as calls:
            other(input)
            other(input, backend="torch")
        assert [call.backend for call in calls] == ["reference", "reference"]
    with llmkernels.explain() as calls:
        llmkernels.nn.RMSNorm(8)(input, backend="reference")
    assert calls[0].backend == "reference"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_compile_and_trace() -> None:
    ours = randomised(llmkernels.nn.RMSNorm(8))
    input = torch.randn(2, 8)
    expected = ours(input)
    torch.testing.assert_close(torch.jit.script(ours)(input), expected)
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager", fullgraph=True)(input), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(ours))(input), expected)
