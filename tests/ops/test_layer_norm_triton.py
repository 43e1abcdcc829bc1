"""What the Triton norm kernels promise beyond the error budget that every backend is held to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import llmkernels
from llmkernels import dropout, testing
from llmkernels.ops.layer_norm.call import NormCall

# Rows in registers, of both kinds of blocks, and a row that is read twice.
_LENGTHS = (1000, 8191, 40000)


@pytest.mark.parametrize("n", _LENGTHS)
def test_rows_far_from_zero_keep_their_digits(n: int, device: torch.device) -> None:
    """Near 1e6 a float32 has 1/16 as its last place; the norm is as exact as that of the same rows moved to
    zero, which takes the correction of the mean."""
    steps = torch.arange(2 * n, device=device).reshape(2, n) * 7919 % 4001
    near_zero = steps.float() / 16
    expected = F.layer_norm(near_zero.double(), (n,))
    baseline = F.layer_norm(near_zero, (n,))
    actual = llmkernels.layer_norm(near_zero + 1e6, (n,), backend="triton")
    testing.assert_within_budget(actual, expected, baseline, name=f"rows of {n} near 1e6")


@pytest.mark.parametrize("n", _LENGTHS)
@pytest.mark.parametrize("value", (2000.1, 1e6 / 3))
def test_constant_rows_give_zeros(n: int, value: float, device: torch.device) -> None:
    x = torch.full((2, n), value, device=device)
    assert torch.equal(llmkernels.layer_norm(x, (n,), eps=1e-12, backend="triton"), torch.zeros_like(x))


@pytest.mark.parametrize("n", (*_LENGTHS, 5))
def test_dropout_is_the_reference_mask(n: int, device: torch.device) -> None:
    from llmkernels.ops.layer_norm import triton_kernels

    x = torch.ones((3, n), device=device)
    seed = torch.tensor([2**62 + 12345], device=device)
    _, z, _, _ = triton_kernels.forward(
        *(x, torch.zeros_like(x), None, None, seed, 1e-5, 0.3, False, torch.float32, torch.float32)
    )
    kept = dropout.dropout_mask(seed, 3, n, 0.3)
    assert torch.equal(z, kept * torch.tensor(dropout.dropout_scale(0.3), dtype=torch.float32, device=device))


def test_gradients_are_bitwise_reproducible(device: torch.device) -> None:
    for n in (64, 1000, 16384):
        x, dy = torch.randn((2, 100 if n < 10000 else 9, n), device=device)
        weight = torch.ones(n, device=device, requires_grad=True)
        gradients = []
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            y = llmkernels.layer_norm(leaf, (n,), weight, backend="triton")
            gradients.append(torch.autograd.grad(y, (leaf, weight), dy))
        for first, second in zip(*gradients, strict=True):
            assert torch.equal(first, second)


def test_reasons_name_the_device(device: torch.device) -> None:
    from llmkernels.ops.layer_norm import triton_kernels

    def reasons(name: str) -> list[str]:
        return triton_kernels.unsupported(NormCall("layer_norm", torch.device(name), torch.float32))

    assert reasons(device.type) == []
    assert reasons("meta") == ["the input is on meta; the Triton kernels serve NVIDIA GPUs"]
    if device.type == "cuda":
        assert "TRITON_INTERPRET=1" in reasons("cpu")[0]
