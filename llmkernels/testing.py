"""The error budget that every kernel is held to, and the inputs that it is tried on.

Budget, not tolerance: a result may err twice as far from float64 as torch does in the same dtype, plus a band
of a few units in the last place for the rounding of the result and of its intermediates, in the maximum and
in the root mean square of every row. The constants below are the only numeric tolerances of the project.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import deterministic as _memory

# |ours - f64| <= FACTOR * |torch - f64| + band: torch's own rounding is what users have accepted already.
FACTOR = 2.0
# Rounding of the result itself to its dtype, in ulps of the row's largest value: 1 in the maximum (a
# correctly rounded result errs by half; the other half pays for a tie decided by the last bit of float32),
# half of that in the mean.
ROUNDING_ULPS_MAX, ROUNDING_ULPS_RMS = 1.0, 0.5
# float32 arithmetic (float64 for float64 tensors) before that rounding, in ulps of the largest intermediate
# of the row.
ARITHMETIC_ULPS = 8.0
# Of random draws only means can be compared: how many standard errors apart those of two correct
# implementations may be found. Of normal errors, two pairs in a billion are further apart.
STANDARD_ERRORS = 6.0


class Comparison(NamedTuple):
    """The worst row of a result against its budget: all three in the units of the values compared."""

    error: float
    baseline_error: float
    allowed: float
    passed: bool
    detail: str

    def __str__(self) -> str:
        figures = f"error {self.error:.3e}, torch's {self.baseline_error:.3e}, allowed {self.allowed:.3e}"
        return f"{figures} ({self.detail})"


def _rows64(tensor: Tensor) -> Tensor:
    """As float64 on the CPU, [rows, columns]; a vector is one row."""
    tensor = tensor.detach().to("cpu", torch.float64)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _distance(values: Tensor, expected: Tensor) -> Tensor:
    """|values - expected| with 0 where both are the same infinity or both NaN, infinity where only one is."""
    same = (values == expected) | (values.isnan() & expected.isnan())
    return torch.where(same, 0.0, (values - expected).abs()).nan_to_num(nan=torch.inf)


def _largest(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0).abs().amax(dim=1)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(dim=1).sqrt()


def measure(
    actual: Tensor, expected: Tensor, baseline: Tensor, magnitude: Tensor | None = None
) -> Comparison:
    """Holds ``actual`` to the budget.

    actual: the result, any floating dtype. expected: the same computed in float64 from the same inputs.
    baseline: torch's result in the dtype of ``actual``. magnitude: broadcastable to expected, the size of the
    float32 intermediates whose rounding the result inherits (a sum's terms, say), by default the result's
    own. A float64 value beyond the dtype's range is expected to come out as that dtype's infinity.
    """
    dtype = actual.dtype
    if actual.shape != expected.shape or baseline.shape != expected.shape:
        shapes = [list(tensor.shape) for tensor in (actual, expected, baseline)]
        raise AssertionError(f"shapes of actual, expected and baseline differ: {shapes}")
    if actual.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, True, "empty")
    rows = _rows64(expected)
    in_range = rows.to(dtype).to(torch.float64)
    rows = torch.where(in_range.isinf(), in_range, rows)
    error, baseline_error = _distance(_rows64(actual), rows), _distance(_rows64(baseline), rows)

    size = _largest(rows)
    intermediates = size if magnitude is None else _largest(_rows64(magnitude.expand(expected.shape)))
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    # The smallest normal number stands in for values so small that an ulp of theirs is a subnormal.
    ulp = torch.finfo(dtype).eps * size.clamp(min=torch.finfo(dtype).tiny)
    arithmetic_ulp = torch.finfo(arithmetic).eps * intermediates.clamp(min=torch.finfo(arithmetic).tiny)

    norms: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
        ("max", lambda values: values.amax(dim=1), ROUNDING_ULPS_MAX),
        ("rms", _rms, ROUNDING_ULPS_RMS),
    )
    worst: Comparison | None = None
    worst_share = -1.0
    for name, norm, rounding in norms:
        ours, torchs = norm(error), norm(baseline_error)
        allowed = FACTOR * torchs.nan_to_num(posinf=0.0) + rounding * ulp + ARITHMETIC_ULPS * arithmetic_ulp
        share = torch.where(ours == 0, 0.0, ours / allowed)
        row = int(share.argmax())
        if share[row] > worst_share:
            worst_share = float(share[row])
            detail = f"{name} of row {row} of {len(rows)}, {worst_share:.2f} of the budget"
            values = (float(ours[row]), float(torchs[row]), float(allowed[row]))
            worst = Comparison(*values, worst_share <= 1, detail)
    assert worst is not None
    return worst


def assert_within_budget(
    actual: Tensor, expected: Tensor, baseline: Tensor, *, name: str, magnitude: Tensor | None = None
) -> Comparison:
    """Raises AssertionError, naming the tensor, its worst row and the three errors, unless ``measure``
    passes."""
    comparison = measure(actual, expected, baseline, magnitude)
    if not comparison.passed:
        raise AssertionError(f"{name} {list(actual.shape)} {actual.dtype}: {comparison}")
    return comparison


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty and its kin hold NaN (integers their largest value): what a kernel leaves unwritten
    shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    _memory.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _memory.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _sliced(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan)
    wide[..., 2 : 2 + tensor.shape[-1]] = tensor
    return wide[..., 2 : 2 + tensor.shape[-1]]


def _misaligned(tensor: Tensor) -> Tensor:
    flat = tensor.new_full((tensor.numel() + 1,), torch.nan)
    flat[1:] = tensor.reshape(-1)
    return flat[1:].view(tensor.shape)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


# Ways to lay out the same values: what reaches a kernel from a sliced projection, an odd offset, a permuted
# batch.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "sliced": _sliced,
    "misaligned": _misaligned,
    "transposed": _transposed,
}


def random_tensor(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    *,
    layout: str = "contiguous",
    shift: float = 0.0,
    scale: float = 1.0,
    requires_grad: bool = False,
) -> Tensor:
    """A leaf of normal values ``shift + scale * N(0, 1)``, drawn on the CPU so that every device sees the
    same ones."""
    generator = torch.Generator().manual_seed(seed)
    values = (shift + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    return LAYOUTS[layout](values.to(device)).detach().requires_grad_(requires_grad)
