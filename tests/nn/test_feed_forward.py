"""llmkernels.nn.FeedForward against the same modules of torch.nn, one by one, and on kernels."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels
from llmkernels.testing import assert_within_budget, random_tensor

from .torch_layers import assert_compiles, on_device_of, outputs_and_gradients, randomised

D, HIDDEN = 8, 12
FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "geglu": lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


class OneByOne(nn.Module):
    """The children of a FeedForward, each called."""

    def __init__(self, ours: llmkernels.nn.FeedForward) -> None:
        super().__init__()
        self.linear1, self.dropout, self.linear2 = ours.linear1, ours.dropout, ours.linear2
        self.function = FUNCTIONS.get(ours.activation, ours.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.function(self.linear1(x))))


def feed_forward(activation: Any = "relu", dropout: float = 0.0, **options: Any) -> llmkernels.nn.FeedForward:
    return randomised(llmkernels.nn.FeedForward(D, HIDDEN, dropout, activation, **options))


def rows(*shape: int) -> Tensor:
    return random_tensor(shape or (2, 3, D), torch.float32, "cpu", 0, requires_grad=True)


def named(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [*FUNCTIONS, F.silu, nn.PReLU(), nn.GELU()], ids=named)
def test_activations(activation: Any, bias: bool, hooked: bool) -> None:
    ours = feed_forward(activation, 0.3, bias=bias)
    if hooked:
        ours.linear1.register_forward_hook(lambda *_: None)
    expected = outputs_and_gradients(OneByOne(copy.deepcopy(ours)), (rows(),))
    actual = outputs_and_gradients(ours, (rows(),))
    values = sorted(float(value.sum()) for value in expected.values())
    torch.testing.assert_close(sorted(float(value.sum()) for value in actual.values()), values)
    torch.testing.assert_close(actual["output"], expected["output"])
    assert ours(rows(D)).shape == (D,)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_on_kernels(activation: str, backend: str) -> None:
    ours, x = on_device_of(backend, feed_forward(activation), rows())
    exact, wide = copy.deepcopy(ours).double(), x.detach().double().requires_grad_()
    expected = outputs_and_gradients(exact, (wide,))
    baseline = outputs_and_gradients(ours, (x,))
    ours.backend = backend
    with llmkernels.explain() as calls:
        actual = outputs_and_gradients(ours, (x,))
    assert [(call.op, call.backend) for call in calls] == [("feed_forward", backend)]
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in actual.items():
        size = torch.full_like(expected[name], largest)
        assert_within_budget(value, expected[name], baseline[name], name=name, magnitude=size)


def test_parameters_are_those_of_torchs_linear_layers() -> None:
    torch.manual_seed(0)
    ours = llmkernels.nn.FeedForward(D)
    torch.manual_seed(0)
    linear1, linear2 = nn.Linear(D, 2048), nn.Linear(2048, D)
    assert list(ours.state_dict()) == ["linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"]
    assert torch.equal(ours.linear1.weight, linear1.weight)
    assert torch.equal(ours.linear2.bias, linear2.bias)
    assert ours.dropout.p == 0.1
    gated = llmkernels.nn.FeedForward(D, HIDDEN, activation="swiglu", bias=False, dtype=torch.bfloat16)
    assert gated.linear1.weight.shape == (2 * HIDDEN, D)
    assert gated.linear2.weight.dtype == torch.bfloat16
    assert gated.linear1.bias is None
    assert "activation='swiglu'" in repr(gated)
    assert "(activation): GELU" in repr(feed_forward(nn.GELU()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="activation: expected one of relu, .* got 'swish'"):
        llmkernels.nn.FeedForward(D, activation="swish")
    with pytest.raises(ValueError, match="dropout probability"):
        llmkernels.nn.FeedForward(D, dropout=2.0)
    with pytest.raises(RuntimeError):
        feed_forward()(rows(2, D + 1))
    with pytest.raises(RuntimeError, match=r"nn\.FeedForward: torch\.jit\.script"):
        torch.jit.script(feed_forward())


def test_dropout_is_read_at_each_call() -> None:
    ours = feed_forward(dropout=0.5)
    assert not torch.equal(ours(rows()), ours(rows()))
    ours.eval()
    assert torch.equal(ours(rows()), ours(rows()))


@pytest.mark.parametrize("backend", [None, "triton"])
def test_compile_fullgraph(backend: str | None) -> None:
    ours = feed_forward("geglu")
    ours.backend = backend
    assert_compiles(ours, (rows(),))
