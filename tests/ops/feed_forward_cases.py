"""A feed-forward call as data: its inputs, the same through torch's own operators, and its comparison with
float64."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkernels
from llmkernels import dropout, testing
from llmkernels.ops.feed_forward.call import ACTIVATIONS

GATED = ("swiglu", "geglu")
_SHORT_ROW = 32


@dataclasses.dataclass(frozen=True)
class Case:
    op: str = "feed_forward"
    shape: tuple[int, ...] = (5, 24)
    hidden: int = 40
    out: int = 16
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32
    bias1: bool = True
    bias2: bool = True
    dropout_p: float = 0.0
    recompute: bool = False
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    scale: float = 1.0
    seed: int = 0

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def function(self) -> str:
        return ACTIVATIONS[self.activation][0]

    @property
    def width(self) -> int:
        """Of the pre-activation."""
        return 2 * self.hidden if self.activation in GATED else self.hidden

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """The tensors of the call by argument name, all leaves that want gradients. Weights are scaled as in
        a trained model: a product keeps the size of its input."""

        def draw(name: str, shape: tuple[int, ...], scale: float = 1.0, layout: str = "contiguous") -> Tensor:
            seed = 1000 * self.seed + sum(map(ord, name))
            return testing.random_tensor(
                shape, self.dtype, device, seed, scale=scale, layout=layout, requires_grad=True
            )

        d = self.shape[-1]
        tensors = {"input": draw("input", self.shape, self.scale, self.layout)}
        single = self.op == "linear_activation"
        first, bias = ("weight", "bias") if single else ("weight1", "bias1")
        tensors[first] = draw("weight1", (self.width, d), max(d, 1) ** -0.5, self.weight_layout)
        if self.bias1:
            tensors[bias] = draw("bias1", (self.width,))
        if not single:
            tensors["weight2"] = draw(
                "weight2", (self.out, self.hidden), max(self.hidden, 1) ** -0.5, self.weight_layout
            )
            if self.bias2:
                tensors["bias2"] = draw("bias2", (self.out,))
        return tensors

    def call(self, tensors: dict[str, Tensor], backend: str | None) -> Tensor:
        """The call through the package."""
        if self.op == "linear_activation":
            return llmkernels.linear_activation(**tensors, activation=self.activation, backend=backend)
        optional: dict[str, Tensor | None] = {"bias1": None, "bias2": None, **tensors}
        return llmkernels.feed_forward(
            **optional,  # type: ignore[arg-type]
            activation=self.activation,
            dropout_p=self.dropout_p,
            recompute=self.recompute,
            backend=backend,
        )

    def output_gradient(self, y: Tensor) -> Tensor:
        return testing.random_tensor(
            tuple(y.shape), y.dtype, y.device, 77 + 1000 * self.seed, layout=self.gradient_layout
        )

    def torch_call(self, tensors: dict[str, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """y, pre and hidden through torch's own operators, with a given dropout mask; in float64 if the
        tensors are."""
        single = self.op == "linear_activation"
        first, bias = ("weight", "bias") if single else ("weight1", "bias1")
        pre = F.linear(tensors["input"], tensors[first], tensors.get(bias))
        gate, up = pre.chunk(2, dim=-1) if self.activation in GATED else (pre, None)
        functions = {
            "relu": F.relu,
            "gelu": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "silu": F.silu,
        }
        hidden = functions[self.function](gate)
        hidden = hidden if up is None else hidden * up
        if mask is not None:
            hidden = torch.where(mask, hidden * dropout.dropout_scale(self.dropout_p), 0.0)
        y = hidden if single else F.linear(hidden, tensors["weight2"], tensors.get("bias2"))
        return y, pre, hidden


def mask_of_next_call(case: Case, device: torch.device | str, backend: str | None) -> Tensor:
    """The dropout mask that a call would draw now: torch's own, or the kernels' Philox stream."""
    shape = (*case.shape[:-1], case.hidden)
    if backend == "torch":
        return F.dropout(torch.ones(shape, dtype=case.dtype, device=device), case.dropout_p) != 0
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return dropout.dropout_mask(seed, case.rows, case.hidden, case.dropout_p).view(shape)


def _leaves(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).requires_grad_()
        for name, tensor in tensors.items()
    }


def _root_of_squares(a: Tensor, b: Tensor) -> Tensor:
    """What the rounding of a @ b grows with: its terms have random signs."""
    return (a.square() @ b.square()).sqrt()


def _magnitudes(
    case: Case, tensors: dict[str, Tensor], pre: Tensor, hidden: Tensor, y: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    """Sizes of the float32 intermediates whose rounding a result inherits, from the float64 call."""
    single = case.op == "linear_activation"
    weight1 = tensors["weight" if single else "weight1"].detach()
    x = tensors["input"].detach().reshape(-1, case.shape[-1])
    pre_terms = _root_of_squares(x, weight1.t()).amax()
    (dpre,) = torch.autograd.grad(y, pre, dy, retain_graph=True)
    dpre, hidden = dpre.reshape(-1, case.width), hidden.detach().reshape(-1, case.hidden)
    dy = dy.reshape(-1, dy.shape[-1])
    weight2 = None if single else tensors["weight2"].detach()
    # A pre-activation that is off by its rounding moves hidden and the slope by about as much.
    dhidden = dy.abs().amax() if weight2 is None else _root_of_squares(dy, weight2).amax()
    dpre = dpre.abs() + dhidden * (1 + pre_terms)
    hidden = hidden.abs() + pre_terms
    found = {
        "output": hidden if weight2 is None else _root_of_squares(hidden, weight2.t()),
        "input": _root_of_squares(dpre, weight1),
        "weight" if single else "weight1": _root_of_squares(dpre.t(), x),
        "bias" if single else "bias1": dpre.square().sum(dim=0).sqrt(),
    }
    if weight2 is not None:
        found |= {"weight2": _root_of_squares(dy.t(), hidden), "bias2": dy.square().sum(dim=0).sqrt()}
    return found


def check(case: Case, backend: str | None, device: torch.device | str) -> None:
    """The output and the gradients of every input, held to the error budget against float64."""
    tensors = case.inputs(device)
    mask = None
    torch.manual_seed(case.seed)
    with testing.poisoned():
        y = case.call(tensors, backend)
        dy = case.output_gradient(y)
        found = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))
    if case.dropout_p > 0:
        torch.manual_seed(case.seed)
        mask = mask_of_next_call(case, device, backend).cpu()

    leaves64, leaves = _leaves(tensors, torch.float64), _leaves(tensors, None)
    y64, pre64, hidden64 = case.torch_call(leaves64, mask)
    dy64 = dy.cpu().double()
    magnitudes = _magnitudes(case, leaves64, pre64, hidden64, y64, dy64)
    expected = torch.autograd.grad(y64, list(leaves64.values()), dy64)
    own, _, _ = case.torch_call(leaves, mask)
    baseline = torch.autograd.grad(own, list(leaves.values()), dy.cpu())

    assert y.dtype == own.dtype and y.shape == own.shape
    _compare("output", y, y64, own, magnitudes["output"])
    for name, exact, of_torch in zip(found, expected, baseline, strict=True):
        assert found[name].dtype == tensors[name].dtype and found[name].shape == tensors[name].shape, name
        _compare(f"gradient of {name}", found[name], exact, of_torch, magnitudes[name])


def _compare(name: str, actual: Tensor, expected: Tensor, baseline: Tensor, magnitude: Tensor) -> None:
    """Row by row; a tensor of short rows as one, for torch's own error in a handful of elements is luck."""
    magnitude = magnitude.view(expected.shape)
    if expected.dim() and expected.shape[-1] < _SHORT_ROW:
        actual, expected, baseline, magnitude = (
            tensor.reshape(-1) for tensor in (actual, expected, baseline, magnitude)
        )
    testing.assert_within_budget(actual, expected, baseline, name=name, magnitude=magnitude)
