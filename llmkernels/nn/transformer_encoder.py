"""torch.nn.TransformerEncoderLayer and torch.nn.TransformerEncoder on the kernels of llmkernels.ops."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, dispatch
from ._blocks import add_norm, attend, run_feed_forward
from ._calls import call, refuse_scripting, trace_call
from ._causal import is_causal_mask
from ._nested import padded, unpadded
from ._stacks import cache_options
from .kv_cache import KVCache
from .layer_norm import LayerNorm
from .multihead_attention import MultiheadAttention, additive, check_mask_dtypes

_LAYER = "nn.TransformerEncoderLayer"


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and feed-forward, a drop-in for torch.nn.TransformerEncoderLayer.

        x = norm1(x + dropout1(self_attn(x)))           x = norm2(x + dropout2(feed_forward(x)))
        norm_first:  x = x + dropout1(self_attn(norm1(x)))    x = x + dropout2(feed_forward(norm2(x)))

    (Vaswani et al., arXiv 1706.03762; Xiong et al., arXiv 2002.04745.) Constructor, parameters, state_dict,
    initial values, shapes, masks and errors are torch's. Dropout, addition and normalisation are one kernel,
    the first product of the feed-forward and its activation are one, wherever the children are torch's plain
    ones; else they are called one by one, as torch's slow path calls them, and ``llmkernels.explain`` says
    why. torch's fast path, which reads the children's weights, is never taken: README.md beside this file.

    backend: None for the automatic choice, or the one that this instance and all in it insist on.
    """

    backend: str | None = None
    __prepare_scriptable__ = refuse_scripting

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adopt_children()

    def adopt_children(self) -> None:
        """Makes the attention and the norms that torch's constructor made ours: same state, other class."""
        self.self_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KVCache | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """torch's arguments and result, and two more.

        cache: the keys and values of the positions before these (see MultiheadAttention): causal, without
        masks, in eval. backend: what the stack around this layer insists on; the instance's own comes first.
        """
        if not isinstance(src, Tensor):
            return trace_call(self, src, src_mask, src_key_padding_mask, is_causal)
        backend = backend if self.backend is None else self.backend
        if src.is_nested:
            return self._nested(src, backend, src_mask, src_key_padding_mask)
        masks = (src_key_padding_mask, src_mask, is_causal)
        if self.norm_first:
            x = call(self.norm1, LayerNorm, backend, src)
            x = attend(self.self_attn, backend, cache, x, x, *masks)
            x, total = add_norm(_LAYER, x, src, self.dropout1, self.norm2, backend)
            return total + self.dropout2(self._feed(x, backend))
        x = attend(self.self_attn, backend, cache, src, src, *masks)
        x, _ = add_norm(_LAYER, x, src, self.dropout1, self.norm1, backend)
        return add_norm(_LAYER, self._feed(x, backend), x, self.dropout2, self.norm2, backend)[0]

    def _feed(self, x: Tensor, backend: str | None) -> Tensor:
        return run_feed_forward(_LAYER, x, self.linear1, self.activation, self.dropout, self.linear2, backend)

    def _nested(self, src: Tensor, backend: str | None, *masks: Tensor | None) -> Tensor:
        """What torch's TransformerEncoder hands its layers of a padded batch in eval, and wants back."""
        if (
            src.layout is not torch.strided
            or not self.self_attn.batch_first
            or any(m is not None for m in masks)
        ):
            expected = "of nested tensors a strided one, batch_first=True and no mask"
            checks.fail(AssertionError, _LAYER, "src", expected, "others")
        dispatch.record_fallback(_LAYER, "a nested tensor is padded for the kernels")
        rows, padding = padded(src)
        return unpadded(self.forward(rows, None, padding, backend=backend), padding)


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of encoder layers, a drop-in for torch.nn.TransformerEncoder.

    Constructor, parameters, state_dict, shapes, masks and errors are torch's. A padded batch stays a padded
    batch: no nested tensor is made of it, and what comes out at the padding is what the layers make of it, in
    eval as in training. ``is_causal=None`` looks at the mask, on a GPU once for each mask (_causal.py).

    backend: None for the automatic choice, or the one that this instance and all in it insist on.
    """

    backend: str | None = None
    __prepare_scriptable__ = refuse_scripting

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        cache: Sequence[KVCache] | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """torch's arguments and result, and two more.

        cache: one KVCache a layer (see TransformerEncoderLayer). backend: what the model around this stack
        insists on; the instance's own comes first.
        """
        if not isinstance(src, Tensor):
            return trace_call(self, src, mask, src_key_padding_mask, is_causal)
        backend = backend if self.backend is None else self.backend
        check_mask_dtypes(mask=mask, src_key_padding_mask=src_key_padding_mask)
        if is_causal is None:
            is_causal = is_causal_mask(mask, src, self.layers[0].self_attn.batch_first)
        output = src
        masks = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask}
        caches = cache_options("TransformerEncoder", cache, len(self.layers))
        for layer, options in zip(self.layers, caches, strict=True):
            if not isinstance(layer, TransformerEncoderLayer):
                # torch's stack hands its layers floating masks, which theirs may rely on.
                masks = {name: additive(each, src.dtype) for name, each in masks.items()}
            output = call(
                layer, TransformerEncoderLayer, backend, output, **masks, is_causal=is_causal, **options
            )
        return output if self.norm is None else call(self.norm, LayerNorm, backend, output)
