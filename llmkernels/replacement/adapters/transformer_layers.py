"""torch.nn's Transformer layers, their attention and the stacks of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import nn as ours
from ..copying import duplicate
from .adapter import Adapter, Inputs, drawn

# Tokens of one sequence, where there are enough for several.
_LENGTH = 512
# Layers of a stack that show what the stack does.
_LAYERS = 2


class _TransformerAdapter(Adapter):
    """What the families of this file have in common: batches of sequences, masks, and children."""

    constants = frozenset(
        (
            *("attn_mask", "key_padding_mask", "mask", "src_mask", "tgt_mask", "memory_mask"),
            *("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"),
        )
    )
    # The children that forward() looks for.
    children: ClassVar[tuple[str, ...]] = ()

    def obstacles(self, module: nn.Module) -> list[str]:
        reasons = [f"{name} is missing" for name in self.children if not hasattr(module, name)]
        for name, part in module.named_modules():
            if ".quanti" in type(part).__module__:
                reasons.append(f"{name} is quantised: {type(part).__module__}.{type(part).__qualname__}")
            for attribute in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
                if isinstance(vars(part).get(attribute), Tensor):
                    path = f"{name}.{attribute}".removeprefix(".")
                    reasons.append(
                        f"{path} is no registered parameter: a wrapper such as FSDP or a hook manages it"
                    )
        return reasons


class MultiheadAttentionAdapter(_TransformerAdapter):
    """torch.nn.MultiheadAttention, by itself or in what is no layer of torch's."""

    original = nn.MultiheadAttention
    replacement = ours.MultiheadAttention
    kernels = ("triton", "cuda")
    children = ("out_proj",)

    def obstacles(self, module: nn.Module) -> list[str]:
        assert isinstance(module, nn.MultiheadAttention)
        width, of_key, of_value = module.embed_dim, module.kdim, module.vdim
        shapes = {
            "in_proj_weight": (3 * width, width),
            "in_proj_bias": (3 * width,),
            "q_proj_weight": (width, width),
            "k_proj_weight": (width, of_key),
            "v_proj_weight": (width, of_value),
        }
        reasons = super().obstacles(module)
        for name, shape in shapes.items():
            parameter = module._parameters.get(name)
            if parameter is None:
                continue
            if tuple(parameter.shape) != shape:
                reasons.append(
                    f"{name} has shape {list(parameter.shape)} where {list(shape)} is the whole: it is "
                    "sharded or pruned"
                )
            if not parameter.is_floating_point():
                reasons.append(f"{name} is {parameter.dtype}: it is quantised")
        return reasons

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        assert isinstance(module, nn.MultiheadAttention)
        batch = _Batch(module, dtype, device, rows)
        query, padding = batch.sequences(0), {"key_padding_mask": batch.padding(), "need_weights": False}
        key, value = (batch.sequences(seed, width) for seed, width in ((1, module.kdim), (2, module.vdim)))
        others = Inputs((query, key, value), padding)
        if not module._qkv_same_embed_dim:
            return [Inputs((query, key, value), {"need_weights": False}), others]
        causal = {"attn_mask": batch.causal(), "is_causal": True, "need_weights": False}
        return [
            Inputs((query, query, query), {"need_weights": False}),
            Inputs((query, query, query), causal),
            others,
        ]


class TransformerEncoderLayerAdapter(_TransformerAdapter):
    """torch.nn.TransformerEncoderLayer with its attention and norms."""

    original = nn.TransformerEncoderLayer
    replacement = ours.TransformerEncoderLayer
    kernels = ("triton", "cuda")
    covers_children = True
    children = (
        *("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2"),
        "activation",
    )

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        return list(_encoder_inputs(_Batch(module, dtype, device, rows), "src_mask"))


