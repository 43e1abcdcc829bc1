"""Triton's interpreter with the bfloat16 arithmetic of a GPU, so that bf16 kernels can be proven on a CPU.

TRITON_INTERPRET=1, set before triton is first imported, runs kernels on numpy. Numpy has no bfloat16, so the
interpreter keeps such values as uint16 bit patterns, computes on the bits as if they were integers and
truncates on the way down from float32. ``install()`` replaces the operations concerned: operands are widened
to float32, the result is rounded to the nearest bfloat16, ties to even, NaN kept. Sums, scans and dots
accumulate in float32 and round once, at the end. It also takes out of the interpreter what made most of its
time, and the warnings of numpy that a GPU would not give.

For tests: on a GPU nothing of this is used. Works with triton 3.5 to 3.9; what it replaces are methods of
triton.runtime.interpreter, which is no public interface.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import JITFunction, interpreter

_QUIET_NAN = np.uint16(0x7FC0)
_TRUNCATE = interpreter._ir.ROUNDING_MODE.RTZ
# The formats numpy computes in; 8-bit floats have conversions of their own in the interpreter.
_NUMPY_FLOATS = (tl.float16, tl.float32, tl.float64)


def active() -> bool:
    """Whether triton was imported under TRITON_INTERPRET=1: only then do its own functions run interpreted,
    too."""
    return not isinstance(tl.sum, JITFunction)


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bit patterns; exact."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[Any], truncate: bool = False) -> NDArray[np.uint16]:
    """The bit patterns of the bfloat16 values nearest to float32 ones, ties to even (or toward zero); NaN
    stays NaN."""
    single = np.asarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    # Adding just under half of the last kept place, plus that place's own bit, carries exactly where rounding
    # must. float32's exponent leaves room: the largest finite pattern carries into infinity's, and NaN is put
    # back below.
    bias = np.uint32(0) if truncate else np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    with np.errstate(over="ignore"):
        rounded = ((bits + bias) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), _QUIET_NAN, rounded)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    """A bfloat16 handle as a float32 one; anything else, dtypes and numpy functions included, unchanged."""
    return interpreter.TensorHandle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _in_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    """A builder method that computes in float32 where an operand is bfloat16 and rounds the result once."""

    @functools.wraps(operation)
    def compute(builder: Any, *operands: Any) -> Any:
        if not any(map(_is_bfloat16, operands)):
            return operation(builder, *operands)
        result = operation(builder, *map(_widened, operands))
        if result.data.dtype == np.bool_:
            return result  # a comparison
        return interpreter.TensorHandle(narrow(result.data), tl.bfloat16)

    return compute


def _dot(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Products of bfloat16 are exact in float32, and the result has the accumulator's dtype."""

    @functools.wraps(operation)
    def dot(builder: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        result = operation(builder, _widened(a), _widened(b), _widened(accumulator), *rest)
        if not _is_bfloat16(accumulator):
            return result
        return interpreter.TensorHandle(narrow(result.data), tl.bfloat16)

    return dot


def _cast(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Casts from and to bfloat16 go through float32, as torch's do."""

    @functools.wraps(operation)
    def cast(builder: Any, source: Any, dtype: Any, *rounding: Any) -> Any:
        target = dtype.scalar
        if _is_bfloat16(source) == (target == tl.bfloat16):
            return operation(builder, source, dtype, *rounding)
        if _is_bfloat16(source):
            wide = _widened(source)
            return (
                wide
                if target == tl.float32
                else interpreter.InterpreterBuilder.cast_impl(builder, wide, dtype)
            )
        truncate = bool(rounding) and rounding[0] == _TRUNCATE
        return interpreter.TensorHandle(narrow(source.data, truncate), tl.bfloat16)

    return cast


def _cast_between_floats(operation: Callable[..., Any]) -> Callable[..., Any]:
    """As ``_cast``, but conversions of 8-bit floats stay with the interpreter, which does them on the
    bits."""
    through_float32 = _cast(operation)

    @functools.wraps(operation)
    def cast(builder: Any, source: Any, dtype: Any, rounding: Any) -> Any:
        other = dtype.scalar if _is_bfloat16(source) else source.dtype.scalar
        return (through_float32 if other in _NUMPY_FLOATS else operation)(builder, source, dtype, rounding)

    return cast


def _reduction(operation: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction or scan of bfloat16 values: made in float32 and rounded once; indices of extrema pass
    through."""

    @functools.wraps(operation)
    def reduce(self: Any, input: Any, *rest: Any, **options: Any) -> Any:
        if not _is_bfloat16(input.handle):
            return operation(self, input, *rest, **options)
        result = operation(self, self.to_tensor(widen(input.handle.data), tl.float32), *rest, **options)

        def rounded(value: Any) -> Any:
            if value.dtype != tl.float32:
                return value
            data = narrow(value.handle.data)
            return self.to_tensor(data if value.type.is_block() else data.item(), tl.bfloat16)

        return type(result)(map(rounded, result)) if isinstance(result, (tuple, list)) else rounded(result)

    return reduce


def _bfloat16_constant(builder: Any, value: float) -> Any:
    return interpreter.TensorHandle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)


# Which of triton's language modules the running grid has patched.
_patched: set[Any] = set()


def _patching_once(patch_language: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter patches triton.language again at every call of a helper, which takes longer than most
    helpers do; within one grid the first patch still holds."""

    @functools.wraps(patch_language)
    def patch(function: Any) -> Any:
        wanted = {
            module
            for module in (tl, tl.core)
            if any(value is module for value in function.__globals__.values())
        }
        if wanted <= _patched:
            return interpreter._LangPatchScope()
        _patched.update(wanted)
        return patch_language(function)

    return patch


def _running_grid(run: Callable[..., Any]) -> Callable[..., Any]:
    """A grid that overflows to infinity and makes NaN without a word, as on a GPU, and patches the language
    once."""

    @functools.wraps(run)
    def quiet(*arguments: Any, **options: Any) -> Any:
        _patched.clear()
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                # Of numpy, about how the interpreter turns a tensor into the bound of a range.
                warnings.simplefilter("ignore", DeprecationWarning)
                return run(*arguments, **options)
        finally:
            _patched.clear()

    return quiet


def _replace(
    owner: type, names: tuple[str, ...], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    # Looked up before any is set: some of the casts are one function under several names.
    for name, operation in [(name, getattr(owner, name)) for name in names if hasattr(owner, name)]:
        setattr(owner, name, wrap(operation))


@functools.cache
def install() -> None:
    """Corrects the interpreter for the life of the process; a second call does nothing."""
    builder = interpreter.InterpreterBuilder
    computed = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt", "create_erf")
    _replace(builder, computed, _in_float32)
    _replace(builder, ("create_dot",), _dot)
    _replace(builder, ("cast_impl",), _cast)
    _replace(builder, ("create_fp_to_fp",), _cast_between_floats)
    builder.get_bf16 = _bfloat16_constant
    _replace(interpreter.ReduceOps, ("sum", "min_max"), _reduction)
    _replace(interpreter.ScanOps, ("cumsum", "cumprod"), _reduction)
    _replace(interpreter.GridExecutor, ("__call__",), _running_grid)
    interpreter._patch_lang = _patching_once(interpreter._patch_lang)
