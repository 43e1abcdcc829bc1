"""python -m bench.tune_layer_norm: see tuning.py."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

from llmkernels.ops.layer_norm import tiles, triton_kernels
from llmkernels.ops.layer_norm.call import NormCall
from llmkernels.ops.layer_norm.tiles import BackwardTile, ForwardTile

from . import tuning

_EPS = 1e-5
# Values of a row tensor that a thread may hold: fewer leave it idle, more spill.
_VALUES_A_THREAD = (4, 64)


@dataclasses.dataclass(frozen=True)
class NormProblem(tuning.Problem):
    """layer_norm, or with ``residual`` add_layer_norm without dropout."""

    direction: str  # forward, backward
    m: int
    n: int
    residual: bool

    def launch(self, dtype: torch.dtype, device: torch.device) -> tuning.Launch:
        x, dy = (torch.randn(self.m, self.n, device=device).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(self.n, device=device).to(dtype) for _ in range(2))
        residual = torch.randn_like(x) if self.residual else None
        given = (x, residual, weight, bias, None, _EPS, 0.0, False, dtype, dtype)
        if self.direction == "forward":
            return lambda: triton_kernels.forward(*given)
        _, z, mean, rstd = triton_kernels.forward(*given)
        saved = (z if self.residual else x, weight, mean, rstd, None, _EPS, 0.0, False)
        dz, residual_dtype = (torch.randn_like(x), dtype) if self.residual else (None, None)
        return lambda: triton_kernels.backward(dy, dz, *saved, True, dtype, residual_dtype, True, dtype)

    def _is_reasonable(self, rows: int, block_n: int, warps: int) -> bool:
        fewest, most = _VALUES_A_THREAD
        return fewest <= rows * block_n / (32 * warps) <= most

    def candidates(self, dtype: torch.dtype, arch: int) -> Sequence[tuning.Tile]:
        """Whole rows in one tile and, where a row is long, strips of it."""
        whole = max(16, 1 << (self.n - 1).bit_length())
        max_n = self.n if self.n < 16384 else math.inf
        several = (1, 2, 4, 8, 16, 32, 64, 128)
        if self.direction == "forward":
            found = [
                ForwardTile(whole, rows, whole, warps)
                for rows, warps in itertools.product(several, (1, 2, 4, 8, 16, 32))
                if self._is_reasonable(rows, whole, warps)
            ]
            looped = itertools.product((1024, 2048, 4096, 8192), (4, 8, 16))
            return found + [
                ForwardTile(max_n, 1, block_n, warps, looped=True)
                for block_n, warps in looped
                if block_n < self.n and self._is_reasonable(1, block_n, warps)
            ]
        return [
            BackwardTile(max_n if block_n < whole else whole, rows, block_n, warps, stages, programs, **sums)
            for rows, block_n, warps, stages, programs in itertools.product(
                several, {whole, 1024, 2048, 4096}, (4, 8, 16, 32), (1, 2), (1, 2, 4)
            )
            if block_n <= whole and self._is_reasonable(rows, block_n, warps)
            for sums in ([{}] if block_n == whole else [{"sums_block_n": 4096, "sums_num_warps": 8}])
        ]

    def table_of(self, tile: tuning.Tile) -> contextlib.AbstractContextManager[None]:
        return tuning.replaced(tiles, **{self.direction: lambda *_: tile})


def problems(quick: bool) -> Sequence[tuning.Problem]:
    """The row lengths of models, and some beyond."""
    shapes = ((12, 40),) if quick else tuple((2**28 // n, n) for n in (1024, 2048, 4096, 8192, 16384, 65536))
    return tuple(
        NormProblem(direction, *shape, residual)
        for shape in shapes
        for residual in (False, True)
        for direction in ("forward", "backward")
    )


def unsupported(device: torch.device, dtype: torch.dtype) -> list[str]:
    return triton_kernels.unsupported(NormCall("layer_norm", device, dtype, dtype, dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    return tuning.main("layer_norm", problems, unsupported, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
