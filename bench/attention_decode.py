"""attention_decode: one step of generation over the caches of a batch."""

from __future__ import annotations

import dataclasses

import torch

from . import formulas, providers
from .case import Function, Shape, Tensors, Variant, Verdict, Work, judged
from .workload import Workload

_MATCH_SEQUENCES = 2
_MATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class DecodeVariant(Variant):
    """A step of ``query_length`` tokens over full caches of ``kv_heads`` heads; page_size 0: contiguous;
    uneven: lengths from a quarter of the cache to all of it."""

    name: str
    op: str = "attention_decode"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    query_length: int = 1
    page_size: int = 0
    uneven: bool = False

    def small(self) -> DecodeVariant:
        return dataclasses.replace(self, heads=max(1, self.heads // self.kv_heads), kv_heads=1, head_dim=16)

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        batch, tokens = shape
        cache = (batch, self.kv_heads, tokens, self.head_dim)
        if self.page_size:
            cache = (batch * -(-tokens // self.page_size), self.kv_heads, self.page_size, self.head_dim)
        query = torch.randn(batch, self.heads, self.query_length, self.head_dim, device=device)
        lengths = torch.full((batch,), tokens, dtype=torch.int32)
        if self.uneven:
            lengths = torch.linspace(tokens / 4, tokens, batch).to(torch.int32)
        tensors = {
            "query": query.to(dtype),
            "key_cache": torch.randn(cache, dtype=dtype, device=device),
            "value_cache": torch.randn(cache, dtype=dtype, device=device),
            "cache_seqlens": lengths.to(device),
        }
        if self.page_size:
            table = torch.randperm(cache[0]).view(batch, -1)
            tensors["block_table"] = table.to(device, torch.int32)
        return tensors

    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """Each key and value of each sequence read once, query and result once."""
        query = tensors["query"]
        tokens = int(tensors["cache_seqlens"].sum())
        elements = 2 * tokens * self.kv_heads * self.head_dim + 2 * query.numel()
        return Work(query.element_size() * elements)

    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        """The step of a few sequences, of the measured length as far as float64 has room."""
        query, formula = tensors["query"], formulas.attention_decode(self)
        few = self.tensors((_MATCH_SEQUENCES, min(shape[1], _MATCH_TOKENS)), query.dtype, query.device)
        exact = {name: t.double() if t.is_floating_point() else t for name, t in few.items()}
        # What a result is summed from: the weighted |values|.
        magnitude = formula({**exact, "value_cache": exact["value_cache"].abs()})
        found, right, own = ({"output": call(given)} for call, given in (
            (function, few), (formula, exact), (formula, few)
        ))  # fmt: skip
        return judged(found, right, own, lambda *_: magnitude)  # type: ignore[arg-type,return-value]


WORKLOAD = Workload(
    name="attention_decode",
    sizes=("sequences", "tokens"),
    swept="tokens",
    bound="copy",
    variants=(
        DecodeVariant("GQA 32/8"),
        DecodeVariant("MHA 32/32", kv_heads=32),
        DecodeVariant("MQA 32/1", kv_heads=1),
        DecodeVariant("GQA 32/8, d64", head_dim=64),
        DecodeVariant("GQA 32/8, 4 new tokens", query_length=4),
        DecodeVariant("GQA 32/8, uneven lengths", uneven=True),
        DecodeVariant("GQA 32/8, pages of 16", page_size=16),
        DecodeVariant("GQA 32/8, pages of 256", page_size=256),
    ),
    shapes=(
        *((32, 4096), (32, 32768), (128, 4096)),
        *((1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768)),
    ),
    small_shapes=((2, 70),),
    providers=providers.DECODE,
    repeats=50,
)
