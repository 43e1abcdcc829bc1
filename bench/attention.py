"""attention, of sequences of one length."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from llmkernels import testing

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
    results,
)
from .workload import Workload

# The check stores the scores in float64.
_MATCH_LENGTH = 1024
# Sequences whose weights are counted: enough that even short ones show whether any is dropped.
_DROPPED_BATCH = 4


def gradient_magnitude(head_dim: int, dtype: torch.dtype) -> Any:
    """Of a result of attention: its kernels round P and dS to the inputs' dtype before they sum, and dP -
    delta of a row that sees one key is exactly 0, of two terms that are no smaller than others'."""
    rounded = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / testing.ARITHMETIC_ULPS
    return lambda name, exact: exact.abs().amax().cpu() * max(rounded, head_dim**0.5)


@dataclasses.dataclass(frozen=True)
class AttentionVariant(Variant):
    """width: of all heads together; group: heads of the query that share a key head; window: of keys to the
    left, causal; bias: [1, H, L, L] that learns."""

    name: str
    op: str = "attention"
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
    every_shape: bool = True

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def is_torchs(self) -> bool:
        """Whether scaled_dot_product_attention has all of it."""
        return not (self.window or self.softcap or self.sinks)

    def options(self) -> dict[str, Any]:
        """The arguments beside the tensors, under torch's names, those that torch lacks where they are
        asked for."""
        found: dict[str, Any] = {
            "dropout_p": self.dropout_p,
            "is_causal": self.causal,
            "enable_gqa": self.group > 1,
        }
        if self.window:
            found["window"] = (self.window, 0)
        if self.softcap:
            found["softcap"] = self.softcap
        return found

    def small(self) -> AttentionVariant:
        """A key head, heads of 16 elements, a window that cuts."""
        window = 24 if self.window else 0
        return dataclasses.replace(self, head_dim=16, width=16 * self.group, window=window)

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        batch, length = shape

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device).to(dtype).requires_grad_()

        tensors = {"query": draw(batch, self.heads, length, self.head_dim)}
        kv_heads = self.heads // self.group
        tensors |= {name: draw(batch, kv_heads, length, self.head_dim) for name in ("key", "value")}
        if self.bias:
            tensors["attn_mask"] = draw(1, self.heads, length, length)
        if self.sinks:
            tensors["sinks"] = torch.randn(self.heads, device=device).requires_grad_()
        return tensors

    def _scores(self, length: int) -> int:
        """How many a head has to compute."""
        scores = length * (length + 1) // 2 if self.causal else length * length
        if self.window and length > self.window:
            hidden = length - self.window - 1
            scores -= hidden * (hidden + 1) // 2
        return scores

    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """Two products forward and five backward, of the visible scores. Inputs read and out written once;
        backward reads these and dout and writes a gradient of each input."""
        batch, length = shape
        product = 2 * batch * self.heads * self._scores(length) * self.head_dim
        inputs, out = sum(tensor.nbytes for tensor in tensors.values()), tensors["query"].nbytes
        forward, backward = Work(inputs + out, 2 * product), Work(2 * inputs + 2 * out, 5 * product)
        return {
            "forward": forward,
            "backward": backward,
            "both": Work(forward.bytes + backward.bytes, 7 * product),
        }[direction]

    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        """Output and all gradients, at a length that fits; of dropout how many weights it keeps."""
        query = tensors["query"]
        length = min(shape[1], _MATCH_LENGTH)
        if self.dropout_p > 0:
            return self._dropped(function, self.tensors((_DROPPED_BATCH, length), query.dtype, query.device))
        few = self.tensors((1, length), query.dtype, query.device)
        formula, exact = formulas.attention(self), copied(few, torch.float64)
        gradients = (torch.randn_like(exact["query"]),)
        found, right, own = (
            results(call, leaves, gradients, few)
            for call, leaves in ((function, copied(few)), (formula, exact), (formula, copied(few)))
        )
        return judged(found, right, own, gradient_magnitude(self.head_dim, query.dtype))

    def _dropped(self, function: Function, few: Tensors) -> Verdict:
        """A query of zeros weighs all keys that it sees alike, and of values that are a unit vector each the
        output shows one weight by one, of as many keys as a head has elements: which were kept, and that
        these have grown by 1 / (1 - p)."""
        given = {name: torch.zeros_like(tensor).detach() for name, tensor in few.items()}
        given["value"][:, :] = torch.eye(*given["value"].shape[2:], device=given["value"].device)
        with torch.no_grad():
            out = function(given)
        assert isinstance(out, Tensor)
        seen = formulas.visible(out.shape[2], self.causal, self.window, out.device)
        shown = seen[:, : self.head_dim].expand(*out.shape[:3], -1)
        kept = out[..., : shown.shape[-1]] != 0
        often = kept_as_often_as_asked(float(kept[shown].double().mean()), int(shown.sum()), self.dropout_p)
        weights = torch.zeros_like(out, dtype=torch.float64)
        weights[..., : shown.shape[-1]] = kept / seen.sum(dim=1, keepdim=True) / (1 - self.dropout_p)
        magnitude = gradient_magnitude(self.head_dim, out.dtype)
        grown = judged({"output": out}, {"output": weights}, {"output": weights.to(out.dtype)}, magnitude)
        return both(often, grown)


WORKLOAD = Workload(
    name="attention",
    sizes=("batch", "length"),
    swept="length",
    bound="matmul",
    variants=(
        AttentionVariant("full d128"),
        AttentionVariant("causal d128", causal=True),
        AttentionVariant("full d64", head_dim=64),
        AttentionVariant("causal d64", head_dim=64, causal=True),
        AttentionVariant("causal d128, atomics", causal=True, deterministic=False),
        AttentionVariant("causal d256", head_dim=256, causal=True),
        AttentionVariant("causal GQA 8 d128", group=8, causal=True),
        AttentionVariant("window 1024 d128", causal=True, window=1024),
        AttentionVariant("softcap, sinks d128", causal=True, softcap=30.0, sinks=True),
        AttentionVariant("bias d64", head_dim=64, width=512, bias=True, every_shape=False),
        AttentionVariant("dropout d128", causal=True, dropout_p=0.1),
    ),
    # 16384 tokens.
    shapes=((8, 2048), (1, 16384), (32, 512), (2, 8192)),
    small_shapes=((1, 40),),
    providers=providers.ATTENTION,
)
