"""Fast, exact kernels for Transformer models in PyTorch: the public names."""

from . import nn
from .dispatch import explain, use_backend
from .ops.attention.api import attention, attention_varlen
from .ops.attention_decode.api import attention_decode
from .ops.feed_forward.api import feed_forward, linear_activation
from .ops.layer_norm.api import add_layer_norm, layer_norm, rms_norm
from .replacement import replace

__version__ = "0.1.0"
__all__ = [
    "add_layer_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "explain",
    "feed_forward",
    "layer_norm",
    "linear_activation",
    "nn",
    "replace",
    "rms_norm",
    "use_backend",
]