class TransformerDecoderLayerAdapter(_TransformerAdapter):
    """torch.nn.TransformerDecoderLayer with its attentions and norms."""

    original = nn.TransformerDecoderLayer
    replacement = ours.TransformerDecoderLayer
    kernels = ("triton", "cuda")
    covers_children = True
    children = (
        *("self_attn", "multihead_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "norm3"),
        *("dropout1", "dropout2", "dropout3", "activation"),
    )

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        return list(_decoder_inputs(_Batch(module, dtype, device, rows)))


class _StackAdapter(_TransformerAdapter):
    """A stack passes masks on to layers that are sites of their own: it is tried with the original ones, of
    which two show what it does with all."""

    kernels = ()

    def copy(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        further = [
            layer
            for part in module.modules()
            if isinstance(part, (nn.TransformerEncoder, nn.TransformerDecoder))
            for layer in list(part.layers)[_LAYERS:]
        ]
        return duplicate(module, dtype, further)


class TransformerEncoderAdapter(_StackAdapter):
    """torch.nn.TransformerEncoder, which otherwise makes nested tensors of padded batches in eval."""

    original = nn.TransformerEncoder
    replacement = ours.TransformerEncoder
    children = ("layers",)

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        return list(_encoder_inputs(_Batch(module, dtype, device, rows), "mask"))


class TransformerDecoderAdapter(_StackAdapter):
    """torch.nn.TransformerDecoder."""

    original = nn.TransformerDecoder
    replacement = ours.TransformerDecoder
    children = ("layers",)

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        return list(_decoder_inputs(_Batch(module, dtype, device, rows)))


class TransformerAdapter(_StackAdapter):
    """torch.nn.Transformer."""

    original = nn.Transformer
    replacement = ours.Transformer
    children = ("encoder", "decoder")

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        batch = _Batch(module, dtype, device, rows)
        source, target = batch.sequences(0), batch.sequences(1)
        padding = batch.padding()
        masks = {
            "tgt_mask": batch.causal(),
            "src_key_padding_mask": padding,
            "memory_key_padding_mask": padding,
        }
        return [Inputs((source, target), masks)]


class _Batch:
    """Sequences that a module of this file takes, about ``rows`` tokens, at least two sequences."""

    def __init__(self, module: Any, dtype: torch.dtype, device: torch.device, rows: int) -> None:
        attention = next((part for part in module.modules() if isinstance(part, nn.MultiheadAttention)), None)
        if attention is None:
            raise ValueError("it has no torch.nn.MultiheadAttention that tells the shape of its inputs")
        self._width, self._batch_first = attention.embed_dim, attention.batch_first
        self._size = max(2, rows // _LENGTH)
        self._length = max(2, rows // self._size)
        self._dtype, self._device = dtype, device

    def sequences(self, seed: int, width: int | None = None) -> Tensor:
        shape = (self._size, self._length) if self._batch_first else (self._length, self._size)
        return drawn((*shape, width or self._width), self._dtype, self._device, seed)

    def causal(self) -> Tensor:
        """True = hidden, as in torch.nn."""
        whole = torch.ones(self._length, self._length, dtype=torch.bool, device=self._device)
        return whole.triu(diagonal=1)

    def padding(self) -> Tensor:
        """The last sequence is shorter by a third; True = hidden."""
        hidden = torch.zeros(self._size, self._length, dtype=torch.bool, device=self._device)
        hidden[-1, self._length - (self._length + 2) // 3 :] = True
        return hidden


def _encoder_inputs(batch: _Batch, mask: str) -> Iterator[Inputs]:
    """Without a mask, causal, and with padding beside a mask; ``mask``: its name in forward()."""
    source = batch.sequences(0)
    yield Inputs((source,), {})
    yield Inputs((source,), {mask: batch.causal(), "is_causal": True})
    yield Inputs((source,), {mask: batch.causal(), "src_key_padding_mask": batch.padding()})


def _decoder_inputs(batch: _Batch) -> Iterator[Inputs]:
    target, memory = batch.sequences(0), batch.sequences(1)
    yield Inputs((target, memory), {"tgt_mask": batch.causal(), "tgt_is_causal": True})
    yield Inputs((target, memory), {"tgt_mask": batch.causal(), "memory_key_padding_mask": batch.padding()})
