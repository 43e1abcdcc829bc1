"""A call of attention as data: its inputs, the same by plain torch operators, and its comparison with
float64."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

import llmkernels
from llmkernels import dropout, testing

_INFINITY = float("inf")


@dataclasses.dataclass(frozen=True)
class Case:
    """heads: of the query and of the keys. head_dims: of query and key, and of value. mask: the shape of a
    mask that broadcasts, mask_dtype bool or floating."""

    lq: int = 37
    lk: int = 53
    batch: int = 1
    heads: tuple[int, int] = (2, 2)
    head_dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    causal: bool = False
    align: str = "top_left"
    window: tuple[int, int] | None = None
    softcap: float | None = None
    mask: tuple[int, ...] | None = None
    mask_dtype: torch.dtype = torch.bool
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    lse: bool = False
    layout: str = "bhld"  # or blhd: heads inside rows; qkv: slices of one packed projection
    magnitude: float = 1.0  # of queries and keys
    deterministic: bool = True
    seed: int = 0

    @property
    def settled_scale(self) -> float:
        return 1 / math.sqrt(self.head_dims[0]) if self.scale is None else self.scale

    @property
    def options(self) -> dict[str, object]:
        return {
            "dropout_p": self.dropout_p,
            "is_causal": self.causal,
            "scale": self.scale,
            "enable_gqa": self.heads[0] != self.heads[1],
            "causal_align": self.align,
            "window": self.window,
            "softcap": self.softcap,
            "return_lse": self.lse,
            "deterministic": self.deterministic,
        }

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """The tensors of the call by argument name; those that are differentiable are leaves that want
        gradients."""
        hq, hkv = self.heads
        d, dv = self.head_dims

        def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            seed = 1000 * self.seed + sum(map(ord, name))
            return testing.random_tensor(shape, dtype, device, seed, scale=scale)

        rows = {
            "query": draw("query", (self.batch, hq, self.lq, d), self.dtype, self.magnitude),
            "key": draw("key", (self.batch, hkv, self.lk, d), self.dtype, self.magnitude),
            "value": draw("value", (self.batch, hkv, self.lk, dv), self.dtype),
        }
        tensors = {name: self._laid_out(rows[name]).requires_grad_() for name in rows}
        if self.mask is not None and self.mask_dtype == torch.bool:
            tensors["attn_mask"] = draw("mask", self.mask, torch.float32) > -0.5
        elif self.mask is not None:
            mask = draw("mask", self.mask, self.mask_dtype)
            hidden = draw("hidden", self.mask, torch.float32) < -1
            tensors["attn_mask"] = mask.masked_fill(hidden, -_INFINITY).requires_grad_()
        if self.alibi:
            tensors["alibi_slopes"] = draw("alibi", (hq,), torch.float32).abs()
        if self.sinks:
            tensors["sinks"] = draw("sinks", (hq,), torch.float32).requires_grad_()
        return tensors

    def _laid_out(self, rows: Tensor) -> Tensor:
        if self.layout == "bhld":
            return rows
        if self.layout == "blhd":
            return rows.transpose(1, 2).contiguous().transpose(1, 2)
        b, h, length, d = rows.shape
        packed = rows.new_full((b, length, 3, h, d), torch.nan)
        packed[:, :, 1] = rows.transpose(1, 2)
        return packed[:, :, 1].transpose(1, 2)

    def call(self, tensors: dict[str, Tensor], backend: str | None) -> tuple[Tensor, ...]:
        found = llmkernels.attention(**tensors, **self.options, backend=backend)  # type: ignore[arg-type]
        return found if isinstance(found, tuple) else (found,)

    def plain(self, tensors: dict[str, Tensor], kept: Tensor | None) -> tuple[Tensor, ...]:
        """The same by matmul, softmax and matmul, in the tensors' dtype (float32 softmax, as torch's math
        path), with a given dropout mask. A yardstick written apart from the package's reference."""
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        dtype = query.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        group = self.heads[0] // max(self.heads[1], 1)
        key, value = (t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (key, value))
        logits = (query @ key.transpose(2, 3)).to(wide) * self.settled_scale
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).tanh()
        offset = self.lk - self.lq if self.align == "bottom_right" else 0
        i = torch.arange(self.lq, device=query.device)[:, None] + offset
        j = torch.arange(self.lk, device=query.device)
        visible = torch.ones(self.lq, self.lk, dtype=torch.bool, device=query.device)
        if self.causal:
            visible &= j <= i
        if self.window is not None and self.window[0] >= 0:
            visible &= j >= i - self.window[0]
        if self.window is not None and self.window[1] >= 0:
            visible &= j <= i + self.window[1]
        mask = tensors.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            visible = visible & mask
        elif mask is not None:
            visible = visible & (mask.detach() != -_INFINITY)
            logits = logits + torch.where(mask.detach() == -_INFINITY, 0.0, mask)
        if self.alibi:
            logits = logits - tensors["alibi_slopes"].to(wide)[:, None, None] * (i - j).abs()
        logits = torch.where(visible, logits, -_INFINITY)
        if self.sinks:
            sink = tensors["sinks"].to(wide)[:, None, None].expand(*logits.shape[:3], 1)
            with_sink = torch.cat((logits, sink), dim=3)
        else:
            with_sink = logits
        dead = (with_sink == -_INFINITY).all(dim=3, keepdim=True)
        lse = torch.where(dead[..., 0], -_INFINITY, torch.where(dead, 0.0, with_sink).logsumexp(dim=3))
        p = torch.where(dead, 0.0, torch.where(dead, 0.0, with_sink).softmax(dim=3))[..., : self.lk]
        if kept is not None:
            p = torch.where(kept, p * dropout.dropout_scale(self.dropout_p), 0.0)
        out = p.to(dtype) @ value
        return (out, lse) if self.lse else (out,)


