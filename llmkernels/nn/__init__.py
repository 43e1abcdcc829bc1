"""Layers with torch.nn's contract whose forward runs on the kernels of llmkernels.ops.

One file a layer. A layer that torch.nn has, too, is a stateless subclass of torch's: same constructor,
parameters, state_dict and initial values, so that ``llmkernels.replace`` can give it to an existing module by
swapping the module's class. README.md lists what differs on purpose.
"""

from .feed_forward import FeedForward
from .kv_cache import KVCache
from .layer_norm import LayerNorm
from .multihead_attention import MultiheadAttention
from .positional_encoding import LearnedPositionalEncoding, PositionalEncoding
from .rms_norm import RMSNorm
from .transformer import Transformer
from .transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "FeedForward",
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "PositionalEncoding",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
