"""What a call costs on the host, beside torch's own: ``pytest bench/test_host_overhead.py``; needs no GPU.

The automatic path on a CPU tensor is torch's operator plus the package's checks and dispatch. The kernel
path is timed with a kernel that only allocates its outputs, so that what is left is everything around a
launch: checks, dispatch, autograd.Function and torch.library. Sizes at which no arithmetic shows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import llmkernels
from llmkernels.ops.layer_norm import api, reference

torch.set_num_threads(1)
torch.manual_seed(0)
X = torch.randn(1, 64)
WEIGHT, BIAS = torch.randn(64), torch.randn(64)
NORM = (X, WEIGHT, BIAS)
GRADIENT = torch.randn(1, 64)


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def _torch(*tensors: Tensor) -> Tensor:
    return F.layer_norm(tensors[0], (64,), tensors[1], tensors[2])


def _automatic(*tensors: Tensor) -> Tensor:
    return llmkernels.layer_norm(tensors[0], (64,), tensors[1], tensors[2])


def _kernel_path(*tensors: Tensor) -> Tensor:
    return llmkernels.layer_norm(tensors[0], (64,), tensors[1], tensors[2], backend="reference")


PATHS = {"torch": _torch, "automatic": _automatic, "kernel path": _kernel_path}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernel path":
        empty = torch.empty

        def forward(x: Tensor, *_: object) -> tuple[Tensor, ...]:
            return torch.empty_like(x), empty(0), empty(1), empty(1)

        def backward(dy: Tensor, *_: object) -> tuple[Tensor, ...]:
            return torch.empty_like(dy), empty(0), empty(64), empty(64)

        stand_in = SimpleNamespace(forward=forward, backward=backward, unsupported=reference.unsupported)
        monkeypatch.setattr(api, "reference", stand_in)
    return request.param


@pytest.mark.benchmark(group="layer_norm, no gradient")
def test_norm_inference(benchmark: BenchmarkFixture, path: str) -> None:
    with torch.no_grad():
        benchmark(PATHS[path], *NORM)


@pytest.mark.benchmark(group="layer_norm, forward")
def test_norm_forward(benchmark: BenchmarkFixture, path: str) -> None:
    benchmark(PATHS[path], *_leaves(*NORM))


@pytest.mark.benchmark(group="layer_norm, forward and backward")
def test_norm_forward_and_backward(benchmark: BenchmarkFixture, path: str) -> None:
    leaves = _leaves(*NORM)
    benchmark(lambda: torch.autograd.grad(PATHS[path](*leaves), leaves, GRADIENT))


# --- the other ops, by torch and by the automatic path

ROWS = torch.randn(1, 1, 1, 16)
FEED_FORWARD = (
    torch.randn(1, 16),
    torch.randn(32, 16),
    torch.randn(32),
    torch.randn(16, 32),
    torch.randn(16),
)


def _feed_forward(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def _self_attention(layer: nn.MultiheadAttention) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, x, x, need_weights=False)[0]


# By op: torch, ours, the tensors of a call.
OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "attention": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        lambda q: llmkernels.attention(q, q, q, is_causal=True),  # type: ignore[return-value]
        (ROWS,),
    ),
    "rms_norm": (
        lambda x, weight: F.rms_norm(x, (64,), weight),
        lambda x, weight: llmkernels.rms_norm(x, (64,), weight),
        (X, WEIGHT),
    ),
    "feed_forward": (_feed_forward, llmkernels.feed_forward, FEED_FORWARD),
    "multi-head attention": (
        _self_attention(nn.MultiheadAttention(16, 1, batch_first=True)),
        _self_attention(llmkernels.nn.MultiheadAttention(16, 1, batch_first=True)),
        (ROWS[0],),
    ),
    "encoder layer": (
        nn.TransformerEncoderLayer(16, 1, 32, 0.0, "gelu", batch_first=True),
        llmkernels.nn.TransformerEncoderLayer(16, 1, 32, 0.0, "gelu", batch_first=True),
        (ROWS[0],),
    ),
}


def _call(op: str, path: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    torchs, ours, tensors = OPS[op]
    return (torchs if path == "torch" else ours), tensors


@pytest.mark.parametrize("path", ("torch", "automatic"))
@pytest.mark.parametrize("op", OPS)
def test_inference(benchmark: BenchmarkFixture, op: str, path: str) -> None:
    benchmark.group = f"{op}, no gradient"
    function, tensors = _call(op, path)
    with torch.no_grad():
        benchmark(function, *tensors)


@pytest.mark.parametrize("path", ("torch", "automatic"))
@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward(benchmark: BenchmarkFixture, op: str, path: str) -> None:
    benchmark.group = f"{op}, forward and backward"
    function, tensors = _call(op, path)
    leaves = _leaves(*tensors)
    benchmark(lambda: torch.autograd.grad(function(*leaves).sum(), leaves))
