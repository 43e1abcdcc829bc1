"""What `llmkernels doctor` runs: small decoding steps, held to the error budget against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import testing
from . import api
from .call import DecodeCall

_LENGTHS = (150, 0, 33)
_CAPACITY, _PAGE_SIZE = 160, 16


def example_call(device: torch.device) -> DecodeCall:
    """A call that every kernel of the op is meant to serve."""
    return DecodeCall("attention_decode", device, torch.bfloat16)


def _tensors(device: torch.device, dtype: torch.dtype, paged: bool) -> dict[str, Tensor]:
    """Two new tokens a sequence, four query heads a key head; pages in a row or in reverse."""
    batch, kv_heads, dim = len(_LENGTHS), 2, 64
    blocks = (batch * _CAPACITY // _PAGE_SIZE, _PAGE_SIZE) if paged else (batch, _CAPACITY)
    shapes = {
        "query": (batch, 4 * kv_heads, 2, dim),
        "key_cache": (blocks[0], kv_heads, blocks[1], dim),
        "value_cache": (blocks[0], kv_heads, blocks[1], dim),
        "key": (batch, kv_heads, 2, dim),
        "value": (batch, kv_heads, 2, dim),
    }
    tensors = {
        name: testing.random_tensor(shape, dtype, device, seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    tensors["cache_seqlens"] = torch.tensor(_LENGTHS, dtype=torch.int32, device=device)
    if paged:
        pages = torch.arange(blocks[0] - 1, -1, -1, dtype=torch.int32, device=device)
        tensors["block_table"] = pages.view(batch, -1)
    return tensors


def compare(backend: str, device: torch.device) -> Iterator[tuple[str, testing.Comparison]]:
    """Each kernel of ``backend`` on ``device``: the name of what was run and its worst tensor against the
    budget."""
    windowed: dict[str, Any] = {"window": (100, 0), "softcap": 20.0, "num_splits": 3}
    for name, paged, options in (("attention_decode", False, {}), ("attention_decode_paged", True, windowed)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tensors = _tensors(device, dtype, paged)
            inputs64 = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
            options = {**options, "return_lse": True}
            expected = _run(inputs64, options, "reference")
            baseline = _run({n: t.clone() for n, t in tensors.items()}, options, "torch")
            with testing.poisoned():
                actual = _run(tensors, options, backend)
            comparisons = []
            for part, value in actual.items():
                # Values and scores are of size 1, and the terms of a result that cancels are so, too.
                magnitude = expected[part].abs() + 1
                comparison = testing.measure(value, expected[part], baseline[part], magnitude)
                comparisons.append(comparison._replace(detail=f"{part}, {comparison.detail}"))
            worst = max(comparisons, key=lambda comparison: comparison.error / comparison.allowed)
            yield f"{name} {str(dtype).removeprefix('torch.')}", worst


def _run(tensors: dict[str, Any], options: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """The results of a call, by name, and the cache as it left it."""
    out, lse = api.attention_decode(**tensors, **options, backend=backend)
    return {"output": out, "logsumexp": lse, "key cache": tensors["key_cache"]}
