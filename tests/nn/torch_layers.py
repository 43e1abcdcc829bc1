"""torch.nn's layers and ours on the same state, inputs and random numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import llmkernels

OURS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(llmkernels.nn, name)
    for name in (
        "LayerNorm",
        "RMSNorm",
        "MultiheadAttention",
        "TransformerEncoderLayer",
        "TransformerDecoderLayer",
        "TransformerEncoder",
        "TransformerDecoder",
        "Transformer",
    )
}


def ours_like(theirs: nn.Module, backend: str | None = None) -> Any:
    """A copy of a module of torch's in which every layer that we have is ours."""
    ours = copy.deepcopy(theirs)
    for module in ours.modules():
        module.__class__ = OURS.get(type(module), type(module))
    if backend is not None:
        ours.backend = backend
    return ours


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """``module`` with parameters that are no zeros and ones, so that each of them matters, of the size that
    keeps what goes through it of the size of its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(values / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * values + (1 if name.endswith("weight") else 0))
    return module


def on_device_of(backend: str | None, *values: Any) -> Any:
    """``values`` with their tensors and modules where the kernels of ``backend`` run: copies on the GPU, if
    there is one. What is one tensor stays one."""
    if backend not in ("triton", "cuda") or not torch.cuda.is_available():
        return values
    moved: dict[int, Any] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, (Tensor, nn.Module)):
            return value
        if id(value) not in moved:
            moved[id(value)] = copy.deepcopy(value).cuda() if isinstance(value, nn.Module) else value.cuda()
        return moved[id(value)]

    return pytree.tree_map(move, values)


def tensors_of(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"output": output}
    return {f"output {i}": part for i, part in enumerate(output) if part is not None}


def outputs_and_gradients(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Outputs, and the gradients of all parameters and floating inputs of a weighted sum of them. Equal
    inputs stay one tensor."""
    leaves: dict[int, Tensor] = {}

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if id(value) not in leaves:
            leaves[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        return leaves[id(value)]

    args = [leaf(value) for value in args]
    kwargs = {name: leaf(value) for name, value in (kwargs or {}).items()}
    torch.manual_seed(seed)
    results = tensors_of(module(*args, **kwargs))
    generator = torch.Generator().manual_seed(seed)
    # Eighths, which every dtype has.
    weights = [torch.randint(-16, 17, t.shape, generator=generator) / 8 for t in results.values()]
    loss = sum((t * w.to(t)).sum() for t, w in zip(results.values(), weights, strict=True))
    named = dict(module.named_parameters())
    named |= {f"input {i}": t for i, t in enumerate(leaves.values()) if t.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {f"gradient of {name}": g for name, g in zip(named, gradients, strict=True) if g is not None}
    return {name: t.detach() for name, t in results.items()} | found


def assert_alike(
    ours: nn.Module, theirs: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> None:
    """Values and dtypes of outputs and all gradients are the same."""
    expected = outputs_and_gradients(theirs, args, kwargs)
    actual = outputs_and_gradients(ours, args, kwargs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def assert_raises_alike(
    ours: nn.Module, theirs: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> None:
    """torch's layer raises, and ours an error of the same type."""
    raised = []
    for module in (theirs, ours):
        with pytest.raises(Exception) as caught:
            module(*args, **(kwargs or {}))
        raised.append(caught.value)
    assert type(raised[1]) is type(raised[0]), f"torch.nn: {raised[0]!r}, ours: {raised[1]!r}"


def assert_compiles(ours: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
    """Outputs and all gradients are the same under torch.compile, as one graph."""
    ours, args, kwargs = on_device_of(ours.backend, ours, tuple(args), kwargs or {})
    expected = outputs_and_gradients(ours, args, kwargs)
    ours.compile(backend="aot_eager", fullgraph=True)
    actual = outputs_and_gradients(ours, args, kwargs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
