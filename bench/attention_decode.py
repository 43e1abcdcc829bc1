"""attention_decode beside torch's scaled_dot_product_attention over the same cache and, where installed,
flash-attn's flash_attn_with_kvcache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkernels
from llmkernels import dispatch, testing
from llmkernels.ops.attention_decode import api
from llmkernels.ops.attention_decode.call import DecodeCall

from .measure import Ceilings, Record, copy_rate, directions, measured

Function = Callable[[dict[str, Tensor]], Tensor]

# Sequences, tokens of each in the cache.
SHAPES = ((1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (32, 4096), (32, 32768), (128, 4096))
QUICK_SHAPES = ((2, 128), (3, 200))
MATCH_SEQUENCES = 2
MATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Variant:
    """A step of ``query_length`` tokens over full caches of ``kv_heads`` heads; page_size 0: contiguous."""

    name: str
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    query_length: int = 1
    page_size: int = 0
    uneven: bool = False  # lengths from a quarter of the cache to all of it

    def tensors(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        shape = (batch, self.kv_heads, tokens, self.head_dim)
        if self.page_size:
            pages = -(-tokens // self.page_size)
            shape = (batch * pages, self.kv_heads, self.page_size, self.head_dim)
        query = torch.randn(batch, self.heads, self.query_length, self.head_dim, device=device)
        tensors = {
            "query": query.to(dtype),
            "key_cache": torch.randn(shape, dtype=dtype, device=device),
            "value_cache": torch.randn(shape, dtype=dtype, device=device),
        }
        lengths = torch.full((batch,), tokens, dtype=torch.int32)
        if self.uneven:
            lengths = torch.linspace(tokens / 4, tokens, batch).to(torch.int32)
        tensors["cache_seqlens"] = lengths.to(device)
        if self.page_size:
            table = torch.randperm(shape[0]).view(batch, -1)
            tensors["block_table"] = table.to(device, torch.int32)
        return tensors

    def floor_bytes(self, tensors: dict[str, Tensor]) -> int:
        """Each key and value of each sequence read once, query and result once."""
        query = tensors["query"]
        tokens = int(tensors["cache_seqlens"].sum())
        return query.element_size() * (2 * tokens * self.kv_heads * self.head_dim + 2 * query.numel())


VARIANTS = (
    Variant("GQA 32/8"),
    Variant("MHA 32/32", kv_heads=32),
    Variant("MQA 32/1", kv_heads=1),
    Variant("GQA 32/8, d64", head_dim=64),
    Variant("GQA 32/8, 4 new tokens", query_length=4),
    Variant("GQA 32/8, uneven lengths", uneven=True),
    Variant("GQA 32/8, pages of 16", page_size=16),
    Variant("GQA 32/8, pages of 256", page_size=256),
)


def _ours(backend: str) -> Function:
    return lambda tensors: llmkernels.attention_decode(**tensors, backend=backend)  # type: ignore[return-value]


def _sdpa(variant: Variant) -> Function:
    """torch's operator as its users call it for a decoding step: keys gathered from their pages, and a mask
    where the lengths or the queries need one."""

    def function(tensors: dict[str, Tensor]) -> Tensor:
        query, keys, values = (tensors[name] for name in ("query", "key_cache", "value_cache"))
        table, mask = tensors.get("block_table"), None
        if table is not None:
            batch, heads, dim = query.shape[0], keys.shape[1], keys.shape[3]
            keys, values = (c[table].transpose(1, 2).reshape(batch, heads, -1, dim) for c in (keys, values))
        if variant.uneven or variant.page_size or variant.query_length > 1:
            rows = torch.arange(query.shape[2], device=query.device) - query.shape[2]
            positions = tensors["cache_seqlens"][:, None] + rows
            columns = torch.arange(keys.shape[2], device=query.device)
            mask = (columns <= positions[:, :, None])[:, None]
        return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)

    return function


def _peers(variant: Variant) -> Iterator[tuple[str, Function]]:
    """Optional packages, with what they can do of this."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return
    if variant.page_size % 256 == 0:

        def flash(tensors: dict[str, Tensor]) -> Tensor:
            q, k, v = (tensors[name].transpose(1, 2) for name in ("query", "key_cache", "value_cache"))
            table, lengths = tensors.get("block_table"), tensors["cache_seqlens"]
            options = {"cache_seqlens": lengths, "block_table": table, "causal": True}
            return flash_attn_with_kvcache(q, k, v, **options).transpose(1, 2)

        yield "flash-attn", flash


def providers(variant: Variant, device: torch.device, dtype: torch.dtype) -> dict[str, Function]:
    """By name; of ours those backends that can serve here."""
    found: dict[str, Function] = {"torch": _sdpa(variant)}
    call = DecodeCall("attention_decode", device, dtype)
    for backend, reasons in dispatch.support(call, dict(api.KERNELS)).items():
        if backend != "reference" and not reasons:
            found[f"llmkernels {backend}"] = _ours(backend)
    found.update(_peers(variant))
    return found


def _match(
    variant: Variant, function: Function, dtype: torch.dtype, device: torch.device, tokens: int
) -> tuple[bool, str]:
    """The step of a few sequences against float64, the measured length as far as float64 has room."""
    few = variant.tensors(MATCH_SEQUENCES, min(tokens, MATCH_TOKENS), dtype, device)
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in few.items()}
    sdpa = _sdpa(variant)
    # What a result is summed from: the weighted |values|.
    magnitude = sdpa({**exact, "value_cache": exact["value_cache"].abs()})
    comparison = testing.measure(function(few), sdpa(exact), sdpa(few), magnitude)
    return comparison.passed, str(comparison)


def run(
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, int], ...],
    only: tuple[str, ...],
    report: Callable[[Record], None],
) -> list[Record]:
    """Every variant, shape and provider; a provider that does not match is recorded and not timed. rows of a
    record: sequences; columns: tokens of the cache."""
    ceilings = Ceilings(copy_rate(device))
    records: list[Record] = []
    for variant in VARIANTS:
        functions = {k: f for k, f in providers(variant, device, dtype).items() if not only or k in only}
        for sizes in shapes:
            tensors = variant.tensors(*sizes, dtype, device)
            for name, function in functions.items():
                verdict = _match(variant, function, dtype, device, sizes[1])
                step = directions(function, tensors)["forward"]
                record = measured(
                    *("attention_decode", variant.name, "forward", name, sizes, dtype, verdict),
                    *(step, device, ceilings, variant.floor_bytes(tensors)),
                )
                records.append(record)
                report(record)
            del tensors
    return records
