"""A decoding step as data: its tensors, the same by a plain loop over sequences, and the comparison with
float64."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

import llmkernels
from llmkernels import testing

# Ways a cache lies in memory: head by head, token by token, inside a wider buffer.
CACHE_LAYOUTS = ("heads", "tokens", "sliced")


@dataclasses.dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (37, 0, 80)  # in the cache before the call, one a sequence
    heads: int = 4
    kv_heads: int = 2
    query_length: int = 1
    new_tokens: int = 1
    head_dim: int = 32
    value_dim: int | None = None  # None: as head_dim
    capacity: int = 90  # rounded up to whole pages
    page_size: int = 0  # 0: a contiguous cache
    dtype: torch.dtype = torch.float32
    is_causal: bool = True
    window: tuple[int, int] | None = None
    softcap: float | None = None
    alibi: int = 0  # dimensions of the slopes
    sinks: bool = False
    scale: float | None = None
    return_lse: bool = True
    num_splits: int | None = None
    layout: str = "heads"
    index_dtype: torch.dtype = torch.int32
    amplitude: float = 1.0  # of the query
    seed: int = 0

    @property
    def dims(self) -> tuple[int, int]:
        return self.head_dim, self.value_dim or self.head_dim

    def _cache(self, shape: tuple[int, ...], fill: float, device: torch.device | str) -> Tensor:
        blocks, heads, tokens, dim = shape
        if self.layout == "tokens":
            cache = torch.full((blocks, tokens, heads, dim), fill, dtype=self.dtype, device=device)
            return cache.transpose(1, 2)
        if self.layout == "sliced":
            wide = torch.full((blocks, heads, tokens, dim + 3), fill, dtype=self.dtype, device=device)
            return wide[..., 1 : 1 + dim]
        return torch.full(shape, fill, dtype=self.dtype, device=device)

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """The tensors of the call by argument name. What no sequence has written in the cache is NaN."""
        batch, seed = len(self.lengths), 1000 * self.seed

        def draw(index: int, *shape: int, dtype: torch.dtype = self.dtype, scale: float = 1.0) -> Tensor:
            return testing.random_tensor(shape, dtype, device, seed + index, scale=scale)

        query = draw(0, batch, self.heads, self.query_length, self.head_dim, scale=self.amplitude)
        tensors = {"query": query}
        pages = 0
        if self.page_size:
            pages = -(-self.capacity // self.page_size)
            # Shuffled, with pages of no sequence; behind a sequence's last page stands no page's number.
            order = torch.randperm(batch * pages + 2, generator=torch.Generator().manual_seed(seed))
            table = order[: batch * pages].view(batch, pages)
            for row, length in zip(table, self.lengths, strict=True):
                row[-(-(length + self.new_tokens) // self.page_size) :] = 10**6
            tensors["block_table"] = table.to(device, self.index_dtype)
        for index, (name, dim) in enumerate(zip(("key_cache", "value_cache"), self.dims, strict=True)):
            blocks = (batch, self.capacity) if not self.page_size else (batch * pages + 2, self.page_size)
            cache = self._cache((blocks[0], self.kv_heads, blocks[1], dim), torch.nan, device)
            written = draw(1 + index, batch, self.kv_heads, max(self.lengths, default=0), dim)
            for sequence, length in enumerate(self.lengths):
                for token in range(length):
                    block, row = place(tensors.get("block_table"), self.page_size, sequence, token)
                    cache[block, :, row] = written[sequence, :, token]
            tensors[name] = cache
        tensors["cache_seqlens"] = torch.tensor(self.lengths, dtype=self.index_dtype, device=device)
        if self.new_tokens:
            tensors["key"] = draw(3, batch, self.kv_heads, self.new_tokens, self.dims[0])
            tensors["value"] = draw(4, batch, self.kv_heads, self.new_tokens, self.dims[1])
        if self.alibi:
            shape = (self.heads,) if self.alibi == 1 else (batch, self.heads)
            tensors["alibi_slopes"] = draw(5, *shape, dtype=torch.float32).abs() / 4
        if self.sinks:
            tensors["sinks"] = draw(6, self.heads)
        return tensors

    def options(self) -> dict[str, object]:
        names = ("is_causal", "window", "softcap", "scale", "return_lse", "num_splits")
        return {name: getattr(self, name) for name in names}


def place(table: Tensor | None, page_size: int, sequence: int, token: int) -> tuple[int, int]:
    """Block and row of a token in the cache."""
    if table is None:
        return sequence, token
    return int(table[sequence, token // page_size]), token % page_size


def appended(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the caches with the new tokens in their places."""
    caches = {name: tensors[name].clone() for name in ("key_cache", "value_cache")}
    for name, cache in caches.items():
        for sequence, length in enumerate(case.lengths):
            for token in range(case.new_tokens):
                block, row = place(tensors.get("block_table"), case.page_size, sequence, length + token)
                cache[block, :, row] = tensors[name.removesuffix("_cache")][sequence, :, token]
    return caches


