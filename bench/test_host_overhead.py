"""What a call costs on the host, beside torch's own: ``pytest bench/test_host_overhead.py``; needs no GPU.

The automatic path on a CPU tensor is torch's operator plus the package's checks and dispatch. The kernel
path is timed with a kernel that only allocates its outputs, so that what is left is everything around a
launch: checks, dispatch, autograd.Function and torch.library. One tiny row, so that no arithmetic shows.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

import llmkernels
from llmkernels.ops.layer_norm import api, reference

torch.set_num_threads(1)
X = torch.randn(1, 64)
WEIGHT, BIAS = torch.randn(64), torch.randn(64)
LEAVES = [tensor.clone().requires_grad_() for tensor in (X, WEIGHT, BIAS)]
GRADIENT = torch.randn(1, 64)


def _torch(*tensors: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(tensors[0], (64,), tensors[1], tensors[2])


def _automatic(*tensors: torch.Tensor) -> torch.Tensor:
    return llmkernels.layer_norm(tensors[0], (64,), tensors[1], tensors[2])


def _kernel_path(*tensors: torch.Tensor) -> torch.Tensor:
    return llmkernels.layer_norm(tensors[0], (64,), tensors[1], tensors[2], backend="reference")


PATHS = {"torch": _torch, "automatic": _automatic, "kernel path": _kernel_path}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernel path":
        empty = torch.empty

        def forward(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, ...]:
            return torch.empty_like(x), empty(0), empty(1), empty(1)

        def backward(dy: torch.Tensor, *_: object) -> tuple[torch.Tensor, ...]:
            return torch.empty_like(dy), empty(0), empty(64), empty(64)

        stand_in = SimpleNamespace(forward=forward, backward=backward, unsupported=reference.unsupported)
        monkeypatch.setattr(api, "reference", stand_in)
    return request.param


@pytest.mark.benchmark(group="forward, no gradient")
def test_inference(benchmark: BenchmarkFixture, path: str) -> None:
    with torch.no_grad():
        benchmark(PATHS[path], X, WEIGHT, BIAS)


@pytest.mark.benchmark(group="forward")
def test_forward(benchmark: BenchmarkFixture, path: str) -> None:
    benchmark(PATHS[path], *LEAVES)


@pytest.mark.benchmark(group="forward and backward")
def test_forward_and_backward(benchmark: BenchmarkFixture, path: str) -> None:
    benchmark(lambda: torch.autograd.grad(PATHS[path](*LEAVES), LEAVES, GRADIENT))


QUERY = torch.randn(1, 1, 1, 16)
QUERY_LEAF = QUERY.clone().requires_grad_()
ATTENTION = {
    "torch": lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    "automatic": lambda q: llmkernels.attention(q, q, q, is_causal=True),
}


@pytest.mark.parametrize("path", ATTENTION)
@pytest.mark.benchmark(group="attention, forward, no gradient")
def test_attention_inference(benchmark: BenchmarkFixture, path: str) -> None:
    with torch.no_grad():
        benchmark(ATTENTION[path], QUERY)


@pytest.mark.parametrize("path", ATTENTION)
@pytest.mark.benchmark(group="attention, forward and backward")
def test_attention_forward_and_backward(benchmark: BenchmarkFixture, path: str) -> None:
    benchmark(lambda: torch.autograd.grad(ATTENTION[path](QUERY_LEAF).sum(), QUERY_LEAF))
