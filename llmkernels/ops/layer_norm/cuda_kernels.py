"""The CUDA C++ kernels of csrc/layer_norm; signatures, shapes and results as reference.py."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import extension
from .call import NormCall

_CODES = extension.DTYPE_CODES


def unsupported(call: NormCall) -> list[str]:
    """The reasons of all kernels, and those of the compiled module: missing, or not for this device."""
    reasons = call.unsupported_by_kernels()
    obstacle = extension.device_obstacle(call.device)
    return reasons if obstacle is None else [*reasons, obstacle]


@functools.lru_cache(maxsize=4096)
def _partial_rows(m: int, n: int, dtype: torch.dtype, device: int) -> int:
    return extension.load().layer_norm_partial_rows(m, n, _CODES[dtype], device)


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
    """y, z, mean, rstd: see reference.forward."""
    m, n = x.shape
    y = x.new_empty((m, n), dtype=output_dtype)
    z = x.new_empty(0 if residual is None else (m, n), dtype=residual_dtype)
    mean = x.new_empty(0 if rms else m, dtype=torch.float32)
    rstd = x.new_empty(m, dtype=torch.float32)
    if m == 0 or n == 0:
        return y, z, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    device = max(x.get_device(), 0)
    extension.load().layer_norm_forward(
        x.data_ptr(),
        x.stride(0),
        _CODES[x.dtype],
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        2 if residual is None else _CODES[residual.dtype],
        0 if weight is None else weight.data_ptr(),
        2 if weight is None else _CODES[weight.dtype],
        0 if bias is None else bias.data_ptr(),
        2 if bias is None else _CODES[bias.dtype],
        0 if residual is None else z.data_ptr(),
        _CODES[residual_dtype],
        y.data_ptr(),
        _CODES[output_dtype],
        0 if rms else mean.data_ptr(),
        rstd.data_ptr(),
        0 if seed is None else seed.data_ptr(),
        dropout_p,
        m,
        n,
        eps,
        device,
        extension.current_stream(device),
    )
    return y, z, mean, rstd


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
    """dx, dresidual, dweight, dbias: see reference.backward. eps is not needed: rstd holds it."""
    m, n = z.shape
    weight_grad = weight_grad and weight is not None
    bias_grad = bias_dtype is not None
    residual_grad = input_grad and residual_dtype is not None
    dx = z.new_empty((m, n) if input_grad else 0, dtype=input_dtype)
    dresidual = z.new_empty((m, n) if residual_grad else 0, dtype=residual_dtype or input_dtype)
    dweight = z.new_empty(n if weight_grad else 0, dtype=z.dtype if weight is None else weight.dtype)
    dbias = z.new_empty(n if bias_grad else 0, dtype=bias_dtype or z.dtype)
    if m == 0 or n == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    device = max(z.get_device(), 0)
    partial_rows = _partial_rows(m, n, z.dtype, device)
    sums = weight_grad + bias_grad
    # dweight's partial rows, then dbias': float32, alive until the launch is enqueued.
    partial = z.new_empty((sums, partial_rows, n) if sums else 0, dtype=torch.float32)
    extension.load().layer_norm_backward(
        dy.data_ptr(),
        dy.stride(0),
        _CODES[dy.dtype],
        0 if dz is None else dz.data_ptr(),
        0 if dz is None else dz.stride(0),
        2 if dz is None else _CODES[dz.dtype],
        z.data_ptr(),
        z.stride(0),
        _CODES[z.dtype],
        0 if weight is None else weight.data_ptr(),
        2 if weight is None else _CODES[weight.dtype],
        0 if rms else mean.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr() if input_grad else 0,
        _CODES[input_dtype],
        dresidual.data_ptr() if residual_grad else 0,
        _CODES[dresidual.dtype],
        dweight.data_ptr() if weight_grad else 0,
        dbias.data_ptr() if bias_grad else 0,
        _CODES[dbias.dtype],
        partial.data_ptr() if weight_grad else 0,
        partial[-1].data_ptr() if bias_grad else 0,
        partial_rows,
        0 if seed is None else seed.data_ptr(),
        dropout_p,
        m,
        n,
        device,
        extension.current_stream(device),
    )
    return dx, dresidual, dweight, dbias
