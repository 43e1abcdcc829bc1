"""torch.nn.MultiheadAttention on the kernels of llmkernels.ops.attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import checks, dispatch, tracing
from ..ops.attention.api import attention
from ._calls import refuse_scripting, trace_call
from ._causal import is_known_as_causal
from ._nested import padded, unpadded
from .kv_cache import KVCache

_NAME = "nn.MultiheadAttention"
# Whether the inputs are batched, or an AssertionError about a number of dimensions, in torch's words.
_check_dims: Callable[..., bool] = F._mha_shape_check  # type: ignore[attr-defined]


class _Heads(NamedTuple):
    """The projections, [N, H, length, head_dim] each: views of what the products wrote."""

    query: Tensor
    key: Tensor
    value: Tensor


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention, a drop-in for torch.nn.MultiheadAttention.

        MultiHead(Q, K, V) = Concat(head_1, ..., head_H) W^O
        head_i = softmax(Q W^Q_i (K W^K_i)^T / sqrt(head_dim)) V W^V_i     (Vaswani et al., arXiv 1706.03762)

    Constructor, parameters, state_dict, initial values, shapes, masks and errors are torch's: see
    torch.nn.MultiheadAttention. What differs on purpose stands in README.md beside this file. The packed
    projection is read where it lies, and ``out_proj`` is called, so that its hooks and adapters live.

    need_weights=True, torch's default, puts the weights of every pair of positions in memory, which no fused
    kernel does: pass need_weights=False where they are not used.

    backend: None for the automatic choice, or the one this instance insists on, as in LayerNorm.
    """

    backend: str | None = None
    __prepare_scriptable__ = refuse_scripting

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KVCache | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """torch's arguments and results, and two more.

        cache: the keys and values of the positions before these, to which it adds theirs. The call is causal
        over all of them, wants need_weights=False and takes no masks. backend: what the layer around this one
        insists on; the instance's own comes first.
        """
        if not isinstance(query, Tensor):
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return trace_call(self, query, key, value, *options)
        backend = backend if self.backend is None else self.backend
        if query.is_nested or key.is_nested or value.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, backend)
        if key_padding_mask is not None or attn_mask is not None:
            check_mask_dtypes(key_padding_mask=key_padding_mask, attn_mask=attn_mask)
            _warn_of_mismatch(key_padding_mask, attn_mask)
        batched = _check_dims(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if cache is not None:
            self._check_cached(key_padding_mask, need_weights, attn_mask)
        elif is_causal:
            if attn_mask is None:
                raise RuntimeError(
                    "Need attn_mask if specifying the is_causal hint. Transformer."
                    "generate_square_subsequent_mask creates this mask."
                )
            is_causal = not need_weights and (key_padding_mask is None or self._knows_causal(attn_mask))
            attn_mask = None if is_causal else attn_mask
        if not batched:
            of_one, key_is_query = value is key, key is query
            query = query.unsqueeze(0)
            key = query if key_is_query else key.unsqueeze(0)
            value = key if of_one else value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)

        seq_first = batched and not self.batch_first
        heads = self._project(query, key, value, seq_first)
        if self.bias_k is not None or self.add_zero_attn:
            heads, attn_mask, key_padding_mask = self._extended(heads, attn_mask, key_padding_mask)
        mask: Tensor | None = None
        if attn_mask is not None or key_padding_mask is not None:
            mask = _merged(attn_mask, key_padding_mask, heads, query.dtype)

        dropout_p = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if cache is not None:
            out = cache.attend(*heads, backend=backend)
        elif need_weights:
            dispatch.record_fallback(_NAME, "need_weights=True asks for the weights, which no kernel stores")
            out, weights = _attend_with_weights(heads, mask, query.dtype, dropout_p)
        else:
            out = _attend(heads, mask, dropout_p, is_causal, backend)
        out = self._joined(out, seq_first)

        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if batched:
            return out, weights
        return out.squeeze(0), None if weights is None else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, seq_first: bool) -> _Heads:
        """The heads of batched inputs. Inputs that are one tensor are projected by one product, whose parts
        are views: their gradients are stacked to its own layout, without a transposition on the way back."""
        width, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if query.shape[-1] != width:
            checks.fail(AssertionError, _NAME, "query", f"an embedding dimension of {width}", query.shape[-1])
        if weight is None:
            q, k, v = self._project_apart(query, key, value)
        elif value is not key:
            if value.shape != key.shape:
                expected = f"the shape {list(key.shape)} (as key)"
                checks.fail(AssertionError, _NAME, "value", expected, list(value.shape))
            weights = weight.chunk(3)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q = self._by_head(F.linear(query, weights[0], biases[0]))
            k = self._by_head(F.linear(key, weights[1], biases[1]))
            v = self._by_head(F.linear(value, weights[2], biases[2]))
        elif key is not query:
            weights = weight.split((width, 2 * width))
            biases = (None, None) if bias is None else bias.split((width, 2 * width))
            q = self._by_head(F.linear(query, weights[0], biases[0]))
            k, v = self._by_head(F.linear(key, weights[1], biases[1]), 2).unbind(2)
        else:
            q, k, v = self._by_head(F.linear(query, weight, bias), 3).unbind(2)
        batch = 1 if seq_first else 0
        if key is not query and key.shape[batch] != query.shape[batch]:
            expected = f"a batch of {query.shape[batch]} (as query)"
            checks.fail(RuntimeError, _NAME, "key", expected, key.shape[batch])
        if seq_first:
            return _Heads(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3))
        return _Heads(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    def _project_apart(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By the three weights of a layer whose keys or values have a width of their own."""
        if key.shape[:2] != value.shape[:2]:
            expected = f"the length and batch {list(key.shape[:2])} (as key)"
            checks.fail(AssertionError, _NAME, "value", expected, list(value.shape[:2]))
        for name, tensor, width in (("key", key, self.kdim), ("value", value, self.vdim)):
            if tensor.shape[-1] != width:
                checks.fail(AssertionError, _NAME, name, f"a last dimension of {width}", tensor.shape[-1])
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return (
            self._by_head(F.linear(query, self.q_proj_weight, biases[0])),
            self._by_head(F.linear(key, self.k_proj_weight, biases[1])),
            self._by_head(F.linear(value, self.v_proj_weight, biases[2])),
        )

    def _by_head(self, projected: Tensor, *parts: int) -> Tensor:
        """[*, *, parts * E] as [*, *, parts, H, head_dim], a view."""
        return projected.reshape(*projected.shape[:2], *parts, self.num_heads, self.head_dim)

    def _joined(self, out: Tensor, seq_first: bool) -> Tensor:
        """The output of the heads [N, H, L, head_dim] through ``out_proj``."""
        if seq_first:
            return self.out_proj(out.permute(2, 0, 1, 3).flatten(2))
        if self.training and out.is_cpu:
            # In memory torch's is sequence first, and the dropout behind it draws its numbers in this order.
            return self.out_proj(out.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _extended(
        self, heads: _Heads, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[_Heads, Tensor | None, Tensor | None]:
        """One more key and value each for add_bias_kv and add_zero_attn, which no mask hides."""
        query, key, value = heads
        size = (query.shape[0], self.num_heads, 1, self.head_dim)
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            more = [bias.view(1, self.num_heads, 1, self.head_dim) for bias in (self.bias_k, self.bias_v)]
            key = torch.cat([key, more[0].to(key.dtype).expand(size)], dim=2)
            value = torch.cat([value, more[1].to(value.dtype).expand(size)], dim=2)
            added += 1
        if self.add_zero_attn:
            key = torch.cat([key, key.new_zeros(size)], dim=2)
            value = torch.cat([value, value.new_zeros(size)], dim=2)
            added += 1
        attn_mask = None if attn_mask is None else F.pad(attn_mask, (0, added))
        key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, added))
        return _Heads(query, key, value), attn_mask, key_padding_mask

    def _knows_causal(self, attn_mask: Tensor) -> bool:
        """Whether the kernel may do without a mask that torch.nn applies, since beside a padding mask the
        hint is_causal alone counts for nothing: where a stack has looked at it, and all keys are its own."""
        return self.bias_k is None and not self.add_zero_attn and is_known_as_causal(attn_mask)

    def _check_cached(
        self, key_padding_mask: Tensor | None, need_weights: bool, attn_mask: Tensor | None
    ) -> None:
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None:
                expected = "None beside cache: each position sees all up to itself"
                checks.fail(ValueError, _NAME, name, expected, f"a mask of shape {list(mask.shape)}")
        if need_weights:
            checks.fail(ValueError, _NAME, "need_weights", "False beside cache", need_weights)
        if self.training and self.dropout > 0:
            expected = "eval() beside cache, which has no dropout"
            checks.fail(ValueError, _NAME, "training", expected, f"a dropout of {self.dropout} in training")
        if self.bias_k is not None or self.add_zero_attn:
            expected = "a layer without add_bias_kv and add_zero_attn"
            checks.fail(ValueError, _NAME, "cache", expected, "one with them")

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        backend: str | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of a nested tensor, as torch's fast path serves it: the output is nested, too."""
        served = query is key and key is value and query.layout is torch.strided and query.dim() == 3
        if not served or not self.batch_first or attn_mask is not None or key_padding_mask is not None:
            expected = "one strided nested tensor as query, key and value, batch_first=True and no mask"
            checks.fail(AssertionError, _NAME, "query", expected, "other nested tensors or arguments")
        dispatch.record_fallback(_NAME, "a nested tensor is padded for the kernels")
        rows, padding = padded(query)
        out, weights = self.forward(rows, rows, rows, padding, need_weights, backend=backend)
        return unpadded(out, padding), weights


def check_mask_dtypes(**masks: Tensor | None) -> None:
    """AssertionError for masks of ints, as torch."""
    for name, mask in masks.items():
        if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")


def _warn_of_mismatch(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    """torch's warning about masks of two dtypes."""
    if key_padding_mask is None or attn_mask is None or attn_mask.dtype == key_padding_mask.dtype:
        return
    if not torch.compiler.is_compiling():
        message = (
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both."
        )
        warnings.warn(message, stacklevel=5)


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: _Heads, dtype: torch.dtype
) -> Tensor:
    """torch.nn's masks as one of ops.attention: bool with True = attend, or a floating one to be added.

    attn_mask [L, S] or [N * H, L, S]; key_padding_mask [N, S]; in both True = hidden. dtype: of the inputs,
    which a bool mask takes where the other is floating.
    """
    batch, num_heads, length, _ = heads.query.shape
    keys = heads.key.shape[2]
    if attn_mask is not None:
        full = (length, keys) if attn_mask.dim() == 2 else (batch * num_heads, length, keys)
        if attn_mask.shape != full:
            dims = attn_mask.dim()
            raise RuntimeError(
                f"The shape of the {dims}D attn_mask is {attn_mask.shape}, but should be {full}."
            )
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(batch, num_heads, length, keys)
    if key_padding_mask is not None:
        if key_padding_mask.shape != (batch, keys):
            got = list(key_padding_mask.shape)
            checks.fail(AssertionError, _NAME, "key_padding_mask", f"shape {[batch, keys]}", got)
        key_padding_mask = key_padding_mask.view(batch, 1, 1, keys)
    if attn_mask is None or key_padding_mask is None:
        mask = key_padding_mask if attn_mask is None else attn_mask
        assert mask is not None
    elif attn_mask.dtype == torch.bool and key_padding_mask.dtype == torch.bool:
        mask = attn_mask | key_padding_mask
    else:
        mask = additive(attn_mask, dtype) + additive(key_padding_mask, dtype)
    if mask.dtype == torch.bool:
        return mask.logical_not()
    _check_mask_dtype(mask, heads.query)
    return mask


def additive(mask: Tensor | None, dtype: torch.dtype) -> Any:
    """A mask of torch.nn's as what is added to the logits: of a bool one 0 and, where it hides, -inf."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _check_mask_dtype(mask: Tensor, query: Tensor) -> None:
    """RuntimeError for the floating masks that torch's attention refuses beside these queries."""
    if mask.dtype in (query.dtype, torch.float32):
        return
    kind = query.device.type
    if mask.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        checks.fail(
            RuntimeError, _NAME, "attn_mask", f"{query.dtype} (as query) or torch.float32", mask.dtype
        )


def _attend(
    heads: _Heads, mask: Tensor | None, dropout_p: float, is_causal: bool, backend: str | None
) -> Tensor:
    """The output [N, H, L, head_dim] of ops.attention, or of torch's for what that doesn't take."""
    if dropout_p >= 1:
        dispatch.record_fallback(_NAME, "a dropout of 1 leaves nothing to attend to")
        return F.scaled_dot_product_attention(*heads, mask, dropout_p, is_causal)
    transform = tracing.obstacle() if backend in (None, "torch") else None
    if transform is not None and not torch._C._is_tracing():
        # The only one of torch's kernels with forward-mode and second derivatives.
        dispatch.record_fallback(_NAME, transform)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*heads, mask, dropout_p, is_causal)
    return attention(*heads, mask, dropout_p, is_causal, backend=backend)  # type: ignore[return-value]


def _attend_with_weights(
    heads: _Heads, mask: Tensor | None, dtype: torch.dtype, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """The output [N, H, L, head_dim] and the weights [N, H, L, S] behind dropout, by torch's operators in the
    order in which torch.nn has them. dtype: of the inputs, in which torch.nn adds a bool mask."""
    batch, num_heads, length, head_dim = heads.query.shape
    query, key, value = (tensor.flatten(0, 1) for tensor in heads)
    query = query * math.sqrt(1.0 / head_dim)
    if mask is None:
        logits = torch.bmm(query, key.transpose(1, 2))
    else:
        if mask.dtype == torch.bool:
            mask = additive(mask.logical_not(), dtype)
        if mask.dim() == 4:
            mask = mask.expand(batch, num_heads, -1, -1).flatten(0, 1)
        logits = torch.baddbmm(mask, query, key.transpose(1, 2))
    weights = torch.softmax(logits, dim=-1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    out = torch.bmm(weights, value).unflatten(0, (batch, num_heads))
    return out, weights.unflatten(0, (batch, num_heads))
