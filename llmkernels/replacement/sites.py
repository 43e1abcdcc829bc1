"""Finds the layers of a model that an adapter knows, and says of each why it must be left alone, if so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from .adapters import Adapter


@dataclasses.dataclass
class Site:
    """One module of a known family, under every name that the model has for it."""

    adapter: Adapter
    module: nn.Module
    names: list[str]
    parents: list[nn.Module]
    obstacles: list[str]
    device: torch.device
    dtype: torch.dtype


def find(model: nn.Module, adapters: Sequence[Adapter]) -> list[Site]:
    """The sites of ``model`` in the order of its modules; a module that several parents share is one site."""
    device, dtype = _placement(model, torch.empty(0))
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    parents: dict[int, list[nn.Module]] = {key: [] for key in modules}
    for module in modules.values():
        for child in module.children():
            parents[id(child)].append(module)

    sites = []
    covered: set[int] = set()
    for key, module in modules.items():
        adapter = next((adapter for adapter in adapters if _belongs(module, adapter)), None)
        if adapter is None or key in covered:
            continue
        obstacles = _obstacles(module, adapter)
        if adapter.covers_children and (not obstacles or type(module) is adapter.replacement):
            covered.update(map(id, module.modules()))
        placement = _placement(module, torch.empty(0, device=device, dtype=dtype))
        sites.append(Site(adapter, module, names[key], parents[key], obstacles, *placement))
    return sites


def _placement(module: nn.Module, default: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the module's first floating-point parameter or buffer, else the default's."""
    tensors: Iterable[torch.Tensor] = (*module.parameters(), *module.buffers())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), default)
    return first.device, first.dtype


def _belongs(module: nn.Module, adapter: Adapter) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) == adapter.original.__name__
    return isinstance(module, adapter.original)


def _obstacles(module: nn.Module, adapter: Adapter) -> list[str]:
    """Why ``module`` can't change its class; none if it can."""
    if type(module) is not adapter.original:
        return [_why_not_the_original(module, adapter)]
    reasons = []
    if "forward" in module.__dict__:
        reasons.append("the instance has a forward of its own, which hides that of its class")
    reasons += [
        f"the instance has an attribute {name!r} of its own"
        for name in adapter.attributes
        if name in module.__dict__
    ]
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            reasons.append(f"{name} is not initialised yet")
        elif (kind := type(parameter)) is not nn.Parameter:
            reasons.append(f"{name} is a {kind.__name__}, a tensor subclass that no kernel can read")
    return reasons + adapter.obstacles(module)


def _why_not_the_original(module: nn.Module, adapter: Adapter) -> str:
    kind = type(module)
    original = f"{adapter.original.__module__.split('.')[0]}.nn.{adapter.original.__name__}"
    if kind is adapter.replacement:
        return "replaced already"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit.script: replace() comes before"
    if parametrize.is_parametrized(module):
        return "parametrized by torch.nn.utils.parametrize"
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        return "wrapped by FSDP: replace() comes before fully_shard()"
    if ".quantized" in kind.__module__:
        return f"quantised: {kind.__module__}.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__} is a subclass of {original} that may behave differently"
