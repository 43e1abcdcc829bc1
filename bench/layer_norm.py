"""The norms: layer_norm, rms_norm, add_layer_norm with and without dropout."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import formulas, providers
from .case import (
    Function,
    Shape,
    Tensors,
    Variant,
    Verdict,
    Work,
    both,
    copied,
    judged,
    kept_as_often_as_asked,
    outputs_of,
    results,
)
from .workload import Workload

_MATCH_ROWS = 64
# The rows of a small batch of activations, 2^28 elements of long ones.
SHAPES = tuple(
    (max(1, min(32768, 2**28 // n)), n) for n in (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 262144)
)
SMALL_SHAPES = ((16, 256), (16, 200))


@dataclasses.dataclass(frozen=True)
class NormVariant(Variant):
    name: str
    op: str
    dropout_p: float = 0.0
    residual_dtype: torch.dtype | None = None

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        m, n = shape
        tensors = {"input": torch.randn(m, n, device=device).to(dtype)}
        if self.op == "add_layer_norm":
            tensors["residual"] = torch.randn(m, n, device=device).to(self.residual_dtype or dtype)
        tensors["weight"] = torch.randn(n, device=device).to(dtype)
        if self.op != "rms_norm":
            tensors["bias"] = torch.randn(n, device=device).to(dtype)
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """Each row tensor read or written once; parameters are noise beside it."""
        x = tensors["input"].nbytes
        residual = tensors["residual"].nbytes if "residual" in tensors else 0
        forward = 2 * x + 2 * residual
        # Reads the gradients of the outputs and z, writes those of the inputs: one tensor where they are the
        # same.
        separate = residual and (self.dropout_p > 0 or tensors["residual"].dtype != tensors["input"].dtype)
        backward = x + (2 * residual or x) + (residual + x if separate else residual or x)
        return Work({"forward": forward, "backward": backward, "both": forward + backward}[direction])

    def _formula(self) -> Function:
        if self.op == "add_layer_norm":
            return formulas.add_layer_norm(self.dropout_p)
        return formulas.layer_norm if self.op == "layer_norm" else formulas.rms_norm

    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        """The first rows, outputs and gradients of the rows and the parameters."""
        few = {name: tensor[:_MATCH_ROWS] if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
        if self.dropout_p > 0:
            return both(_dropped(function, few, self.dropout_p), _of_its_own_sum(function, few))
        exact, formula = copied(few, torch.float64), self._formula()
        gradients = tuple(torch.randn_like(output) for output in outputs_of(formula(exact)))
        found, right, own = (
            results(call, leaves, gradients, few)
            for call, leaves in ((function, copied(few)), (formula, exact), (formula, copied(few)))
        )
        return judged(found, right, own, lambda name, value: self._magnitude(name, value, exact, gradients))

    def _magnitude(
        self, name: str, value: Tensor, exact: Tensors, gradients: tuple[Tensor, ...]
    ) -> Tensor | None:
        """What a gradient is a sum of: products of an output's gradient, a weight and a normalised value, of
        which the largest is as many standard deviations as the input's largest."""
        if not name.startswith("gradient"):
            return None
        rows = exact["input"].detach()
        deviations = (rows / rows.std(dim=-1, keepdim=True, correction=0)).abs().amax()
        scale = exact["weight"].detach().abs().amax() * gradients[0].abs().amax() * deviations
        return (value.abs().amax() if value.dim() == 1 else scale).cpu()


def _dropped(function: Function, few: Tensors, dropout_p: float) -> Verdict:
    """Of a residual of zeros and an input of ones, z is what dropout keeps."""
    given = {name: tensor.detach() for name, tensor in few.items()}
    given |= {"input": torch.ones_like(few["input"]), "residual": torch.zeros_like(few["residual"])}
    with torch.no_grad():
        z = outputs_of(function(given))[1]
    return kept_as_often_as_asked(float((z != 0).float().mean()), z.numel(), dropout_p)


def _of_its_own_sum(function: Function, few: Tensors) -> Verdict:
    """The norm is that of the new residual, whichever elements dropout kept in it."""
    with torch.no_grad():
        y, z = outputs_of(function(few))
        parameters = {name: few[name] for name in ("weight", "bias")}
        right, own = (
            formulas.layer_norm({"input": z.to(dtype)} | copied(parameters, dtype)).detach()
            for dtype in (torch.float64, z.dtype)
        )
    return judged({"norm": y}, {"norm": right}, {"norm": own.to(y.dtype)}, lambda *_: None)


WORKLOAD = Workload(
    name="layer_norm",
    sizes=("rows", "width"),
    swept="width",
    bound="copy",
    variants=(
        NormVariant("layer_norm", "layer_norm"),
        NormVariant("dropout_add_layer_norm", "add_layer_norm", dropout_p=0.1),
        NormVariant("add_layer_norm", "add_layer_norm"),
        NormVariant("add_layer_norm, fp32 residual", "add_layer_norm", residual_dtype=torch.float32),
        NormVariant("rms_norm", "rms_norm"),
    ),
    shapes=SHAPES,
    small_shapes=SMALL_SHAPES,
    providers=providers.NORMS,
    repeats=50,
)
