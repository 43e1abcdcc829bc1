"""What the CUDA C++ feed-forward kernels promise beyond the error budget that every backend is held to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import llmkernels
from llmkernels import dropout, extension, testing
from llmkernels.ops.feed_forward import cuda_kernels, reference
from llmkernels.ops.feed_forward.call import ACTIVATIONS, FeedForwardCall

from .feed_forward_cases import Case, check

GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def cuda_kernels_here(cuda_kernels_missing: str | None) -> None:
    if cuda_kernels_missing is not None:
        pytest.skip(cuda_kernels_missing)


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """torch's switch of float32 products, set for one test."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def _product_with_one(value: float, device: torch.device) -> float:
    x = torch.full((1, 1), value, device=device)
    _, pre = cuda_kernels.forward(x, torch.ones_like(x), None, None, "relu", 0.0, True, False)
    return pre.item()


def test_float32_products_are_exact(device: torch.device) -> None:
    assert _product_with_one(1 + 2.0**-23, device) == 1 + 2.0**-23


def test_float32_products_follow_torchs_switch(tf32_allowed: None, device: torch.device) -> None:
    """TensorFloat-32 has 11 significant bits."""
    assert _product_with_one(1 + 2.0**-10, device) == 1 + 2.0**-10
    assert _product_with_one(1 + 2.0**-12, device) == 1


@pytest.mark.parametrize("value", (-torch.inf, torch.inf, torch.nan, 1e30, -3e38))
def test_float32_operands_that_have_no_small_part(device: torch.device, value: float) -> None:
    """Split into two parts, an infinity's second one is NaN: it may not show."""
    found = torch.tensor(_product_with_one(value, device))
    torch.testing.assert_close(found, torch.tensor(value), equal_nan=True)


def test_long_sums_keep_the_accuracy_of_float32(device: torch.device) -> None:
    """Terms of one sign, 0.5 to 1.5, whose sum tensor cores would cut off at each step."""
    x = testing.random_tensor((4, 3000), torch.float32, device, 0).sigmoid() + 0.5
    weight = testing.random_tensor((8, 3000), torch.float32, device, 1).sigmoid() + 0.5
    _, pre = cuda_kernels.forward(x, weight, None, None, "relu", 0.0, True, False)
    _, expected = reference.forward(x.double(), weight.double(), None, None, "relu", 0.0, True, False)
    _, own = reference.forward(x, weight, None, None, "relu", 0.0, True, False)
    testing.assert_within_budget(pre, expected, own, name="pre")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("transposed", (False, True))
