"""attention_decode: argument checks, the choice of a backend and torch.library."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, overrides

from ... import checks, dispatch, tracing
from . import reference, torch_backend
from .call import LARGEST_HEAD_DIM, DecodeCall

_PACKAGE = __name__.rsplit(".", 1)[0]
_OP = "attention_decode"
KERNELS = (
    ("triton", f"{_PACKAGE}.triton_kernels"),
    ("reference", f"{_PACKAGE}.reference"),
)
# README.md, "Which backend": torch has no operator for this.
AUTOMATIC = ("triton",)
# Positions and bounds of windows are int32 in the kernels.
_CAPACITY_LIMIT = 2**30

# Two operators, so that the caches are written by one and only read by the other: a call without new tokens
# mutates nothing.
_library = torch.library.Library("llmkernels", "FRAGMENT")
_library.define(
    "attention_decode_append(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, "
    "Tensor cache_seqlens, Tensor? block_table, str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "attention_decode_forward(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, SymInt new_tokens, float scale, SymInt left, "
    "SymInt right, float softcap, SymInt num_splits, str backend) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _kernels(backend: str) -> Any:
    return reference if backend == "reference" else dispatch.kernels(_PACKAGE, backend)


def _append_implementation(*arguments: Any) -> None:
    _kernels(arguments[-1]).append(*arguments[:-1])


def _forward_implementation(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _kernels(arguments[-1]).forward(*arguments[:-1])


for _key in ("CPU", "CUDA"):
    _library.impl("attention_decode_append", _append_implementation, _key)
    _library.impl("attention_decode_forward", _forward_implementation, _key)


@torch.library.register_fake("llmkernels::attention_decode_append", lib=_library)
def _append_fake(*arguments: Any) -> None:
    return None


@torch.library.register_fake("llmkernels::attention_decode_forward", lib=_library)
def _forward_fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = query.shape[:3]
    return query.new_empty(*shape, value_cache.shape[3]), query.new_empty(shape, dtype=wide)


_append_op = torch.ops.llmkernels.attention_decode_append.default
_forward_op = torch.ops.llmkernels.attention_decode_forward.default


def _is_int(value: Any) -> bool:
    return type(value) is int or (not isinstance(value, bool) and hasattr(value, "__index__"))


def _as_int(value: Any) -> Any:
    """An int of another library, numpy's say, as Python's; sizes being traced as they are."""
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def _check_shape(argument: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        checks.fail(RuntimeError, _OP, argument, f"the shape {list(expected)}", list(value.shape))


def _check_like(argument: str, value: object, query: Tensor) -> None:
    """A tensor of four dimensions, of the query's dtype and on its device."""
    checks.check_tensor(_OP, argument, value)
    assert isinstance(value, Tensor)
    if value.dim() != 4:
        checks.fail(RuntimeError, _OP, argument, "4 dimensions", list(value.shape))
    if value.dtype != query.dtype:
        checks.fail(RuntimeError, _OP, argument, f"{query.dtype} (as query)", value.dtype)
    _check_device(argument, value, query)


def _check_device(argument: str, value: Tensor, query: Tensor) -> None:
    if value.device != query.device:
        checks.fail(RuntimeError, _OP, argument, f"device {query.device} (as query)", value.device)


def _check_index(argument: str, value: object, query: Tensor) -> None:
    checks.check_tensor(_OP, argument, value)
    assert isinstance(value, Tensor)
    if value.dtype not in (torch.int32, torch.int64):
        checks.fail(RuntimeError, _OP, argument, "torch.int32 or torch.int64", value.dtype)
    _check_device(argument, value, query)


