"""The CUDA C++ kernels of csrc/feed_forward; signatures, shapes and results as reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension
from .call import ACTIVATIONS, FeedForwardCall, operand, product_kind

# csrc/feed_forward/feed_forward.h.
_FUNCTIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


def unsupported(call: FeedForwardCall) -> list[str]:
    """The reasons of all kernels, and those of the compiled module: missing, or not for this device."""
    reasons = call.unsupported_by_kernels()
    obstacle = extension.device_obstacle(call.device)
    return reasons if obstacle is None else [*reasons, obstacle]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    wants_pre: bool,
    wants_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """hidden, pre: see reference.forward."""
    function, gated = ACTIVATIONS[activation]
    (m, k), width = x.shape, weight.shape[0]
    n = width // 2 if gated else width
    hidden = x.new_empty((m, n) if wants_hidden else 0)
    pre = x.new_empty((m, width) if wants_pre else 0)
    if m == 0 or n == 0:
        return hidden, pre
    weight, weight_stride, along_k = operand(weight, 1)
    device = max(x.get_device(), 0)
    extension.load().linear_activation_forward(
        extension.DTYPE_CODES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight_stride,
        along_k,
        0 if bias is None else bias.data_ptr(),
        pre.data_ptr() if wants_pre else 0,
        hidden.data_ptr() if wants_hidden else 0,
        0 if seed is None else seed.data_ptr(),
        dropout_p,
        _FUNCTIONS[function],
        gated,
        product_kind(x.dtype) == "tf32",
        m,
        n,
        k,
        device,
        extension.current_stream(device),
    )
    return hidden, pre


def backward(
    dy: Tensor,
    weight: Tensor | None,
    pre: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    wants_dpre: bool,
    wants_hidden: bool,
    wants_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre, hidden, dbias: see reference.backward. dbias is added up in an order that depends on M, N and the
    GPU's model: it is bitwise reproducible on one GPU, and nothing is added atomically."""
    function, gated = ACTIVATIONS[activation]
    m, width = pre.shape
    n = width // 2 if gated else width
    dpre = pre.new_empty((m, width) if wants_dpre else 0)
    hidden = pre.new_empty((m, n) if wants_hidden else 0)
    dbias = pre.new_empty(width if wants_dbias else 0)
    if m == 0 or n == 0:
        return dpre, hidden, dbias.zero_()
    module, dtype = extension.load(), extension.DTYPE_CODES[pre.dtype]
    device = max(pre.get_device(), 0)
    k = weight_stride = partial_rows = 0
    along_k = False
    if weight is not None:
        weight, weight_stride, along_k = operand(weight, 0)
        k = weight.shape[0]
    tf32 = product_kind(pre.dtype) == "tf32"
    if wants_dbias:
        partial_rows = module.linear_activation_partial_rows(dtype, weight is not None, tf32, m, n, device)
    partial = pre.new_empty((partial_rows, width), dtype=torch.float32)
    module.linear_activation_backward(
        dtype,
        dy.data_ptr(),
        dy.stride(0),
        0 if weight is None else weight.data_ptr(),
        weight_stride,
        along_k,
        pre.data_ptr(),
        dpre.data_ptr() if wants_dpre else 0,
        hidden.data_ptr() if wants_hidden else 0,
        dbias.data_ptr() if wants_dbias else 0,
        partial.data_ptr() if wants_dbias else 0,
        partial_rows,
        0 if seed is None else seed.data_ptr(),
        dropout_p,
        _FUNCTIONS[function],
        gated,
        tf32,
        m,
        n,
        k,
        device,
        extension.current_stream(device),
    )
    return dpre, hidden, dbias
