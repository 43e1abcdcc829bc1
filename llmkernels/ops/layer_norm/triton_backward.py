"""Backward of the norms in Triton; the formulas stand in reference.backward."""

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


@triton.jit
def _load_normalized(z_ptr, mean_ptr, rstd_ptr, z_stride, rows, cols, mask_m, mask):
    """xhat = (z - mean) * rstd, or z * rstd without a mean, as a float32 tile [ROWS, BLOCK_N], and rstd
    [ROWS]."""
    z_ptrs = z_ptr + rows[:, None] * z_stride + cols[None, :]
    xhat = tl.load(z_ptrs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
    if mean_ptr is not None:
        xhat -= tl.load(mean_ptr + rows, mask=mask_m, other=0.0)[:, None]
    return xhat * rstd[:, None], rstd


@triton.jit(do_not_specialize=["dy_stride", "z_stride", "N"])
def _norm_backward_sums_kernel(
    dy_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, sums_ptr, dy_stride, z_stride, N,
    VEC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums[row] = (sum(g), sum(g * xhat)) with g = dy * weight, for rows that don't fit in registers; program
    i owns row i. Without a mean (RMSNorm) the first sum is not needed and not stored."""
    dy_stride = known_multiple(dy_stride, VEC)
    z_stride = known_multiple(z_stride, VEC)
    N = known_multiple(N, VEC)
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # int64 [1]
    lane_g = tl.zeros([1, BLOCK_N], dtype=tl.float32)
    lane_gx = tl.zeros([1, BLOCK_N], dtype=tl.float32)
    for first_column in tl.range(0, N, BLOCK_N):
        cols = first_column + tl.arange(0, BLOCK_N)
        mask = (cols < N)[None, :]
        g = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
            g = g * weight.to(tl.float32)[None, :]
        xhat, _ = _load_normalized(z_ptr, mean_ptr, rstd_ptr, z_stride, rows, cols, rows >= 0, mask)
        lane_g += g
        lane_gx += g * xhat
    if mean_ptr is not None:
        tl.store(sums_ptr + 2 * rows, tl.sum(lane_g, axis=1))
    tl.store(sums_ptr + 2 * rows + 1, tl.sum(lane_gx, axis=1))


@triton.jit
def _input_gradient(g, xhat, rstd, mean_ptr, sums_ptr, rows, mask_m, N):
    """rstd * (g - mean(g) - xhat * mean(g * xhat)) [ROWS, BLOCK_N], without mean(g) for RMSNorm. The means
    are of whole rows: of these tiles, or where tiles are but strips of rows, ready in ``sums``."""
    if sums_ptr is None:
        sum_gx = tl.sum(g * xhat, axis=1)  # [ROWS]
    else:
        sum_gx = tl.load(sums_ptr + 2 * rows + 1, mask=mask_m, other=0.0)
    dz = g - xhat * (sum_gx / N)[:, None]
    if mean_ptr is not None:
        if sums_ptr is None:
            sum_g = tl.sum(g, axis=1)
        else:
            sum_g = tl.load(sums_ptr + 2 * rows, mask=mask_m, other=0.0)
        dz -= (sum_g / N)[:, None]
    return dz * rstd[:, None]


@triton.jit(do_not_specialize=["dy_stride", "dz_stride", "z_stride", "M", "N", "threshold"])
def _norm_backward_kernel(
    dy_ptr, dz_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, sums_ptr,
    dx_ptr, dresidual_ptr, dweight_partial_ptr, dbias_partial_ptr,
    dy_stride, dz_stride, z_stride, M, N, threshold, scale,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, dresidual and partial sums over rows of dweight and dbias; a pointer that is None is not computed.

    Program (p, j) owns columns [j * BLOCK_N, (j + 1) * BLOCK_N) of the row tiles p, p + P, p + 2P, ... of P
    programs, and row p of the partials [P, N], which it keeps in registers until its last tile: no atomics,
    one fixed order. Either one column block holds whole rows, or sums_ptr brings what must be known of them.
    """
    dy_stride = known_multiple(dy_stride, VEC)
    dz_stride = known_multiple(dz_stride, VEC)
    z_stride = known_multiple(z_stride, VEC)
    N = known_multiple(N, VEC)
    first_column = tl.program_id(1) * BLOCK_N
    cols = first_column + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    if dx_ptr is not None and weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask_n, other=0.0)  # [BLOCK_N]
    dweight = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * tl.full([1], ROWS, dtype=tl.int64) + tl.arange(0, ROWS)  # int64 [ROWS]
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]  # [ROWS, BLOCK_N]
        g = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        xhat, rstd = _load_normalized(z_ptr, mean_ptr, rstd_ptr, z_stride, rows, cols, mask_m, mask)
        if dweight_partial_ptr is not None:
            dweight += g * xhat
        if dbias_partial_ptr is not None:
            dbias += g
        if dx_ptr is not None:
            if weight_ptr is not None:
                g = g * weight.to(tl.float32)[None, :]
            dx = _input_gradient(g, xhat, rstd, mean_ptr, sums_ptr, rows, mask_m, N)
            if dz_ptr is not None:
                dz_ptrs = dz_ptr + rows[:, None] * dz_stride + cols[None, :]
                dx += tl.load(dz_ptrs, mask=mask, other=0.0).to(tl.float32)
            out = rows[:, None] * N + cols[None, :]
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + out, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
            if seed_ptr is not None:
                kept = kept_by_dropout(seed_ptr, rows, first_column, N, threshold, ROWS, BLOCK_N)
                dx = tl.where(kept, dx * scale, 0.0)
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(0).to(tl.int64) * N + cols
    if dweight_partial_ptr is not None:
        tl.store(dweight_partial_ptr + partial, tl.sum(dweight, axis=0), mask=mask_n)
    if dbias_partial_ptr is not None:
        tl.store(dbias_partial_ptr + partial, tl.sum(dbias, axis=0), mask=mask_n)


