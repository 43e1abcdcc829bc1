"""What ``replace`` asks of a family of layers."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..copying import duplicate


class Inputs(NamedTuple):
    """The arguments of one call of a layer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The arguments with ``function`` of each tensor in them; one tensor given twice is one again.

        What is neither a tensor nor a container that torch knows is copied, so that a call can't change it
        for the next.
        """
        done: dict[int, Any] = {}

        def leaf(value: Any) -> Any:
            if id(value) not in done:
                done[id(value)] = function(value) if isinstance(value, Tensor) else copy.deepcopy(value, memo)
            return done[id(value)]

        memo: dict[int, Any] = {}
        leaves, spec = pytree.tree_flatten((tuple(self.args), dict(self.kwargs)))
        return Inputs(*pytree.tree_unflatten(map(leaf, leaves), spec))


class Adapter(abc.ABC):
    """One family: which modules belong to it, the classes they get, and how to try one out away from its
    model.

    An adapter has no state: it is pickled by its class. A new family is one file with a subclass and one
    entry in ``ADAPTERS``.
    """

    # The one class whose instances are taken over, and a subclass of it that adds no state, so that an
    # instance changes sides by its __class__ alone. A family of several classes has ``classes`` instead.
    original: ClassVar[type[nn.Module]]
    replacement: ClassVar[type[nn.Module]]
    # The backends whose kernels serve the family: those shown through the interpreter without a GPU.
    kernels: ClassVar[tuple[str, ...]]
    # Attributes that the replacement may set on an instance; a module that has one already is left alone.
    attributes: ClassVar[tuple[str, ...]] = ("backend",)
    # Whether the replacement computes what its children compute. They are then no sites of their own: those
    # of known families change sides with it and come back with it. Where it can't be taken over or fails its
    # verification, each of them is a site.
    covers_children: ClassVar[bool] = False
    # Attributes that tell layers of one kind apart and not what they compute: those are shown and timed once.
    ordinals: ClassVar[frozenset[str]] = frozenset({"layer_idx"})
    # Parameters of forward() whose tensors get no gradient where a layer is tried out: masks and the like.
    constants: ClassVar[frozenset[str]] = frozenset()

    def classes(self) -> Mapping[type[nn.Module], type[nn.Module]]:
        """Original -> replacement, of exact classes: not their subclasses, whose behaviour can't be seen from
        here. Asked at each replace(); the same classes must get the same replacements each time. A library
        that not everyone has is not imported for it: where nobody did, no model holds a class of it.
        """
        return {self.original: self.replacement}

    def obstacles(self, module: nn.Module) -> list[str]:
        """Sentences that say why a module of an original class can't be taken over; none if it can."""
        return []

    def remark(self, module: nn.Module, parents: Sequence[nn.Module]) -> str | None:
        """What to know about a site though it is replaced; parents: the modules that hold it."""
        return None

    def copy(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """A module to try things out on: copying.duplicate. May leave out descendants that are sites of their
        own, where the others show what this one does."""
        return duplicate(module, dtype)

    @abc.abstractmethod
    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[Inputs]:
        """The arguments of calls that may occur in a model, about ``rows`` tokens each, each time the same.

        One entry for each way to call the layer that takes another path (a mask, say); the first is the one
        that is timed. Values are drawn on the CPU, so that every device sees the same ones.
        """

    def captured(self, module: nn.Module, inputs: Inputs) -> Inputs:
        """What to verify with of the arguments that the module gets in the model, before they are cloned:
        without a cache, say, which a second call would find filled."""
        return inputs

    def magnitudes(
        self, module: nn.Module, inputs: Inputs, output_gradients: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The size of the intermediates whose rounding a result inherits, where it exceeds the result's own.

        By the names of verification.results, broadcastable to it. All arguments are in float64. For results
        without an entry torch's own error is drawn several times (verification.redrawn).
        """
        return {}

    def swap(self, module: nn.Module, backend: str | None) -> None:
        """Gives one module of an original class its replacement's class, and the backend it shall insist
        on."""
        module.__class__ = self.classes()[type(module)]
        if backend is not None:
            module.backend = backend  # type: ignore[assignment]

    def restore(self, module: nn.Module) -> bool:
        """Undoes ``swap``; leaves a module of any class but a replacement's alone and says so by False."""
        for original, replacement in self.classes().items():
            if type(module) is replacement:
                module.__class__ = original
                for name in self.attributes:
                    module.__dict__.pop(name, None)
                return True
        return False


def drawn(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int, *, scale: float = 1.0
) -> Tensor:
    """Normal values, each time the same, drawn on the CPU so that every device sees the same ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    return (scale * values).to(device, dtype)
