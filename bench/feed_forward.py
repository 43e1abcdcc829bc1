"""feed_forward and linear_activation."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llmkernels.ops.feed_forward.call import ACTIVATIONS

from . import formulas, providers
from .case import (
    Function,
    Shape,
    Tensors,
    Variant,
    Verdict,
    Work,
    copied,
    judged,
    kept_as_often_as_asked,
    largest,
    outputs_of,
    results,
)
from .workload import Workload

# More than one tile has rows, so that the kernel compared is the one that is timed.
_MATCH_ROWS = 256


@dataclasses.dataclass(frozen=True)
class FeedForwardVariant(Variant):
    """op: feed_forward, or linear_activation for its first layer alone. The hidden size is 4 d, gated 8/3
    d."""

    name: str
    activation: str
    op: str = "feed_forward"
    dropout_p: float = 0.0
    recompute: bool = False
    every_shape: bool = False

    @property
    def gated(self) -> bool:
        return ACTIVATIONS[self.activation][1]

    def hidden(self, d: int) -> int:
        return -(-8 * d // 3 // 64) * 64 if self.gated else 4 * d

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        m, d = shape
        hidden = self.hidden(d)
        width = 2 * hidden if self.gated else hidden
        shapes: dict[str, tuple[int, ...]] = {"weight": (width, d), "bias": (width,)}
        if self.op == "feed_forward":
            shapes = {"weight1": (width, d), "bias1": (width,), "weight2": (d, hidden), "bias2": (d,)}
        tensors = {"input": torch.randn(m, d, device=device).to(dtype)}
        for name, sizes in shapes.items():
            tensors[name] = (torch.randn(sizes, device=device) * sizes[-1] ** -0.5).to(dtype)
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """Of the products alone: forward each once, backward each twice (recompute has one more that is its
        own choice and so no part of the least). Each operand read once and each result written once, what
        lies between the two layers and its gradient among them."""
        m, d = shape
        hidden, size = self.hidden(d), tensors["input"].element_size()
        layers = (2 if self.gated else 1) + (self.op == "feed_forward")
        flops = 2 * m * d * hidden * layers
        parameters = sum(tensor.nbytes for name, tensor in tensors.items() if name != "input")
        x, inner = tensors["input"].nbytes, m * hidden * size
        pre = 2 * inner if self.gated else inner
        if self.op == "feed_forward":
            forward = x + parameters + pre + 2 * inner + x
            backward = 2 * x + 2 * parameters + 2 * pre + 2 * inner + x
        else:
            forward = x + parameters + pre + inner
            backward = 2 * x + 2 * parameters + 2 * pre + inner
        return {
            "forward": Work(forward, flops),
            "backward": Work(backward, 2 * flops),
            "both": Work(forward + backward, 3 * flops),
        }[direction]

    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        """The output and, where there are gradients, all of them, of the first rows."""
        few = {**tensors, "input": tensors["input"][:_MATCH_ROWS]}
        if self.dropout_p > 0:
            return self._dropped(function, few)
        formula = formulas.feed_forward(self.activation, 0.0)
        if self.op == "linear_activation":
            formula = formulas.linear_activation(self.activation)
        exact = copied(few, torch.float64)
        gradients = tuple(torch.randn_like(output) for output in outputs_of(formula(exact)))
        found, right, own = (
            results(call, leaves, gradients, few)
            for call, leaves in ((function, copied(few)), (formula, exact), (formula, copied(few)))
        )
        return judged(found, right, own, largest)

    def _dropped(self, function: Function, few: Tensors) -> Verdict:
        """A second layer of zeros but for a diagonal lets the elements of hidden be seen."""
        given = {name: tensor.detach() for name, tensor in few.items()}
        d, hidden = given["weight2"].shape
        given["weight2"] = torch.zeros_like(given["weight2"]).fill_diagonal_(1.0)
        given["bias2"] = torch.zeros_like(given["bias2"])
        with torch.no_grad():
            y = function(given)
        assert isinstance(y, Tensor)
        seen = y[:, : min(d, hidden)]
        return kept_as_often_as_asked(float((seen != 0).float().mean()), seen.numel(), self.dropout_p)


WORKLOAD = Workload(
    name="feed_forward",
    sizes=("tokens", "width"),
    swept="width",
    bound="matmul",
    variants=(
        FeedForwardVariant("gelu", "gelu", every_shape=True),
        FeedForwardVariant("swiglu", "swiglu", every_shape=True),
        FeedForwardVariant("gelu_tanh", "gelu_tanh"),
        FeedForwardVariant("relu", "relu"),
        FeedForwardVariant("geglu", "geglu"),
        FeedForwardVariant("gelu, dropout", "gelu", dropout_p=0.1),
        FeedForwardVariant("gelu, recompute", "gelu", recompute=True),
        FeedForwardVariant("linear_activation gelu", "gelu", op="linear_activation"),
        FeedForwardVariant("linear_activation swiglu", "swiglu", op="linear_activation"),
    ),
    shapes=tuple((8192, d) for d in (1024, 2048, 4096, 8192)),
    small_shapes=((48, 24),),
    providers=providers.PRODUCTS,
)
