"""What `llmkernels doctor` runs: the feed-forward on small inputs, held to the error budget against
float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ... import testing
from . import api
from .call import ACTIVATIONS, FeedForwardCall

# Rows, d, hidden: odd ones take the kernels' masked path, the others their vector loads.
_SHAPES = ((40, 33, 45), (70, 64, 72))
# Large tiles are taken only where there is one for each processor.
_SHAPES_OF_GPUS = (*_SHAPES, (2000, 40, 1800))


def example_call(device: torch.device) -> FeedForwardCall:
    """A call that every kernel of the op is meant to serve."""
    return FeedForwardCall("feed_forward", device, torch.bfloat16)


def _run(tensors: dict[str, Tensor], activation: str, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """The output of one call and the gradients of its inputs, by name, for a fixed seed of dropout."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    torch.manual_seed(0)
    call: Callable[..., Tensor] = api.feed_forward
    y = call(**leaves, activation=activation, dropout_p=0.25, backend=backend)
    # The same values in every dtype: made from the input, whose bits all of them hold.
    gradient = tensors["input"].flip(0).to(dtype)
    found = torch.autograd.grad(y, list(leaves.values()), gradient)
    named = {f"gradient of {name}": tensor for name, tensor in zip(leaves, found, strict=True)}
    return {"output": y.detach()} | named


def _tensors(
    rows: int, d: int, hidden: int, activation: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    width = 2 * hidden if ACTIVATIONS[activation][1] else hidden
    shapes = {
        "input": (rows, d),
        "weight1": (width, d),
        "bias1": (width,),
        "weight2": (d, hidden),
        "bias2": (d,),
    }
    scales = {"weight1": d**-0.5, "weight2": hidden**-0.5}
    return {
        name: testing.random_tensor(shape, dtype, device, seed, scale=scales.get(name, 1.0))
        for seed, (name, shape) in enumerate(shapes.items())
    }


def compare(backend: str, device: torch.device) -> Iterator[tuple[str, testing.Comparison]]:
    """Each activation by the kernels of ``backend`` on ``device``: the name of what was run and its worst
    tensor against the budget."""
    for activation in ACTIVATIONS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            worst: testing.Comparison | None = None
            for shape in _SHAPES_OF_GPUS if device.type == "cuda" else _SHAPES:
                tensors = _tensors(*shape, activation, dtype, device)
                # The yardsticks must drop the same elements, as only the reference does.
                expected = _run(tensors, activation, torch.float64, "reference")
                baseline = _run(tensors, activation, dtype, "reference")
                with testing.poisoned():
                    actual = _run(tensors, activation, dtype, backend)
                for name, value in actual.items():
                    # A sum of many terms rounds as its terms do, of which few are larger than 4.
                    magnitude = expected[name].abs().amax().clamp(min=4).cpu()
                    comparison = testing.measure(value, expected[name], baseline[name], magnitude)
                    comparison = comparison._replace(detail=f"{name} {list(shape)}, {comparison.detail}")
                    if worst is None or comparison.error / comparison.allowed > worst.error / worst.allowed:
                        worst = comparison
            assert worst is not None
            yield f"{activation} {str(dtype).removeprefix('torch.')}", worst
