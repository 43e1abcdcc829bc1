"""Layers with torch.nn's contract whose forward runs on the kernels of llmkernels.ops.

One file a layer. A layer is a stateless subclass of torch.nn's own: same constructor, parameters, state_dict
and initial values, so that ``llmkernels.replace`` can give it to an existing module by swapping the module's
class.
"""

from .layer_norm import LayerNorm

__all__ = ["LayerNorm"]
