"""attention_varlen: sequences of different lengths that lie one after the other."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import formulas, providers
from .attention import gradient_magnitude
from .case import Function, Shape, Tensors, Variant, Verdict, Work, copied, judged, results
from .workload import Workload

_ROWS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class VarlenVariant(Variant):
    """Lengths rise evenly from an eighth of the longest to the longest."""

    name: str
    op: str = "attention_varlen"
    heads: int = 16
    head_dim: int = 128
    group: int = 1
    causal: bool = True

    def bounds(self, shape: Shape) -> list[int]:
        """Where each sequence begins, and the number of tokens."""
        sequences, longest = shape
        lengths = torch.linspace(longest / 8, longest, sequences).long() if sequences > 1 else [longest]
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + int(length))
        return bounds

    def small(self) -> VarlenVariant:
        return dataclasses.replace(self, heads=self.group, head_dim=16)

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        bounds = self.bounds(shape)
        heads = {"query": self.heads, "key": self.heads // self.group, "value": self.heads // self.group}
        tensors: dict[str, Tensor] = {
            name: torch.randn(bounds[-1], count, self.head_dim, device=device).to(dtype).requires_grad_()
            for name, count in heads.items()
        }
        return tensors | {"bounds": torch.tensor(bounds, dtype=torch.int32, device=device)}

    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """As attention's, sequence by sequence."""
        bounds = self.bounds(shape)
        lengths = [last - first for first, last in zip(bounds, bounds[1:], strict=False)]
        scores = sum(n * (n + 1) // 2 if self.causal else n * n for n in lengths)
        product = 2 * self.heads * scores * self.head_dim
        inputs, out = sum(tensors[name].nbytes for name in _ROWS), tensors["query"].nbytes
        forward, backward = inputs + out, 2 * inputs + 2 * out
        return {
            "forward": Work(forward, 2 * product),
            "backward": Work(backward, 5 * product),
            "both": Work(forward + backward, 7 * product),
        }[direction]

    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        """Output and gradients of the very call that is timed: one sequence's scores at a time fit in
        float64."""
        query, bounds = tensors["query"], tensors["bounds"].tolist()
        exact, formula = copied(tensors, torch.float64), formulas.attention_varlen(self, bounds)
        gradients = (torch.randn_like(exact["query"]),)
        found, right, own = (
            results(call, leaves, gradients, _ROWS)
            for call, leaves in ((function, copied(tensors)), (formula, exact), (formula, copied(tensors)))
        )
        return judged(found, right, own, gradient_magnitude(self.head_dim, query.dtype))


WORKLOAD = Workload(
    name="attention_varlen",
    sizes=("sequences", "longest"),
    swept="longest",
    bound="matmul",
    variants=(
        VarlenVariant("causal d128"),
        VarlenVariant("full d64", head_dim=64, causal=False),
        VarlenVariant("causal GQA 8 d128", group=8),
    ),
    shapes=((16, 2048), (64, 512), (8, 4096)),
    small_shapes=((3, 40),),
    providers=providers.VARLEN,
)
