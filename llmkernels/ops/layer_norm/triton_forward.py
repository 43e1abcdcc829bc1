"""Forward of the norms in Triton: y = norm(z) * weight + bias, z = residual + dropout(x)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import dropout_scale, dropout_threshold
from ...triton_support import architecture, kept_by_dropout, known_multiple, on_device, vector_width
from . import tiles


@triton.jit
def _load_stream(
    x_ptr, residual_ptr, seed_ptr, z_ptr, x_stride, residual_stride, N, threshold, scale,
    rows, first_column, mask,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """A float32 tile of z, 0 outside the mask: x, or with a residual the sum as rounded to z's dtype, which
    is stored. The program that normalises a row is the one that stores its z."""
    cols = first_column + tl.arange(0, BLOCK_N)[None, :]
    x_ptrs = x_ptr + rows[:, None] * x_stride + cols
    z = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)  # [ROWS, BLOCK_N]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows[:, None] * residual_stride + cols
        residual = tl.load(residual_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if seed_ptr is not None:
            kept = kept_by_dropout(seed_ptr, rows, first_column, N, threshold, ROWS, BLOCK_N)
            z = tl.where(kept, z * scale, 0.0)
        rounded = (residual + z).to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + rows[:, None] * N + cols, rounded, mask=mask)
        z = rounded.to(tl.float32)
    return z


@triton.jit
def _inverse_deviation(sum_of_squares, count, eps):
    """1 / sqrt(variance + eps), each operation correctly rounded: the approximate ones flush denormal
    variances."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(sum_of_squares, count) + eps))