def plain(case: Case, tensors: dict[str, Tensor], wide: torch.dtype) -> dict[str, Tensor]:
    """out and lse, sequence by sequence and head by head, in float64 or as torch computes 16-bit attention:
    products and sums in float32, the weights rounded to the values' dtype. And the sizes of the intermediates
    whose rounding they inherit: weighted |values|, |scores|."""
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    caches = appended(case, tensors)
    batch, value_dim = len(case.lengths), case.dims[1]
    shape = (batch, case.heads, case.query_length)
    found = {"out": torch.zeros(*shape, value_dim, dtype=wide), "lse": torch.zeros(shape, dtype=wide)}
    sizes = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    for sequence, length in enumerate(case.lengths):
        total = length + case.new_tokens
        places = [
            place(tensors.get("block_table"), case.page_size, sequence, token) for token in range(total)
        ]
        positions = torch.arange(case.query_length)[:, None] + total - case.query_length
        keys_at = torch.arange(total)
        visible = torch.ones(case.query_length, total, dtype=torch.bool)
        if case.is_causal:
            visible &= keys_at <= positions
        if case.window is not None:
            left, right = case.window
            visible &= (left == -1) | (keys_at >= positions - left)
            visible &= (right == -1) | (keys_at <= positions + right)
        for head in range(case.heads):
            kv_head = head // (case.heads // case.kv_heads)
            keys, values = (
                torch.stack([cache[block, kv_head, row] for block, row in places]).to(wide)
                if places
                else torch.zeros(0, cache.shape[3], dtype=wide)
                for cache in caches.values()
            )
            scores = tensors["query"][sequence, head].to(wide) @ keys.T * scale
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if case.alibi:
                slopes = tensors["alibi_slopes"].expand(batch, -1)
                scores = scores - slopes[sequence, head].to(wide) * (positions - keys_at).abs()
            sink = torch.full((case.query_length, 1), -torch.inf, dtype=wide)
            if case.sinks:
                sink += torch.inf
                sink[:] = tensors["sinks"][head].to(wide)
            scores = torch.cat((scores.masked_fill(~visible, -torch.inf), sink), dim=1)
            weights = torch.softmax(scores, dim=1).nan_to_num(0.0)[:, :-1]
            rounded = weights if wide == torch.float64 else weights.to(case.dtype).to(wide)
            found["out"][sequence, head] = rounded @ values
            found["lse"][sequence, head] = torch.logsumexp(scores, dim=1)
            sizes["out"][sequence, head] = weights @ values.abs()
            sizes["lse"][sequence, head] = scores.where(scores.isfinite(), 0.0).abs().amax(dim=1)
    if wide != torch.float64:
        found["out"] = found["out"].to(case.dtype)
    return found | {f"size of {name}": tensor for name, tensor in sizes.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaN included."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def check(case: Case, backend: str | None, device: torch.device | str) -> dict[str, Tensor]:
    """out and lse held to the error budget against float64; the caches hold the new tokens and are otherwise
    as they were; no other argument has changed. Returns out and lse."""
    tensors = case.inputs(device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with testing.poisoned():
        result = llmkernels.attention_decode(**tensors, **case.options(), backend=backend)
    out, lse = result if case.return_lse else (result, None)
    expected, baseline = plain(case, before, torch.float64), plain(case, before, torch.float32)
    for name, actual in (("out", out), ("lse", lse)):
        if actual is not None:
            assert actual.dtype == (torch.float32 if name == "lse" else case.dtype)
            size = expected[f"size of {name}"]
            testing.assert_within_budget(actual, expected[name], baseline[name], name=name, magnitude=size)
    after = before | appended(case, before)
    for name, tensor in tensors.items():
        assert same_bits(tensor, after[name]), f"{name} is not as it should be after the call"
    return {"out": out} if lse is None else {"out": out, "lse": lse}
