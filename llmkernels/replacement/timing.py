"""How much faster a replaced layer is on the device where it stands."""

from __future__ import annotations

import torch
from torch import nn

from .adapters import Adapter
from .sites import swap
from .verification import differentiable, tensors_of

# Tokens of one measured call: the batch of a training step, enough that the launch is not what is measured.
ROWS = 8192
_SECONDS = 0.1


def speed_up(
    adapter: Adapter, module: nn.Module, dtype: torch.dtype, device: torch.device, backend: str | None
) -> float:
    """Median time of torch's layer over that of ours, forward and backward, both on copies."""
    original, replaced = adapter.copy(module), adapter.copy(module)
    swap(adapter, replaced, backend)
    return _seconds(original, adapter, dtype, device) / _seconds(replaced, adapter, dtype, device)


def _seconds(module: nn.Module, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> float:
    # Not at the top: it imports setuptools, which would be most of the time that importing this package
    # takes.
    from torch.utils.benchmark import Timer

    inputs = adapter.synthetic_inputs(module, dtype, device, ROWS)[0]
    wanted = list(differentiable(adapter, module, inputs).values())

    def step() -> None:
        outputs = [
            output for output in tensors_of(module(*inputs.args, **inputs.kwargs)) if output.requires_grad
        ]
        torch.autograd.grad(outputs, wanted, outputs, allow_unused=True)

    step()  # compiles what is compiled at the first call
    return Timer("step()", globals={"step": step}).blocked_autorange(min_run_time=_SECONDS).median
