"""What `llmkernels doctor` runs: the norms on small inputs, held to the error budget against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import testing
from . import api
from .call import NormCall

# Rows of an odd length take the kernels' masked path, the longer ones their vector loads.
_SHAPES = ((6, 229), (4, 1024))


def example_call(device: torch.device) -> NormCall:
    """A call that every kernel of the op is meant to serve."""
    return NormCall("layer_norm", device, torch.bfloat16, torch.bfloat16, torch.bfloat16)


def _arguments(op: str, n: int) -> dict[str, Any]:
    options: dict[str, Any] = {"normalized_shape": (n,)}
    return options | ({"dropout_p": 0.25} if op == "add_layer_norm" else {})


def _run(op: str, tensors: dict[str, Tensor], dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """The outputs of one call and the gradients of its inputs, by name, for a fixed seed of dropout."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    n = tensors["input"].shape[-1]
    torch.manual_seed(0)
    result = getattr(api, op)(**leaves, **_arguments(op, n), backend=backend)
    outputs = result if isinstance(result, tuple) else (result,)
    # The same values in every dtype: made from the input, whose bits all of them hold.
    gradients = [tensors["input"].flip(0).to(dtype) * (i + 1) for i in range(len(outputs))]
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    named = {"output": outputs[0]} | ({"residual": outputs[1]} if len(outputs) > 1 else {})
    return named | {f"gradient of {name}": tensor for name, tensor in zip(leaves, found, strict=True)}


def compare(backend: str, device: torch.device) -> Iterator[tuple[str, testing.Comparison]]:
    """Each kernel of ``backend`` on ``device``: the name of what was run and its worst tensor against the
    budget."""
    for op in ("layer_norm", "add_layer_norm", "rms_norm"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            worst: testing.Comparison | None = None
            for shape in _SHAPES:
                names = ["input", *(["residual"] if op == "add_layer_norm" else [])]
                parameters = ["weight", *(["bias"] if op != "rms_norm" else [])]
                tensors = {
                    name: testing.random_tensor(shape if name in names else shape[1:], dtype, device, seed)
                    for seed, name in enumerate(names + parameters)
                }
                expected = _run(op, tensors, torch.float64, "reference")
                # With dropout the yardstick must drop the same elements, as only the reference does.
                baseline = _run(op, tensors, dtype, "reference" if op == "add_layer_norm" else "torch")
                with testing.poisoned():
                    actual = _run(op, tensors, dtype, backend)
                for name, value in actual.items():
                    comparison = testing.measure(value, expected[name], baseline[name])
                    comparison = comparison._replace(detail=f"{name} {list(shape)}, {comparison.detail}")
                    if worst is None or comparison.error / comparison.allowed > worst.error / worst.allowed:
                        worst = comparison
            assert worst is not None
            yield f"{op} {str(dtype).removeprefix('torch.')}", worst
