"""Whether a mask is the causal one, for which kernels need no mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import checks, tracing

# Of masks on a device: (version, data_ptr) and what was found then.
_found = WeakTensorKeyDictionary()


def is_causal_mask(mask: Tensor | None, inputs: Tensor, batch_first: bool) -> bool:
    """Whether ``mask`` is the causal one of torch.nn for ``inputs``: [L, L], 0 or False up to the diagonal,
    -inf or True beyond it.

    Looking at a mask on a GPU makes the host wait for it, so it is done once for each mask, and again after
    every write that autograd's version counter sees (one to ``mask.data`` it doesn't). Where looking is
    impossible (torch.compile, dispatch modes, functorch, the capture of a CUDA graph, meta tensors) the
    answer is False, which costs speed alone: the mask is then applied as it is.
    """
    if mask is None or inputs.is_nested:
        return False
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        # What comes of torch's attempt to make the causal mask of this dtype.
        checks.fail(RuntimeError, "is_causal", "mask", "torch.bool or a floating-point dtype", mask.dtype)
    length = inputs.shape[0 if inputs.dim() == 2 or not batch_first else 1]
    if mask.shape != (length, length):
        return False
    if tracing.traced() or tracing.obstacle(mask) is not None or mask.device.type == "meta":
        return False
    if not _waits(mask):
        return _is_causal(mask)
    known = _known(mask)
    if known is not None:
        return known
    if _captured(mask):
        return False
    answer = _is_causal(mask)
    if not mask.is_inference():
        _found[mask] = (_state(mask), answer)
    return answer


def is_known_as_causal(mask: Tensor) -> bool:
    """Whether a stack has found that ``mask`` is the causal one and it is what it was then; without looking
    at it, so False is no proof of the contrary."""
    return not torch.compiler.is_compiling() and _known(mask) is True


def _known(mask: Tensor) -> bool | None:
    found = None if mask.is_inference() else _found.get(mask)
    return None if found is None or found[0] != _state(mask) else found[1]


def _state(mask: Tensor) -> tuple[int, int]:
    return mask._version, mask.data_ptr()


def _waits(mask: Tensor) -> bool:
    """Whether the host has to wait for a device to know the values of ``mask``."""
    return mask.device.type != "cpu"


def _captured(mask: Tensor) -> bool:
    return mask.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_causal(mask: Tensor) -> bool:
    hidden = torch.full(mask.shape, float("-inf"), dtype=mask.dtype, device=mask.device)
    return torch.equal(mask, hidden.triu(diagonal=1))
