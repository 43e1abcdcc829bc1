"""feed_forward beside torch eager, torch.compile (default and max-autotune) and the library's own
epilogues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkernels
from llmkernels import dispatch, testing
from llmkernels.ops.feed_forward import api
from llmkernels.ops.feed_forward.call import ACTIVATIONS, FeedForwardCall

from .measure import Ceilings, Record, copy_rate, directions, matmul_rate, measured

Function = Callable[[dict[str, Tensor]], Tensor]

# Tokens and d; the hidden size is 4 d, gated 8/3 d.
SHAPES = tuple((8192, d) for d in (1024, 2048, 4096, 8192))
QUICK_SHAPES = ((64, 32), (48, 40))
# More than one tile has rows, so that the kernel compared is the one that is timed.
MATCH_ROWS = 256
_REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Variant:
    """Only the first shape of all is measured where not ``every_shape``."""

    name: str
    activation: str
    dropout_p: float = 0.0
    recompute: bool = False
    every_shape: bool = False

    @property
    def gated(self) -> bool:
        return ACTIVATIONS[self.activation][1]

    def hidden(self, d: int) -> int:
        return -(-8 * d // 3 // 64) * 64 if self.gated else 4 * d

    def tensors(self, m: int, d: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        hidden = self.hidden(d)
        width = 2 * hidden if self.gated else hidden
        shapes = {"weight1": (width, d), "bias1": (width,), "weight2": (d, hidden), "bias2": (d,)}
        tensors = {"input": torch.randn(m, d, device=device).to(dtype)}
        for name, shape in shapes.items():
            tensors[name] = (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def floor_flops(self, m: int, d: int, direction: str) -> int:
        """Of the products alone: two forward, two each for the gradients of both; recompute has one more
        that is its own choice and so no part of the floor."""
        products = 2 * m * d * self.hidden(d) * (3 if self.gated else 2)
        return {"forward": products, "backward": 2 * products, "both": 3 * products}[direction]

    def floor_bytes(self, tensors: dict[str, Tensor], direction: str) -> int:
        """Each operand read once and each result written once, hidden and its gradient between the two
        layers among them."""
        x = tensors["input"].nbytes
        weights = sum(tensor.nbytes for name, tensor in tensors.items() if name != "input")
        m, hidden = tensors["input"].shape[0], tensors["weight2"].shape[1]
        inner = m * hidden * tensors["input"].element_size()
        pre = 2 * inner if self.gated else inner
        forward = x + weights + pre + 2 * inner + x
        backward = 2 * x + 2 * weights + 2 * pre + 2 * inner + x
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


VARIANTS = (
    Variant("gelu", "gelu", every_shape=True),
    Variant("swiglu", "swiglu", every_shape=True),
    Variant("gelu_tanh", "gelu_tanh"),
    Variant("relu", "relu"),
    Variant("geglu", "geglu"),
    Variant("gelu, dropout", "gelu", dropout_p=0.1),
    Variant("gelu, recompute", "gelu", recompute=True),
)


def _ours(variant: Variant, backend: str) -> Function:
    options = {"activation": variant.activation, "recompute": variant.recompute, "backend": backend}
    return lambda tensors: llmkernels.feed_forward(**tensors, dropout_p=variant.dropout_p, **options)  # type: ignore[arg-type]


def _eager(variant: Variant) -> Function:
    """As a model writes it in torch."""

    def function(tensors: dict[str, Tensor]) -> Tensor:
        pre = F.linear(tensors["input"], tensors["weight1"], tensors["bias1"])
        if variant.gated:
            gate, up = pre.chunk(2, dim=-1)
            hidden = (F.silu(gate) if variant.activation == "swiglu" else F.gelu(gate)) * up
        elif variant.activation == "relu":
            hidden = F.relu(pre)
        else:
            hidden = F.gelu(pre, approximate="tanh" if variant.activation == "gelu_tanh" else "none")
        if variant.dropout_p > 0:
            hidden = F.dropout(hidden, variant.dropout_p)
        return F.linear(hidden, tensors["weight2"], tensors["bias2"])

    return function


def _library_epilogue(variant: Variant) -> Function:
    """cublasLt's bias + activation epilogue, which torch offers without a gradient."""

    def function(tensors: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            hidden = torch._addmm_activation(
                tensors["bias1"],
                tensors["input"],
                tensors["weight1"].t(),
                use_gelu=variant.activation == "gelu_tanh",
            )
            return F.linear(hidden, tensors["weight2"], tensors["bias2"])

    return function


def providers(variant: Variant, device: torch.device, dtype: torch.dtype) -> dict[str, Function]:
    """By name; of ours those backends that can serve here."""
    eager = _eager(variant)
    found: dict[str, Function] = {
        "torch": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
        # Without its own CUDA graphs: what is timed is captured in one anyway.
        "max-autotune": torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs"),
    }
    if device.type == "cuda" and variant.activation in ("relu", "gelu_tanh"):
        found["cublasLt epilogue"] = _library_epilogue(variant)  # on a CPU its GELU is the exact one
    call = FeedForwardCall("feed_forward", device, dtype)
    for backend, reasons in dispatch.support(call, dict(api.KERNELS)).items():
        if backend != "reference" and not reasons:
            found[f"llmkernels {backend}"] = _ours(variant, backend)
    return found


def _match(variant: Variant, function: Function, tensors: dict[str, Tensor]) -> tuple[bool, str]:
    """The output and, where there are gradients, all of them, of the first rows against float64; dropout by
    its share of kept elements."""
    if variant.dropout_p > 0:
        return _match_dropout(variant, function, tensors)
    few = {
        name: (tensor[:MATCH_ROWS] if name == "input" else tensor).detach().requires_grad_()
        for name, tensor in tensors.items()
    }
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in few.items()}
    reference = _eager(variant)
    results = [(function(few), few), (reference(exact), exact), (reference(few), few)]
    compared = [("output", [y for y, _ in results])]
    if results[0][0].requires_grad:
        gradients = [torch.autograd.grad(y.square().mean(), list(t.values())) for y, t in results]
        compared += [(f"gradient of {name}", list(g)) for name, *g in zip(few, *gradients, strict=True)]
    comparisons = []
    for name, (ours, expected, own) in compared:
        # What a sum of many terms rounds with is their size, of which the largest result speaks.
        comparison = testing.measure(ours, expected, own, expected.abs().amax().cpu())
        comparisons.append(comparison._replace(detail=f"{name}, {comparison.detail}"))
    worst = max(comparisons, key=lambda comparison: comparison.error / max(comparison.allowed, 1e-300))
    return all(comparison.passed for comparison in comparisons), str(worst)


