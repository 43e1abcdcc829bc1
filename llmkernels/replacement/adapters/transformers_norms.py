"""The RMSNorm of transformers' models: Llama's, T5's, and the same code in the many that repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import dispatch
from ...ops.layer_norm.api import rms_norm
from .adapter import Inputs, drawn
from .transformers_classes import Replaced, TransformersAdapter, same_code


def _as_llama(self: Any, hidden_states: Tensor) -> Tensor:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _as_t5(self: Any, hidden_states: Tensor) -> Tensor:
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states


class RMSNorm(Replaced):
    """y = x / sqrt(mean(x^2) + variance_epsilon) * weight, by ops.layer_norm.rms_norm.

    The normalised row is not rounded to half precision before it meets the weight, as it is in transformers.
    """

    weight: Tensor
    variance_epsilon: float

    @classmethod
    def recognises(cls, kind: type[nn.Module]) -> bool:
        return any(same_code(kind.forward, template) for template in (_as_llama, _as_t5))

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, dtype = self.weight, hidden_states.dtype
        if weight.dtype != dtype:
            name = f"transformers.{type(self).__name__}"
            dispatch.record_fallback(name, f"its result beside {weight.dtype} weights is not {dtype}")
            return super().forward(hidden_states)
        return rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon, backend=self.backend).to(
            dtype
        )


class RMSNormAdapter(TransformersAdapter):
    """LlamaRMSNorm, T5LayerNorm and their twins."""

    mixins = (RMSNorm,)
    kernels = ("triton", "cuda")

    def obstacles(self, module: nn.Module) -> list[str]:
        weight = module._parameters.get("weight")
        if weight is None:
            return ["weight is no registered parameter: a wrapper such as FSDP or a hook manages it"]
        if not weight.is_floating_point():
            return [f"weight is {weight.dtype}: it is quantised"]
        return []

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        layer: Any = module
        width = layer.weight.shape[0]
        # Hidden states are neither centred nor of one size: each row has its own scale.
        values = drawn((rows, width), torch.float64, torch.device("cpu"), 0) + 0.5
        scale = torch.logspace(-1, 1, rows, dtype=torch.float64, device="cpu")[:, None]
        return [Inputs(((values * scale).to(device, dtype),), {})]

    def magnitudes(
        self, module: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        # transformers computes this in float32 whatever the dtype: its digits end there, beyond which
        # nothing can be told from a difference.
        layer: Any = module
        given: Tensor = next(iter((*inputs.args, *inputs.kwargs.values())))
        weight: Tensor = layer.weight.detach()
        x, dy = given.reshape(-1, weight.shape[0]), output_gradients[0].reshape(-1, weight.shape[0])
        rstd = (x.square().mean(1, keepdim=True) + layer.variance_epsilon).rsqrt()
        xhat = x.abs() * rstd
        dx = (dy * weight * rstd).abs().amax(1, keepdim=True) * (1 + xhat.amax(1, keepdim=True))
        return {
            "output": (xhat * weight.abs()).view(given.shape),
            "gradient of hidden_states": dx.expand(x.shape).reshape(given.shape),
            # The terms of the sum have random signs: their rounding grows with the root of the sum of
            # squares.
            "gradient of weight": (dy * xhat).square().sum(0).sqrt(),
        }
