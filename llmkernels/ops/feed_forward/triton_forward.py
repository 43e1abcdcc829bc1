"""Linear layer + activation in Triton: hidden = dropout(act(x @ weight.T + bias))."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import dropout_scale, dropout_threshold
from ...triton_support import architecture, kept_by_dropout, known_multiple, on_device, vector_width
from . import tiles
from .call import ACTIVATIONS, operand, product_kind
from .triton_common import (
    activate,
    dot_precision,
    elements_in,
    product,
    strip,
    tile_of_program,
)


@triton.jit
def _add_bias_and_round(acc, bias_ptr, pre_ptr, pre_offs, cols, mask, N, DTYPE: tl.constexpr):
    """acc + bias as float32 values of DTYPE, the pre-activation, which is stored where it is wanted."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    rounded = acc.to(DTYPE)
    if pre_ptr is not None:
        tl.store(pre_ptr + pre_offs, rounded, mask=mask)
    return rounded.to(tl.float32)


@triton.jit
def _finish_strip(
    gate, up, bias_ptr, seed_ptr, pre_ptr, hidden_ptr, rows, first_column, M, N, threshold, scale,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Makes of the products of one strip of columns pre and hidden, and stores them."""
    cols = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]  # [BLOCK_M, BLOCK_N]
    pre_offs = rows[:, None] * (2 * N if GATED else N) + cols[None, :]
    gate = _add_bias_and_round(gate, bias_ptr, pre_ptr, pre_offs, cols, mask, N, DTYPE)
    hidden, _ = activate(gate, FUNCTION)
    if GATED:
        up_bias_ptr = None if bias_ptr is None else bias_ptr + N
        hidden *= _add_bias_and_round(up, up_bias_ptr, pre_ptr, pre_offs + N, cols, mask, N, DTYPE)
    if hidden_ptr is not None:
        if seed_ptr is not None:
            kept = kept_by_dropout(seed_ptr, rows, first_column, N, threshold, BLOCK_M, BLOCK_N)
            hidden = tl.where(kept, hidden * scale, 0.0)
        tl.store(hidden_ptr + rows[:, None] * N + cols[None, :], hidden.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["x_stride", "weight_stride", "M", "N", "K", "threshold"])
def _linear_activation_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, seed_ptr, pre_ptr, hidden_ptr,
    x_stride, weight_stride, M, N, K, threshold, scale,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, WEIGHT_ALONG_K: tl.constexpr, PRECISION: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """pre = x @ weight.T + bias [M, N], gated [M, 2 * N], and hidden = dropout(act(pre)) [M, N] resp.
    dropout(act(gate) * up); of the two a pointer that is None is not computed.

    A program owns one BLOCK_M x BLOCK_N tile of hidden, gated with both halves of pre that it is made of,
    and finishes it in STRIPS strips of columns.
    """
    x_stride = known_multiple(x_stride, VEC)
    weight_stride = known_multiple(weight_stride, VEC)
    N = known_multiple(N, VEC)
    K = known_multiple(K, VEC)
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64 [BLOCK_M]
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64 [BLOCK_N]
    up_weight_ptr = None
    if GATED:
        up_weight_ptr = weight_ptr + N.to(tl.int64) * (weight_stride if WEIGHT_ALONG_K else 1)
    gate, up = product(
        x_ptr, weight_ptr, up_weight_ptr, x_stride, weight_stride, rows, cols, M, N, K,
        WEIGHT_ALONG_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N // STRIPS
    for i in tl.static_range(STRIPS):
        _finish_strip(
            strip(gate, i, STRIPS, BLOCK_M, BLOCK_N), strip(up, i, STRIPS, BLOCK_M, BLOCK_N),
            bias_ptr, seed_ptr, pre_ptr, hidden_ptr, rows, tile_n * BLOCK_N + i * WIDTH, M, N,
            threshold, scale, FUNCTION, GATED, x_ptr.dtype.element_ty, BLOCK_M, WIDTH,
        )  # fmt: skip


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
    """reference.forward by the kernel of this module: same arguments, same results (hidden, pre)."""
    function, gated = ACTIVATIONS[activation]
    (m, k), width = x.shape, weight.shape[0]
    n = width // 2 if gated else width
    hidden = torch.empty((m, n) if wants_hidden else 0, dtype=x.dtype, device=x.device)
    pre = torch.empty((m, width) if wants_pre else 0, dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return hidden, pre
    weight, weight_stride, along_k = operand(weight, 1)
    sizes = (n, k, x.stride(0), weight_stride, elements_in(x), elements_in(weight))
    vector = vector_width((x.dtype,), *sizes)
    kind = product_kind(x.dtype)
    tile = tiles.forward(m, kind, gated, vector, architecture(x.device))
    with on_device(x):
        _linear_activation_forward_kernel[(-(-m // tile.block_m) * -(-n // tile.block_n),)](
            x, weight, bias, seed, pre if wants_pre else None, hidden if wants_hidden else None,
            x.stride(0), weight_stride, m, n, k, dropout_threshold(dropout_p), dropout_scale(dropout_p),
            function, gated, along_k, dot_precision(kind),
            vector, tile.block_m, tile.block_n, tile.block_k, tile.group_m, tile.num_stages, tile.strips,
            num_warps=tile.num_warps,
        )  # fmt: skip
    return hidden, pre
