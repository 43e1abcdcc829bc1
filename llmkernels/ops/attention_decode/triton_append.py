"""Append of new keys and values to the cache, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import known_multiple, on_device, padded
from . import tiles
from .triton_common import common_vector_width, page_of, page_size, unit_rows


@triton.jit
def _copy_rows(
    from_ptr, to_ptr, from_stride, to_stride, from_rows, to_blocks, to_rows, to_block_stride, mask,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of D elements: row from_rows[i] to row to_rows[i] of block to_blocks[i], where the mask holds."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask[:, None] & (offs_d < D)[None, :]  # [ROWS, BLOCK_D]
    from_ptrs = from_ptr + (from_rows * from_stride)[:, None] + offs_d[None, :]
    to_ptrs = to_ptr + (to_blocks * to_block_stride + to_rows * to_stride)[:, None] + offs_d[None, :]
    tl.store(to_ptrs, tl.load(from_ptrs, mask=mask, other=0.0), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh", "stride_vn"),
        *("stride_kcb", "stride_kch", "stride_kcn", "stride_vcb", "stride_vch", "stride_vcn"),
        *("stride_tb", "H", "NEW", "BLOCKS", "CAPACITY"),
    ]
)
def _attention_decode_append_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr, table_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_kcb, stride_kch, stride_kcn, stride_vcb, stride_vch, stride_vcn,
    stride_tb, H, NEW, BLOCKS, CAPACITY,
    PAGE_SIZE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """cache[b, h, lengths[b] + t] = new[b, h, t], through the page table where there is one.

    Program i owns ROWS tokens of one head of one sequence, the tokens fastest. Tokens beyond the capacity,
    and those whose page the cache doesn't have, are not written.
    """
    token_tiles = tl.cdiv(NEW, ROWS)
    program = tl.program_id(0)
    head = (program // token_tiles % H).to(tl.int64)
    sequence = (program // token_tiles // H).to(tl.int64)
    offs_n = (program % token_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64 [ROWS]
    positions = tl.maximum(tl.load(lengths_ptr + sequence).to(tl.int64), 0) + offs_n
    mask_n = (offs_n < NEW) & (positions < CAPACITY)
    if table_ptr is None:
        blocks, slots = sequence, positions
    else:
        blocks = page_of(table_ptr + sequence * stride_tb, positions, mask_n, PAGE_SIZE)
        slots = positions % PAGE_SIZE
        mask_n = mask_n & (blocks >= 0) & (blocks < BLOCKS)
    k_ptr += sequence * known_multiple(stride_kb, VEC) + head * known_multiple(stride_kh, VEC)
    v_ptr += sequence * known_multiple(stride_vb, VEC) + head * known_multiple(stride_vh, VEC)
    _copy_rows(
        k_ptr, k_cache_ptr + head * known_multiple(stride_kch, VEC),
        known_multiple(stride_kn, VEC), known_multiple(stride_kcn, VEC),
        offs_n, blocks, slots, known_multiple(stride_kcb, VEC), mask_n, D, BLOCK_D,
    )  # fmt: skip
    _copy_rows(
        v_ptr, v_cache_ptr + head * known_multiple(stride_vch, VEC),
        known_multiple(stride_vn, VEC), known_multiple(stride_vcn, VEC),
        offs_n, blocks, slots, known_multiple(stride_vcb, VEC), mask_n, DV, BLOCK_DV,
    )  # fmt: skip


def append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    """reference.append by the kernel of this module."""
    batch, heads, new_tokens, head_dim = key.shape
    value_dim = value.shape[3]
    if key.numel() == 0 or key_cache.numel() == 0 or value_cache.numel() == 0:
        return
    key, value = unit_rows(key), unit_rows(value)
    table = None if block_table is None else block_table.contiguous()
    limit = key_cache.shape[2] if table is None else key_cache.shape[2] * table.shape[1]
    rows = min(1 << (new_tokens - 1).bit_length(), tiles.APPEND_ROWS)
    grid = (-(-new_tokens // rows) * heads * batch,)
    with on_device(key_cache):
        _attention_decode_append_kernel[grid](
            key, value, key_cache, value_cache, cache_seqlens.contiguous(), table,
            *key.stride()[:3], *value.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
            0 if table is None else table.shape[1], heads, new_tokens, key_cache.shape[0], limit,
            page_size(key_cache, table), common_vector_width(key, value, key_cache, value_cache), rows,
            head_dim, padded(head_dim), value_dim, padded(value_dim), num_warps=tiles.APPEND_WARPS,
        )  # fmt: skip
