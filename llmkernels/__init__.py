"""Fast, exact kernels for Transformer models in PyTorch: the public names."""

from . import nn
from .dispatch import explain, use_backend
from .ops.layer_norm.api import add_layer_norm, layer_norm, rms_norm
from .replacement import replace

__version__ = "0.1.0"
__all__ = ["add_layer_norm", "explain", "layer_norm", "nn", "replace", "rms_norm", "use_backend"]
