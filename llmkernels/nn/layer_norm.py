"""torch.nn.LayerNorm on the kernels of llmkernels.ops.layer_norm."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layer_norm.api import layer_norm


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimensions, a drop-in for torch.nn.LayerNorm.

        y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        (Ba et al., arXiv 1607.06450)

    Constructor, parameters, state_dict, initial values and representation are torch.nn.LayerNorm's; input and
    output are [*, *normalized_shape]. Which backend serves a call is decided at each call
    (``llmkernels.explain``).

    backend: None for the automatic choice, or the one this instance insists on: a call that it can't serve
    raises RuntimeError. It is an attribute of the class unless set, so that instances have no state beyond
    torch's: pickles, deep copies and checkpoints made without it load. torch.jit.script compiles torch's own
    operator.
    """

    # torch.jit.script reads this annotation of instances that set it, as an object: so no string of it. Nor
    # does it know keyword-only arguments.
    backend: Optional[str] = None  # noqa: UP045

    def forward(self, input: Tensor, backend: Optional[str] = None) -> Tensor:  # noqa: UP045
        """backend: what the layer around this one insists on; this instance's own comes first."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        backend = backend if self.backend is None else self.backend
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, backend=backend)
