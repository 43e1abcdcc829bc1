"""LayerNorm, residual + dropout + LayerNorm and RMSNorm in pure PyTorch: forward and explicit backward.

The yardstick of every kernel, and the path of double backward: each function is differentiable by autograd,
and ``backward`` recomputes its statistics from ``z`` so that it depends on it. Statistics and sums are in
float32, or in float64 for float64 inputs. Formulas: Ba et al., Layer Normalization (arXiv 1607.06450); Zhang
and Sennrich, RMSNorm (arXiv 1910.07467); torch.nn.functional.layer_norm and rms_norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dropout import dropout_mask, dropout_scale
from .call import NormCall


def unsupported(call: NormCall) -> list[str]:
    """The reference serves every call that reaches it outside functorch."""
    return [] if call.obstacle is None else [call.obstacle]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _normalize(z: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """xhat [M, N], mean [M, 1] (None for RMSNorm) and rstd [M, 1] of the rows of z, which is float32 or
    float64."""
    mean, centred = None, z
    if not rms:
        mean = z.mean(dim=1, keepdim=True)
        # The rounding of a large mean would stay in every element; the mean of what is left takes it out
        # again.
        correction = (z - mean).mean(dim=1, keepdim=True)
        mean, centred = mean + correction, (z - mean) - correction
    rstd = torch.rsqrt((centred * centred).mean(dim=1, keepdim=True) + eps)
    return centred * rstd, mean, rstd


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    rms: bool,
    residual_dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = residual + dropout(x), rounded to residual_dtype (z = x without a residual); y = norm(z) * weight
    + bias.

    x, residual: [M, N]. weight, bias: [N]. seed: int64 [1], None without dropout. Returns y [M, N] of
    output_dtype, z [M, N] of residual_dtype (empty without a residual), mean [M] (empty for RMSNorm) and
    rstd [M], both float32 (float64 where z is).
    """
    m, n = x.shape
    if residual is None:
        z = x
    else:
        wide = _wide(torch.promote_types(x.dtype, residual_dtype))
        kept = x.to(wide)
        if seed is not None:
            kept = torch.where(dropout_mask(seed, m, n, dropout_p), kept * dropout_scale(dropout_p), 0.0)
        z = (residual.to(wide) + kept).to(residual_dtype).contiguous()
    xhat, mean, rstd = _normalize(z.to(_wide(z.dtype)), eps, rms)
    y = xhat if weight is None else xhat * weight
    y = y if bias is None else y + bias
    return (
        y.to(output_dtype).contiguous(),
        x.new_empty(0, dtype=residual_dtype) if residual is None else z,
        xhat.new_empty(0) if mean is None else mean.squeeze(1),
        rstd.squeeze(1),
    )


def backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    rms: bool,
    input_grad: bool,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_grad: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``forward``; with xhat = (z - mean) * rstd, g = dy * weight and means over a row:

        dz_total = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dz      (RMSNorm: without mean(g))
        dx       = dropout(dz_total) with the mask of forward             (dresidual: dz_total itself)
        dweight  = sum over rows of dy * xhat,    dbias = sum over rows of dy

    dy, z: [M, N]; z is x where there was no residual. dz: the gradient of the new residual, or None.
    input_grad, weight_grad: whether dx (and dresidual), dweight are wanted; bias_dtype: the dtype of dbias,
    None if not wanted; residual_dtype: the dtype of dresidual, None where dx serves as both (no dropout and
    one dtype). Returns dx, dresidual [M, N], dweight, dbias [N], each an empty tensor if not wanted. mean
    and rstd are what a kernel saved; the reference computes its own from z and eps, so that its result can
    be differentiated again.
    """
    wide = _wide(z.dtype)
    xhat, _, row_rstd = _normalize(z.to(wide), eps, rms)
    grad = dy.to(wide)
    # Four tensors of their own: the outputs of an operator may not share memory.
    dx, dresidual, dweight, dbias = (z.new_empty(0) for _ in range(4))
    if input_grad:
        g = grad if weight is None else grad * weight
        centre = 0.0 if rms else g.mean(dim=1, keepdim=True)
        total = row_rstd * (g - centre - xhat * (g * xhat).mean(dim=1, keepdim=True))
        total = total if dz is None else total + dz
        kept = total
        if seed is not None:
            mask = dropout_mask(seed, z.shape[0], z.shape[1], dropout_p)
            kept = torch.where(mask, total * dropout_scale(dropout_p), 0.0)
        dx = kept.to(input_dtype)
        if residual_dtype is not None:
            dresidual = total.to(residual_dtype, copy=kept is total)
    if weight is not None and weight_grad:
        dweight = (grad * xhat).sum(dim=0).to(weight.dtype)
    if bias_dtype is not None:
        dbias = grad.sum(dim=0).to(bias_dtype)
    return dx, dresidual, dweight, dbias
