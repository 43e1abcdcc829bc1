"""Our layers on kernels, held to float64 by the project's budget."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import llmkernels
from llmkernels.testing import assert_within_budget

from .torch_layers import on_device_of, ours_like, outputs_and_gradients


def _in_float64(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def assert_exact(
    theirs: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backend: str,
    ops: set[str],
    reference: str | None = None,
) -> None:
    """Our twin of torch's layer, on ``backend``, within the budget of float64 in outputs and all gradients,
    with ``ops`` and no other call, every one served by the backend.

    The yardsticks are torch's layer in float64 and in the twin's dtype, or with ``reference`` our twin on
    that backend: its dropout draws the numbers that every backend of ours draws.
    """
    theirs, args, kwargs = on_device_of(backend, theirs, tuple(args), dict(kwargs))
    wide: dict[int, Any] = {}
    wide_args = [wide.setdefault(id(value), _in_float64(value)) for value in args]
    wide_kwargs = {name: _in_float64(value) for name, value in kwargs.items()}
    exact, baseline = copy.deepcopy(theirs).double(), theirs
    if reference is not None:
        exact, baseline = ours_like(exact, reference), ours_like(baseline, reference)
    expected = outputs_and_gradients(exact, wide_args, wide_kwargs)
    torchs = outputs_and_gradients(baseline, args, kwargs)
    with llmkernels.explain() as calls:
        actual = outputs_and_gradients(ours_like(theirs, backend), args, kwargs)
    assert {(call.op, call.backend) for call in calls} == {(op, backend) for op in ops}, calls
    assert actual.keys() == expected.keys()
    # A gradient comes through the whole layer: the rounding it inherits is of the largest one's size.
    largest = max((float(value.abs().max()) for value in expected.values() if value.numel()), default=0.0)
    for name, value in actual.items():
        assert value.dtype == torchs[name].dtype
        size = torch.full_like(expected[name], largest)
        assert_within_budget(value, expected[name], torchs[name], name=name, magnitude=size)
