"""Backward of linear layer + activation in Triton; the formulas stand in reference.backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import dropout_scale, dropout_threshold
from ...triton_support import (
    architecture,
    kept_by_dropout,
    known_multiple,
    on_device,
    processors,
    vector_width,
)
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
def _pre_gradient(
    dhidden, pre_ptr, seed_ptr, dpre_ptr, hidden_ptr, rows, cols, first_column, mask, N, threshold, scale,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Makes of a float32 tile of dhidden that of dpre and hidden, and stores them; returns dpre unrounded,
    gated its two halves (else the one twice)."""
    pre_offs = rows[:, None] * (2 * N if GATED else N) + cols[None, :]  # int64 [BLOCK_M, BLOCK_N]
    gate = tl.load(pre_ptr + pre_offs, mask=mask, other=0.0).to(tl.float32)
    hidden, slope = activate(gate, FUNCTION)
    if seed_ptr is not None:
        kept = kept_by_dropout(seed_ptr, rows, first_column, N, threshold, BLOCK_M, BLOCK_N)
        dhidden = tl.where(kept, dhidden * scale, 0.0)
    dup = dhidden
    if GATED:
        up = tl.load(pre_ptr + pre_offs + N, mask=mask, other=0.0).to(tl.float32)
        dup = dhidden * hidden
        dhidden *= up
        hidden *= up
    # Where relu is off there is no gradient at all, not even of an infinite dhidden.
    dgate = tl.where(slope == 0, 0.0, dhidden) if FUNCTION == "relu" else dhidden * slope
    if dpre_ptr is not None:
        tl.store(dpre_ptr + pre_offs, dgate.to(dpre_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(dpre_ptr + pre_offs + N, dup.to(dpre_ptr.dtype.element_ty), mask=mask)
    if hidden_ptr is not None:
        if seed_ptr is not None:
            hidden = tl.where(kept, hidden * scale, 0.0)
        hidden_ptrs = hidden_ptr + rows[:, None] * N + cols[None, :]
        tl.store(hidden_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
    return dgate, dup if GATED else dgate


@triton.jit
def _finish_strip(
    dhidden, pre_ptr, seed_ptr, dpre_ptr, hidden_ptr, dbias_partial_ptr, rows, first_column, M, N,
    threshold, scale,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Makes of one strip of dhidden dpre, hidden and the sums of dpre over the rows of the tile."""
    cols = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    dgate, dup = _pre_gradient(
        dhidden, pre_ptr, seed_ptr, dpre_ptr, hidden_ptr, rows, cols, first_column, mask, N,
        threshold, scale, FUNCTION, GATED, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if dbias_partial_ptr is not None:
        # Rows past M are not all zeros: 0 @ weight is NaN where the weight is infinite.
        tl.store(dbias_partial_ptr + cols, tl.sum(tl.where(mask, dgate, 0.0), axis=0), mask=cols < N)
        if GATED:
            tl.store(dbias_partial_ptr + N + cols, tl.sum(tl.where(mask, dup, 0.0), axis=0), mask=cols < N)


@triton.jit(do_not_specialize=["dy_stride", "weight_stride", "M", "N", "K", "threshold"])
def _linear_activation_backward_kernel(
    dy_ptr, weight_ptr, pre_ptr, seed_ptr, dpre_ptr, hidden_ptr, dbias_partial_ptr,
    dy_stride, weight_stride, M, N, K, threshold, scale,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, WEIGHT_ALONG_K: tl.constexpr, PRECISION: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """dpre = dropout(dy @ weight) * act'(pre), hidden made again from pre, and partial sums over rows of
    dpre; a pointer that is None is not computed. dy: [M, K], weight: [K, N], pre: [M, N], gated [M, 2 * N].

    A program owns one BLOCK_M x BLOCK_N tile, gated of both halves, and row tile_m of the partials, in which
    no other program writes its columns: no atomics, one fixed order. It finishes its tile in STRIPS strips.
    """
    dy_stride = known_multiple(dy_stride, VEC)
    weight_stride = known_multiple(weight_stride, VEC)
    N = known_multiple(N, VEC)
    K = known_multiple(K, VEC)
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64 [BLOCK_M]
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64 [BLOCK_N]
    dhidden, _ = product(
        dy_ptr, weight_ptr, None, dy_stride, weight_stride, rows, cols, M, N, K,
        WEIGHT_ALONG_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    if dbias_partial_ptr is not None:
        dbias_partial_ptr += tile_m.to(tl.int64) * (2 * N if GATED else N)
    WIDTH: tl.constexpr = BLOCK_N // STRIPS
    for i in tl.static_range(STRIPS):
        _finish_strip(
            strip(dhidden, i, STRIPS, BLOCK_M, BLOCK_N), pre_ptr, seed_ptr, dpre_ptr, hidden_ptr,
            dbias_partial_ptr, rows, tile_n * BLOCK_N + i * WIDTH, M, N,
            threshold, scale, FUNCTION, GATED, BLOCK_M, WIDTH,
        )  # fmt: skip


@triton.jit(do_not_specialize=["dy_stride", "M", "N"])
def _activation_backward_kernel(
    dy_ptr, pre_ptr, dpre_ptr, dbias_partial_ptr, dy_stride, M, N,
    FUNCTION: tl.constexpr, GATED: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As _linear_activation_backward_kernel where no linear layer follows: dhidden is dy. Program (p, j) owns
    BLOCK_N columns of the row tiles p, p + P, ... of P programs, and row p of the partials."""
    dy_stride = known_multiple(dy_stride, VEC)
    N = known_multiple(N, VEC)
    first_column = tl.program_id(1) * BLOCK_N
    cols = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
    sum_gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    sum_up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tile * tl.full([1], BLOCK_M, dtype=tl.int64) + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * dy_stride + cols[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        dgate, dup = _pre_gradient(
            dy, pre_ptr, None, dpre_ptr, None, rows, cols, first_column, mask, N, 0, 1.0,
            FUNCTION, GATED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        sum_gate += dgate
        if GATED:
            sum_up += dup
    if dbias_partial_ptr is not None:
        partial_ptrs = dbias_partial_ptr + tl.program_id(0).to(tl.int64) * (2 * N if GATED else N) + cols
        tl.store(partial_ptrs, tl.sum(sum_gate, axis=0), mask=cols < N)
        if GATED:
            tl.store(partial_ptrs + N, tl.sum(sum_up, axis=0), mask=cols < N)


@triton.jit(do_not_specialize=["P", "N"])
def _bias_gradient_kernel(
    partial_ptr, dbias_ptr, P, N, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dbias [N] from its float32 partials [P, N], in a fixed order; program j owns BLOCK_N columns."""
    N = known_multiple(N, VEC)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for first_row in tl.range(0, P, BLOCK_P):
        rows = first_row + tl.arange(0, BLOCK_P).to(tl.int64)
        mask = (rows < P)[:, None] & (cols < N)[None, :]  # [BLOCK_P, BLOCK_N]
        total += tl.load(partial_ptr + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(dbias_ptr + cols, tl.sum(total, axis=0).to(dbias_ptr.dtype.element_ty), mask=cols < N)


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
    """reference.backward by the kernels of this module: same arguments, same results (dpre, hidden, dbias);
    dropout and hidden with a weight only.

    The order in which dbias is added up depends on M, N and the GPU's model: it is bitwise reproducible on
    one GPU, and nothing is added atomically.
    """
    function, gated = ACTIVATIONS[activation]
    (m, width), device = pre.shape, pre.device
    n = width // 2 if gated else width
    dpre = torch.empty((m, width) if wants_dpre else 0, dtype=pre.dtype, device=device)
    hidden = torch.empty((m, n) if wants_hidden else 0, dtype=pre.dtype, device=device)
    dbias = torch.empty(width if wants_dbias else 0, dtype=pre.dtype, device=device)
    if m == 0 or n == 0:
        return dpre, hidden, dbias.zero_()
    outputs = (dpre if wants_dpre else None, hidden if wants_hidden else None)
    if weight is None:
        flat = tiles.ELEMENTWISE
        programs = flat.row_programs(m, n, processors(device))
    else:
        weight, weight_stride, along_k = operand(weight, 0)
        k, kind = weight.shape[0], product_kind(pre.dtype)
        sizes = (n, k, dy.stride(0), weight_stride, elements_in(dy), elements_in(weight))
        vector = vector_width((pre.dtype,), *sizes)
        tile = tiles.backward(m, kind, vector, architecture(device))
        programs = -(-m // tile.block_m)
    partial = torch.empty((programs, width), dtype=torch.float32, device=device) if wants_dbias else None
    with on_device(pre):
        if weight is None:
            _activation_backward_kernel[(programs, -(-n // flat.block_n))](
                dy, pre, outputs[0], partial, dy.stride(0), m, n,
                function, gated, vector_width((pre.dtype,), n, dy.stride(0)),
                flat.block_m, flat.block_n, num_warps=flat.num_warps,
            )  # fmt: skip
        else:
            _linear_activation_backward_kernel[(programs * -(-n // tile.block_n),)](
                dy, weight, pre, seed, *outputs, partial,
                dy.stride(0), weight_stride, m, n, k, dropout_threshold(dropout_p), dropout_scale(dropout_p),
                function, gated, along_k, dot_precision(kind),
                vector, tile.block_m, tile.block_n, tile.block_k,
                tile.group_m, tile.num_stages, tile.strips, num_warps=tile.num_warps,
            )  # fmt: skip
        if partial is not None:
            last = tiles.FINALIZE
            _bias_gradient_kernel[(-(-width // last.block_n),)](
                partial, dbias, programs, width, vector_width((torch.float32,), width),
                last.block_p, last.block_n, num_warps=last.num_warps,
            )  # fmt: skip
    return dpre, hidden, dbias
