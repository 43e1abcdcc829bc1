"""What the stacks of encoder and of decoder layers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import checks
from .kv_cache import KVCache


def cache_options(stack: str, cache: Sequence[KVCache] | None, layers: int) -> Sequence[dict[str, Any]]:
    """For each layer the argument that hands it its cache, if there is one."""
    if cache is None:
        return [{}] * layers
    if len(cache) != layers:
        checks.fail(ValueError, f"nn.{stack}", "cache", f"{layers} caches, one a layer", len(cache))
    return [{"cache": of_layer} for of_layer in cache]