def test_alignment_changes_nothing(device: torch.device, dtype: torch.dtype, transposed: bool) -> None:
    """Copies of 16, 4 and 2 bytes and accesses of one and of four columns: the same bits."""
    m, k, n, out = 9, 40, 44, 24
    tensors = {
        "x": testing.random_tensor((m, k), dtype, device, 0),
        "weight": testing.random_tensor((k, n) if transposed else (n, k), dtype, device, 1),
        "bias": testing.random_tensor((n,), dtype, device, 2),
        "dy": testing.random_tensor((m, out), dtype, device, 3),
        "weight2": testing.random_tensor((n, out) if transposed else (out, n), dtype, device, 4),
    }
    results = []
    for offset in (0, 1, 2, 8):
        shifted = {
            name: torch.nn.functional.pad(tensor, (offset, 8 - offset))[
                ..., offset : offset + tensor.shape[-1]
            ]
            for name, tensor in tensors.items()
        }
        for name in ("weight", "weight2"):
            shifted[name] = shifted[name].t() if transposed else shifted[name]
        seed = torch.tensor([5], device=device)
        options = (seed, "gelu", 0.25)
        hidden, pre = cuda_kernels.forward(
            shifted["x"], shifted["weight"], shifted["bias"], *options, True, True
        )
        found = cuda_kernels.backward(shifted["dy"], shifted["weight2"], pre, *options, True, True, True)
        results.append((hidden, pre, *found))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize(
    "rows, hidden, activation, dtype",
    (
        # Ten tiles down and three across: groups of eight, and of the two that are left.
        (640, 130, "gelu", torch.float32),
        # Large tiles, which are taken where every multiprocessor has one.
        (2000, 1800, "swiglu", torch.bfloat16) if GPU else (260, 200, "swiglu", torch.bfloat16),
        (2000, 1800, "gelu", torch.float16) if GPU else (1100, 140, "gelu", torch.float16),
    ),
)
def test_order_of_tiles(
    device: torch.device, rows: int, hidden: int, activation: str, dtype: torch.dtype
) -> None:
    check(Case(shape=(rows, 8), hidden=hidden, out=8, activation=activation, dtype=dtype), "cuda", device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_makes_forwards_hidden(device: torch.device, activation: str, dtype: torch.dtype) -> None:
    """The activation is of the rounded pre-activation in both: of another one a good part of the elements
    would round differently. Two compiled kernels may fuse differently, which moves one in thousands."""
    case = Case(shape=(70, 24), activation=activation, dtype=dtype)
    x, weight1, bias1, weight2, _ = (tensor.detach() for tensor in case.inputs(device).values())
    seed = torch.tensor([7], device=device)
    hidden, pre = cuda_kernels.forward(x, weight1, bias1, seed, activation, 0.5, True, True)
    dy = torch.zeros(70, case.out, dtype=dtype, device=device)
    _, again, _ = cuda_kernels.backward(dy, weight2, pre, seed, activation, 0.5, False, True, False)
    assert (hidden != again).double().mean() < 0.01
    kept = dropout.dropout_mask(seed, 70, case.hidden, 0.5)
    assert (hidden[~kept] == 0).all() and (hidden[kept] != 0).any()


def test_bias_gradient_is_of_unrounded_terms(device: torch.device) -> None:
    """192 terms of 1 + 31 * 2^-13, each of which bfloat16 would round to 1, make 193 and not 192."""
    pre = torch.ones(192, 4, dtype=torch.bfloat16, device=device)
    dy = torch.ones(192, 2, dtype=torch.bfloat16, device=device)
    weight = torch.tensor([[1.0] * 4, [31 * 2.0**-13] * 4], dtype=torch.bfloat16, device=device)
    dpre, _, dbias = cuda_kernels.backward(dy, weight, pre, None, "relu", 0.0, True, False, True)
    assert torch.equal(dpre, torch.ones_like(dpre)) and dbias.tolist() == [193.0] * 4


def test_partial_rows_are_of_the_tile_that_is_taken(tf32_allowed: None, device: torch.device) -> None:
    """Of TensorFloat-32 another tile serves than of float32: dbias of many rows shows which was counted."""
    pre = torch.ones(600, 300, device=device)
    dy, weight = torch.ones(600, 1, device=device), torch.ones(1, 300, device=device)
    _, _, dbias = cuda_kernels.backward(dy, weight, pre, None, "relu", 0.0, False, False, True)
    assert (dbias == 600).all()


def test_a_wrong_number_of_partial_rows_is_refused(device: torch.device) -> None:
    pre, dbias = torch.ones(70, 8, device=device), torch.empty(8, device=device)
    partial = torch.empty(8, 8, device=device)
    with pytest.raises(
        RuntimeError, match=r"linear_activation_backward: CUDA error 1 .*m = 70, n = 8, k = 0"
    ):
        extension.load().linear_activation_backward(
            2, pre.data_ptr(), 8, 0, 0, False, pre.data_ptr(), 0, 0, dbias.data_ptr(), partial.data_ptr(), 8,
            0, 0.0, 0, False, False, 70, 8, 0, max(pre.get_device(), 0), 0,
        )  # fmt: skip


def test_sizes_that_numbers_do_not_hold_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"expected 1 <= m <= 2147483647, 1 <= width <= 1073741824"):
        extension.load().linear_activation_partial_rows(2, True, False, 2**31, 8, 0)
    with pytest.raises(RuntimeError, match=r"got m = 8, n = 1073741825 and k = 0"):
        extension.load().linear_activation_partial_rows(2, True, False, 8, 2**30 + 1, 0)


def test_reasons_name_the_device_and_the_dtype(device: torch.device) -> None:
    call = FeedForwardCall("feed_forward", device, torch.bfloat16)
    assert cuda_kernels.unsupported(call) == []
    (reason,) = cuda_kernels.unsupported(call._replace(device=torch.device("meta")))
    assert "meta" in reason
    assert cuda_kernels.unsupported(call._replace(dtype=torch.float64)) == [
        "input is torch.float64; the kernels take float16, bfloat16 and float32"
    ]


def test_chosen_only_where_asked_for() -> None:
    """Nothing of them has run on a GPU."""
    from llmkernels.ops.feed_forward import api

    assert "cuda" in dict(api.KERNELS) and "cuda" not in api.AUTOMATIC
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with llmkernels.explain() as calls:
        llmkernels.linear_activation(x, weight)
    assert calls[0].backend == "torch"
