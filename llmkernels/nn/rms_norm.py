"""torch.nn.RMSNorm on the kernels of llmkernels.ops.layer_norm."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layer_norm.api import rms_norm


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over the last dimensions, a drop-in for torch.nn.RMSNorm.

        y = x / sqrt(mean(x^2) + eps) * weight                 (Zhang and Sennrich, arXiv 1910.07467)

    Constructor, parameters, state_dict, initial values and representation are torch.nn.RMSNorm's; input and
    output are [*, *normalized_shape]; eps None is the machine epsilon of the dtype computed in. ``backend``
    as in LayerNorm. torch.jit.script compiles torch's own operator.
    """

    # torch.jit.script reads this annotation of instances that set it, as an object: so no string of it. Nor
    # does it know keyword-only arguments.
    backend: Optional[str] = None  # noqa: UP045

    def forward(self, x: Tensor, backend: Optional[str] = None) -> Tensor:  # noqa: UP045
        """backend: what the layer around this one insists on; this instance's own comes first."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        backend = backend if self.backend is None else self.backend
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, backend=backend)
