"""Who may be computed from its parameters and who has to be called."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, fx, nn
from torch.nn.modules import module as _module

from .. import checks

_PLAIN_PARAMETERS = (nn.Parameter, Tensor)


def has_global_hooks() -> bool:
    """Whether somebody listens to the calls of every module."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def obstacle(module: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Why ``module`` has to be called, instead of being computed from its parameters as the modules of
    ``kinds`` are; None if nobody could tell the difference."""
    if type(module) not in kinds:
        return f"a {type(module).__name__} stands where a {kinds[0].__name__} is known"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"its {type(module).__name__} has hooks"
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return f"its {type(module).__name__} has a forward of its own"
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) not in _PLAIN_PARAMETERS:
            return f"its {type(module).__name__} has a {type(parameter).__name__} as a parameter"
    return None


def call(
    module: nn.Module, kind: type[nn.Module], backend: str | None, *arguments: Any, **options: Any
) -> Any:
    """Calls a child, and where it is of ``kind``, one of our layers, tells it the backend of its parent."""
    if backend is not None and isinstance(module, kind) and type(module).forward is kind.forward:
        return module(*arguments, **options, backend=backend)
    return module(*arguments, **options)


def trace_call(module: nn.Module, *arguments: Any) -> Any:
    """What a layer answers to a first argument that is no tensor: under torch.fx.symbolic_trace it is one
    node, as torch.nn's layers are, and to anything else it is a TypeError."""
    first = arguments[0]
    if not isinstance(first, fx.Proxy):
        checks.fail(TypeError, f"nn.{type(module).__name__}", "input", "a torch.Tensor", type(first).__name__)
    tracer: Any = first.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def refuse_scripting(self: nn.Module) -> NoReturn:
    """As a module's ``__prepare_scriptable__``, which torch.jit.script asks first: RuntimeError."""
    name = type(self).__name__
    raise RuntimeError(
        f"llmkernels.nn.{name}: torch.jit.script can't compile it: use torch.compile or torch.export, or "
        "give its state_dict to torch's own layer (the report of replace() has undo())"
    )
