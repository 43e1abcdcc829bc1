"""attention and attention_varlen: argument checks, the choice of a backend, and the shapes in between."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, overrides

from ... import checks, dispatch, tracing
from . import torch_backend
from .autograd import PACKAGE, attend
from .call import UNLIMITED, AttentionCall, Settings, autocast_is_on, size_obstacle

KERNELS = (
    ("cuda", f"{PACKAGE}.cuda_kernels"),
    ("triton", f"{PACKAGE}.triton_kernels"),
    ("reference", f"{PACKAGE}.reference"),
)
# For the calls that torch has no fast and reproducible kernel for (README.md, "Which backend").
AUTOMATIC = ("triton",)

_ALIGNMENTS = ("top_left", "bottom_right")
_Rows = tuple[Tensor, Tensor, Tensor]  # query, key, value


class _Options(NamedTuple):
    """The checked options that attention and attention_varlen have in common."""

    dropout_p: float
    scale: float
    left: int
    right: int
    bottom_right: bool
    softcap: float
    alibi_slopes: Tensor | None  # [1 | sequences, Hq], float32, or float64 for float64 queries
    sinks: Tensor | None  # [Hq], of the same dtype

    def settings(self, max_seqlen_q: int, max_seqlen_k: int) -> Settings:
        return Settings(
            self.scale,
            self.softcap,
            self.dropout_p,
            self.left,
            self.right,
            self.bottom_right,
            max_seqlen_q,
            max_seqlen_k,
        )


def _check_number(op: str, argument: str, value: Any) -> float:
    scalar = isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad
    if not scalar and (isinstance(value, bool) or not isinstance(value, checks.REAL)):
        checks.fail(TypeError, op, argument, "a number", type(value).__name__)
    return float(value)


def _check_tensors(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Tensors of one device, of floating dtypes, whose head dims fit."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(op, name, tensor)
        checks.check_floating(op, name, tensor)
        if tensor.dim() < 2:
            checks.fail(RuntimeError, op, name, "at least 2 dimensions [L, D]", list(tensor.shape))
        if tensor.device != query.device:
            checks.fail(RuntimeError, op, name, f"device {query.device} (as query)", tensor.device)
    # torch looks at nested ones itself: of the strided layout they have no shape.
    if not (query.is_nested or key.is_nested) and key.shape[-1] != query.shape[-1]:
        checks.fail(RuntimeError, op, "key", f"a head_dim of {query.shape[-1]} (as query)", key.shape[-1])


def _check_options(
    op: str,
    query: Tensor,
    heads: int,
    sequences: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    causal_align: str,
    window: Sequence[int] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> _Options:
    dropout_p = _check_number(op, "dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        checks.fail(ValueError, op, "dropout_p", "a probability of at least 0 and below 1", dropout_p)
    if not isinstance(is_causal, (bool, torch.SymBool)):
        checks.fail(TypeError, op, "is_causal", "a bool", type(is_causal))
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    softcap = 0.0 if softcap is None else _check_number(op, "softcap", softcap)
    if not 0 <= softcap < math.inf:
        checks.fail(ValueError, op, "softcap", "a finite number >= 0 (0 or None: no cap)", softcap)
    if causal_align not in _ALIGNMENTS:
        checks.fail(ValueError, op, "causal_align", f"one of {', '.join(_ALIGNMENTS)}", repr(causal_align))
    left, right = _check_window(op, window)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if is_causal:
        right = min(right, 0)
    if alibi_slopes is not None:
        _check_per_head(op, "alibi_slopes", alibi_slopes, query, ([heads], [sequences, heads]))
        alibi_slopes = (alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]).to(wide).contiguous()
    if sinks is not None:
        _check_per_head(op, "sinks", sinks, query, ([heads],))
        sinks = sinks.to(wide).contiguous()
    scale = _check_number(op, "scale", scale)
    bottom_right = causal_align == "bottom_right"
    return _Options(dropout_p, scale, left, right, bottom_right, softcap, alibi_slopes, sinks)


def _check_window(op: str, window: Sequence[int] | None) -> tuple[int, int]:
    """left and right, UNLIMITED for -1."""
    if window is None:
        return UNLIMITED, UNLIMITED
    expected = "a pair (left, right) of ints >= -1, -1 for no limit"
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        checks.fail(TypeError, op, "window", expected, window)
    for size in window:
        # type() first: torch.compile knows it of its symbolic ints, but not their attributes.
        if type(size) is not int and (isinstance(size, bool) or not hasattr(size, "__index__")):
            checks.fail(TypeError, op, "window", expected, window)
    left, right = (int(size) for size in window)
    if left < -1 or right < -1:
        checks.fail(ValueError, op, "window", expected, window)
    return tuple(UNLIMITED if size == -1 else min(size, UNLIMITED) for size in (left, right))  # type: ignore[return-value]


def _check_per_head(
    op: str, argument: str, value: Tensor, query: Tensor, shapes: tuple[list[int], ...]
) -> None:
    checks.check_tensor(op, argument, value)
    checks.check_floating(op, argument, value)
    if list(value.shape) not in shapes:
        checks.fail(RuntimeError, op, argument, f"shape {' or '.join(map(str, shapes))}", list(value.shape))
    if value.device != query.device:
        checks.fail(RuntimeError, op, argument, f"device {query.device} (as query)", value.device)


def _check_mask(op: str, attn_mask: Tensor, query: Tensor, full: tuple[int, ...]) -> None:
    checks.check_tensor(op, "attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        checks.fail(RuntimeError, op, "attn_mask", "torch.bool or a floating-point dtype", attn_mask.dtype)
    if attn_mask.device != query.device:
        checks.fail(RuntimeError, op, "attn_mask", f"device {query.device} (as query)", attn_mask.device)
    shape = attn_mask.shape
    if len(shape) > len(full) or any(
        size not in (1, whole) for size, whole in zip(reversed(shape), reversed(full), strict=False)
    ):
        checks.fail(RuntimeError, op, "attn_mask", f"a shape that broadcasts to {list(full)}", list(shape))


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> _Rows:
    """The three as autocast has scaled_dot_product_attention take them."""
    if not autocast_is_on(query.device):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    return query, key, value


def _of_one_dtype(op: str, query: Tensor, key: Tensor, value: Tensor) -> _Rows:
    """The three after autocast, which leaves float64 beside its own dtype."""
    query, key, value = _autocast(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            checks.fail(RuntimeError, op, name, f"{query.dtype} (as query)", tensor.dtype)
    return query, key, value


def _broadcast(op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> _Rows:
    """The three as [B, H, L, D]: missing dimensions added on the left, batches and heads broadcast as torch
    does; of heads, those of key and value stay fewer where each serves a group of the query's."""
    if (
        query.dim() == key.dim() == 4
        and query.shape[:2] == key.shape[:2]
        and key.shape[:3] == value.shape[:3]
    ):
        return query, key, value
    query, key, value = (t[(None,) * (4 - t.dim())] if t.dim() < 4 else t for t in (query, key, value))
    if value.shape[2] != key.shape[2]:
        checks.fail(RuntimeError, op, "value", f"{key.shape[2]} rows (as key)", value.shape[2])
    heads, of_key, of_value = query.shape[1], key.shape[1], value.shape[1]
    try:
        (batch,) = torch.broadcast_shapes(query.shape[:1], key.shape[:1], value.shape[:1])
    except RuntimeError:
        sizes = [query.shape[0], key.shape[0], value.shape[0]]
        checks.fail(RuntimeError, op, "query, key, value", "batch sizes that broadcast", sizes)
    if enable_gqa:
        for name, count in (("key", of_key), ("value", of_value)):
            if count == 0 or heads % count != 0:
                checks.fail(RuntimeError, op, name, f"a number of heads that divides query's {heads}", count)
        if of_key != of_value:
            key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
            of_key = of_value = heads
    else:
        try:
            (every,) = torch.broadcast_shapes((heads,), (of_key,), (of_value,))
        except RuntimeError:
            sizes = [heads, of_key, of_value]
            expected = "numbers of heads that broadcast (enable_gqa=True shares key heads among groups)"
            checks.fail(RuntimeError, op, "query, key, value", expected, sizes)
        heads = every
        if of_key != of_value:
            of_key = of_value = every
    return (
        query.expand(batch, heads, -1, -1),
        key.expand(batch, of_key, -1, -1),
        value.expand(batch, of_value, -1, -1),
    )


