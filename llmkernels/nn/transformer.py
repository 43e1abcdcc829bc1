"""torch.nn.Transformer on the kernels of llmkernels.ops."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from .. import checks
from ._calls import call, refuse_scripting, trace_call
from .layer_norm import LayerNorm
from .transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder, TransformerEncoderLayer

_NAME = "nn.Transformer"


class Transformer(nn.Transformer):
    """Encoder and decoder, a drop-in for torch.nn.Transformer.

    Constructor, parameters, state_dict, initial values, shapes, masks and errors are torch's (Vaswani et al.,
    arXiv 1706.03762). custom_encoder and custom_decoder stay what they are.

    backend: None for the automatic choice, or the one that this instance and all in it insist on.
    """

    backend: str | None = None
    __prepare_scriptable__ = refuse_scripting

    @functools.wraps(nn.Transformer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(nn.Transformer).bind(*args, **kwargs).arguments
        if given.get("custom_encoder") is None:
            self.encoder.__class__ = TransformerEncoder
            self.encoder.norm.__class__ = LayerNorm
            for layer in self.encoder.layers:
                layer.__class__ = TransformerEncoderLayer
                layer.adopt_children()
        if given.get("custom_decoder") is None:
            self.decoder.__class__ = TransformerDecoder
            self.decoder.norm.__class__ = LayerNorm
            for layer in self.decoder.layers:
                layer.__class__ = TransformerDecoderLayer
                layer.adopt_children()

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """torch's arguments and result."""
        if not isinstance(src, Tensor):
            masks = (src_mask, tgt_mask, memory_mask)
            padding = (src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask)
            hints = (src_is_causal, tgt_is_causal, memory_is_causal)
            return trace_call(self, src, tgt, *masks, *padding, *hints)
        batch = 0 if self.batch_first else 1
        if src.dim() == 3 and src.shape[batch] != tgt.shape[batch]:
            checks.fail(
                RuntimeError, _NAME, "tgt", f"a batch of {src.shape[batch]} (as src)", tgt.shape[batch]
            )
        for name, tensor in (("src", src), ("tgt", tgt)):
            if tensor.shape[-1] != self.d_model:
                checks.fail(
                    RuntimeError, _NAME, name, f"a last dimension of {self.d_model}", tensor.shape[-1]
                )
        memory = call(
            self.encoder,
            TransformerEncoder,
            self.backend,
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
        )
        return call(
            self.decoder,
            TransformerDecoder,
            self.backend,
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
