"""torch.nn.TransformerDecoderLayer and torch.nn.TransformerDecoder on the kernels of llmkernels.ops."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ._blocks import add_norm, attend, run_feed_forward
from ._calls import call, refuse_scripting, trace_call
from ._causal import is_causal_mask
from ._stacks import cache_options
from .kv_cache import KVCache
from .layer_norm import LayerNorm
from .multihead_attention import MultiheadAttention

_LAYER = "nn.TransformerDecoderLayer"


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention, attention to a memory and feed-forward, a drop-in for torch.nn.TransformerDecoderLayer.

        x = norm1(x + dropout1(self_attn(x)))
        x = norm2(x + dropout2(multihead_attn(x, memory)))
        x = norm3(x + dropout3(feed_forward(x)))
        norm_first:  x = x + dropout(block(norm(x))) in each of the three

    (Vaswani et al., arXiv 1706.03762.) What is fused and when, and what ``backend`` means: as in
    TransformerEncoderLayer.
    """

    backend: str | None = None
    __prepare_scriptable__ = refuse_scripting

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adopt_children()

    def adopt_children(self) -> None:
        """Makes the attention and the norms that torch's constructor made ours: same state, other class."""
        self.self_attn.__class__ = self.multihead_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = self.norm3.__class__ = LayerNorm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """torch's arguments and result, and two more.

        cache: the self-attention's keys and values of the positions before these (see MultiheadAttention):
        causal, without tgt masks, in eval. backend: what the stack around this layer insists on; the
        instance's own comes first.
        """
        if not isinstance(tgt, Tensor):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            return trace_call(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal)
        backend = backend if self.backend is None else self.backend
        masks = (tgt_key_padding_mask, tgt_mask, tgt_is_causal)
        memory_masks = (memory_key_padding_mask, memory_mask, memory_is_causal)
        if self.norm_first:
            x = call(self.norm1, LayerNorm, backend, tgt)
            x = attend(self.self_attn, backend, cache, x, x, *masks)
            x, total = add_norm(_LAYER, x, tgt, self.dropout1, self.norm2, backend)
            x = attend(self.multihead_attn, backend, None, x, memory, *memory_masks)
            x, total = add_norm(_LAYER, x, total, self.dropout2, self.norm3, backend)
            return total + self.dropout3(self._feed(x, backend))
        x = attend(self.self_attn, backend, cache, tgt, tgt, *masks)
        x, _ = add_norm(_LAYER, x, tgt, self.dropout1, self.norm1, backend)
        attended = attend(self.multihead_attn, backend, None, x, memory, *memory_masks)
        x, _ = add_norm(_LAYER, attended, x, self.dropout2, self.norm2, backend)
        return add_norm(_LAYER, self._feed(x, backend), x, self.dropout3, self.norm3, backend)[0]

    def _feed(self, x: Tensor, backend: str | None) -> Tensor:
        return run_feed_forward(_LAYER, x, self.linear1, self.activation, self.dropout, self.linear2, backend)


class TransformerDecoder(nn.TransformerDecoder):
    """A stack of decoder layers, a drop-in for torch.nn.TransformerDecoder.

    Constructor, parameters, state_dict, shapes, masks and errors are torch's. ``tgt_is_causal=None`` and
    ``backend``: as in TransformerEncoder.
    """

    backend: str | None = None
    __prepare_scriptable__ = refuse_scripting

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: Sequence[KVCache] | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """torch's arguments and result, and two more.

        cache: one KVCache a layer (see TransformerDecoderLayer). backend: what the model around this stack
        insists on; the instance's own comes first.
        """
        if not isinstance(tgt, Tensor):
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            return trace_call(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal)
        backend = backend if self.backend is None else self.backend
        if tgt_is_causal is None:
            tgt_is_causal = is_causal_mask(tgt_mask, tgt, self.layers[0].self_attn.batch_first)
        masks = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": tgt_is_causal,
            "memory_is_causal": memory_is_causal,
        }
        output = tgt
        caches = cache_options("TransformerDecoder", cache, len(self.layers))
        for layer, options in zip(self.layers, caches, strict=True):
            output = call(layer, TransformerDecoderLayer, backend, output, memory, **masks, **options)
        return output if self.norm is None else call(self.norm, LayerNorm, backend, output)