@triton.jit(do_not_specialize=["P", "N"])
def _norm_backward_finalize_kernel(
    dweight_partial_ptr, dbias_partial_ptr, dweight_ptr, dbias_ptr, P, N,
    VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dweight and dbias [N] from their float32 partials [P, N], in a fixed order; program j owns BLOCK_N
    columns."""
    N = known_multiple(N, VEC)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = cols < N
    dweight = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for first_row in tl.range(0, P, BLOCK_P):
        rows = first_row + tl.arange(0, BLOCK_P).to(tl.int64)
        partial = rows[:, None] * N + cols[None, :]
        mask = (rows < P)[:, None] & mask_n[None, :]  # [BLOCK_P, BLOCK_N]
        if dweight_ptr is not None:
            dweight += tl.load(dweight_partial_ptr + partial, mask=mask, other=0.0)
        if dbias_ptr is not None:
            dbias += tl.load(dbias_partial_ptr + partial, mask=mask, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=mask_n)


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
    """reference.backward by the kernels of this module: same arguments, same results (dx, dresidual, dweight,
    dbias).

    dweight and dbias depend on how many programs share the rows, a number fixed by M, N and the GPU's model:
    they are bitwise reproducible on one GPU, and nothing is added atomically.
    """
    m, n = z.shape
    device = z.device
    wants_weight = weight_grad and weight is not None
    wants_bias = bias_dtype is not None
    wants_residual = input_grad and residual_dtype is not None
    dx = torch.empty((m, n) if input_grad else 0, dtype=input_dtype, device=device)
    dresidual = torch.empty(
        (m, n) if wants_residual else 0, dtype=residual_dtype or input_dtype, device=device
    )
    dweight = torch.empty(
        n if wants_weight else 0, dtype=z.dtype if weight is None else weight.dtype, device=device
    )
    dbias = torch.empty(n if wants_bias else 0, dtype=bias_dtype or z.dtype, device=device)
    if m == 0 or n == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    if not (input_grad or wants_weight or wants_bias):
        return dx, dresidual, dweight, dbias

    dy_stride, z_stride = dy.stride(0), z.stride(0)
    dz_stride = 0 if dz is None else dz.stride(0)
    dtypes = (dy.dtype, None if dz is None else dz.dtype, z.dtype, input_dtype, residual_dtype)
    width = vector_width(dtypes, n, dy_stride, dz_stride, z_stride)
    means = None if rms else mean
    tile = tiles.backward(n, architecture(device), width, dz is not None or seed is not None)
    programs = tile.row_programs(m, n, processors(device))
    # One allocation for both; the finalize kernel reads it back.
    partials = torch.empty((wants_weight + wants_bias, programs, n), dtype=torch.float32, device=device)
    dweight_partial = partials[0] if wants_weight else None
    dbias_partial = partials[-1] if wants_bias else None
    with on_device(z):
        sums = None
        if tile.strips and input_grad:
            sums = torch.empty((m, 2), dtype=torch.float32, device=device)
            _norm_backward_sums_kernel[(m,)](
                dy, z, weight, means, rstd, sums, dy_stride, z_stride, n, width,
                tile.sums_block_n, num_warps=tile.sums_num_warps,
            )  # fmt: skip
        _norm_backward_kernel[(programs, -(-n // tile.block_n))](
            dy, dz, z, weight, means, rstd, seed, sums,
            dx if input_grad else None, dresidual if wants_residual else None, dweight_partial, dbias_partial,
            dy_stride, dz_stride, z_stride, m, n, dropout_threshold(dropout_p), dropout_scale(dropout_p),
            width, tile.rows, tile.block_n, tile.num_stages, num_warps=tile.num_warps,
        )  # fmt: skip
        if wants_weight or wants_bias:
            last = tiles.finalize(programs)
            _norm_backward_finalize_kernel[(-(-n // last.block_n),)](
                dweight_partial, dbias_partial,
                dweight if wants_weight else None, dbias if wants_bias else None,
                programs, n, vector_width((torch.float32,), n),
                last.block_p, last.block_n, num_warps=last.num_warps,
            )  # fmt: skip
    return dx, dresidual, dweight, dbias
