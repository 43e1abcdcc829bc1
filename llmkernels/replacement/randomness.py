"""Tries the dropout of a layer: what verification.check, which switches it off, can't see.

Two implementations draw different numbers, so that no result of theirs can be compared. Three things can:
that a seed decides ours (without which activation checkpointing computes wrong gradients), that it decides
ours if and only if it decides torch's, and how far dropout moves the outputs on the average, which shows a
place that was forgotten, one too many, or another probability. That a mask is drawn at the right rate, scaled
and made again in backward is shown of each op in the op's own tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import testing
from .adapters import Adapter, Inputs
from .sites import swap
from .verification import results, tensors_of

_SEEDS = range(16)


def problem(
    adapter: Adapter, module: nn.Module, inputs: Inputs, backend: str | None, device: torch.device
) -> str | None:
    """What is wrong with the replacement in train mode, as a sentence; None if nothing is, or if neither
    layer draws random numbers. Seeds the generators of the CPU and of ``device``."""
    original, replaced = adapter.copy(module).train(), adapter.copy(module).train()
    swap(adapter, replaced, backend)
    if not _draws(original, inputs, device):
        if _draws(replaced, inputs, device):
            return "draws random numbers in train mode where torch draws none"
        return None
    first, again = (_seeded(adapter, replaced, inputs, device) for _ in range(2))
    for name, result in first.items():
        if not torch.equal(result, again[name]):
            return f"{name} differs between two runs in train mode from one seed"
    theirs, ours = (_movements(layer, inputs, device) for layer in (original, replaced))
    if theirs.amax() > 0 and not ours.amax() > 0:
        return "applies no dropout in train mode where torch does"
    distance = (ours.mean() - theirs.mean()).abs()
    error = math.sqrt(float(ours.var() + theirs.var()) / ours.numel())
    if not distance <= testing.STANDARD_ERRORS * error:
        share = float(ours.mean() / theirs.mean())
        return f"dropout moves its outputs by {share:.3g} times the mean square by which torch's does"
    return None


def _seed(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _draws(layer: nn.Module, inputs: Inputs, device: torch.device) -> bool:
    def states() -> list[Tensor]:
        on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    before = states()
    _run(layer, inputs)
    return not all(map(torch.equal, before, states()))


@torch.no_grad()
def _run(layer: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating-point outputs of one call in float64, each [rows, columns]."""
    args, kwargs = inputs.map(Tensor.clone)
    outputs = [output for output in tensors_of(layer(*args, **kwargs)) if output.is_floating_point()]
    return [output.to(torch.float64).reshape(-1, output.shape[-1]) for output in outputs]


def _seeded(adapter: Adapter, layer: nn.Module, inputs: Inputs, device: torch.device) -> dict[str, Tensor]:
    _seed(0, device)
    return results(adapter, layer, inputs, None)[0]


def _movements(layer: nn.Module, inputs: Inputs, device: torch.device) -> Tensor:
    """[seeds * rows]: the mean square of how far dropout moves each row of the outputs."""
    still = _run(layer.eval(), inputs)
    layer.train()
    moved = []
    for seed in _SEEDS:
        _seed(seed, device)
        for output, rest in zip(_run(layer, inputs), still, strict=True):
            moved.append((output - rest).nan_to_num().square().mean(dim=1))
    return torch.cat(moved)
