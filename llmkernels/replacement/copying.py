"""Copies of layers that share nothing with their model, to try things out on."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


def duplicate(
    module: nn.Module, dtype: torch.dtype | None = None, omit: Collection[nn.Module] = ()
) -> nn.Module:
    """A copy of ``module`` with its class, settings, mode and values, but no hooks and no gradients.

    Parameters and buffers are clones, tied where the originals are; floating-point parameters require grad.
    Draws no random numbers. dtype: that of the copy's floating-point tensors; None keeps each one's own.
    omit: descendants to leave out of the modules that hold them.
    """
    return _Copier(dtype, omit).module(module)


class _Copier:
    """One copy; what is met twice is copied once."""

    def __init__(self, dtype: torch.dtype | None, omit: Collection[nn.Module]) -> None:
        self._dtype = dtype
        self._omitted = {id(module) for module in omit}
        self._done: dict[int, Any] = {}  # by id(original), also as the memo of copy.deepcopy

    def module(self, original: nn.Module) -> nn.Module:
        if id(original) in self._done:
            return self._done[id(original)]
        if isinstance(original, torch.jit.ScriptModule):
            scripted = copy.deepcopy(original)
            self._done[id(original)] = scripted if self._dtype is None else scripted.to(self._dtype)
            return self._done[id(original)]
        copied = original.__new__(type(original))
        self._done[id(original)] = copied
        # The attributes of every module, without hooks; by __dict__, since a class may watch its attributes.
        copied.__dict__.update(nn.Module().__dict__, training=original.training)
        bookkeeping = {*copied.__dict__, "_compiled_call_impl"}
        for name, child in original._modules.items():
            if id(child) not in self._omitted:
                copied._modules[name] = None if child is None else self.module(child)
        for name, parameter in original._parameters.items():
            copied._parameters[name] = None if parameter is None else self._parameter(parameter)
        for name, buffer in original._buffers.items():
            copied._buffers[name] = None if buffer is None else self._tensor(buffer)
        copied._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
        for name, value in vars(original).items():
            if name not in bookkeeping:
                copied.__dict__[name] = self._setting(value)
        return copied

    def _parameter(self, original: nn.Parameter) -> nn.Parameter:
        if id(original) not in self._done:
            values = self._values(original)
            differentiable = values.is_floating_point() or values.is_complex()
            self._done[id(original)] = nn.Parameter(values, requires_grad=differentiable)
        return self._done[id(original)]

    def _tensor(self, original: Tensor) -> Tensor:
        if id(original) not in self._done:
            self._done[id(original)] = self._values(original)
        return self._done[id(original)]

    def _values(self, original: Tensor) -> Tensor:
        values = original.detach().clone()
        return values if self._dtype is None or not values.is_floating_point() else values.to(self._dtype)

    def _setting(self, value: Any) -> Any:
        """A plain attribute: modules and tensors in it are copied as the registered ones are."""
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, nn.Parameter):
            return self._parameter(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (list, tuple, set):
            return type(value)(map(self._setting, value))
        if type(value) is dict:
            return {key: self._setting(each) for key, each in value.items()}
        try:
            return copy.deepcopy(value, self._done)
        except Exception:
            return value  # a lock, a stream, a process group: what can't be copied is not what a layer learns


def signature(module: nn.Module, ignored: Collection[str] = ()) -> tuple[Any, ...]:
    """Equal for modules that differ in the values of their parameters and buffers alone: classes, shapes,
    dtypes and settings of them and of all in them, but for the attributes in ``ignored``."""
    parts = []
    for name, part in module.named_modules():
        tensors = {**part._parameters, **part._buffers}
        shapes = [(key, None if t is None else (t.shape, t.dtype)) for key, t in sorted(tensors.items())]
        settings = [
            (key, repr(value) if type(value) in _PLAIN else id(value))
            for key, value in sorted(vars(part).items())
            if key not in ignored and not key.startswith("_")
        ]
        parts.append((name, type(part), tuple(shapes), tuple(settings)))
    return tuple(parts)


_PLAIN = {bool, int, float, str, type(None), tuple, list, torch.Size, torch.dtype}
