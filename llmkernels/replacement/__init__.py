"""replace(model): the layers of an existing model on the kernels of this package, verified and reversible."""

from .api import replace
from .report import Report, Row
from .transformers_attention import register_attention

__all__ = ["Report", "Row", "register_attention", "replace"]
