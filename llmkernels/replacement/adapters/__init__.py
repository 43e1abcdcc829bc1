"""The families of layers that ``replace`` knows, one file each; ``ADAPTERS`` is the list it walks through."""

from .adapter import Adapter, Inputs
from .layer_norm import LayerNormAdapter

ADAPTERS: list[Adapter] = [LayerNormAdapter()]

__all__ = ["ADAPTERS", "Adapter", "Inputs", "LayerNormAdapter"]
