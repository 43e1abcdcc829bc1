"""Argument errors that name the argument, say what was expected and what came, and are of the kind torch
raises."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

# What torch's functions take as a number; numpy's scalars are registered as the former.
REAL: Any = (numbers.Real, torch.SymFloat)


def fail(kind: type[Exception], op: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raises ``kind`` with the one sentence form that every argument error of the package has."""
    raise kind(f"{op}: {argument}: expected {expected}, got {got}")


def check_tensor(op: str, argument: str, value: object) -> None:
    """TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        fail(TypeError, op, argument, "a torch.Tensor", type(value).__name__)


def check_floating(op: str, argument: str, value: Tensor) -> None:
    """RuntimeError unless ``value`` is real floating point, as torch's norms demand."""
    if not value.dtype.is_floating_point:
        fail(RuntimeError, op, argument, "a floating-point dtype", value.dtype)


def check_size(op: str, argument: str, value: Any, least: int) -> Any:
    """The value as an int (one being traced as it is). TypeError unless it is one, ValueError if below
    ``least``."""
    # type() first: torch.compile knows it of its symbolic ints, but not their attributes.
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            fail(TypeError, op, argument, "an int", type(value).__name__)
        value = operator.index(value)
    if value < least:
        fail(ValueError, op, argument, f"at least {least}", value)
    return value


def check_device(op: str, argument: str, value: Tensor, like: Tensor) -> None:
    """RuntimeError unless ``value`` lies on the device of ``like``, the input."""
    if value.device != like.device:
        fail(RuntimeError, op, argument, f"device {like.device} (as input)", value.device)


def check_normalized_shape(op: str, normalized_shape: Sequence[int], input: Tensor) -> tuple[int, ...]:
    """The shape as a tuple of ints. TypeError for anything but a sequence of ints, RuntimeError where it is
    empty or does not end the input's shape, as torch.nn.functional.layer_norm raises them."""
    if not isinstance(normalized_shape, (tuple, list)):
        fail(TypeError, op, "normalized_shape", "a tuple of ints", type(normalized_shape).__name__)
    shape = tuple(normalized_shape)
    for size in shape:
        if type(size) is not int and not hasattr(size, "__index__"):
            fail(
                TypeError,
                op,
                "normalized_shape",
                "a tuple of ints",
                f"an element of type {type(size).__name__}",
            )
    if not shape:
        fail(RuntimeError, op, "normalized_shape", "at least one dimension", list(shape))
    if input.shape[-len(shape) :] != shape:
        fail(RuntimeError, op, "input", f"a shape of [*, {', '.join(map(str, shape))}]", list(input.shape))
    return shape


def check_parameter(
    op: str, argument: str, value: Tensor, shape: tuple[int, ...], input: Tensor, any_dtype: bool
) -> None:
    """A norm's weight or bias: of normalized_shape, on the input's device and, unless any floating dtype will
    do, in the input's dtype or, beside an fp16 or bf16 input, in float32."""
    check_tensor(op, argument, value)
    if value.shape != shape:
        fail(RuntimeError, op, argument, f"the shape of normalized_shape {list(shape)}", list(value.shape))
    check_device(op, argument, value, input)
    if value.dtype == input.dtype:
        return
    half_input = input.dtype in (torch.float16, torch.bfloat16)
    if any_dtype:
        check_floating(op, argument, value)
    elif not (half_input and value.dtype == torch.float32):
        expected = f"{input.dtype} (as input)" + (" or torch.float32" if half_input else "")
        fail(RuntimeError, op, argument, expected, value.dtype)


def check_same_dtype(op: str, weight: Tensor | None, bias: Tensor) -> None:
    """RuntimeError unless a norm's weight and bias are of one dtype."""
    if weight is not None and bias.dtype != weight.dtype:
        fail(RuntimeError, op, "bias", f"{weight.dtype} (as weight)", bias.dtype)


def check_eps(op: str, eps: Any) -> None:
    """TypeError unless a real number, ValueError unless it is >= 0 (so NaN is refused too)."""
    if (
        type(eps) is not float
        and type(eps) is not int
        and (isinstance(eps, bool) or not isinstance(eps, REAL))
    ):
        fail(TypeError, op, "eps", "a number", type(eps).__name__)
    if not eps >= 0:
        fail(ValueError, op, "eps", "a number >= 0", eps)


def check_dropout(op: str, dropout_p: Any) -> None:
    """TypeError unless a real number, ValueError unless in [0, 1], as torch.nn.functional.dropout."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, REAL):
        fail(TypeError, op, "dropout_p", "a number", type(dropout_p).__name__)
    if not 0 <= dropout_p <= 1:
        fail(ValueError, op, "dropout_p", "a probability between 0 and 1", dropout_p)
