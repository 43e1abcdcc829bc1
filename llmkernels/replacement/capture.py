"""Real inputs of every site: one forward of the model on a sample, without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Inputs
from .sites import Site


def capture(model: nn.Module, sites: Sequence[Site], sample_inputs: Any) -> dict[int, Inputs]:
    """id(module) -> the inputs of its first call, for the sites that ``model(sample_inputs)`` calls with
    something that can be copied.

    sample_inputs: a mapping is spread as keyword arguments, a tuple or list as positional ones; anything else
    is the one argument.
    """
    captured: dict[int, Inputs] = {}
    adapters = {id(site.module): site.adapter for site in sites}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in captured:
            inputs = adapters[id(module)].captured(module, Inputs(args, kwargs))
            with contextlib.suppress(TypeError, RuntimeError):
                captured[id(module)] = inputs.map(_snapshot)

    with _unchanged(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        for site in sites:
            # The last pre-hook sees what forward will see.
            handle = site.module.register_forward_pre_hook(keep, with_kwargs=True)
            hooks.callback(handle.remove)
        for module in _with_mode(model):
            module.training = False
        if isinstance(sample_inputs, Mapping):
            model(**sample_inputs)
        elif isinstance(sample_inputs, (tuple, list)):
            model(*sample_inputs)
        else:
            model(sample_inputs)
    return captured


def _snapshot(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _with_mode(model: nn.Module) -> list[nn.Module]:
    """The modules that know of train and eval mode: torch.jit.freeze takes that from a module."""
    return [module for module in model.modules() if hasattr(module, "training")]


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts every module's mode and every buffer, the object and its values, back at the end."""
    modes = [(module, module.training) for module in _with_mode(model)]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [
        (buffer, buffer._version, buffer.detach().clone())
        for _, named in buffers
        for buffer in named.values()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, named in buffers:
            if not isinstance(module, torch.jit.ScriptModule):  # whose buffers are not Python's to exchange
                module._buffers.clear()
                module._buffers.update(named)
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)
