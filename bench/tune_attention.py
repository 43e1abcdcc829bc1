"""python -m bench.tune_attention: see tuning.py."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels import testing
from llmkernels.ops.attention import tiles, triton_kernels
from llmkernels.ops.attention.call import UNLIMITED, AttentionCall, Settings
from llmkernels.ops.attention.tiles import BackwardTile, ForwardTile, Walk
from llmkernels.triton_support import INTERPRETED

from . import tuning

# Of forward a whole row; of backward one of its walks, the others as the table has them.
KERNELS = ("forward", "keys", "single_pass", "queries")


@dataclasses.dataclass(frozen=True)
class AttentionProblem(tuning.Problem):
    """features: a soft cap and a bias that every tile reads; all causal."""

    kernel: str
    batch: int
    heads: int
    length: int
    head_dim: int
    features: bool

    def launch(self, dtype: torch.dtype, device: torch.device) -> tuning.Launch:
        shape = (self.batch, self.heads, self.length, self.head_dim)
        query, key, value, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
        bias, softcap = None, 0.0
        if self.features:
            softcap = 30.0
            bias = torch.randn(1, self.heads, self.length, self.length, device=device).to(dtype)
        scale = 1 / math.sqrt(self.head_dim)
        settings = Settings(scale, softcap, 0.0, UNLIMITED, 0, False, self.length, self.length)
        rest = (bias, None, None, None, None, None, settings)
        if self.kernel == "forward":
            return lambda: triton_kernels.forward(query, key, value, *rest)
        out, lse = triton_kernels.forward(query, key, value, *rest)
        deterministic = self.kernel != "single_pass"
        return lambda: triton_kernels.backward(
            dout, None, query, key, value, out, lse, *rest, False, deterministic
        )

    def magnitude(self, expected: Tensor) -> float:
        """Kernels round P and dS to the inputs' dtype before they sum."""
        rounded = torch.finfo(expected.dtype).eps / torch.finfo(torch.float32).eps
        return max(rounded / testing.ARITHMETIC_ULPS, 1.0)

    def _row(self, itemsize: int, arch: int) -> ForwardTile | BackwardTile:
        arguments = (max(16, self.head_dim), itemsize, arch, self.features)
        if self.kernel == "forward":
            return tiles.FORWARD_INTERPRETED if INTERPRETED else tiles.forward(*arguments)
        return tiles.BACKWARD_INTERPRETED if INTERPRETED else tiles.backward(*arguments)

    def candidates(self, dtype: torch.dtype, arch: int) -> Sequence[tuning.Tile]:
        """Every power of two that is no smaller than a dot."""
        row = self._row(dtype.itemsize, arch)
        sizes = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
        if self.kernel == "forward":
            names = ("block_m", "block_n", "num_warps", "num_stages")
            return [dataclasses.replace(row, **dict(zip(names, size, strict=True))) for size in sizes]
        return [dataclasses.replace(row, **{self.kernel: Walk(*size)}) for size in sizes]

    def table_of(self, tile: tuning.Tile) -> contextlib.AbstractContextManager[None]:
        name = "forward" if isinstance(tile, ForwardTile) else "backward"
        return tuning.replaced(tiles, **{name: lambda *_: tile, f"{name.upper()}_INTERPRETED": tile})


def problems(quick: bool) -> Sequence[tuning.Problem]:
    """The head dims of the tables, at 16384 tokens."""
    sizes = ((1, 2, 48, 16),) if quick else ((4, 32, 4096, 64), (4, 16, 4096, 128), (4, 8, 4096, 256))
    return tuple(
        AttentionProblem(kernel, *size, features)
        for size in sizes
        for features in (False, True)
        for kernel in KERNELS
        if not (features and kernel == "single_pass")
    )


def unsupported(device: torch.device, dtype: torch.dtype) -> list[str]:
    return triton_kernels.unsupported(AttentionCall("attention", device, dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    return tuning.main("attention", problems, unsupported, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
