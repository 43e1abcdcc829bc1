"""Subclasses made for the classes of transformers, which are recognised by their code.

transformers is never imported here: where nobody did, no model holds a class of it. Its models repeat the
same few lines under many names, and change them between releases; so a class is known by the bytecode of one
method, compared with that of a template in this package, and nothing else of it is assumed. A template never
runs; its few lines are those of transformers (Apache License 2.0), for no others compile to the same.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from torch import nn

from ...nn import _calls
from .adapter import Adapter

# transformers itself, and where it keeps the code that comes with a checkpoint.
_LIBRARIES = ("transformers.", "transformers_modules.")


def same_code(function: object, template: Callable[..., Any]) -> bool:
    """Whether ``function`` is compiled to what ``template`` is: the same instructions on the same names,
    constants, parameters and defaults. Comments, annotations and places in a file don't count."""
    assert isinstance(template, types.FunctionType)
    return isinstance(function, types.FunctionType) and _fingerprint(function) == _fingerprint(template)


def _fingerprint(function: types.FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    return (
        code.co_code,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        # By their text, since 1, 1.0 and True are equal.
        repr(code.co_consts),
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR),
        repr((function.__defaults__, function.__kwdefaults__)),
    )


class Replaced(nn.Module):
    """What the made subclasses have in common. ``derive(mixin, original)`` inherits from a subclass of this
    and from a class of transformers, whose name it keeps; attributes are few and odd, for those of a class
    hide an instance's children.

    backend: None for the automatic choice, or the one this instance insists on. There is no other state.
    """

    backend: str | None = None
    _llmkernels_original: ClassVar[type[nn.Module]]
    _llmkernels_mixin: ClassVar[type[Replaced]]

    @classmethod
    def recognises(cls, kind: type[nn.Module]) -> bool:
        """Whether ``derive(cls, kind)`` computes what ``kind`` does."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The made class has no name that pickle could import; those that it is made of have.
        plain = super().__reduce_ex__(max(int(protocol), 2))
        made_of = (self._llmkernels_mixin, self._llmkernels_original)
        # Not for classes that others made of it in turn, as fully_shard() does.
        return (_blank, made_of, *plain[2:]) if type(self) is derive(*made_of) else plain


def _blank(mixin: type[Replaced], original: type[nn.Module]) -> nn.Module:
    made = derive(mixin, original)
    return made.__new__(made)


_made: dict[tuple[type[Replaced], type[nn.Module]], type[Replaced]] = {}


def derive(mixin: type[Replaced], original: type[nn.Module]) -> type[Replaced]:
    """The subclass of ``original`` with the methods of ``mixin``: one and the same at every call."""
    if (mixin, original) not in _made:
        body = {
            "_llmkernels_original": original,
            "_llmkernels_mixin": mixin,
            "__doc__": mixin.__doc__,
            "__module__": mixin.__module__,
        }
        # The name counts: trainers pick parameters by it, transformers the layers that it must not split.
        made = types.new_class(
            original.__name__, (mixin, original), exec_body=lambda names: names.update(body)
        )
        _made.setdefault((mixin, original), made)
    return _made[mixin, original]


# What a family has found in a module of transformers, which is looked through once.
_recognised: dict[
    tuple[tuple[type[Replaced], ...], types.ModuleType], dict[type[nn.Module], type[nn.Module]]
] = {}


class TransformersAdapter(Adapter):
    """A family of classes of transformers, whichever of its models have them."""

    mixins: ClassVar[tuple[type[Replaced], ...]]

    def classes(self) -> dict[type[nn.Module], type[nn.Module]]:
        found: dict[type[nn.Module], type[nn.Module]] = {}
        for name, module in list(sys.modules.items()):
            if name.startswith(_LIBRARIES) and ".modeling_" in name and isinstance(module, types.ModuleType):
                if (self.mixins, module) not in _recognised:
                    _recognised[self.mixins, module] = dict(self._recognise(module))
                found.update(_recognised[self.mixins, module])
        return found

    def _recognise(self, module: types.ModuleType) -> Iterator[tuple[type[nn.Module], type[nn.Module]]]:
        """Original and replacement of the classes that ``module`` defines."""
        for kind in list(vars(module).values()):
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                for mixin in self.mixins:
                    if mixin.recognises(kind):
                        yield kind, derive(mixin, kind)

    def swap(self, module: nn.Module, backend: str | None) -> None:
        mixin = next(mixin for mixin in self.mixins if mixin.recognises(type(module)))
        module.__class__ = derive(mixin, type(module))
        if backend is not None:
            module.backend = backend  # type: ignore[assignment]

    def restore(self, module: nn.Module) -> bool:
        if not isinstance(module, self.mixins):
            return False
        original = module._llmkernels_original
        if type(module) is not derive(module._llmkernels_mixin, original):
            return False
        module.__class__ = original  # type: ignore[assignment]
        for name in self.attributes:
            module.__dict__.pop(name, None)
        return True


def obstacle(module: nn.Module, *kinds: tuple[str, Sequence[str]]) -> str | None:
    """Why the children of these names, which must be of these classes, have to be called one by one where
    one kernel could compute them all; None if nobody could tell. By names, since transformers' own classes
    are not imported here: "torch.nn.modules.linear.Linear"."""
    if _calls.has_global_hooks():
        return "hooks of all modules are set"
    for name, allowed in kinds:
        child = getattr(module, name)
        kind = type(child)
        if f"{kind.__module__}.{kind.__qualname__}" not in allowed:
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
        reason = _calls.obstacle(child, kind)
        if reason is not None:
            return reason
    return None


def width(projection: nn.Module) -> int:
    """The number of features that a Linear, a Conv1D or something wrapped around one takes."""
    weight = next(parameter for parameter in projection.parameters() if parameter.dim() == 2)
    return weight.shape[0 if type(projection).__name__ == "Conv1D" else 1]
