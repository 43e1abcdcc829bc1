"""Generation on our layers and their KVCache."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkernels.nn import KVCache

from ..case import Function, Tensors
from .bound import Bound
from .language_model import SPARE, LanguageModel


def function(model: LanguageModel, heads: int) -> Function:
    """A call appends the token that it is given and returns its logits [B, 1, V]."""
    model.eval()
    held: list[KVCache] = []

    def advance(ids: Tensor, first: int) -> Tensor:
        with torch.no_grad():
            return model.logits(model.blocks(model.embed(ids, first), cache=held)[:, -1:])

    def begin(tensors: Tensors) -> None:
        batch, context = tensors["prompt"].shape
        weight = model.tokens.weight
        size = (batch, context + SPARE, heads, weight.shape[1] // heads)
        held[:] = [KVCache(*size, dtype=weight.dtype, device=weight.device) for _ in model.blocks.layers]
        advance(tensors["prompt"], 0)

    def call(tensors: Tensors) -> Tensor:
        return advance(tensors["token"], tensors["prompt"].shape[1])

    return Bound(model, call, begin)
