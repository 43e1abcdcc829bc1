"""torch.nn.LayerNorm in any model: torch.nn's Transformer layers, those of transformers, others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...nn import LayerNorm
from .adapter import Adapter, Inputs


class LayerNormAdapter(Adapter):
    """Exact instances of torch.nn.LayerNorm become llmkernels.nn.LayerNorm."""

    original = nn.LayerNorm
    replacement = LayerNorm
    kernels = ("triton", "cuda")

    def obstacles(self, module: nn.Module) -> list[str]:
        assert isinstance(module, nn.LayerNorm)
        reasons = []
        for name in ("weight", "bias"):
            if name not in module._parameters:
                reasons.append(
                    f"{name} is no registered parameter: a wrapper such as FSDP or a hook manages it"
                )
                continue
            parameter = module._parameters[name]
            if parameter is None or nn.parameter.is_lazy(parameter):
                continue
            if tuple(parameter.shape) != tuple(module.normalized_shape):
                reasons.append(
                    f"{name} has shape {list(parameter.shape)} and normalized_shape is "
                    f"{list(module.normalized_shape)}: it is sharded or pruned"
                )
            if not parameter.is_floating_point():
                reasons.append(f"{name} is {parameter.dtype}: it is quantised")
        return reasons

    def remark(self, module: nn.Module, parents: Sequence[nn.Module]) -> str | None:
        if any(_fused_in_eval(parent, module) for parent in parents):
            return (
                "bypassed in eval mode without gradients, where torch's fused encoder layer reads its weights"
            )
        return None

    def copy(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        assert isinstance(module, nn.LayerNorm)
        # Without parameters of its own: nothing is allocated or initialised on a default device.
        copy = nn.LayerNorm(module.normalized_shape, module.eps, elementwise_affine=False)
        copy.elementwise_affine = module.elementwise_affine
        copy.train(module.training)
        for name in ("weight", "bias"):
            parameter = module._parameters[name]
            if parameter is not None:
                values = parameter.detach().clone().to(dtype or parameter.dtype)
                copy.register_parameter(name, nn.Parameter(values))
        return copy

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> Inputs:
        assert isinstance(module, nn.LayerNorm)
        generator = torch.Generator().manual_seed(0)
        shape = (rows, *module.normalized_shape)
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        # Hidden states are neither centred nor of one size: each row has its own scale, and a mean of that
        # order.
        scale = torch.logspace(-1, 1, rows, dtype=torch.float64, device="cpu").view(
            -1, *[1] * (len(shape) - 1)
        )
        return Inputs((((values + 0.5) * scale).to(device, dtype),), {})

    def magnitudes(
        self, module: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(module, nn.LayerNorm)
        shape = module.normalized_shape
        given: Tensor = inputs.args[0] if inputs.args else inputs.kwargs["input"]
        x, dy = given.reshape(-1, *shape), output_gradients[0].reshape(-1, *shape)
        row = tuple(range(1, x.dim()))
        centred = x - x.mean(row, keepdim=True)
        rstd = (centred.square().mean(row, keepdim=True) + module.eps).rsqrt()
        # The normalised row inherits the rounding of x - mean, which is relative to x.
        xhat = (centred.abs() + x.abs()) * rstd
        weight = x.new_ones(shape) if module.weight is None else module.weight.detach()
        bias = x.new_zeros(shape) if module.bias is None else module.bias.detach()
        dx = (dy * weight * rstd).abs().amax(row, keepdim=True) * (1 + xhat.amax(row, keepdim=True))
        return {
            "output": (xhat * weight.abs() + bias.abs()).view(given.shape),
            "gradient of input": dx.expand(x.shape).reshape(given.shape),
            # The terms of these sums have random signs: their rounding grows with the root of the sum of
            # squares.
            "gradient of weight": (dy * xhat).square().sum(0).sqrt(),
            "gradient of bias": dy.square().sum(0).sqrt(),
        }


def _fused_in_eval(parent: nn.Module, norm: nn.Module) -> bool:
    """Whether torch may run the whole encoder layer as one operator that never calls this norm of it.

    The conditions of torch.nn.TransformerEncoderLayer.forward that depend on the layer alone. Its children
    may be others than torch's, or gone.
    """
    if not isinstance(parent, nn.TransformerEncoderLayer):
        return False
    if type(parent).forward is not nn.TransformerEncoderLayer.forward:
        return False
    first, second, attention = (getattr(parent, name, None) for name in ("norm1", "norm2", "self_attn"))
    if not isinstance(first, nn.LayerNorm) or not isinstance(second, nn.LayerNorm):
        return False
    if not isinstance(attention, nn.MultiheadAttention):
        return False
    return bool(
        norm in (first, second)
        and torch.backends.mha.get_fastpath_enabled()
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and parent.activation_relu_or_gelu
        and first.eps == second.eps
    )
