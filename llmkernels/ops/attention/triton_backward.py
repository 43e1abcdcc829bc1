"""Backward of attention in Triton; the formulas stand in reference.backward.

Probabilities are made again from the logsumexp, tile by tile: one kernel walks the queries of each tile of
keys for dk and dv, another the keys of each tile of queries for dq, so that every sum has one owner and one
order. The gradient of a bias has a kernel of its own, in triton_backward_bias.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import dropout_scale, dropout_threshold
from ...triton_support import (
    INTERPRETED,
    architecture,
    dot_precision,
    kept_by_dropout,
    on_device,
    padded,
    vector_width,
)
from . import tiles
from .call import UNLIMITED, Settings, new_rows, sink_gradient
from .triton_backward_bias import _attention_backward_bias_kernel
from .triton_backward_common import (
    bias_pointers,
    head_rows,
    load_rows,
    store_rows,
    tile_gradients,
)
from .triton_common import (
    LOG2E,
    addressable,
    cut_tile,
    finite,
    sequence_bounds,
    tile_logits,
    tile_range,
)

_UNLIMITED = tl.constexpr(UNLIMITED)
# Elements of out that a program of the rows kernel takes: 32 a thread of its 4 warps.
_ROWS_ELEMENTS = 4096
# The most rows of a tile: so many may be read after the last one.
_ROWS_BEYOND = 256


@triton.jit(do_not_specialize=["length", "heads", "tiles"])
def _attention_backward_rows_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, lse_log2_ptr, delta_ptr,
    out_strides, dout_strides, length, heads, tiles,
    VEC: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * dout) - dlse and the logsumexp to base 2, float32 [B, H, L]; program i owns
    BLOCK_M rows of one head.

    The out of a row that sees no key is 0: whatever comes in for it, even NaN, adds 0. Its delta is then
    -dlse if the sink takes all of its weight, and else 0.
    """
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    mask_m = first + tl.arange(0, BLOCK_M) < length
    out_ptr, out_stride = head_rows(out_ptr, out_strides, pair // heads, pair % heads, 0, VEC)
    dout_ptr, dout_stride = head_rows(dout_ptr, dout_strides, pair // heads, pair % heads, 0, VEC)
    out = load_rows(out_ptr, out_stride, first, mask_m, BLOCK_M, DV, BLOCK_DV).to(tl.float32)
    dout = load_rows(dout_ptr, dout_stride, first, mask_m, BLOCK_M, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(tl.where(out == 0, 0.0, out * dout), axis=1)  # [BLOCK_M]
    rows = pair * length + first + tl.arange(0, BLOCK_M)  # int64 [BLOCK_M]
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=mask_m, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=mask_m, other=0.0)
    tl.store(lse_log2_ptr + rows, lse * LOG2E, mask=mask_m)
    tl.store(delta_ptr + rows, tl.where(lse == float("-inf"), 0.0, delta), mask=mask_m)


@triton.jit(do_not_specialize=[
    "length_q", "length_k", "heads", "group", "tiles", "left", "right", "bottom_right", "quads_per_row",
    "threshold",
])  # fmt: skip
def _attention_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_log2_ptr, delta_ptr, bias_ptr, slopes_ptr, seed_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, dk_ptr, dv_ptr, dq_sum_ptr,
    q_strides, k_strides, v_strides, dout_strides, bias_strides, slopes_stride, dk_strides, dv_strides,
    length_q, length_k, heads, group, tiles,
    left, right, bottom_right, quads_per_row, threshold, kept_scale, scale, softcap,
    VEC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = scale dS^T q and dv = dropout(P)^T dout; where dq_sum_ptr, float32 [B, heads, Lq, D], is given, dS
    k is added to it atomically.

    Program ``tile + tiles * (sequence * key heads + key head)`` owns BLOCK_N keys and visits, of each query
    head of their group, the tiles of queries that see some of them: first, without masks, those that see them
    all. Its tiles are transposed, [BLOCK_N, BLOCK_M], so that P^T and dS^T are left operands, which a dot
    takes from registers. heads: of queries. length_q, length_k: of packed sequences the number of all tokens.
    """
    pid = tl.program_id(0)
    first_n = pid % tiles * BLOCK_N
    key_head = (pid // tiles % (heads // group)).to(tl.int64)
    sequence = (pid // tiles // (heads // group)).to(tl.int64)
    start_q, found_q = sequence_bounds(cu_seqlens_q_ptr, sequence, length_q)
    start_k, found_k = sequence_bounds(cu_seqlens_k_ptr, sequence, length_k)
    if first_n >= found_k:
        return
    batch = sequence if cu_seqlens_q_ptr is None else tl.zeros_like(sequence)
    offset = bottom_right * (found_k - found_q)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    n = first_n + offs_n
    mask_n = n < found_k
    k_ptr, k_stride = head_rows(k_ptr, k_strides, batch, key_head, start_k, VEC)
    v_ptr, v_stride = head_rows(v_ptr, v_strides, batch, key_head, start_k, VEC)
    k = load_rows(k_ptr, k_stride, first_n, mask_n, BLOCK_N, D, BLOCK_D)
    v = load_rows(v_ptr, v_stride, first_n, mask_n, BLOCK_N, DV, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    last_n = tl.minimum(first_n + BLOCK_N, found_k) - 1
    low, full_low, full_high, high = tile_range(
        first_n - offset, last_n - offset, right, left, found_q, BLOCK_M
    )
    if bias_ptr is not None:
        full_high = full_low
    if dq_sum_ptr is not None:
        # dk and dv of the rows beyond the last key are not stored, but dq sums over them: mask them.
        full_high = tl.where(first_n + BLOCK_N > found_k, full_low, full_high)
    # With a bias or a mask no tile is known to be full.
    for CUT in tl.static_range(0 if bias_ptr is None else 1, 2):
        visits = (full_high - full_low) // BLOCK_M
        if CUT:
            visits = (high - low) // BLOCK_M - visits
        # One loop over heads and tiles: loads run ahead from one head into the next.
        for index in tl.range(0, group * visits, num_stages=STAGES):
            head = key_head * group + index // visits
            first_m = full_low + index % visits * BLOCK_M
            mask_m = None
            inside = None
            if CUT:
                first_m = cut_tile(index % visits, low, full_low, full_high, BLOCK_M)
            m = first_m + offs_m
            position = m + offset
            if CUT:
                # Without a bias these are the rows that see a key: what is NaN in another's q or dout must
                # not meet the probabilities of 0.
                mask_m = (m < found_q) & (position >= -right) & (position - left < found_k)
                inside = mask_n[:, None] & mask_m[None, :]
            q_head_ptr, q_stride = head_rows(q_ptr, q_strides, batch, head, start_q, VEC)
            dout_head_ptr, dout_stride = head_rows(dout_ptr, dout_strides, batch, head, start_q, VEC)
            first_row = (batch * heads + head) * length_q + start_q + first_m
            q = load_rows(q_head_ptr, q_stride, first_m, mask_m, BLOCK_M, D, BLOCK_D)
            dout = load_rows(dout_head_ptr, dout_stride, first_m, mask_m, BLOCK_M, DV, BLOCK_DV)
            # Beyond the last row of all lies room for a tile: what stands there, or in a row of another
            # sequence, is masked below.
            lse_log2 = tl.load(lse_log2_ptr + first_row + offs_m)
            delta = tl.load(delta_ptr + first_row + offs_m)
            slope = None
            if slopes_ptr is not None:
                slope = tl.load(slopes_ptr + sequence * slopes_stride + head)
            bias_ptrs = None
            if bias_ptr is not None:
                bias_ptrs = bias_pointers(
                    bias_ptr, bias_strides, batch, head, first_m, first_n, offs_m[None, :], offs_n[:, None]
                )
            kept = None
            if seed_ptr is not None:
                kept = tl.trans(
                    kept_by_dropout(
                        seed_ptr, first_row + offs_m, first_n, 4 * quads_per_row, threshold, BLOCK_M, BLOCK_N
                    )
                )
            qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            logits, capped = tile_logits(
                qk, bias_ptrs, inside, slope, position[None, :], n[:, None], left, right, scale, softcap, CUT
            )
            weights, ds = tile_gradients(
                logits, capped, lse_log2[None, :], delta[None, :], dp, kept, kept_scale, softcap, CUT
            )
            if bias_ptr is not None:
                seen = (tl.max(logits, axis=0) > float("-inf"))[:, None]
                q, dout = tl.where(seen, q, 0.0), tl.where(seen, dout, 0.0)
            ds = ds.to(q.dtype)
            dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if dq_sum_ptr is not None:
                dq = tl.dot(tl.trans(ds), finite(k) if CUT else k, input_precision=PRECISION)
                offs_d = tl.arange(0, BLOCK_D)
                dq_ptrs = dq_sum_ptr + first_row * D + (offs_m[:, None] * D + offs_d[None, :])
                mask_dq = (m < found_q)[:, None] & (offs_d < D)[None, :]
                tl.atomic_add(dq_ptrs, dq, mask=mask_dq, sem="relaxed")
    dk_ptr, dk_stride = head_rows(dk_ptr, dk_strides, batch, key_head, start_k, VEC)
    dv_ptr, dv_stride = head_rows(dv_ptr, dv_strides, batch, key_head, start_k, VEC)
    store_rows(dk_ptr, dk_stride, first_n, dk * scale, mask_n, BLOCK_N, D, BLOCK_D)
    store_rows(dv_ptr, dv_stride, first_n, dv * kept_scale, mask_n, BLOCK_N, DV, BLOCK_DV)


@triton.jit(do_not_specialize=[
    "length_q", "length_k", "heads", "group", "tiles", "left", "right", "bottom_right", "quads_per_row",
    "threshold",
])  # fmt: skip
def _attention_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_log2_ptr, delta_ptr, bias_ptr, slopes_ptr, seed_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, dq_ptr,
    q_strides, k_strides, v_strides, dout_strides, bias_strides, slopes_stride, dq_strides,
    length_q, length_k, heads, group, tiles,
    left, right, bottom_right, quads_per_row, threshold, kept_scale, scale, softcap,
    VEC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale dS k.

    Program ``tile + tiles * (sequence * heads + head)`` owns BLOCK_M queries, as in the forward kernel, and
    visits the tiles of keys that some of them see: first, without masks, those that all see.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    # Where keys to the right are hidden the last tile has the most work: it comes first.
    first_m = tl.where(right < _UNLIMITED, tiles - 1 - tile, tile) * BLOCK_M
    head = (pid // tiles % heads).to(tl.int64)
    sequence = (pid // tiles // heads).to(tl.int64)
    start_q, found_q = sequence_bounds(cu_seqlens_q_ptr, sequence, length_q)
    start_k, found_k = sequence_bounds(cu_seqlens_k_ptr, sequence, length_k)
    if first_m >= found_q:
        return
    batch = sequence if cu_seqlens_q_ptr is None else tl.zeros_like(sequence)
    offset = bottom_right * (found_k - found_q)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m = first_m + offs_m
    mask_m = m < found_q
    rows = (batch * heads + head) * length_q + start_q + m  # int64 [BLOCK_M]
    q_ptr, q_stride = head_rows(q_ptr, q_strides, batch, head, start_q, VEC)
    dout_ptr, dout_stride = head_rows(dout_ptr, dout_strides, batch, head, start_q, VEC)
    k_ptr, k_stride = head_rows(k_ptr, k_strides, batch, head // group, start_k, VEC)
    v_ptr, v_stride = head_rows(v_ptr, v_strides, batch, head // group, start_k, VEC)
    q = load_rows(q_ptr, q_stride, first_m, mask_m, BLOCK_M, D, BLOCK_D)
    dout = load_rows(dout_ptr, dout_stride, first_m, mask_m, BLOCK_M, DV, BLOCK_DV)
    lse_log2 = tl.load(lse_log2_ptr + rows, mask=mask_m, other=0.0)
    delta = tl.load(delta_ptr + rows, mask=mask_m, other=0.0)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + sequence * slopes_stride + head)

    last_m = tl.minimum(first_m + BLOCK_M, found_q) - 1
    low, full_low, full_high, high = tile_range(
        first_m + offset, last_m + offset, left, right, found_k, BLOCK_N
    )
    if bias_ptr is not None:
        full_high = full_low
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for CUT in tl.static_range(0 if bias_ptr is None else 1, 2):
        visits = (full_high - full_low) // BLOCK_N
        if CUT:
            visits = (high - low) // BLOCK_N - visits
        for index in tl.range(0, visits, num_stages=STAGES):
            first_n = full_low + index * BLOCK_N
            mask_n = None
            inside = None
            if CUT:
                first_n = cut_tile(index, low, full_low, full_high, BLOCK_N)
                mask_n = first_n + offs_n < found_k
                inside = mask_m[:, None] & mask_n[None, :]
            k = load_rows(k_ptr, k_stride, first_n, mask_n, BLOCK_N, D, BLOCK_D)
            v = load_rows(v_ptr, v_stride, first_n, mask_n, BLOCK_N, DV, BLOCK_DV)
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            bias_ptrs = None
            if bias_ptr is not None:
                bias_ptrs = bias_pointers(
                    bias_ptr, bias_strides, batch, head, first_m, first_n, offs_m[:, None], offs_n[None, :]
                )
            kept = None
            if seed_ptr is not None:
                kept = kept_by_dropout(
                    seed_ptr, rows, first_n, 4 * quads_per_row, threshold, BLOCK_M, BLOCK_N
                )
            logits, capped = tile_logits(
                qk, bias_ptrs, inside, slope, (m + offset)[:, None], (first_n + offs_n)[None, :], left, right,
                scale, softcap, CUT,
            )  # fmt: skip
            _, ds = tile_gradients(
                logits, capped, lse_log2[:, None], delta[:, None], dp, kept, kept_scale, softcap, CUT
            )
            dq = tl.dot(ds.to(k.dtype), finite(k) if CUT else k, dq, input_precision=PRECISION)
    dq_ptr, dq_stride = head_rows(dq_ptr, dq_strides, batch, head, start_q, VEC)
    store_rows(dq_ptr, dq_stride, first_m, dq * scale, mask_m, BLOCK_M, D, BLOCK_D)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of batch, head and row."""
    return tensor.stride()[:3]


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    settings: Settings,
    bias_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """reference.backward by the kernels of this module: same arguments, same results (dquery, dkey, dvalue,
    dbias, dsinks), made from out and lse.

    Nothing is added atomically, and results are bitwise reproducible, unless ``deterministic`` is False: then
    the kernel that makes dk and dv makes dq along the way, with two products of matrices less, in a float32
    buffer.
    """
    b, heads, length_q, head_dim = query.shape
    kv_heads, length_k, value_dim = value.shape[1:]
    sequences = b if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    device = query.device
    dquery, dkey, dvalue = (new_rows(tensor, tensor.shape[3]) for tensor in (query, key, value))
    dbias = query.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    rows = b * heads * length_q
    statistics = torch.empty((2, rows + _ROWS_BEYOND), dtype=torch.float32, device=device)
    lse_log2, delta = statistics.unbind()
    if sequences == 0:
        return (
            dquery.zero_(),
            dkey.zero_(),
            dvalue.zero_(),
            dbias,
            sink_gradient(sinks, lse, delta[:rows].view(lse.shape)),
        )

    dout, out, query, key, value = map(addressable, (dout, out, query, key, value))
    lse = lse.contiguous()
    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None:
        bias = addressable(bias.view(torch.uint8) if bias.dtype == torch.bool else bias)
        bias_strides = tuple(
            0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)
        )
    slopes_stride = 0 if alibi_slopes is None or alibi_slopes.shape[0] == 1 else alibi_slopes.stride(0)
    block_d, block_dv = padded(head_dim), padded(value_dim)
    tile = tiles.BACKWARD_INTERPRETED
    if not INTERPRETED:
        features = any(x is not None for x in (bias, alibi_slopes, seed)) or settings.softcap > 0
        tile = tiles.backward(max(block_d, block_dv), query.element_size(), architecture(device), features)

    inputs = (query, key, value, dout, lse_log2, delta, bias, alibi_slopes, seed)
    strides = (*map(_strides, (query, key, value, dout)), bias_strides, slopes_stride)
    numbers = (
        settings.left, settings.right, int(settings.bottom_right), -(-settings.max_seqlen_k // 4),
        dropout_threshold(settings.dropout_p), dropout_scale(settings.dropout_p), settings.scale,
        settings.softcap or None,
    )  # fmt: skip
    tensors = (query, key, value, dout, out, dquery, dkey, dvalue)
    width = vector_width((query.dtype,), *(stride for tensor in tensors for stride in _strides(tensor)))

    def constants(walk: tiles.Walk) -> tuple[Any, ...]:
        sizes = (head_dim, value_dim, walk.block_m, walk.block_n, block_d, block_dv)
        return width, *sizes, walk.num_stages, dot_precision(query.dtype)

    with on_device(query):
        if rows > 0:
            block_m = _ROWS_ELEMENTS // block_dv
            count = -(-length_q // block_m)
            _attention_backward_rows_kernel[(count * b * heads,)](
                out, dout, lse, None if dlse is None else dlse.contiguous(), lse_log2, delta,
                _strides(out), _strides(dout), length_q, heads, count, width, value_dim, block_m, block_dv,
                num_warps=4,
            )  # fmt: skip
        walk = tile.keys if deterministic else tile.single_pass
        count = -(-settings.max_seqlen_k // walk.block_n)
        dq_sum = None
        if not deterministic:
            dq_sum = torch.zeros((b, heads, length_q, head_dim), dtype=torch.float32, device=device)
        if count * sequences * kv_heads > 0:
            _attention_backward_keys_kernel[(count * sequences * kv_heads,)](
                *inputs, cu_seqlens_q, cu_seqlens_k, dkey, dvalue, dq_sum,
                *strides, _strides(dkey), _strides(dvalue),
                length_q, length_k, heads, heads // kv_heads, count, *numbers, *constants(walk),
                num_warps=walk.num_warps,
            )  # fmt: skip
        walk = tile.queries
        count = -(-settings.max_seqlen_q // walk.block_m)
        if dq_sum is not None:
            dquery.copy_(dq_sum.mul_(settings.scale))
        elif count * sequences * heads > 0:
            _attention_backward_queries_kernel[(count * sequences * heads,)](
                *inputs, cu_seqlens_q, cu_seqlens_k, dquery, *strides, _strides(dquery),
                length_q, length_k, heads, heads // kv_heads, count, *numbers, *constants(walk),
                num_warps=walk.num_warps,
            )  # fmt: skip
        if bias is not None and dbias.numel() > 0:
            walk = tile.bias
            one_row, one_column = bias.shape[2] != length_q, bias.shape[3] != length_k
            count = 1 if one_row else -(-length_q // walk.block_m)
            count *= 1 if one_column else -(-length_k // walk.block_n)
            _attention_backward_bias_kernel[(count * bias.shape[0] * bias.shape[1],)](
                *inputs, dbias, *strides,
                b, heads, heads // kv_heads, length_q, length_k, bias.shape[0], bias.shape[1],
                *numbers, *constants(walk), one_row, one_column, num_warps=walk.num_warps,
            )  # fmt: skip
    return dquery, dkey, dvalue, dbias, sink_gradient(sinks, lse, delta[:rows].view(lse.shape))
