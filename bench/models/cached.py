"""Generation as users of torch.nn write it by hand: a layer's keys and values in two preallocated tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import Function, Tensors
from .bound import Bound
from .language_model import SPARE, LanguageModel


def _advance(
    model: LanguageModel, heads: int, ids: Tensor, keys: list[Tensor], values: list[Tensor], first: int
) -> Tensor:
    """Logits [B, 1, V] of the last of ids [B, L], whose keys and values are kept at ``first`` and on."""
    hidden = model.embed(ids, first)
    end = first + ids.shape[1]
    for block, held_keys, held_values in zip(model.blocks.layers, keys, values, strict=True):
        attention = block.self_attn
        packed = F.linear(block.norm1(hidden), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        held_keys[:, :, first:end] = key
        held_values[:, :, first:end] = value
        seen = held_keys[:, :, :end], held_values[:, :, :end]
        out = F.scaled_dot_product_attention(query, *seen, is_causal=first == 0)
        hidden = hidden + attention.out_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + block.linear2(F.gelu(block.linear1(block.norm2(hidden))))
    return model.logits(model.blocks.norm(hidden[:, -1:]))


def function(model: LanguageModel, heads: int, prepared: Callable[[Any], Any]) -> Function:
    """prepared: what makes of ``_advance`` what is timed, a compiler or nothing."""
    model.eval()
    step = prepared(_advance)
    held: dict[str, list[Tensor]] = {}

    def begin(tensors: Tensors) -> None:
        batch, context = tensors["prompt"].shape
        weight = model.tokens.weight
        shape = (batch, heads, context + SPARE, weight.shape[1] // heads)
        for name in ("keys", "values"):
            held[name] = [weight.new_empty(shape) for _ in model.blocks.layers]
        with torch.no_grad():
            _advance(model, heads, tensors["prompt"], **held, first=0)

    def call(tensors: Tensors) -> Tensor:
        with torch.no_grad():
            return step(model, heads, tensors["token"], **held, first=tensors["prompt"].shape[1])

    return Bound(model, call, begin)
