"""What `llmkernels doctor` runs: attention on small inputs, held to the error budget against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import testing
from . import api
from .call import AttentionCall

_HEADS, _KEY_HEADS, _QUERIES, _KEYS, _HEAD_DIM = 4, 2, 37, 53, 40


def example_call(device: torch.device) -> AttentionCall:
    """A call that every kernel of the op is meant to serve."""
    return AttentionCall("attention", device, torch.bfloat16, gradients=True)


# float32 is what the reference computes beside a kernel of any dtype: with dropout, too, to the same mask.
_CALLS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True, "causal_align": "bottom_right"},
    "window, softcap, dropout": {"window": (20, 3), "softcap": 3.0, "dropout_p": 0.25},
}


def _run(
    tensors: dict[str, Tensor], dtype: torch.dtype, backend: str, options: dict[str, Any]
) -> list[Tensor]:
    """out, lse and the gradients of all tensors, for a fixed seed of dropout."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    torch.manual_seed(0)
    found = api.attention(**leaves, enable_gqa=True, return_lse=True, **options, backend=backend)  # type: ignore[arg-type]
    # The same values in every dtype: made from the query, whose bits all of them hold.
    gradients = (tensors["query"].flip(2).to(dtype), torch.ones_like(found[1]))
    return [*found, *torch.autograd.grad(found, list(leaves.values()), gradients)]


def compare(backend: str, device: torch.device) -> Iterator[tuple[str, testing.Comparison]]:
    """Each kind of call by ``backend`` on ``device``: its name and its worst tensor against the budget."""
    rows = {"query": (_HEADS, _QUERIES), "key": (_KEY_HEADS, _KEYS), "value": (_KEY_HEADS, _KEYS)}
    for call, options in _CALLS.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tensors = {
                name: testing.random_tensor((2, *shape, _HEAD_DIM), dtype, device, seed)
                for seed, (name, shape) in enumerate(rows.items())
            }
            bias = testing.random_tensor((1, _HEADS, _QUERIES, _KEYS), dtype, device, 3)
            tensors["attn_mask"] = bias
            expected = _run(tensors, torch.float64, "reference", options)
            baseline = _run(tensors, dtype, "reference", options)
            with testing.poisoned():
                actual = _run(tensors, dtype, backend, options)
            worst: testing.Comparison | None = None
            for i, name in enumerate(("out", "logsumexp", *(f"gradient of {name}" for name in tensors))):
                # Kernels multiply probabilities that are rounded to the inputs' dtype: one of its ulps of the
                # largest result, where the budget counts in float32.
                half = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / testing.ARITHMETIC_ULPS
                magnitude = expected[i].abs().amax() * max(half, 1.0)
                found = testing.measure(actual[i], expected[i], baseline[i], magnitude.cpu())
                found = found._replace(detail=f"{name}, {found.detail}")
                if worst is None or found.error / found.allowed > worst.error / worst.allowed:
                    worst = found
            assert worst is not None
            yield f"attention {call} {str(dtype).removeprefix('torch.')}", worst
