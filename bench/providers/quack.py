"""quack-kernels, which are written in CuTe's Python DSL for Hopper and newer."""

from __future__ import annotations

import functools

from torch import Tensor

from ..case import Case, Function
from ..formulas import RMS_EPS
from .base import Provider


@functools.lru_cache(maxsize=8)
def _as_float32(parameter: Tensor) -> Tensor:
    return parameter.detach().float()


class Quack(Provider):
    """Its LayerNorm has no backward and takes float32 parameters, which are made of the variant's once."""

    name = "quack"
    distribution, module = "quack-kernels", "quack.rmsnorm"

    def layer_norm(self, case: Case) -> Function:
        from quack.rmsnorm import layernorm_fwd

        return lambda tensors: layernorm_fwd(
            tensors["input"].detach(),
            _as_float32(tensors["weight"]),
            _as_float32(tensors["bias"]),
            eps=1e-5,
        )

    def rms_norm(self, case: Case) -> Function:
        from quack.rmsnorm import rmsnorm

        return lambda tensors: rmsnorm(tensors["input"], tensors["weight"], eps=RMS_EPS)
