"""attention beside torch's scaled_dot_product_attention by each of its kernels, and FlexAttention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import llmkernels
from llmkernels import dispatch, testing
from llmkernels.ops.attention import api
from llmkernels.ops.attention.call import AttentionCall

from .measure import Ceilings, Record, copy_rate, directions, matmul_rate, measured

Function = Callable[[dict[str, Tensor]], Tensor]

# Batch and length: 16384 tokens.
SHAPES = ((32, 512), (8, 2048), (2, 8192), (1, 16384))
QUICK_SHAPES = ((2, 64), (1, 100))
# The check materialises the scores in float64.
MATCH_LENGTH = 1024
_REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Variant:
    """width: of all heads together; window: of keys to the left, causal; bias: [1, H, L, L] that learns."""

    name: str
    head_dim: int = 128
    width: int = 2048
    group: int = 1
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    bias: bool = False
    dropout_p: float = 0.0
    deterministic: bool = True

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def is_torchs(self) -> bool:
        """Whether scaled_dot_product_attention has all of it."""
        return not (self.window or self.softcap or self.sinks)

    def tensors(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype).requires_grad_()

        kv_heads = self.heads // self.group
        tensors = {"query": draw(batch, self.heads, length, self.head_dim)}
        tensors |= {name: draw(batch, kv_heads, length, self.head_dim) for name in ("key", "value")}
        if self.bias:
            tensors["attn_mask"] = draw(1, self.heads, length, length)
        if self.sinks:
            tensors["sinks"] = torch.randn(self.heads, device=device).requires_grad_()
        return tensors

    def floor_flops(self, batch: int, length: int, direction: str) -> int:
        """Two products forward and five backward, of the visible scores."""
        scores = length * length
        if self.causal:
            scores = length * (length + 1) // 2
        if self.window and length > self.window:
            hidden = length - self.window - 1
            scores -= hidden * (hidden + 1) // 2
        product = 2 * batch * self.heads * scores * self.head_dim
        return {"forward": 2 * product, "backward": 5 * product, "both": 7 * product}[direction]

    def floor_bytes(self, tensors: dict[str, Tensor], direction: str) -> int:
        """Inputs read and out written once; backward reads these and dout and writes a gradient of each."""
        inputs = sum(tensor.nbytes for tensor in tensors.values())
        out = tensors["query"].nbytes
        forward, backward = inputs + out, 2 * inputs + 2 * out
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


VARIANTS = (
    Variant("full d128"),
    Variant("causal d128", causal=True),
    Variant("causal d64", head_dim=64, causal=True),
    Variant("causal d256", head_dim=256, causal=True),
    Variant("causal GQA 8 d128", group=8, causal=True),
    Variant("causal d128, atomics", causal=True, deterministic=False),
    Variant("window 1024 d128", causal=True, window=1024),
    Variant("softcap, sinks d128", causal=True, softcap=30.0, sinks=True),
    Variant("bias d64", head_dim=64, width=512, bias=True),
    Variant("dropout d128", causal=True, dropout_p=0.1),
)


def _ours(variant: Variant, backend: str) -> Function:
    def function(tensors: dict[str, Tensor]) -> Tensor:
        return llmkernels.attention(  # type: ignore[return-value]
            **tensors,
            dropout_p=variant.dropout_p,
            is_causal=variant.causal,
            enable_gqa=variant.group > 1,
            window=(variant.window, 0) if variant.window else None,
            softcap=variant.softcap,
            deterministic=variant.deterministic,
            backend=backend,
        )

    return function


def _sdpa(variant: Variant, kernel: SDPBackend) -> Function:
    def function(tensors: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                **tensors,
                dropout_p=variant.dropout_p,
                is_causal=variant.causal,
                enable_gqa=variant.group > 1,
            )

    return function


@functools.cache
def _block_mask(window: int, length: int, device: torch.device) -> object:
    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - window) if window else j <= i

    return create_block_mask(visible, None, None, length, length, device=device)


def _flex(variant: Variant) -> Function:
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(tensors: dict[str, Tensor]) -> Tensor:
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        mask = _block_mask(variant.window, query.shape[2], query.device) if variant.causal else None
        score = None
        if variant.bias:
            bias = tensors["attn_mask"]

            def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + bias[0, h, i, j]

        return compiled(query, key, value, score, mask, enable_gqa=variant.group > 1)

    return function


def providers(variant: Variant, device: torch.device, dtype: torch.dtype) -> dict[str, Function]:
    """By name; of ours those backends that can serve here, the torch backend included."""
    found: dict[str, Function] = {}
    if variant.is_torchs:
        on_gpu = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
        kernels = {**on_gpu, "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa math": SDPBackend.MATH}
        if device.type != "cuda":
            kernels = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa math": SDPBackend.MATH}
        found |= {name: _sdpa(variant, kernel) for name, kernel in kernels.items()}
    if device.type == "cuda" and not (variant.softcap or variant.sinks or variant.dropout_p):
        found["flex_attention"] = _flex(variant)
    call = AttentionCall("attention", device, dtype, gradients=True)
    for backend, reasons in dispatch.support(call, dict(api.KERNELS)).items():
        if backend != "reference" and not reasons:
            found[f"llmkernels {backend}"] = _ours(variant, backend)
    return found


def _match(variant: Variant, function: Function, tensors: dict[str, Tensor]) -> tuple[bool, str] | None:
    """Output and all gradients at a length that fits, against float64; dropout by its mean alone. None of a
    kernel of torch's that does not serve the call."""
    query = tensors["query"]
    small = variant.tensors(1, min(query.shape[2], MATCH_LENGTH), query.dtype, query.device)
    gradient = torch.randn_like(small["query"])

    def run(function: Function, dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in small.items()}
        out = function(leaves)
        return [out, *torch.autograd.grad(out, list(leaves.values()), gradient.to(dtype))]

    try:
        if variant.dropout_p > 0:
            small["value"] = torch.ones_like(small["value"])
            with torch.no_grad():
                mean = function(small).float().mean().item()
            return abs(mean - 1) < 0.02, f"mean weight {mean:.4f}"
        actual = run(function, query.dtype)
    except RuntimeError as error:
        if "No available kernel" in str(error):
            return None
        raise
    exact, own = (run(_ours(variant, "reference"), dtype) for dtype in (torch.float64, query.dtype))
    comparisons = []
    for name, ours, expected, torchs in zip(("out", *small), actual, exact, own, strict=True):
        half = torch.finfo(ours.dtype).eps / torch.finfo(torch.float32).eps / testing.ARITHMETIC_ULPS
        # dP - delta of a row that sees one key is exactly 0, of two terms that are no smaller than others'.
        magnitude = expected.abs().amax().cpu() * max(half, variant.head_dim**0.5)
        comparison = testing.measure(ours, expected, torchs, magnitude)
        comparisons.append(comparison._replace(detail=f"{name}, {comparison.detail}"))
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
    ceilings = Ceilings(copy_rate(device), matmul_rate(device, dtype))
    records: list[Record] = []
    for variant in VARIANTS:
        functions = {k: f for k, f in providers(variant, device, dtype).items() if not only or k in only}
        for sizes in shapes:
            tensors = variant.tensors(*sizes, dtype, device)
            for name, function in functions.items():
                verdict = _match(variant, function, tensors)
                if verdict is None:
                    continue
                for direction, timed in directions(function, tensors).items():
                    floor_bytes = variant.floor_bytes(tensors, direction)
                    floor_flops = variant.floor_flops(*sizes, direction)
                    record = measured(
                        *("attention", variant.name, direction, name, sizes, dtype, verdict),
                        *(timed, device, ceilings, floor_bytes, floor_flops, _REPEATS),
                    )
                    records.append(record)
                    report(record)
            del tensors
    return records
