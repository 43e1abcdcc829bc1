"""Finds the layers of a model that an adapter knows, and says of each why it must be left alone, if so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from .adapters import ADAPTERS, Adapter


@dataclasses.dataclass
class Site:
    """One module of a known family, under every name that the model has for it."""

    adapter: Adapter
    module: nn.Module
    names: list[str]
    obstacles: list[str]
    remark: str | None
    device: torch.device
    dtype: torch.dtype

    @property
    def is_replaced(self) -> bool:
        """Whether it has our class already."""
        return type(self.module) in self.adapter.classes().values()

    @property
    def descendants(self) -> list[nn.Module]:
        return [module for module in self.module.modules() if module is not self.module]


def find(model: nn.Module) -> list[Site]:
    """The sites of ``model`` in the order of its modules, those within others too; a module that several
    parents share is one site."""
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

    family = _Families()
    sites = []
    for key, module in modules.items():
        adapter = family.of(module)
        if adapter is not None:
            obstacles = family.obstacles(module, adapter)
            remark = None if obstacles else adapter.remark(module, parents[key])
            placement = _placement(module, torch.empty(0, device=device, dtype=dtype))
            sites.append(Site(adapter, module, names[key], obstacles, remark, *placement))
    return sites


def parts(adapter: Adapter, module: nn.Module) -> list[tuple[str, Adapter, nn.Module]]:
    """What changes sides with ``module``, itself first: each one's name within it, its family and itself."""
    found = [("", adapter, module)]
    if adapter.covers_children:
        family = _Families()
        for name, child in module.named_modules():
            known = None if child is module else family.of(child)
            if known is not None and not family.obstacles(child, known):
                found.append((name, known, child))
    return found


def swap(adapter: Adapter, module: nn.Module, backend: str | None) -> None:
    """Gives ``module`` and what changes sides with it their new classes."""
    for _, family, part in parts(adapter, module):
        family.swap(part, backend)


class _Families:
    """Which adapter a module belongs to, the one of its class or of the nearest class above it, as the
    classes are now."""

    def __init__(self) -> None:
        self._classes = {adapter: adapter.classes() for adapter in ADAPTERS}
        self._by_class = {kind: adapter for adapter, classes in self._classes.items() for kind in classes}
        self._by_name = {kind.__name__: adapter for kind, adapter in self._by_class.items()}

    def of(self, module: nn.Module) -> Adapter | None:
        if isinstance(module, torch.jit.ScriptModule):
            return self._by_name.get(getattr(module, "original_name", ""))
        return next((self._by_class[kind] for kind in type(module).__mro__ if kind in self._by_class), None)

    def obstacles(self, module: nn.Module, adapter: Adapter) -> list[str]:
        """Why ``module`` can't change its class; none if it can."""
        classes = self._classes[adapter]
        if type(module) not in classes:
            return [_why_not_an_original(module, classes)]
        reasons = []
        if "forward" in module.__dict__:
            reasons.append("the instance has a forward of its own, which hides that of its class")
        reasons += [
            f"the instance has an attribute {name!r} of its own"
            for name in adapter.attributes
            if name in module.__dict__
        ]
        reasons += _unreadable_parameters(module)
        return reasons or adapter.obstacles(module)


def _placement(module: nn.Module, default: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the module's first floating-point parameter or buffer, else the default's."""
    tensors: Iterable[torch.Tensor] = (*module.parameters(), *module.buffers())
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), default)
    return first.device, first.dtype


def _unreadable_parameters(module: nn.Module) -> Iterator[str]:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            yield f"{name} is not initialised yet"
        elif (kind := type(parameter)) is not nn.Parameter:
            yield f"{name} is a {kind.__name__}, a tensor subclass that no kernel can read"


def _why_not_an_original(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> str:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit.script: replace() comes before"
    if kind in classes.values():
        return "replaced already"
    if parametrize.is_parametrized(module):
        return "parametrized by torch.nn.utils.parametrize"
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        return "wrapped by FSDP: replace() comes before fully_shard()"
    if ".quanti" in kind.__module__:
        return f"quantised: {kind.__module__}.{kind.__qualname__}"
    base = next(base for base in kind.__mro__ if base in classes)
    package = base.__module__.partition(".")[0]
    original = f"torch.nn.{base.__name__}" if package == "torch" else f"{package}'s {base.__name__}"
    return f"{kind.__module__}.{kind.__qualname__} is a subclass of {original} that may behave differently"
