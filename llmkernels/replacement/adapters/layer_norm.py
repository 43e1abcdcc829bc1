"""torch.nn's norms in any model: its own Transformer layers, those of transformers, others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...nn import LayerNorm, RMSNorm
from .adapter import Adapter, Inputs, drawn


class LayerNormAdapter(Adapter):
    """Exact instances of torch.nn.LayerNorm become llmkernels.nn.LayerNorm."""

    original = nn.LayerNorm
    replacement = LayerNorm
    kernels = ("triton", "cuda")

    def obstacles(self, module: nn.Module) -> list[str]:
        return _obstacles(module, ("weight", "bias"))

    def remark(self, module: nn.Module, parents: Sequence[nn.Module]) -> str | None:
        if any(_fused_in_eval(parent, module) for parent in parents):
            return (
                "bypassed in eval mode without gradients, where torch's fused encoder layer reads its weights"
            )
        return None

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        return [_rows(module, dtype, device, rows)]

    def magnitudes(
        self, module: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        return _magnitudes(module, inputs, output_gradients, centred=True)


class RMSNormAdapter(Adapter):
    """Exact instances of torch.nn.RMSNorm become llmkernels.nn.RMSNorm."""

    original = nn.RMSNorm
    replacement = RMSNorm
    kernels = ("triton", "cuda")

    def obstacles(self, module: nn.Module) -> list[str]:
        return _obstacles(module, ("weight",))

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        return [_rows(module, dtype, device, rows)]

    def magnitudes(
        self, module: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        return _magnitudes(module, inputs, output_gradients, centred=False)


def _obstacles(norm: nn.Module, names: Sequence[str]) -> list[str]:
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    reasons = []
    for name in names:
        if name not in norm._parameters:
            reasons.append(f"{name} is no registered parameter: a wrapper such as FSDP or a hook manages it")
            continue
        parameter = norm._parameters[name]
        if parameter is None or nn.parameter.is_lazy(parameter):
            continue
        if tuple(parameter.shape) != tuple(norm.normalized_shape):
            reasons.append(
                f"{name} has shape {list(parameter.shape)} and normalized_shape is "
                f"{list(norm.normalized_shape)}: it is sharded or pruned"
            )
        if not parameter.is_floating_point():
            reasons.append(f"{name} is {parameter.dtype}: it is quantised")
    return reasons


def _rows(norm: nn.Module, dtype: torch.dtype, device: torch.device, rows: int) -> Inputs:
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    cpu = torch.device("cpu")
    values = drawn((rows, *norm.normalized_shape), torch.float64, cpu, 0)
    # Hidden states are neither centred nor of one size: each row has its own scale, and a mean of that order.
    scale = torch.logspace(-1, 1, rows, dtype=torch.float64, device=cpu)
    scale = scale.view(-1, *[1] * len(norm.normalized_shape))
    return Inputs((((values + 0.5) * scale).to(device, dtype),), {})


def _magnitudes(
    norm: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor], *, centred: bool
) -> dict[str, Tensor]:
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    shape = norm.normalized_shape
    # Of the name that the class has for its only argument: input, or x.
    argument, given = next(iter(inputs.kwargs.items()), ("input" if centred else "x", None))
    given = inputs.args[0] if given is None else given
    x, dy = given.reshape(-1, *shape), output_gradients[0].reshape(-1, *shape)
    row = tuple(range(1, x.dim()))
    deviation = x - x.mean(row, keepdim=True) if centred else x
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    rstd = (deviation.square().mean(row, keepdim=True) + eps).rsqrt()
    # The normalised row inherits the rounding of x - mean, which is relative to x.
    xhat = (deviation.abs() + x.abs()) * rstd
    weight = x.new_ones(shape) if norm.weight is None else norm.weight.detach()
    bias = getattr(norm, "bias", None)
    bias = x.new_zeros(shape) if bias is None else bias.detach()
    dx = (dy * weight * rstd).abs().amax(row, keepdim=True) * (1 + xhat.amax(row, keepdim=True))
    return {
        "output": (xhat * weight.abs() + bias.abs()).view(given.shape),
        f"gradient of {argument}": dx.expand(x.shape).reshape(given.shape),
        # The terms of these sums have random signs: their rounding grows with the root of the sum of squares.
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
