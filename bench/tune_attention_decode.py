"""python -m bench.tune_attention_decode: see tuning.py."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels import testing
from llmkernels.ops.attention_decode import tiles, triton_kernels
from llmkernels.ops.attention_decode.call import DecodeCall
from llmkernels.ops.attention_decode.tiles import DecodeTile

from . import tuning


@dataclasses.dataclass(frozen=True)
class DecodeProblem(tuning.Problem):
    """One new token of each sequence over a full cache; page_size 0: contiguous."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    page_size: int = 0

    def launch(self, dtype: torch.dtype, device: torch.device) -> tuning.Launch:
        query = torch.randn(self.batch, self.heads, 1, self.head_dim, device=device).to(dtype)
        lengths = torch.full((self.batch,), self.tokens, dtype=torch.int32, device=device)
        cache, table = (self.batch, self.kv_heads, self.tokens, self.head_dim), None
        if self.page_size:
            pages = self.batch * (self.tokens // self.page_size)
            cache = (pages, self.kv_heads, self.page_size, self.head_dim)
            table = torch.randperm(pages, device=device).view(self.batch, -1).to(torch.int32)
        keys, values = (torch.randn(cache, dtype=dtype, device=device) for _ in range(2))
        scalars = (0, self.head_dim**-0.5, -1, 0, 0.0)
        return lambda: triton_kernels.forward(query, keys, values, lengths, table, None, None, *scalars)

    def magnitude(self, expected: Tensor) -> float:
        """The kernel rounds P to the cache's dtype before it sums."""
        rounded = torch.finfo(expected.dtype).eps / torch.finfo(torch.float32).eps
        return max(rounded / testing.ARITHMETIC_ULPS, 1.0)

    def candidates(self, dtype: torch.dtype, arch: int) -> Sequence[tuning.Tile]:
        """All that a table might say of this head dim and dtype."""
        width = 16 // dtype.itemsize
        return [
            DecodeTile(max(16, self.head_dim), dtype.itemsize, width, max_m, block_n, warps, stages)
            for max_m, block_n, warps, stages in itertools.product(
                (16, 32), (16, 32, 64, 128, 256), (2, 4, 8), (1, 2, 3, 4, 5)
            )
        ]

    def table_of(self, tile: tuning.Tile) -> contextlib.AbstractContextManager[None]:
        return tuning.replaced(tiles, decode=lambda *_: tile)


def problems(quick: bool) -> Sequence[tuning.Problem]:
    """Large and small batches of grouped heads, the head dims of the table, pages."""
    if quick:
        return (DecodeProblem(2, 4, 2, 48, 16), DecodeProblem(2, 4, 2, 48, 16, page_size=16))
    return (
        DecodeProblem(32, 32, 8, 4096, 128),
        DecodeProblem(32, 32, 8, 32768, 128),
        DecodeProblem(1, 32, 8, 32768, 128),
        DecodeProblem(32, 32, 32, 4096, 64),
        DecodeProblem(32, 16, 4, 4096, 256),
        DecodeProblem(32, 32, 8, 4096, 128, page_size=16),
    )


def unsupported(device: torch.device, dtype: torch.dtype) -> list[str]:
    return triton_kernels.unsupported(DecodeCall("attention_decode", device, dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    return tuning.main("attention_decode", problems, unsupported, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