def _call(
    op: str,
    query: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: _Options,
    beyond_torch: bool,
    varlen: bool,
    deterministic: bool,
    others: tuple[Tensor | None, ...],
) -> AttentionCall:
    tensors = (query, value, mask, options.alibi_slopes, options.sinks, *others)
    obstacle = tracing.obstacle(*tensors)
    slopes = options.alibi_slopes
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        obstacle = obstacle or "alibi_slopes want a gradient, which the kernels don't compute"
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return AttentionCall(
        op,
        query.device,
        query.dtype,
        None if mask is None else mask.dtype,
        varlen,
        beyond_torch,
        gradients,
        deterministic or torch.are_deterministic_algorithms_enabled(),
        size_obstacle(query.shape[-1], value.shape[-1]),
        obstacle,
    )


def _automatic(call: AttentionCall) -> tuple[str, ...]:
    """The backends tried on a GPU. A plain call without gradients, or whose gradients may differ from run to
    run, is what torch's own kernels are best at; until ours have been timed against them, it is theirs."""
    plain = not (call.beyond_torch or call.varlen)
    return () if plain and not (call.gradients and call.deterministic) else AUTOMATIC


def _seed(options: _Options, query: Tensor) -> Tensor | None:
    # On the query's device: CUDA graphs replay the generator's advance, and nothing waits for the GPU.
    if options.dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)