def to_cpu(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies on the CPU, floating ones in ``dtype`` (None: their own)."""
    found = {}
    for name, tensor in tensors.items():
        floating = tensor.dtype.is_floating_point
        copy = tensor.detach().to("cpu", dtype if floating and dtype is not None else tensor.dtype, copy=True)
        found[name] = copy.requires_grad_(tensor.requires_grad)
    return found


def gradients(
    outputs: tuple[Tensor, ...], tensors: dict[str, Tensor], output_gradients: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """By input name; zeros where an output, of no keys say, does not depend on it."""
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    pairs = [pair for pair in zip(outputs, output_gradients, strict=True) if pair[0].requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True
    )
    zeros = (
        torch.zeros_like(tensor) if g is None else g for g, tensor in zip(found, wanted.values(), strict=True)
    )
    return dict(zip(wanted, zeros, strict=True))


def kept_mask(case: Case, seed: Tensor) -> Tensor:
    """The keys that the kernels' Philox stream keeps, bool [B, Hq, Lq, Lk]."""
    from llmkernels.ops.attention import reference

    rows = torch.arange(case.batch * case.heads[0] * case.lq).view(case.batch, case.heads[0], case.lq)
    return reference.dropout_mask(seed.cpu(), rows, case.lk, (case.lk + 3) // 4, case.dropout_p)


def _size(tensor: Tensor) -> float:
    """Root of the mean square; 0 of an empty tensor."""
    return float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0


def magnitudes(case: Case, tensors: dict[str, Tensor], grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Sizes of the intermediates whose rounding a result inherits beside its own.

    The probabilities and dS enter their dot products in the inputs' dtype, which for half precision is one
    ulp of theirs instead of the budget's share of float32; the logits, of float32, err by their own size,
    which exp makes a relative error of the probabilities.
    """
    half = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps / testing.ARITHMETIC_ULPS
    q, k, v, grad = (_size(t) for t in (tensors["query"], tensors["key"], tensors["value"], grads[0]))
    scale = abs(case.settled_scale)
    logits = q * k * scale * case.head_dims[0] ** 0.5
    if case.alibi:
        logits += float(tensors["alibi_slopes"].max()) * max(case.lq, case.lk)
    relative = max(half, 1 + logits)
    kept = 1 / (1 - case.dropout_p)
    # Of the many rows the worst is held to this: twice the root mean square.
    ds = 2 * relative * (kept * grad * v * case.head_dims[1] ** 0.5 + (_size(grads[1]) if case.lse else 0.0))
    rows = max(case.lq * case.heads[0] // max(case.heads[1], 1), 1) ** 0.5
    sizes = {
        "out": relative * kept * v,
        "lse": 1 + logits,
        "query": ds * k * scale,
        "key": ds * q * scale * rows,
        "value": relative * kept * grad * rows,
        "attn_mask": ds * (case.batch * case.heads[0] * max(case.lq, 1)) ** 0.5,
        "sinks": ds * (case.batch * max(case.lq, 1)) ** 0.5,
    }
    return {name: torch.tensor(size, dtype=torch.float64) for name, size in sizes.items()}


def check(case: Case, backend: str | None, device: torch.device | str) -> None:
    """Outputs and the gradient of every input, held to the error budget against float64."""
    tensors = case.inputs(device)
    torch.manual_seed(case.seed)
    with testing.poisoned():
        outputs = case.call(tensors, backend)
        output_gradients = tuple(
            testing.random_tensor(tuple(y.shape), y.dtype, y.device, 77 + i) for i, y in enumerate(outputs)
        )
        # The logsumexp of a row that sees nothing is -inf whatever its inputs are.
        output_gradients = tuple(
            torch.where(y.isinf(), 0.0, g) for y, g in zip(outputs, output_gradients, strict=True)
        )
        found = gradients(outputs, tensors, output_gradients)
    kept = None
    if case.dropout_p > 0:
        torch.manual_seed(case.seed)
        kept = kept_mask(case, torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device))

    gradients64 = tuple(g.cpu().double() for g in output_gradients)
    exact_leaves = to_cpu(tensors, torch.float64)
    exact = case.plain(exact_leaves, kept)
    expected = gradients(exact, exact_leaves, gradients64)
    own_leaves = to_cpu(tensors, None)
    own = case.plain(own_leaves, kept)
    baseline = gradients(own, own_leaves, tuple(g.cpu() for g in output_gradients))
    sizes = magnitudes(case, exact_leaves, gradients64)

    for name, actual, right, torchs in zip(("out", "lse"), outputs, exact, own, strict=False):
        assert actual.dtype == torchs.dtype and actual.shape == torchs.shape, name
        testing.assert_within_budget(actual, right, torchs, name=name, magnitude=sizes[name])
    for name, actual in found.items():
        assert actual.dtype == tensors[name].dtype and actual.shape == tensors[name].shape, name
        testing.assert_within_budget(
            actual, expected[name], baseline[name], name=f"gradient of {name}", magnitude=sizes[name]
        )
