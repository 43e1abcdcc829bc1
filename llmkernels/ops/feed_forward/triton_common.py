"""What the Triton feed-forward kernels of both directions share: activations, the order of tiles, the
product."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# As reference._SATURATION: beyond it every activation has reached its limit and no power of it overflows.
_SATURATION = tl.constexpr(1000.0)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution, 1 / sqrt(2 pi)
_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): of v, with 1 + tanh(v / 2) = 2 sigmoid(v)
_TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid_and_slope(v):
    """s = sigmoid(v) and s * (1 - s), both to float32 accuracy for any v: neither 1 - s nor an overflow is
    in it."""
    e = tl.exp(-tl.abs(v))
    inverse = 1.0 / (1.0 + e)
    return tl.where(v < 0, e, 1.0) * inverse, e * inverse * inverse


@triton.jit
def activate(x, FUNCTION: tl.constexpr):
    """The activation of a float32 tile and its derivative (formulas: reference.activate); whichever the
    caller does not use is not computed."""
    if FUNCTION == "relu":
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    else:
        inside = tl.clamp(x, -_SATURATION, _SATURATION, propagate_nan=tl.PropagateNan.ALL)
        if FUNCTION == "gelu":
            share = 0.5 + 0.5 * tl.erf(inside * _SQRT_HALF)
            slope = share + inside * _DENSITY_AT_0 * tl.exp(-0.5 * inside * inside)
        elif FUNCTION == "gelu_tanh":
            cubic = inside * inside * _TANH_CUBIC
            share, share_slope = _sigmoid_and_slope(inside * _TANH_SCALE * (1.0 + cubic))
            slope = share + inside * share_slope * _TANH_SCALE * (1.0 + 3.0 * cubic)
        else:
            tl.static_assert(FUNCTION == "silu", "unknown activation")
            share, share_slope = _sigmoid_and_slope(inside)
            slope = share + inside * share_slope
        # Of -inf the limit, 0, and not -inf * 0; +inf stays.
        value = tl.maximum(x, -_SATURATION, propagate_nan=tl.PropagateNan.ALL) * share
    return value, slope


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile of an M x N result this program owns. Programs that run at the same time take GROUP_M tiles
    of a column before they move on to the next: about as many rows of the one operand as columns of the
    other, which L2 holds together."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    programs_per_group = GROUP_M * tiles_n
    group = tl.program_id(0) // programs_per_group
    within = tl.program_id(0) % programs_per_group
    rows_of_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % rows_of_group, within // rows_of_group


@triton.jit
def product(
    a_ptr, b_ptr, second_b_ptr, a_stride, b_stride, rows, cols, M, N, K,
    B_ALONG_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A float32 tile [BLOCK_M, BLOCK_N] of a @ b, and of a @ second_b where there is one (else the first
    twice).

    a: [M, K], unit stride along K. b: K x N; element (k, n) lies at n * b_stride + k where B_ALONG_K, else
    at k * b_stride + n. rows, cols: int64, of the tile.
    """
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * a_stride + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    if B_ALONG_K:
        b_offs = offs_k[:, None] + cols[None, :] * b_stride  # int64 [BLOCK_K, BLOCK_N]
        b_step = tl.full([1, 1], BLOCK_K, dtype=tl.int64)
    else:
        b_offs = offs_k[:, None].to(tl.int64) * b_stride + cols[None, :]
        b_step = tl.full([1, 1], BLOCK_K, dtype=tl.int64) * b_stride
    mask_m, mask_n = (rows < M)[:, None], (cols < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    second_acc = acc
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = k + offs_k < K
        a = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        b = tl.load(b_ptr + b_offs, mask=mask_k[:, None] & mask_n, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if second_b_ptr is not None:
            second_b = tl.load(second_b_ptr + b_offs, mask=mask_k[:, None] & mask_n, other=0.0)
            second_acc = tl.dot(a, second_b, second_acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_offs += b_step
    return acc, acc if second_b_ptr is None else second_acc


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns; neither leaves the registers."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def strip(tile, INDEX: tl.constexpr, STRIPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One of 1, 2 or 4 equal strips of columns: what is made of a product at its end needs several values
    for each of it, and a strip at a time they fit in the registers."""
    tl.static_assert(STRIPS == 1 or STRIPS == 2 or STRIPS == 4)
    if STRIPS >= 2:
        left, right = _halves(tile, BLOCK_M, BLOCK_N)
        tile = right if INDEX >= STRIPS // 2 else left
    if STRIPS == 4:
        left, right = _halves(tile, BLOCK_M, BLOCK_N // 2)
        tile = right if INDEX % 2 == 1 else left
    return tile


def elements_in(tensor: Tensor) -> int:
    """How many elements into memory it starts: vector_width of it knows an address that is odd."""
    return tensor.data_ptr() // tensor.element_size()


def dot_precision(kind: str) -> str:
    """What tl.dot is told of float32 operands; 16-bit ones have no choice."""
    return "tf32" if kind == "tf32" else "ieee"
