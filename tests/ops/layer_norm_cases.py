"""A norm call as data: its inputs, the same through torch's own operators, and its comparison with
float64."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkernels
from llmkernels import dropout, testing


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dims: int = 1  # of normalized_shape
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None  # None: as dtype
    residual_in: torch.dtype | None = None  # None: as dtype
    residual_out: torch.dtype | None = None
    weight: bool = True
    bias: bool = True
    dropout_p: float = 0.0
    eps: float = 1e-5
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    shift: float = 0.0
    scale: float = 1.0
    seed: int = 0

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        return self.shape[-self.dims :]

    @property
    def n(self) -> int:
        return torch.Size(self.normalized_shape).numel()

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """The tensors of the call by argument name, all leaves that want gradients."""
        parameter_dtype = self.parameter_dtype or self.dtype

        def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, **how: object) -> Tensor:
            seed = 1000 * self.seed + sum(map(ord, name))
            return testing.random_tensor(shape, dtype, device, seed, requires_grad=True, **how)  # type: ignore[arg-type]

        tensors = {
            "input": draw(
                "input", self.shape, self.dtype, layout=self.layout, shift=self.shift, scale=self.scale
            )
        }
        if self.op == "add_layer_norm":
            tensors["residual"] = draw(
                "residual", self.shape, self.residual_in or self.dtype, layout=self.layout
            )
        if self.weight:
            tensors["weight"] = draw("weight", self.normalized_shape, parameter_dtype)
        if self.bias and self.op != "rms_norm":
            tensors["bias"] = draw("bias", self.normalized_shape, parameter_dtype)
        return tensors

    def output_gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            testing.random_tensor(
                tuple(y.shape), y.dtype, y.device, 77 + i + 1000 * self.seed, layout=self.gradient_layout
            )
            for i, y in enumerate(outputs)
        )

    def call(self, tensors: dict[str, Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """The call through the package."""
        arguments = dict(tensors)
        options: dict[str, object] = {"eps": self.eps, "backend": backend}
        if self.op == "add_layer_norm":
            options |= {"dropout_p": self.dropout_p, "residual_dtype": self.residual_out}
        function = getattr(llmkernels, self.op)
        outputs = function(normalized_shape=self.normalized_shape, **arguments, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def torch_call(self, tensors: dict[str, Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
        """The same through torch's own operators, with a given dropout mask; in float64 if the tensors
        are."""
        x, weight, bias = tensors["input"], tensors.get("weight"), tensors.get("bias")
        if self.op == "rms_norm":
            return (F.rms_norm(x, self.normalized_shape, weight, self.eps),)
        if weight is None and bias is not None:
            # torch's backward refuses a float32 bias alone beside half-precision rows.
            weight = torch.ones_like(bias)
        if self.op == "layer_norm":
            return (F.layer_norm(x, self.normalized_shape, weight, bias, self.eps),)
        if mask is not None:
            x = torch.where(mask, x * dropout.dropout_scale(self.dropout_p), 0.0)
        z = tensors["residual"] + x
        if x.dtype != torch.float64:
            z = z.to(self.residual_out or z.dtype)
        wide = torch.promote_types(z.dtype, torch.float32)
        parameters = [p if p is None or p.dtype == z.dtype else p.to(wide) for p in (weight, bias)]
        return F.layer_norm(z, self.normalized_shape, *parameters, self.eps).to(x.dtype), z


def _mask_of_next_call(case: Case, x: Tensor, backend: str | None) -> Tensor:
    """The dropout mask that a call would draw now: torch's own, or the kernels' Philox stream."""
    if backend == "torch":
        return F.dropout(torch.ones_like(x), case.dropout_p) != 0
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return dropout.dropout_mask(seed, x.numel() // case.n, case.n, case.dropout_p).view(case.shape)


def _leaves(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).requires_grad_()
        for name, tensor in tensors.items()
    }


def _gradients(
    outputs: tuple[Tensor, ...], tensors: dict[str, Tensor], gradients: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    found = torch.autograd.grad(outputs, list(tensors.values()), gradients)
    return dict(zip(tensors, found, strict=True))


def _magnitudes(
    case: Case, tensors: dict[str, Tensor], outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
):
    """Sizes of the float32 intermediates whose rounding a gradient inherits, from the float64 call."""
    n = case.n
    z = (outputs[1] if len(outputs) > 1 else tensors["input"]).detach().reshape(-1, n)
    dy = gradients[0].reshape(-1, n)
    weight = tensors["weight"].detach().reshape(n) if case.weight else torch.ones(n, dtype=torch.float64)
    centred = z if case.op == "rms_norm" else z - z.mean(dim=1, keepdim=True)
    rstd = (centred.square().mean(dim=1, keepdim=True) + case.eps).rsqrt()
    # xhat inherits the rounding of z - mean, which is relative to z.
    xhat = (centred.abs() + z.abs()) * rstd
    largest = (dy * weight * rstd).abs().amax(dim=1, keepdim=True) * (1 + xhat.amax(dim=1, keepdim=True))
    dz = largest + (gradients[1].reshape(-1, n).abs() if len(gradients) > 1 else 0.0)
    # The terms of a sum over rows have random signs, so its rounding grows with their root of squares.
    over_rows = {
        "weight": (dy * xhat).square().sum(dim=0).sqrt(),
        "bias": dy.square().sum(dim=0).sqrt(),
    }
    dz = dz.expand(z.shape).reshape(case.shape)
    return {"input": dz, "residual": dz} | {
        name: value.reshape(case.normalized_shape) for name, value in over_rows.items()
    }


def check(case: Case, backend: str | None, device: torch.device | str) -> None:
    """Outputs and the gradients of every input, held to the error budget against float64."""
    tensors = case.inputs(device)
    mask = None
    torch.manual_seed(case.seed)
    with testing.poisoned():
        outputs = case.call(tensors, backend)
        gradients = case.output_gradients(outputs)
        found = _gradients(outputs, tensors, gradients)
    if case.dropout_p > 0:
        torch.manual_seed(case.seed)
        mask = _mask_of_next_call(case, tensors["input"], backend).cpu()

    gradients64 = tuple(gradient.cpu().double() for gradient in gradients)
    leaves64 = _leaves(tensors, torch.float64)
    outputs64 = case.torch_call(leaves64, mask)
    expected = _gradients(outputs64, leaves64, gradients64)
    leaves = _leaves(tensors, None)
    torchs = case.torch_call(leaves, mask)
    baseline = _gradients(torchs, leaves, tuple(gradient.cpu() for gradient in gradients))
    magnitudes = _magnitudes(case, leaves64, outputs64, gradients64)

    for name, actual, exact, own in zip(("output", "new residual"), outputs, outputs64, torchs, strict=False):
        assert actual.dtype == own.dtype and actual.shape == own.shape, name
        testing.assert_within_budget(actual, exact, own, name=name)
    for name, actual in found.items():
        assert actual.dtype == tensors[name].dtype, name
        testing.assert_within_budget(
            actual, expected[name], baseline[name], name=f"gradient of {name}", magnitude=magnitudes[name]
        )
