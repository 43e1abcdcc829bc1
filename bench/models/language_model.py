"""A language model of GPT-2's size: its training step, and generation from a key-value cache."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import providers
from ..case import Function, Shape, Tensors, Variant, Verdict, Work, copied
from ..workload import Workload
from .bound import Bound, match_of_layers, parameter_bytes, parameters_of

# Tokens that a cache has room for beyond its context: one a repetition.
SPARE = 256


class LanguageModel(nn.Module):
    """Pre-norm blocks under a causal mask, and an output layer that shares the embedding's weight."""

    def __init__(
        self,
        layers: ModuleType,
        depth: int,
        width: int,
        head_dim: int,
        vocabulary: int,
        longest: int,
        **to: Any,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, **to)
        self.positions = nn.Embedding(longest, width, **to)
        block = layers.TransformerEncoderLayer(
            *(width, width // head_dim, 4 * width, 0.0, "gelu"), batch_first=True, norm_first=True, **to
        )
        norm = layers.LayerNorm(width, **to)
        self.blocks = layers.TransformerEncoder(block, depth, norm, enable_nested_tensor=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def embed(self, ids: Tensor, first: int = 0) -> Tensor:
        """[B, L, width] of ids [B, L] whose positions begin with ``first``."""
        places = torch.arange(first, first + ids.shape[1], device=ids.device)
        return self.tokens(ids) + self.positions(places)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.tokens.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of predicting each next token of ids [B, L + 1]."""
        hidden = self.embed(ids[:, :-1])
        length = hidden.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, ids.device, hidden.dtype)
        logits = self.logits(self.blocks(hidden, mask=mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@dataclasses.dataclass(frozen=True)
class _Sized(Variant):
    name: str
    depth: int = 12
    width: int = 768
    head_dim: int = 64
    vocabulary: int = 50257

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    def small(self) -> Any:
        return dataclasses.replace(self, depth=2, width=32, head_dim=16, vocabulary=60)

    def module(
        self, layers: ModuleType, longest: int, dtype: torch.dtype, device: torch.device
    ) -> LanguageModel:
        sizes = (self.depth, self.width, self.head_dim, self.vocabulary, longest)
        return LanguageModel(layers, *sizes, dtype=dtype, device=device)

    def _ids(self, *sizes: int, device: torch.device) -> Tensor:
        return torch.randint(self.vocabulary, sizes, device=device)

    def _dense_flops(self, tokens: int) -> int:
        return 2 * tokens * (12 * self.depth * self.width**2 + self.width * self.vocabulary)


@dataclasses.dataclass(frozen=True)
class TrainingVariant(_Sized):
    op: str = "language_model"

    def function(self, module: LanguageModel, call: Any) -> Function:
        """call: the module, or what a compiler made of it."""
        return Bound(module, lambda tensors: call(tensors["ids"]))

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        batch, length = shape
        parameters = parameters_of(self.module(nn, length, dtype, device), trained=True)
        return {"ids": self._ids(batch, length + 1, device=device), **parameters}

    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """The products alone, causal attention's two forward and five backward. Parameters once, and their
        gradients."""
        batch, length = shape
        tokens = batch * length
        product = 2 * self.depth * batch * self.width * length * (length + 1) // 2
        dense, parameters = self._dense_flops(tokens), parameter_bytes(tensors)
        return {
            "forward": Work(parameters, dense + 2 * product),
            "backward": Work(2 * parameters, 2 * dense + 5 * product),
            "both": Work(3 * parameters, 3 * dense + 7 * product, tokens),
        }[direction]

    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        """Loss and gradients of one sequence of up to 128 tokens."""
        few = {**tensors, "ids": tensors["ids"][:1, :129]}
        weight = tensors["tokens.weight"]
        module = self.module(nn, shape[1], weight.dtype, weight.device)
        return match_of_layers(function, self.function(module, module), few, self.depth)


@dataclasses.dataclass(frozen=True)
class GenerationVariant(_Sized):
    """One new token of each sequence, behind a prompt that is prefilled before anything is timed."""

    op: str = "generation"

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        batch, context = shape
        parameters = parameters_of(self.module(nn, context + SPARE, dtype, device), trained=False)
        ids = {
            "prompt": self._ids(batch, context, device=device),
            "token": self._ids(batch, 1, device=device),
        }
        return ids | parameters

    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """Every parameter but the table of positions, and every key and value, read once."""
        batch, context = shape
        size = tensors["tokens.weight"].element_size()
        parameters = parameter_bytes(tensors) - tensors["positions.weight"].nbytes
        cache = 2 * self.depth * batch * context * self.width * size
        return Work(parameters + cache, tokens=batch)

    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        """The logits of a token behind up to 128 of the prompt, against the model without a cache."""
        few = {**tensors, "prompt": tensors["prompt"][:1, :128], "token": tensors["token"][:1]}
        weight = tensors["tokens.weight"]
        module = self.module(nn, shape[1] + SPARE, weight.dtype, weight.device).eval()

        def whole(given: Tensors) -> Tensor:
            ids = torch.cat((given["prompt"], given["token"]), dim=1)
            hidden = module.embed(ids)
            mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], ids.device, hidden.dtype)
            return module.logits(module.blocks(hidden, mask=mask, is_causal=True)[:, -1:])

        def first_step(given: Tensors) -> Tensor:
            # A step goes on from the one before it, so that only the first is this one.
            return function(copied(given))  # type: ignore[return-value]

        with torch.no_grad():
            return match_of_layers(first_step, Bound(module, whole), few, self.depth)


TRAINING = Workload(
    name="language_model",
    sizes=("batch", "length"),
    swept="length",
    bound="matmul",
    variants=(TrainingVariant("GPT-2 size, training step"),),
    shapes=((16, 1024), (8, 2048)),
    small_shapes=((1, 12),),
    providers=providers.LAYERS,
)
GENERATION = Workload(
    name="generation",
    sizes=("sequences", "context"),
    swept="sequences",
    bound="copy",
    variants=(GenerationVariant("GPT-2 size, one token"),),
    shapes=((1, 1024), (8, 1024), (32, 1024), (128, 1024)),
    small_shapes=((2, 12),),
    providers=providers.LAYERS,
    repeats=50,
)
