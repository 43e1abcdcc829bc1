"""The families of layers that ``replace`` knows; ``ADAPTERS`` is the list of them."""

from .adapter import Adapter, Inputs
from .layer_norm import LayerNormAdapter, RMSNormAdapter
from .transformer_layers import (
    MultiheadAttentionAdapter,
    TransformerAdapter,
    TransformerDecoderAdapter,
    TransformerDecoderLayerAdapter,
    TransformerEncoderAdapter,
    TransformerEncoderLayerAdapter,
)
from .transformers_attention import AttentionAdapter
from .transformers_blocks import FeedForwardAdapter, ResidualNormAdapter
from .transformers_norms import RMSNormAdapter as TransformersRMSNormAdapter

ADAPTERS: list[Adapter] = [
    LayerNormAdapter(),
    RMSNormAdapter(),
    MultiheadAttentionAdapter(),
    TransformerEncoderLayerAdapter(),
    TransformerDecoderLayerAdapter(),
    TransformerEncoderAdapter(),
    TransformerDecoderAdapter(),
    TransformerAdapter(),
    AttentionAdapter(),
    FeedForwardAdapter(),
    ResidualNormAdapter(),
    TransformersRMSNormAdapter(),
]

__all__ = ["ADAPTERS", "Adapter", "Inputs"]