def _is_torchs_alone(query: object, attn_mask: object, dropout_p: object, backend: str | None) -> bool:
    """Whether torch is sure to serve a plain call and would refuse all that ours refuses. Masks of fewer than
    two dimensions it refuses by an IndexError, and of another dtype than the query's it may misread them."""
    return (
        isinstance(query, Tensor)
        and dispatch.leaves_to_torch(query, backend)
        and type(dropout_p) is float
        and 0 <= dropout_p < 1
        and not torch.compiler.is_compiling()
        and (
            attn_mask is None
            or (
                isinstance(attn_mask, Tensor)
                and attn_mask.dim() >= 2
                and (attn_mask.dtype == torch.bool or attn_mask.dtype == query.dtype)
            )
        )
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: str = "top_left",
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, a superset of torch.nn.functional.scaled_dot_product_attention.

        out = dropout(softmax(scale * query key^T + bias)) value

    query: [B, Hq, Lq, D]; key: [B, Hkv, Lk, D]; value: [B, Hkv, Lk, Dv]; fewer leading dimensions and
    broadcasting as in torch; float16, bfloat16, float32 or float64, any strides. attn_mask: bool (True =
    attend) or floating (added to the logits; differentiable), broadcastable to [B, Hq, Lq, Lk], and
    together with is_causal, which here may be. enable_gqa: Hq is a multiple of Hkv, query head h reads key
    head h // (Hq / Hkv). scale: 1 / sqrt(D) if None.

    causal_align: where query i stands among the keys: "top_left" at i, "bottom_right" at i + Lk - Lq; for
    is_causal, window and alibi_slopes. window: (left, right), how many keys before and after its position a
    query sees, -1 for all. softcap: logits become softcap * tanh(logits / softcap) before bias and slopes.
    alibi_slopes: [Hq] or [B, Hq]; -slope * distance is added (Press et al., arXiv 2108.12409). sinks: [Hq],
    one more logit per head that takes weight but has no value; differentiable. return_lse: return (out,
    logsumexp) with the natural logsumexp of the logits, float32 [B, Hq, Lq], differentiable.

    A query that sees no key gets 0 (logsumexp -inf) and gradients of 0. Dropout comes from torch's generator
    and is made again in backward. Gradients are the same bits in every run unless deterministic=False, which
    torch.use_deterministic_algorithms overrides. backend: see llmkernels.dispatch. Raises TypeError,
    ValueError or RuntimeError, as torch does, naming the argument.
    """
    op = "attention"
    if not isinstance(query, Tensor) and overrides.has_torch_function((query, key, value)):
        options = {
            "causal_align": causal_align,
            "window": window,
            "softcap": softcap,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
            "return_lse": return_lse,
            "deterministic": deterministic,
            "backend": backend,
        }
        positional = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return overrides.handle_torch_function(attention, (query, key, value), *positional, **options)
    plain = not return_lse and all(option is None for option in (window, softcap, alibi_slopes, sinks))
    if plain and causal_align == "top_left" and _is_torchs_alone(query, attn_mask, dropout_p, backend):
        # As cheap as torch's own. What torch refuses is served below, or explained.
        with contextlib.suppress(TypeError, RuntimeError):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    _check_tensors(op, query, key, value)
    beyond_torch = (
        (is_causal and attn_mask is not None)
        or (is_causal and causal_align == "bottom_right" and query.shape[-2] != key.shape[-2])
        or window is not None
        or bool(softcap)
        or alibi_slopes is not None
        or sinks is not None
        or return_lse
    )
    dims = max(query.dim(), key.dim(), value.dim())
    if dims > 4 or query.is_nested or key.is_nested:
        return _more_than_four_dimensions(
            op, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, beyond_torch, backend
        )
    query, key, value = _of_one_dtype(op, query, key, value)
    query, key, value = _broadcast(op, query, key, value, enable_gqa)
    batch, heads, lq, _ = query.shape
    lk = key.shape[2]
    found = _check_options(
        op,
        query,
        heads,
        batch,
        dropout_p,
        is_causal,
        scale,
        causal_align,
        window,
        softcap,
        alibi_slopes,
        sinks,
    )
    if attn_mask is not None:
        _check_mask(op, attn_mask, query, (batch, heads, lq, lk))
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    call = _call(op, query, value, attn_mask, found, beyond_torch, False, deterministic, (key,))
    if dispatch.leaves_to_torch(query, backend):
        chosen = "torch"
    else:
        chosen = dispatch.choose(call, KERNELS, _automatic(call), backend)
    settings = found.settings(lq, lk)
    tensors = (query, key, value, attn_mask, found.alibi_slopes, found.sinks)
    lse: Tensor | None
    if chosen == "torch":
        out, lse = torch_backend.attend(*tensors, settings, return_lse)
    else:
        out, lse = attend(*tensors, _seed(found, query), None, None, settings, call.deterministic, chosen)
    for _ in range(4 - dims):
        out, lse = out.squeeze(0), None if lse is None else lse.squeeze(0)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _more_than_four_dimensions(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    beyond_torch: bool,
    backend: str | None,
) -> Tensor:
    """What torch alone takes: more leading dimensions, nested tensors."""
    name, tensor = max((("query", query), ("key", key), ("value", value)), key=lambda item: item[1].dim())
    if query.is_nested or key.is_nested:
        kind, obstacle = "a nested tensor", "a tensor is nested"
    else:
        kind = f"{tensor.dim()} dimensions"
        obstacle = f"{name} has {kind}; the kernels take at most 4"
    if beyond_torch:
        expected = (
            "2 to 4 dimensions beside window, softcap, alibi_slopes, sinks, return_lse, causal_align or "
            "attn_mask with is_causal"
        )
        checks.fail(RuntimeError, op, name, expected, kind)
    call = AttentionCall(op, query.device, query.dtype, obstacle=obstacle)
    dispatch.choose(call, KERNELS, AUTOMATIC, backend)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _check_bounds(op: str, argument: str, bounds: Tensor, tokens: int, max_seqlen: Any, query: Tensor) -> int:
    """cu_seqlens_q or cu_seqlens_k and its longest sequence; the values where the host can see them. Returns
    max_seqlen, an int of another library as Python's."""
    checks.check_tensor(op, argument, bounds)
    if bounds.dtype not in (torch.int32, torch.int64):
        checks.fail(RuntimeError, op, argument, "torch.int32 or torch.int64", bounds.dtype)
    if bounds.dim() != 1 or bounds.numel() == 0:
        checks.fail(RuntimeError, op, argument, "shape [sequences + 1]", list(bounds.shape))
    if bounds.device != query.device:
        checks.fail(RuntimeError, op, argument, f"device {query.device} (as query)", bounds.device)
    longest = argument.replace("cu_seqlens", "max_seqlen")
    if type(max_seqlen) is not int and (isinstance(max_seqlen, bool) or not hasattr(max_seqlen, "__index__")):
        checks.fail(TypeError, op, longest, "an int", type(max_seqlen).__name__)
    max_seqlen = max_seqlen if isinstance(max_seqlen, (int, torch.SymInt)) else int(max_seqlen)
    if max_seqlen < 0:
        checks.fail(ValueError, op, longest, "an int >= 0", max_seqlen)
    if bounds.device.type != "cpu" or tracing.traced() or type(bounds) is not Tensor:
        return max_seqlen
    values = bounds.tolist()
    lengths = [last - first for first, last in zip(values, values[1:], strict=False)]
    if values[0] != 0 or values[-1] != tokens or any(length < 0 for length in lengths):
        expected = f"bounds that begin with 0, don't decrease and end with {tokens}"
        checks.fail(ValueError, op, argument, expected, values)
    if max(lengths, default=0) > max_seqlen:
        checks.fail(ValueError, op, longest, f"at least the longest sequence, {max(lengths)}", max_seqlen)
    return max_seqlen


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: str = "top_left",
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``attention`` of sequences of different lengths that lie one after the other, without padding.

    query: [Tq, Hq, D]; key: [Tk, Hkv, D]; value: [Tk, Hkv, Dv]. cu_seqlens_q, cu_seqlens_k: int32 or int64
    [sequences + 1], where each sequence begins, the last being Tq and Tk (which is checked only on the CPU:
    on a GPU looking would wait for it); sequences may be empty. max_seqlen_q, max_seqlen_k: the lengths of
    the longest, or more. Every option counts within a sequence; alibi_slopes: [Hq] or [sequences, Hq].
    Returns [Tq, Hq, Dv] and, with return_lse, the logsumexp float32 [Hq, Tq].
    """
    op = "attention_varlen"
    _check_tensors(op, query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            checks.fail(RuntimeError, op, name, "3 dimensions [tokens, heads, head_dim]", list(tensor.shape))
    if value.shape[:2] != key.shape[:2]:
        expected = f"{list(key.shape[:2])} tokens and heads (as key)"
        checks.fail(RuntimeError, op, "value", expected, list(value.shape[:2]))
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and not (enable_gqa and kv_heads and heads % kv_heads == 0):
        expected = f"{heads} heads (as query), or with enable_gqa=True a divisor of them"
        checks.fail(RuntimeError, op, "key", expected, kv_heads)
    max_seqlen_q = _check_bounds(op, "cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q, query)
    max_seqlen_k = _check_bounds(op, "cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k, query)
    if cu_seqlens_k.numel() != cu_seqlens_q.numel():
        expected = f"{cu_seqlens_q.numel()} bounds (as cu_seqlens_q)"
        checks.fail(RuntimeError, op, "cu_seqlens_k", expected, cu_seqlens_k.numel())
    sequences = cu_seqlens_q.numel() - 1
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in _of_one_dtype(op, query, key, value))
    found = _check_options(
        op,
        query,
        heads,
        sequences,
        dropout_p,
        is_causal,
        scale,
        causal_align,
        window,
        softcap,
        alibi_slopes,
        sinks,
    )
    call = _call(op, query, value, None, found, True, True, deterministic, (key, cu_seqlens_q, cu_seqlens_k))
    chosen = dispatch.choose(call, KERNELS, _automatic(call), backend)
    settings = found.settings(max_seqlen_q, max_seqlen_k)
    lse: Tensor | None
    if chosen == "torch":
        out, lse = torch_backend.attend_packed(
            query,
            key,
            value,
            found.alibi_slopes,
            found.sinks,
            cu_seqlens_q,
            cu_seqlens_k,
            settings,
            return_lse,
        )
    else:
        out, lse = attend(
            query,
            key,
            value,
            None,
            found.alibi_slopes,
            found.sinks,
            _seed(found, query),
            cu_seqlens_q.to(torch.int32),
            cu_seqlens_k.to(torch.int32),
            settings,
            call.deterministic,
            chosen,
        )
    out = out[0].transpose(0, 1)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse[0]
