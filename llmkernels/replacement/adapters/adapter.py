"""What ``replace`` asks of a family of layers."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Inputs(NamedTuple):
    """The arguments of one call of a layer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Adapter(abc.ABC):
    """One family: which modules belong to it, the class they get, and how to try one out away from its model.

    An adapter has no state. A new family is one file with a subclass and one entry in ``ADAPTERS``.
    """

    # The class whose instances are taken over; not its subclasses, whose behaviour can't be seen from here.
    original: ClassVar[type[nn.Module]]
    # A subclass of it that adds no state, so that an instance changes sides by its __class__ alone.
    replacement: ClassVar[type[nn.Module]]
    # The backends whose kernels serve the family: those shown through the interpreter without a GPU.
    kernels: ClassVar[tuple[str, ...]]
    # Attributes that the replacement may set on an instance; a module that has one already is left alone.
    attributes: ClassVar[tuple[str, ...]] = ("backend",)
    # Whether the replacement computes what its children compute: they are then no sites of their own.
    covers_children: ClassVar[bool] = False

    def obstacles(self, module: nn.Module) -> list[str]:
        """Sentences that say why a module of the original class can't be taken over; none if it can."""
        return []

    def remark(self, module: nn.Module, parents: Sequence[nn.Module]) -> str | None:
        """What to know about a site though it is replaced; parents: the modules that hold it."""
        return None

    @abc.abstractmethod
    def copy(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """A new instance of the original class with the module's settings, mode and values, but no hooks.

        The values are clones that require grad; dtype: None keeps that of each. Draws no random numbers.
        """

    @abc.abstractmethod
    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> Inputs:
        """Arguments that a call may have in a model, ``rows`` tokens; the same ones at each call."""

    def magnitudes(
        self, module: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The size of the intermediates whose rounding a result inherits, where it exceeds the result's own.

        By the names of verification.results, broadcastable to it. All arguments are in float64.
        """
        return {}

    def swap(self, module: nn.Module, backend: str | None) -> None:
        """Gives the module the replacement's class, and the backend that it shall insist on."""
        module.__class__ = self.replacement
        if backend is not None:
            module.backend = backend  # type: ignore[assignment]

    def restore(self, module: nn.Module) -> None:
        """Undoes ``swap``."""
        module.__class__ = self.original
        for name in self.attributes:
            module.__dict__.pop(name, None)
