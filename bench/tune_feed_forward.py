"""python -m bench.tune_feed_forward: see tuning.py."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels.ops.feed_forward import tiles, triton_kernels
from llmkernels.ops.feed_forward.call import ACTIVATIONS, FeedForwardCall, product_kind
from llmkernels.ops.feed_forward.tiles import GemmTile

from . import tuning

# The largest shared memory a block may have (CUDA C++ Programming Guide, technical specifications).
_SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
_ACCUMULATORS_A_THREAD = 128


@dataclasses.dataclass(frozen=True)
class FeedForwardProblem(tuning.Problem):
    """M rows, d, hidden size; all outputs wanted."""

    direction: str  # forward, backward
    activation: str
    m: int
    d: int
    hidden: int

    @property
    def gated(self) -> bool:
        return ACTIVATIONS[self.activation][1]

    def launch(self, dtype: torch.dtype, device: torch.device) -> tuning.Launch:
        width = 2 * self.hidden if self.gated else self.hidden

        def draw(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, device=device) * columns**-0.5).to(dtype)

        if self.direction == "forward":
            x, weight = draw(self.m, self.d) * self.d**0.5, draw(width, self.d)
            bias = draw(1, width).view(-1)
            return lambda: triton_kernels.forward(x, weight, bias, None, self.activation, 0.0, True, True)
        dy, weight, pre = draw(self.m, self.d), draw(self.d, self.hidden), draw(self.m, width)
        return lambda: triton_kernels.backward(dy, weight, pre, None, self.activation, 0.0, True, True, True)

    def candidates(self, dtype: torch.dtype, arch: int) -> Sequence[tuning.Tile]:
        """Every row whose operands fit in shared memory and whose accumulators fit in registers."""
        kind, shared_bytes = product_kind(dtype), _SHARED_BYTES[tiles.known_architecture(arch)]
        products = 2 if self.gated and self.direction == "forward" else 1
        element_size, width = (2, 8) if kind == "half" else (4, 4)
        small, max_m = (16, 64) if self.m <= 64 else (64, math.inf)
        blocks = (small, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128)
        others = (4, 8), (2, 3, 4, 5), (1, 2, 4), (4, 8, 16)
        found = []
        for sizes in itertools.product(*blocks, *others):
            block_m, block_n, block_k, warps, stages, _, _ = sizes
            accumulators = products * block_m * block_n // (32 * warps)
            shared = stages * block_k * (block_m + products * block_n) * element_size
            if 8 <= accumulators <= _ACCUMULATORS_A_THREAD and shared <= shared_bytes:
                found.append(GemmTile(kind, max_m, *sizes, width))
        return list(dict.fromkeys(found))

    def table_of(self, tile: tuning.Tile) -> contextlib.AbstractContextManager[None]:
        return tuning.replaced(tiles, **{self.direction: lambda *_: tile})


def problems(quick: bool) -> Sequence[tuning.Problem]:
    """Few and many rows of the sizes between which the best row changes."""
    shapes = ((20, 16, 32),) if quick else ((8192, 1024, 4096), (8192, 4096, 16384), (64, 4096, 16384))
    return tuple(
        FeedForwardProblem(direction, activation, *shape)
        for shape in shapes
        for activation in ("gelu", "swiglu")
        for direction in ("forward", "backward")
    )


def unsupported(device: torch.device, dtype: torch.dtype) -> list[str]:
    return triton_kernels.unsupported(FeedForwardCall("feed_forward", device, dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    return tuning.main("feed_forward", problems, unsupported, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