def _check_tensors(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """TypeError for what is no tensor, RuntimeError for shapes, dtypes and devices that don't match."""
    checks.check_tensor(_OP, "query", query)
    checks.check_floating(_OP, "query", query)
    if query.dim() != 4:
        checks.fail(RuntimeError, _OP, "query", "[batch, heads, length, head_dim]", list(query.shape))
    _check_like("key_cache", key_cache, query)
    _check_like("value_cache", value_cache, query)
    batch, heads, _, head_dim = query.shape
    blocks, kv_heads, page_size, _ = key_cache.shape
    value_dim = value_cache.shape[3]
    if head_dim < 1 or value_dim < 1:
        checks.fail(RuntimeError, _OP, "query", "head dims of at least 1", [head_dim, value_dim])
    first = batch if block_table is None else blocks
    _check_shape("key_cache", key_cache, (first, kv_heads, page_size, head_dim))
    _check_shape("value_cache", value_cache, (first, kv_heads, page_size, value_dim))
    if kv_heads < 1 or heads % kv_heads != 0:
        checks.fail(RuntimeError, _OP, "query", f"heads in a multiple of the cache's {kv_heads}", heads)
    _check_index("cache_seqlens", cache_seqlens, query)
    _check_shape("cache_seqlens", cache_seqlens, (batch,))
    if block_table is not None:
        _check_index("block_table", block_table, query)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            checks.fail(RuntimeError, _OP, "block_table", f"[{batch}, max_blocks]", list(block_table.shape))
        if page_size < 1:
            checks.fail(RuntimeError, _OP, "key_cache", "pages of at least 1 token", page_size)
    capacity = reference.capacity(key_cache, block_table)
    if capacity >= _CAPACITY_LIMIT:
        checks.fail(RuntimeError, _OP, "key_cache", "room for less than 2^30 tokens a sequence", capacity)
    if (key is None) != (value is None):
        given, missing = ("value", "key") if key is None else ("key", "value")
        checks.fail(RuntimeError, _OP, missing, f"a torch.Tensor beside {given}", None)
    if key is not None and value is not None:
        _check_like("key", key, query)
        _check_like("value", value, query)
        _check_shape("key", key, (batch, kv_heads, key.shape[2], head_dim))
        _check_shape("value", value, (batch, kv_heads, key.shape[2], value_dim))


def _check_per_head(argument: str, value: object, query: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    checks.check_tensor(_OP, argument, value)
    assert isinstance(value, Tensor)
    checks.check_floating(_OP, argument, value)
    _check_device(argument, value, query)
    if tuple(value.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        checks.fail(RuntimeError, _OP, argument, f"the shape {expected}", list(value.shape))


def _checked_number(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, checks.REAL):
        checks.fail(TypeError, _OP, argument, "a number or None", type(value).__name__)
    return float(value)


def _bounds(is_causal: Any, window: Any) -> tuple[int, int]:
    """The window (left, right), -1 = no bound, with causality taken in: nothing to the right."""
    if not isinstance(is_causal, bool):
        checks.fail(TypeError, _OP, "is_causal", "a bool", type(is_causal).__name__)
    left, right = -1, -1
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(map(_is_int, window)):
            checks.fail(TypeError, _OP, "window", "two ints (left, right) or None", window)
        left, right = (_as_int(size) for size in window)
        if left < -1 or right < -1:
            checks.fail(ValueError, _OP, "window", "sizes >= 0, or -1 for no bound", tuple(window))
    return left, 0 if is_causal else right


def _check_values(
    key_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, new_tokens: int
) -> int:
    """Lengths and pages of CPU tensors, which can be read without waiting for a GPU: ValueError unless they
    fit the cache. Returns the longest length, the new tokens included."""
    if cache_seqlens.numel() == 0:
        return 0
    capacity = reference.capacity(key_cache, block_table)
    shortest, longest = (int(length) for length in cache_seqlens.aminmax())
    if shortest < 0:
        checks.fail(ValueError, _OP, "cache_seqlens", "lengths >= 0", shortest)
    if longest + new_tokens > capacity:
        beside = f" beside {new_tokens} new tokens" if new_tokens else ""
        checks.fail(ValueError, _OP, "cache_seqlens", f"lengths <= {capacity - new_tokens}{beside}", longest)
    if block_table is not None:
        blocks, page_size = key_cache.shape[0], key_cache.shape[2]
        firsts = torch.arange(block_table.shape[1]) * page_size
        used = block_table[firsts < (cache_seqlens + new_tokens)[:, None]]
        wrong = used[(used < 0) | (used >= blocks)]
        if wrong.numel() > 0:
            checks.fail(ValueError, _OP, "block_table", f"pages in use from 0 to {blocks - 1}", int(wrong[0]))
    return longest + new_tokens


def _has_unit_rows(cache: Tensor) -> bool:
    return cache.shape[3] == 1 or cache.stride(3) == 1


def _settled(condition: Any) -> bool:
    """A condition on sizes as a plain bool: where torch.compile traces them a branch, on which it guards."""
    return True if condition else False  # noqa: SIM210


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last tokens of each sequence over its key-value cache, to which they may be appended.

        out_i = sum_j exp(s_ij - lse_i) v_j        s_ij = cap(scale * q_i . k_j) - slope * |i - j|
        lse_i = log(e^sink + sum_j e^s_ij)         cap(s) = softcap * tanh(s / softcap)

    query: [B, Hq, Lq, D], float16, bfloat16, float32 or float64. key_cache: [B, Hkv, S, D], value_cache:
    [B, Hkv, S, Dv], in the query's dtype, any strides with a unit last one (others go to torch); Hq is a
    multiple of Hkv and query head h reads key head h // (Hq / Hkv). cache_seqlens: int32 or int64 [B], the
    tokens that the cache holds already; only ever read, so the caller adds Lnew to it afterwards. key, value:
    [B, Hkv, Lnew, D] and [..., Dv], written in place to positions cache_seqlens[b] and on, before attending;
    both or neither. T_b = cache_seqlens[b] + Lnew is the length of sequence b from here on.

    block_table: int32 or int64 [B, max_blocks] for a paged cache, which is then [num_blocks, Hkv, page_size,
    D(v)]: token j of sequence b is token j % page_size of page block_table[b, j // page_size].

    Query i stands at position T_b - Lq + i. It sees the keys j of its sequence with j <= position where
    is_causal, and, with window = (left, right), position - left <= j <= position + right, -1 being no bound.
    scale: 1 / sqrt(D) by default. softcap: 0 or None for none. alibi_slopes: [Hq] or [B, Hq]. sinks: [Hq],
    one more logit a head that takes weight and has no value. num_splits: into how many parts the kernels
    split the keys, None for as many as the sizes suggest.

    Returns out [B, Hq, Lq, Dv] in the query's dtype and, with return_lse, lse [B, Hq, Lq], float32 (float64
    of float64 queries). A query that sees no key gets out 0 and lse -inf, or its sink. What the cache holds
    beyond T_b, or where no query of the sequence looks, may be NaN and changes nothing. Nothing waits for the
    GPU, so a CUDA graph can capture the call and replay it as cache_seqlens grows.

    Raises TypeError (no tensor, no number), ValueError (window < -1, softcap < 0, num_splits < 1; unknown
    backend; on the CPU, where they can be read at once, lengths beyond the capacity and pages that the cache
    doesn't have) or RuntimeError (shapes, dtypes, devices that don't match; a tensor that requires grad while
    grad mode is on; a backend that can't serve), and then has changed no tensor. On a GPU a token beyond the
    capacity or on a missing page is dropped, and reads stay inside the cache.
    """
    tensors = (query, key_cache, value_cache, cache_seqlens, key, value, block_table, alibi_slopes, sinks)
    if not isinstance(query, Tensor) and overrides.has_torch_function(tensors):
        return overrides.handle_torch_function(
            attention_decode, tensors, query, key_cache, value_cache, cache_seqlens, key=key, value=value,
            block_table=block_table, scale=scale, is_causal=is_causal, window=window, softcap=softcap,
            alibi_slopes=alibi_slopes, sinks=sinks, return_lse=return_lse, num_splits=num_splits,
            backend=backend,
        )  # fmt: skip
    _check_tensors(query, key_cache, value_cache, cache_seqlens, key, value, block_table)
    batch, heads, _, head_dim = query.shape
    if alibi_slopes is not None:
        _check_per_head("alibi_slopes", alibi_slopes, query, ((heads,), (batch, heads)))
    if sinks is not None:
        _check_per_head("sinks", sinks, query, ((heads,),))
    scale = 1 / math.sqrt(head_dim) if scale is None else _checked_number("scale", scale)
    cap = 0.0 if softcap is None else _checked_number("softcap", softcap)
    if not 0 <= cap < math.inf:
        checks.fail(ValueError, _OP, "softcap", "a finite number >= 0 (0 or None: no cap)", softcap)
    left, right = _bounds(is_causal, window)
    if num_splits is not None:
        if not _is_int(num_splits):
            checks.fail(TypeError, _OP, "num_splits", "an int or None", type(num_splits).__name__)
        if num_splits < 1:
            checks.fail(ValueError, _OP, "num_splits", "at least 1 or None", num_splits)
        num_splits = _as_int(num_splits)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{_OP}: it has no gradient, it is for inference: call it under torch.no_grad() or on tensors "
            "that don't require grad"
        )
    obstacle = tracing.obstacle(*tensors)
    # Of the operator's own arguments torch's dispatcher resolves the sign.
    if obstacle is None and not tracing.traced() and any(t is not None and t.is_neg() for t in tensors):
        obstacle = "a tensor is lazily negated: its memory holds the other sign"
    call = DecodeCall(
        _OP,
        query.device,
        query.dtype,
        _settled(max(head_dim, value_cache.shape[3]) > LARGEST_HEAD_DIM),
        _settled(not (_has_unit_rows(key_cache) and _has_unit_rows(value_cache))),
        obstacle,
    )
    chosen = dispatch.choose(call, KERNELS, AUTOMATIC, backend)
    new_tokens = 0 if key is None else key.shape[2]
    longest = None
    if query.is_cpu and obstacle is None and not tracing.traced():
        longest = _check_values(key_cache, cache_seqlens, block_table, new_tokens)

    append, forward = _append_implementation, _forward_implementation
    if tracing.traced():
        append, forward = _append_op, _forward_op
    # Autocast would have the matrix products, and with them out and lse, in half precision.
    kind = query.device.type
    autocast_is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    exact = torch.autocast(kind, enabled=False) if autocast_is_on else contextlib.nullcontext()
    with torch.no_grad(), exact:
        if key is not None and value is not None:
            new = (key_cache, value_cache, key, value, cache_seqlens, block_table)
            if chosen == "torch":
                reference.append(*new)
            else:
                append(*new, chosen)
        held = (query, key_cache, value_cache, cache_seqlens, block_table, alibi_slopes, sinks)
        options = (new_tokens, scale, left, right, cap)
        if chosen == "torch":
            out, lse = torch_backend.forward(*held, *options, return_lse, longest)
        else:
            out, lse = forward(*held, *options, num_splits or 0, chosen)
    return (out, lse) if return_lse and lse is not None else out
