"""liger-kernel (0.5 and newer)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..case import Case, Function, Outputs, Tensors
from ..formulas import RMS_EPS
from .base import Provider, Unavailable


class Liger(Provider):
    """The backward of its SwiGLU and GEGLU writes into what the forward saved."""

    name = "liger-kernel"
    distribution, module = "liger-kernel", "liger_kernel.ops"
    overwrites_saved = frozenset({"feed_forward"})

    def is_interpreted(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def layer_norm(self, case: Case) -> Function:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction as Norm

        return lambda tensors: Norm.apply(tensors["input"], tensors["weight"], tensors["bias"], 1e-5)

    def rms_norm(self, case: Case) -> Function:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm

        # The last argument keeps its backward from writing into the gradient that it is given.
        return lambda tensors: Norm.apply(tensors["input"], tensors["weight"], RMS_EPS, 0.0, "llama", False)

    def feed_forward(self, case: Case) -> Function:
        variant: Any = case.variant
        if variant.dropout_p > 0 or variant.recompute:
            raise Unavailable("has neither dropout nor recomputation")
        if variant.activation == "swiglu":
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Gate
        elif variant.activation == "geglu":
            raise Unavailable("its GEGLU is of the tanh GELU")
        else:
            raise Unavailable("has gated activations alone")

        def function(tensors: Tensors) -> Outputs:
            gate, up = F.linear(tensors["input"], tensors["weight1"], tensors["bias1"]).chunk(2, dim=-1)
            return (F.linear(Gate.apply(gate, up), tensors["weight2"], tensors["bias2"]),)

        return function
