"""The error budget must fail what it should: a test helper that passes everything would hide every bug."""

from __future__ import annotations

import pytest
import torch

from llmkernels import testing

EXACT = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_correct_rounding_passes(dtype: torch.dtype) -> None:
    rounded = EXACT.to(dtype)
    assert testing.measure(rounded, EXACT, rounded).passed


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_a_few_ulps_fail(dtype: torch.dtype) -> None:
    rounded = EXACT.to(dtype)
    ulps = 4 if dtype != torch.float32 else 16
    wrong = rounded.clone()
    wrong[2, 5] += ulps * torch.finfo(dtype).eps * float(EXACT[2].abs().max())
    comparison = testing.measure(wrong, EXACT, rounded)
    assert not comparison.passed and "row 2" in comparison.detail


def test_small_error_everywhere_fails_in_the_mean() -> None:
    """A wrong constant moves every element by less than the largest rounding, and the root mean square sees
    it."""
    rounded = EXACT.to(torch.bfloat16)
    exact_but_shifted = EXACT + 0.009 * EXACT.abs().amax(dim=1, keepdim=True)
    comparison = testing.measure(exact_but_shifted.to(torch.bfloat16), EXACT, EXACT.to(torch.bfloat16))
    assert comparison.error > 0 and testing.measure(rounded, EXACT, rounded).passed
    assert not comparison.passed and "rms" in comparison.detail


def test_torchs_error_is_what_is_allowed() -> None:
    rounded = EXACT.to(torch.float32)
    assert testing.measure(rounded + 1e-3, EXACT, rounded + 6e-4).passed
    assert not testing.measure(rounded + 1e-3, EXACT, rounded + 4e-4).passed


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_nonfinite_values(value: float) -> None:
    """One that should not be there fails, one that should be there is demanded."""
    rounded = EXACT.to(torch.float32)
    with_value, exact_with_value = rounded.clone(), EXACT.clone()
    with_value[1, 1] = exact_with_value[1, 1] = value
    assert not testing.measure(with_value, EXACT, rounded).passed
    assert not testing.measure(rounded, exact_with_value, with_value).passed
    assert testing.measure(with_value, exact_with_value, with_value).passed
    # Torch's own infinity is no licence for ours.
    assert not testing.measure(rounded + 1, EXACT, with_value).passed


def test_overflow_of_the_dtype_is_its_infinity() -> None:
    exact = torch.tensor([[1e6, 1.0]], dtype=torch.float64)
    assert testing.measure(exact.half(), exact, exact.half()).passed
    assert not testing.measure(torch.tensor([[6e4, 1.0]]).half(), exact, exact.half()).passed


def test_message_names_the_tensor() -> None:
    with pytest.raises(
        AssertionError, match=r"gradient of x \[4, 64\] torch.float32: error .* of the budget"
    ):
        testing.assert_within_budget(EXACT.float() + 1, EXACT, EXACT.float(), name="gradient of x")
    with pytest.raises(AssertionError, match="shapes of actual, expected and baseline differ"):
        testing.measure(EXACT[:1].float(), EXACT, EXACT.float())


def test_poisoned_memory_and_its_end() -> None:
    with testing.poisoned():
        assert torch.empty(8).isnan().all() and torch.empty_like(EXACT).isnan().all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_keep_the_values(layout: str) -> None:
    tensors = [
        testing.random_tensor((2, 3, 5), torch.float32, "cpu", 0, layout=name)
        for name in ("contiguous", layout)
    ]
    assert torch.equal(*tensors)
    if layout == "misaligned":
        assert tensors[1].data_ptr() % 16 != 0
    elif layout != "contiguous":
        assert not tensors[1].is_contiguous()
