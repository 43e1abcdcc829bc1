"""Who looks at a call from above its kernels: torch.compile, dispatch modes, functorch, tensor subclasses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def traced() -> bool:
    """Whether somebody has to see the operator: torch.compile, or a dispatch mode (make_fx, a FLOP counter,
    selective checkpointing). Otherwise the kernels are called without it, which saves its share of the host's
    time of a call."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def distinct(tensor: Tensor | None, *others: Tensor | None) -> Tensor | None:
    """``tensor``, or a view of it where it is also one of ``others`` and torch.compile is tracing, which
    takes no tensor twice as an input of an autograd.Function."""
    if tensor is not None and torch.compiler.is_compiling() and any(tensor is other for other in others):
        return tensor.view_as(tensor)
    return tensor


def batched(gradient: Tensor | None) -> bool:
    """Whether a gradient stands for many, which no kernel takes: torch.vmap maps over a backward, or
    is_grads_batched=True does, which has an older vmap of its own."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return torch._C._are_functorch_transforms_active() or (
        gradient is not None and functorch.is_legacy_batchedtensor(gradient)
    )


def _transform() -> str | None:
    """The transform that this call is seen through, under torch.compile that of the code being traced."""
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform (vmap, grad, jvp, ...) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation is active"
    if torch._C._is_tracing():
        return "torch.jit.trace is recording, which would not see the kernels"
    return None


# As dispatch._decide_and_record: torch.compile calls it while tracing, with the transforms it traces entered.
_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def obstacle(*tensors: Tensor | None) -> str | None:
    """Why no kernel of ours may see these tensors, or None: the cases torch handles above the kernels."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"a {type(tensor).__name__} is a tensor subclass"
        if tensor.layout is not torch.strided:
            return f"the layout is {tensor.layout}, not torch.strided"
    return _transform()
