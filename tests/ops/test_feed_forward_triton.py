"""What the Triton feed-forward kernels promise beyond the error budget that every backend is held to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from llmkernels import dropout, testing
from llmkernels.ops.feed_forward import reference, tiles, triton_kernels
from llmkernels.ops.feed_forward.call import ACTIVATIONS, FeedForwardCall, operand, product_kind

from .feed_forward_cases import Case, check


@pytest.mark.parametrize("along", (0, 1))
@pytest.mark.parametrize("shape", ((6, 8), (6, 1), (1, 8), (1, 1)))
def test_weights_are_read_where_they_lie(shape: tuple[int, int], along: int) -> None:
    """Both layouts, slices of either, single rows and columns: no copy, and the unit stride's dimension."""
    wide = torch.randn(shape[0] * 2, shape[1] * 2)
    tall = torch.randn(shape[1] * 2, shape[0] * 2)
    for matrix in (
        torch.randn(shape),
        torch.randn(shape[::-1]).t(),
        wide[::2, : shape[1]],
        tall[::2, : shape[0]].t(),
    ):
        found, stride, unit_along = operand(matrix, along)
        assert found is matrix
        unit = along if unit_along else 1 - along
        assert matrix.shape[unit] == 1 or matrix.stride(unit) == 1
        assert stride == matrix.stride(1 - unit)
    copied, stride, unit_along = operand(torch.randn(12, 16)[::2, ::2], along)
    assert copied.is_contiguous() and stride == 8 and unit_along == (along == 1)


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """torch's switch of float32 products, set for one test."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_float32_products_follow_torchs_switch(tf32_allowed: None) -> None:
    assert product_kind(torch.float32) == "tf32"
    assert product_kind(torch.bfloat16) == product_kind(torch.float16) == "half"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert product_kind(torch.float32) == "ieee"


@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorFloat-32 rounds beyond the budget of float32")
@pytest.mark.parametrize("d", (40, 33))
def test_tf32_rows(tf32_allowed: None, device: torch.device, d: int) -> None:
    """The interpreter has no TensorFloat-32: what is shown is that its rows and their masks are right."""
    check(Case(shape=(140, d), hidden=72, activation="geglu", dropout_p=0.2), "triton", device)


# One row of each tile table at a size that it does not choose by itself.
_ROWS = (
    (tiles.GemmTile("ieee", 1, 16, 32, 16, num_warps=4, num_stages=2, strips=1, group_m=1), 50, 90, "gelu"),
    (tiles.GemmTile("ieee", 1, 32, 16, 16, num_warps=4, num_stages=2, strips=2, group_m=3), 120, 50, "geglu"),
    (tiles.GemmTile("ieee", 1, 16, 64, 32, num_warps=4, num_stages=2, strips=4, group_m=8), 40, 90, "geglu"),
    # More partial rows of dbias than its finalize kernel takes at a time.
    (tiles.GemmTile("ieee", 1, 16, 16, 16, num_warps=4, num_stages=2, strips=1, group_m=8), 2070, 6, "gelu"),
)


@pytest.mark.parametrize("tile, rows, hidden_size, activation", _ROWS)
def test_every_order_and_number_of_strips(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    tile: tiles.GemmTile,
    rows: int,
    hidden_size: int,
    activation: str,
) -> None:
    """Many small tiles, groups that the rows do not fill, strips: the same results as the reference."""
    monkeypatch.setattr(tiles, "forward", lambda *_: tile)
    monkeypatch.setattr(tiles, "backward", lambda *_: tile)
    case = Case(shape=(rows, 40), hidden=hidden_size, activation=activation)
    x, weight1, bias1, weight2, _ = (tensor.detach() for tensor in case.inputs(device).values())
    seed = torch.tensor([2**62 + 12345], device=device)
    dy = testing.random_tensor((rows, case.out), torch.float32, device, 5)
    with testing.poisoned():
        hidden, pre = triton_kernels.forward(x, weight1, bias1, seed, activation, 0.3, True, True)
        found = triton_kernels.backward(dy, weight2, pre, seed, activation, 0.3, True, True, True)
    expected_hidden, expected_pre = reference.forward(x, weight1, bias1, seed, activation, 0.3, True, True)
    expected = reference.backward(dy, weight2, pre, seed, activation, 0.3, True, True, True)
    for actual, wanted in zip((hidden, pre, *found), (expected_hidden, expected_pre, *expected), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_makes_forwards_hidden(device: torch.device, activation: str) -> None:
    """The activation is of the rounded pre-activation in both: of another one a good part of the elements
    would round differently. Two compiled kernels may fuse differently, which moves one in thousands."""
    case = Case(shape=(70, 24), activation=activation, dtype=torch.bfloat16)
    x, weight1, bias1, weight2, _ = (tensor.detach() for tensor in case.inputs(device).values())
    seed = torch.tensor([7], device=device)
    hidden, pre = triton_kernels.forward(x, weight1, bias1, seed, activation, 0.5, True, True)
    dy = torch.zeros(70, case.out, dtype=torch.bfloat16, device=device)
    _, again, _ = triton_kernels.backward(dy, weight2, pre, seed, activation, 0.5, False, True, False)
    assert (hidden != again).double().mean() < 0.01
    kept = dropout.dropout_mask(seed, 70, case.hidden, 0.5)
    assert (hidden[~kept] == 0).all() and (hidden[kept] != 0).any()


@pytest.mark.parametrize("kernels", (reference, triton_kernels))
def test_bias_gradient_is_of_unrounded_terms(kernels, device: torch.device) -> None:
    """192 terms of 1 + 31 * 2^-13, each of which bfloat16 would round to 1, make 193 and not 192."""
    pre = torch.ones(192, 4, dtype=torch.bfloat16, device=device)
    dy = torch.ones(192, 2, dtype=torch.bfloat16, device=device)
    weight = torch.tensor([[1.0] * 4, [31 * 2.0**-13] * 4], dtype=torch.bfloat16, device=device)
    dpre, _, dbias = kernels.backward(dy, weight, pre, None, "relu", 0.0, True, False, True)
    assert torch.equal(dpre, torch.ones_like(dpre)) and dbias.tolist() == [193.0] * 4


def test_reasons_name_the_device_and_the_dtype(device: torch.device) -> None:
    call = FeedForwardCall("feed_forward", device, torch.bfloat16)
    assert triton_kernels.unsupported(call) == []
    assert triton_kernels.unsupported(call._replace(device=torch.device("meta"))) == [
        "the input is on meta; the Triton kernels serve NVIDIA GPUs"
    ]
    assert triton_kernels.unsupported(call._replace(dtype=torch.float64)) == [
        "input is torch.float64; the kernels take float16, bfloat16 and float32"
    ]