@triton.jit
def _scale_and_shift(xhat, weight_ptr, bias_ptr, cols, N):
    """xhat * weight + bias on a [ROWS, BLOCK_N] tile at columns ``cols``, with the parameters that there
    are."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
        xhat = xhat * weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
        xhat = xhat + bias.to(tl.float32)[None, :]
    return xhat


@triton.jit(do_not_specialize=["x_stride", "residual_stride", "M", "N", "threshold"])
def _norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, M, N, eps, threshold, scale,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = (z - mean) * rstd * weight + bias of rows that fit in registers; without mean_ptr RMSNorm, y = z *
    rstd * weight.

    Program i owns rows [i * ROWS, (i + 1) * ROWS), reads each once and saves z (if there is a residual), mean
    and rstd. The variance is taken from the centred registers, never as E[z^2] - mean^2; the mean itself is
    corrected by the mean of z - mean, which is what its own rounding and that of its sum have left, and the
    correction stays apart from it in the centring: a row of values near 1e6 keeps all digits of its
    deviations.
    """
    x_stride = known_multiple(x_stride, VEC)
    residual_stride = known_multiple(residual_stride, VEC)
    N = known_multiple(N, VEC)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64 [ROWS]
    cols = tl.arange(0, BLOCK_N)
    mask_m = rows < M
    mask = mask_m[:, None] & (cols < N)[None, :]  # [ROWS, BLOCK_N]
    count = N.to(tl.float32)
    centred = _load_stream(
        x_ptr, residual_ptr, seed_ptr, z_ptr, x_stride, residual_stride, N, threshold, scale, rows, 0, mask,
        ROWS, BLOCK_N, "evict_first",
    )  # fmt: skip
    if mean_ptr is not None:
        mean = tl.div_rn(tl.sum(centred, axis=1), count)  # [ROWS]
        centred = tl.where(mask, centred - mean[:, None], 0.0)
        correction = tl.div_rn(tl.sum(centred, axis=1), count)
        centred = tl.where(mask, centred - correction[:, None], 0.0)
        tl.store(mean_ptr + rows, mean + correction, mask=mask_m)
    rstd = _inverse_deviation(tl.sum(centred * centred, axis=1), count, eps)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    y = _scale_and_shift(centred * rstd[:, None], weight_ptr, bias_ptr, cols, N)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge_lanes(lane_mean, lane_squares, N, BLOCK_N: tl.constexpr):
    """Mean and sum of squared deviations [1] of a row from those of its lanes [1, BLOCK_N], lane j being the
    columns j, j + BLOCK_N, ...: Chan, Golub and LeVeque (1983), for many groups at once."""
    lane_count = ((N - 1 - tl.arange(0, BLOCK_N)) // BLOCK_N + 1).to(tl.float32)[None, :]
    mean = tl.div_rn(tl.sum(lane_mean * lane_count, axis=1), N.to(tl.float32))
    between = lane_mean - mean[:, None]
    return mean, tl.sum(lane_squares + lane_count * between * between, axis=1)


@triton.jit(do_not_specialize=["x_stride", "residual_stride", "N", "threshold"])
def _norm_forward_looped_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr,
    x_stride, residual_stride, N, eps, threshold, scale,
    VEC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As ``_norm_forward_kernel`` for rows that don't fit in registers, N >= BLOCK_N; program i owns row i.

    The row passes twice, the second time as z, mostly from L2: a first loop makes z and, in each lane,
    Welford's running mean and squares of its columns; no value crosses lanes until _merge_lanes. All
    deviations are taken from a pivot near the mean, the mean of the first block, so that those of a row far
    from zero are exact.
    """
    x_stride = known_multiple(x_stride, VEC)
    residual_stride = known_multiple(residual_stride, VEC)
    N = known_multiple(N, VEC)
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # int64 [1]
    lanes = tl.arange(0, BLOCK_N)
    count = N.to(tl.float32)
    z = _load_stream(
        x_ptr, residual_ptr, seed_ptr, z_ptr, x_stride, residual_stride, N, threshold, scale, rows, 0,
        (lanes < N)[None, :], 1, BLOCK_N, "evict_last",
    )  # fmt: skip
    if mean_ptr is not None:
        pivot = tl.sum(z, axis=1) / BLOCK_N  # [1]
        lane_mean = z - pivot[:, None]  # [1, BLOCK_N]
        lane_squares = tl.zeros([1, BLOCK_N], dtype=tl.float32)
    else:
        lane_squares = z * z
    seen = 1.0
    for first_column in tl.range(BLOCK_N, N, BLOCK_N):
        mask = (first_column + lanes < N)[None, :]
        z = _load_stream(
            x_ptr, residual_ptr, seed_ptr, z_ptr, x_stride, residual_stride, N, threshold, scale,
            rows, first_column, mask, 1, BLOCK_N, "evict_last",
        )  # fmt: skip
        if mean_ptr is not None:
            seen += 1.0
            deviation = tl.where(mask, z - pivot[:, None] - lane_mean, 0.0)
            lane_mean += deviation / seen
            lane_squares += tl.where(mask, deviation * (z - pivot[:, None] - lane_mean), 0.0)
        else:
            lane_squares += z * z
    if mean_ptr is not None:
        offset, squares = _merge_lanes(lane_mean, lane_squares, N, BLOCK_N)
        tl.store(mean_ptr + rows, pivot + offset)
    else:
        squares = tl.sum(lane_squares, axis=1)
    rstd = _inverse_deviation(squares, count, eps)  # [1]
    tl.store(rstd_ptr + rows, rstd)

    if residual_ptr is not None:
        x_ptr, x_stride = z_ptr, N
        tl.debug_barrier()  # the threads that read z need not be those that stored it
    for first_column in tl.range(0, N, BLOCK_N):
        cols = first_column + lanes
        mask = (cols < N)[None, :]
        z_ptrs = x_ptr + rows[:, None] * x_stride + cols[None, :]
        centred = tl.load(z_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if mean_ptr is not None:
            centred = centred - pivot[:, None] - offset[:, None]
        y = _scale_and_shift(centred * rstd[:, None], weight_ptr, bias_ptr, cols, N)
        tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


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
    """reference.forward by the kernels of this module: same arguments, same results (y, z, mean, rstd)."""
    m, n = x.shape
    y = torch.empty((m, n), dtype=output_dtype, device=x.device)
    z = torch.empty((m, n) if residual is not None else 0, dtype=residual_dtype, device=x.device)
    mean = torch.empty(0 if rms else m, dtype=torch.float32, device=x.device)
    rstd = torch.empty(m, dtype=torch.float32, device=x.device)
    if m == 0 or n == 0:
        return y, z, mean.fill_(torch.nan), rstd.fill_(torch.nan)  # of no elements: 0 / 0
    x_stride = x.stride(0)
    residual_stride = 0 if residual is None else residual.stride(0)
    weight_dtype = None if weight is None else weight.dtype
    bias_dtype = None if bias is None else bias.dtype
    dtypes = (
        x.dtype,
        None if residual is None else residual.dtype,
        weight_dtype,
        bias_dtype,
        residual_dtype,
        output_dtype,
    )
    width = vector_width(dtypes, n, x_stride, residual_stride)
    tile = tiles.forward(n, architecture(x.device), width, residual is not None)
    arguments = (
        x, residual, weight, bias, seed, y, None if residual is None else z, None if rms else mean, rstd,
        x_stride, residual_stride,
    )  # fmt: skip
    scalars = (eps, dropout_threshold(dropout_p), dropout_scale(dropout_p), width)
    with on_device(x):
        if tile.looped:
            _norm_forward_looped_kernel[(m,)](*arguments, n, *scalars, tile.block_n, num_warps=tile.num_warps)
        else:
            grid = (-(-m // tile.rows),)
            _norm_forward_kernel[grid](
                *arguments, m, n, *scalars, tile.rows, tile.block_n, num_warps=tile.num_warps
            )
    return y, z, mean, rstd
