"""A sentence encoder of MiniLM's sizes, a BERT of the transformers library with random weights: inference."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import providers
from ..case import Function, Shape, Tensors, Variant, Verdict, Work
from ..providers import Unavailable
from ..workload import Workload
from .bound import Bound, match_of_layers, parameter_bytes, parameters_of


@dataclasses.dataclass(frozen=True)
class SentenceEncoderVariant(Variant):
    """Lengths rise evenly from a quarter of the longest to the longest, padded on the right."""

    name: str
    op: str = "sentence_encoder"
    depth: int = 6
    width: int = 384
    head_dim: int = 32
    vocabulary: int = 30522

    def small(self) -> SentenceEncoderVariant:
        return dataclasses.replace(self, depth=1, width=32, head_dim=16, vocabulary=60)

    def module(self, dtype: torch.dtype, device: torch.device) -> Any:
        try:
            from transformers import BertConfig, BertModel
        except ImportError as error:
            raise Unavailable("transformers is not installed (pip install transformers)") from error
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.width // self.head_dim,
            intermediate_size=4 * self.width,
            attn_implementation="sdpa",
        )
        return BertModel(config, add_pooling_layer=False).to(device, dtype).eval()

    def function(self, module: Any, call: Any) -> Function:
        """The hidden states of the tokens that are no padding, call: the module, or what a compiler made of
        it."""

        def encode(tensors: Tensors) -> Tensor:
            mask = tensors["attention_mask"]
            with torch.no_grad():
                hidden = call(input_ids=tensors["input_ids"], attention_mask=mask).last_hidden_state
            return hidden * mask[..., None]

        return Bound(module, encode)

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        batch, longest = shape
        lengths = torch.linspace(longest / 4, longest, batch, device=device).long()
        mask = torch.arange(longest, device=device) < lengths[:, None]
        ids = torch.randint(self.vocabulary, shape, device=device)
        parameters = parameters_of(self.module(dtype, device), trained=False)
        return {"input_ids": ids, "attention_mask": mask.long(), **parameters}

    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """The products, of every position as the model is called; tokens: those that are no padding."""
        batch, longest = shape
        dense = 2 * batch * longest * 12 * self.depth * self.width**2
        scores = 4 * self.depth * batch * longest**2 * self.width
        return Work(parameter_bytes(tensors), dense + scores, int(tensors["attention_mask"].sum()))

    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        few = {**tensors, **{name: tensors[name][-2:] for name in ("input_ids", "attention_mask")}}
        weight = next(tensor for tensor in tensors.values() if tensor.is_floating_point())
        module = self.module(weight.dtype, weight.device)
        return match_of_layers(function, self.function(module, module), few, self.depth)


WORKLOAD = Workload(
    name="sentence_encoder",
    sizes=("batch", "longest"),
    swept="batch",
    bound="matmul",
    variants=(SentenceEncoderVariant("MiniLM size, inference"),),
    shapes=((32, 128), (128, 128), (8, 512), (64, 512)),
    small_shapes=((2, 12),),
    providers=providers.LAYERS,
)
