"""The norms beside torch eager, torch.compile and, where installed, Liger and quack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkernels
from llmkernels import dispatch, testing
from llmkernels.ops.layer_norm import api
from llmkernels.ops.layer_norm.call import NormCall

from .measure import Ceilings, Record, copy_rate, directions, measured

Outputs = tuple[Tensor, ...]
Function = Callable[[dict[str, Tensor]], Outputs]

SHAPES = tuple(
    (max(1, min(32768, 2**28 // n)), n) for n in (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 262144)
)
QUICK_SHAPES = ((64, 256), (64, 1000))
MATCH_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    op: str
    dropout_p: float = 0.0
    residual_dtype: torch.dtype | None = None

    def tensors(self, m: int, n: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        tensors = {"input": torch.randn(m, n, device=device).to(dtype)}
        if self.op == "add_layer_norm":
            tensors["residual"] = torch.randn(m, n, device=device).to(self.residual_dtype or dtype)
        tensors["weight"] = torch.randn(n, device=device).to(dtype)
        if self.op != "rms_norm":
            tensors["bias"] = torch.randn(n, device=device).to(dtype)
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def floor_bytes(self, tensors: dict[str, Tensor], direction: str) -> int:
        """Each row tensor read or written once: the least that any kernel moves; parameters are noise beside
        it."""
        x = tensors["input"].nbytes
        residual = tensors["residual"].nbytes if "residual" in tensors else 0
        forward = 2 * x + 2 * residual
        # Reads the gradients of the outputs and z, writes those of the inputs: one tensor where they are the
        # same.
        separate = residual and (self.dropout_p > 0 or tensors["residual"].dtype != tensors["input"].dtype)
        backward = x + (2 * residual or x) + (residual + x if separate else residual or x)
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


VARIANTS = (
    Variant("layer_norm", "layer_norm"),
    Variant("rms_norm", "rms_norm"),
    Variant("add_layer_norm", "add_layer_norm"),
    Variant("add_layer_norm, fp32 residual", "add_layer_norm", residual_dtype=torch.float32),
    Variant("dropout_add_layer_norm", "add_layer_norm", dropout_p=0.1),
)


def _ours(variant: Variant, backend: str) -> Function:
    def function(tensors: dict[str, Tensor]) -> Outputs:
        options = {"dropout_p": variant.dropout_p} if variant.op == "add_layer_norm" else {}
        shape = tensors["input"].shape[-1:]
        outputs = getattr(llmkernels, variant.op)(
            **tensors, normalized_shape=shape, backend=backend, **options
        )
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return function


def _eager(variant: Variant) -> Function:
    def function(tensors: dict[str, Tensor]) -> Outputs:
        x, weight, bias = tensors["input"], tensors["weight"], tensors.get("bias")
        shape = x.shape[-1:]
        if variant.op == "rms_norm":
            return (F.rms_norm(x, shape, weight, torch.finfo(torch.float32).eps),)
        if variant.op == "layer_norm":
            return (F.layer_norm(x, shape, weight, bias),)
        z = tensors["residual"] + F.dropout(x, variant.dropout_p)
        return F.layer_norm(z, shape, weight.to(z.dtype), bias.to(z.dtype)).to(x.dtype), z

    return function


def _peers(variant: Variant) -> Iterator[tuple[str, Function]]:
    """Optional packages, with the ops that they have."""
    if variant.name == "layer_norm":
        try:
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            yield "liger", lambda t: (LigerLayerNormFunction.apply(t["input"], t["weight"], t["bias"], 1e-5),)
        except ImportError:
            pass
    if variant.name == "rms_norm":
        try:
            from quack.rmsnorm import rmsnorm

            yield "quack", lambda t: (rmsnorm(t["input"], t["weight"], eps=torch.finfo(torch.float32).eps),)
        except ImportError:
            pass


def providers(variant: Variant, device: torch.device, dtype: torch.dtype) -> dict[str, Function]:
    """By name; of ours those backends that can serve here."""
    residual = variant.residual_dtype or dtype if variant.op == "add_layer_norm" else None
    call = NormCall(variant.op, device, dtype, dtype, dtype, residual, residual)
    found = {"torch": _eager(variant), "torch.compile": torch.compile(_eager(variant), dynamic=False)}
    for backend, reasons in dispatch.support(call, dict(api.KERNELS)).items():
        if backend != "reference" and not reasons:
            found[f"llmkernels {backend}"] = _ours(variant, backend)
    found.update(_peers(variant))
    return found


def _match(variant: Variant, function: Function, tensors: dict[str, Tensor]) -> tuple[bool, str]:
    """Outputs and input gradients of the first rows against float64; dropout by its share of kept
    elements."""
    few = {
        name: (tensor[:MATCH_ROWS] if tensor.dim() > 1 else tensor).detach().requires_grad_()
        for name, tensor in tensors.items()
    }
    outputs = function(few)
    if variant.dropout_p > 0:
        kept = ((outputs[1] - few["residual"]).abs() > 1e-3).float().mean().item()
        return abs(kept - (1 - variant.dropout_p)) < 0.02, f"{kept:.3f} of the elements kept"
    exact_inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in few.items()}
    reference = _eager(variant)
    exact, own = reference(exact_inputs), reference(few)
    gradients = [
        torch.autograd.grad(ys[0].sum(), ts["input"])[0] for ys, ts in ((outputs, few), (exact, exact_inputs))
    ]
    own_gradient = torch.autograd.grad(own[0].sum(), few["input"])[0]
    comparisons = [testing.measure(outputs[0], exact[0], own[0])]
    magnitude = (exact_inputs["weight"].abs().max() * torch.ones_like(gradients[1])).detach()
    comparisons.append(testing.measure(gradients[0], gradients[1], own_gradient, magnitude.cpu() * 8))
    worst = max(comparisons, key=lambda comparison: comparison.error / max(comparison.allowed, 1e-300))
    return all(comparison.passed for comparison in comparisons), str(worst)


def run(
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, int], ...],
    only: tuple[str, ...],
    report: Callable[[Record], None],
) -> list[Record]:
    """Every variant, shape, provider and direction; a provider that does not match is recorded and not
    timed."""
    ceilings = Ceilings(copy_rate(device))
    records: list[Record] = []
    for variant in VARIANTS:
        functions = {k: f for k, f in providers(variant, device, dtype).items() if not only or k in only}
        for sizes in shapes:
            tensors = variant.tensors(*sizes, dtype, device)
            for name, function in functions.items():
                verdict = _match(variant, function, tensors)
                for direction, timed in directions(function, tensors).items():
                    record = measured(
                        *("layer_norm", variant.name, direction, name, sizes, dtype, verdict),
                        *(timed, device, ceilings, variant.floor_bytes(tensors, direction)),
                    )
                    records.append(record)
                    report(record)
            del tensors
    return records
