"""Tensors in guarded memory of the emulator, so that a kernel's accesses beside them are found.

In a race-checking build every stray load and store is reported when it happens; in the fast build a stray
store is reported when the buffer is freed, and a stray load reads NaN.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_PAGE_BYTES = 4096


class GuardedMemory:
    """Guarded buffers of one emulated module, freed together. A context manager."""

    def __init__(self, module: ModuleType) -> None:
        self._emulator = module.emulator
        self._buffers: list[Any] = []

    def __enter__(self) -> GuardedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def free(self) -> None:
        """Gives the buffers back; tensors on them must not be used any more."""
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()

    def empty(
        self,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        offset: int = 0,
        label: str = "tensor",
    ) -> Tensor:
        """A tensor of NaN bytes that fills its buffer, `offset` bytes (modulo a page) after a page."""
        size = dtype.itemsize * _storage_elements(shape, stride)
        buffer = self._emulator.GuardedBuffer(size, offset % _PAGE_BYTES, label)
        self._buffers.append(buffer)
        if size == 0:
            return _torch_empty_strided(tuple(shape), tuple(stride), dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).as_strided(tuple(shape), tuple(stride))

    def guarded(self, tensor: Tensor, label: str = "tensor") -> Tensor:
        """A copy in guarded memory: the same values, shape and strides, and the same alignment."""
        copy = self.empty(tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr(), label)
        # Element by element, since an expanded tensor has several names for one place.
        elements = _storage_elements(tensor.shape, tensor.stride())
        copy.as_strided((elements,), (1,)).copy_(tensor.as_strided((elements,), (1,)))
        return copy

    @contextmanager
    def guarded_outputs(self) -> Iterator[None]:
        """While it lasts, torch.empty, empty_like and empty_strided and Tensor.new_empty give guarded memory
        for CPU tensors, so that what a kernel's caller allocates is guarded too."""
        patches: list[Any] = [
            mock.patch.object(torch, "empty", self._empty),
            mock.patch.object(torch, "empty_like", self._empty_like),
            mock.patch.object(torch, "empty_strided", self._empty_strided),
            mock.patch.object(Tensor, "new_empty", self._new_empty()),
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()

    def _contiguous(self, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        stride = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return self.empty(shape, stride, dtype or torch.get_default_dtype(), label=_caller())

    def _empty(
        self, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any
    ) -> Tensor:
        if not _on_cpu(device) or options:
            return _torch_empty(*size, dtype=dtype, device=device, **options)
        return self._contiguous(_shape(size), dtype)

    def _empty_like(self, like: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        dense = _torch_empty_like(like, dtype=dtype, **options)  # torch's rule for the strides
        if not dense.is_cpu:
            return dense
        return self.empty(dense.shape, dense.stride(), dense.dtype, label=_caller())

    def _empty_strided(
        self, size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any
    ) -> Tensor:
        if not _on_cpu(options.get("device")):
            return _torch_empty_strided(size, stride, dtype=dtype, **options)
        return self.empty(size, stride, dtype or torch.get_default_dtype(), label=_caller())

    def _new_empty(self) -> Callable[..., Tensor]:
        def new_empty(
            like: Tensor, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any
        ) -> Tensor:
            if not _on_cpu(like.device if device is None else device) or options:
                return _torch_new_empty(like, *size, dtype=dtype, device=device, **options)
            return self._contiguous(_shape(size), dtype or like.dtype)

        return new_empty


_torch_empty = torch.empty
_torch_empty_like = torch.empty_like
_torch_empty_strided = torch.empty_strided
_torch_new_empty = Tensor.new_empty


def _storage_elements(shape: Sequence[int], stride: Sequence[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size


def _on_cpu(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"


def _caller() -> str:
    """Where the allocation was asked for, as a name for reports: ``cuda_kernels.py:57``."""
    frame = sys._getframe()
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