def _match_dropout(variant: Variant, function: Function, tensors: dict[str, Tensor]) -> tuple[bool, str]:
    """A second layer of zeros but for a diagonal lets the elements of hidden be seen."""
    d, hidden = tensors["weight2"].shape
    diagonal = torch.zeros_like(tensors["weight2"]).fill_diagonal_(1.0)
    few = {**tensors, "input": tensors["input"][:MATCH_ROWS], "weight2": diagonal}
    few["bias2"] = torch.zeros_like(tensors["bias2"])
    with torch.no_grad():
        y = function({name: tensor.detach() for name, tensor in few.items()})
    kept = (y[:, : min(d, hidden)] != 0).float().mean().item()
    return abs(kept - (1 - variant.dropout_p)) < 0.02, f"{kept:.3f} of the elements kept"


def run(
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, int], ...],
    only: tuple[str, ...],
    report: Callable[[Record], None],
) -> list[Record]:
    """Every variant, shape, provider and direction; a provider that does not match is recorded and not
    timed."""
    ceilings = Ceilings(copy_rate(device), matmul_rate(device, dtype))
    records: list[Record] = []
    for variant in VARIANTS:
        functions = {k: f for k, f in providers(variant, device, dtype).items() if not only or k in only}
        for sizes in shapes if variant.every_shape else shapes[:1]:
            tensors = variant.tensors(*sizes, dtype, device)
            for name, function in functions.items():
                verdict = _match(variant, function, tensors)
                for direction, timed in directions(function, tensors).items():
                    floor_bytes = variant.floor_bytes(tensors, direction)
                    floor_flops = variant.floor_flops(*sizes, direction)
                    record = measured(
                        *("feed_forward", variant.name, direction, name, sizes, dtype, verdict),
                        *(timed, device, ceilings, floor_bytes, floor_flops, _REPEATS),
                    )
                    records.append(record)
                    report(record)
            del tensors
    return records
