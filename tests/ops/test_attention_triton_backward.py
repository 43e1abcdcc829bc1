"""The Triton backward of attention alone, on the reference's out and lse, against the reference in
float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmkernels import testing
from llmkernels.ops.attention import reference, triton_backward
from llmkernels.ops.attention.call import UNLIMITED, Settings, new_rows

_NAMES = ("dquery", "dkey", "dvalue", "dbias", "dsinks")


@dataclass(frozen=True)
class Case:
    """One call. bias: its shape or None; lengths_q, lengths_k: of packed sequences; window: (left, right)."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    length_q: int = 50
    length_k: int = 70
    head_dim: int = 16
    value_dim: int = 16
    window: tuple[int, int] = (UNLIMITED, UNLIMITED)
    bottom_right: bool = False
    bias: tuple[int, int, int, int] | None = None
    mask: bool = False
    alibi: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dropout_p: float = 0.0
    dlse: bool = False
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    size: float = 1.0
    scale: float | None = None

    def settings(self) -> Settings:
        return Settings(
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout_p,
            left=self.window[0],
            right=self.window[1],
            bottom_right=self.bottom_right,
            max_seqlen_q=self.length_q if self.lengths_q is None else max(self.lengths_q),
            max_seqlen_k=self.length_k if self.lengths_k is None else max(self.lengths_k),
        )

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | None]:
        """What the gradients are of, and dout and dlse; query, key and value as a projection's heads lie."""

        def rows(seed: int, heads: int, length: int, size: int, scale: float = 1.0) -> Tensor:
            shape = (self.batch, length, heads, size)
            return testing.random_tensor(shape, dtype, device, seed, scale=scale).transpose(1, 2)

        def values(wanted: object, seed: int, *shape: int) -> Tensor | None:
            return testing.random_tensor(shape, torch.float32, device, seed) if wanted else None

        def bounds(lengths: tuple[int, ...] | None) -> Tensor | None:
            if lengths is None:
                return None
            ends = torch.tensor((0, *lengths)).cumsum(0)
            return ends.to(device, torch.int32)

        length_q = self.length_q if self.lengths_q is None else sum(self.lengths_q)
        length_k = self.length_k if self.lengths_k is None else sum(self.lengths_k)
        bias = None
        if self.bias is not None:
            bias = testing.random_tensor(self.bias, torch.float32, device, 5)
            bias = bias > -0.5 if self.mask else bias.to(dtype)
        slopes = values(self.alibi, 6, self.alibi, self.heads)
        return {
            "dout": rows(1, self.heads, length_q, self.value_dim),
            "dlse": values(self.dlse, 2, self.batch, self.heads, length_q),
            "query": rows(3, self.heads, length_q, self.head_dim, self.size),
            "key": rows(4, self.kv_heads, length_k, self.head_dim),
            "value": rows(9, self.kv_heads, length_k, self.value_dim),
            "bias": bias,
            "alibi_slopes": None if slopes is None else slopes.abs() / 8,
            "sinks": values(self.sinks, 7, self.heads),
            "seed": torch.tensor([2**40 + 8], device=device) if self.dropout_p else None,
            "cu_seqlens_q": bounds(self.lengths_q),
            "cu_seqlens_k": bounds(self.lengths_k),
        }


def _wide(inputs: dict[str, Tensor | None]) -> dict[str, Any]:
    return {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


def gradients(
    inputs: dict[str, Any], settings: Settings, backward: Any = reference.backward, deterministic: bool = True
) -> dict[str, Tensor]:
    """By name; the bias has one unless it is a mask."""
    dout, dlse, query, key, value, *others = inputs.values()
    out, lse = reference.forward(query, key, value, *others, settings)
    bias = inputs["bias"]
    wanted = bias is not None and bias.dtype != torch.bool
    results = backward(dout, dlse, query, key, value, out, lse, *others, settings, wanted, deterministic)
    return dict(zip(_NAMES, results, strict=True))


def _magnitudes(inputs: dict[str, Any], expected: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """Of the float32 terms of each gradient: its largest element's, for its rows are made of terms alike, or
    a single product's where they all but cancel; times the logits', whose ulp is a probability's relative
    error."""
    largest = {
        name: inputs[name].double().nan_to_num(0, 0, 0).abs().max()
        for name in ("dout", "query", "key", "value")
    }
    _, lse = reference.forward(*list(_wide(inputs).values())[2:], settings)
    logit = lse.nan_to_num(0, 0, 0).abs().max().clamp(min=1)
    dp = largest["dout"] * largest["value"]
    products = (
        dp * largest["key"] * abs(settings.scale),
        dp * largest["query"] * abs(settings.scale),
        largest["dout"],
        dp,
        dp,
    )
    return {
        name: torch.maximum(gradient.abs().max(), product) * logit
        for (name, gradient), product in zip(expected.items(), products, strict=True)
        if gradient.numel()
    }


def _baseline(inputs: dict[str, Any], settings: Settings) -> dict[str, Tensor]:
    """The reference, which is float32 inside; for 16-bit tensors with its arithmetic in their dtype, as
    torch's own operations would do it."""
    dtype = inputs["query"].dtype
    if dtype == torch.float32:
        return gradients(inputs, settings)
    inputs = {
        name: tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_wide", lambda tensor: tensor)
        return gradients(inputs, settings)


def check(
    inputs: dict[str, Any], settings: Settings, name: str, deterministic: bool = True
) -> dict[str, Tensor]:
    """Holds every gradient to the budget."""
    expected = gradients(_wide(inputs), settings)
    baseline = _baseline(inputs, settings)
    with testing.poisoned():
        actual = gradients(inputs, settings, triton_backward.backward, deterministic)
    assert {gradient.dtype for gradient in list(actual.values())[:4]} == {inputs["query"].dtype}
    assert actual["dsinks"].dtype == torch.float32
    for gradient, magnitude in _magnitudes(inputs, expected, settings).items():
        testing.assert_within_budget(
            actual[gradient], expected[gradient], baseline[gradient], name=f"{name}: {gradient}",
            magnitude=magnitude,
        )  # fmt: skip
    return actual


_CAUSAL = (UNLIMITED, 0)
_VARLEN = {"lengths_q": (37, 0, 20, 1, 5), "lengths_k": (41, 9, 20, 33, 0)}
CASES: dict[str, Case] = {
    "plain": Case(batch=2),
    "causal": Case(length_k=50, window=_CAUSAL),
    "causal, fewer queries, top left": Case(length_q=33, length_k=80, window=_CAUSAL),
    "causal, fewer queries, bottom right": Case(length_q=33, length_k=80, window=_CAUSAL, bottom_right=True),
    "causal, more queries, top left": Case(length_q=80, length_k=33, window=_CAUSAL),
    "causal, more queries, bottom right": Case(length_q=80, length_k=33, window=_CAUSAL, bottom_right=True),
    # One more key on either side and another tile would be needed.
    "window": Case(length_q=90, length_k=90, window=(33, 17)),
    "narrow window": Case(length_q=80, length_k=80, window=(5, 0)),
    "window of the past": Case(length_q=80, length_k=60, window=(20, -10), bottom_right=True),
    "multi-query": Case(heads=3, kv_heads=1, window=_CAUSAL),
    "grouped": Case(batch=2, heads=4, kv_heads=2, length_k=40),
    "wide values": Case(head_dim=20, value_dim=40),
    "wide queries": Case(head_dim=72, value_dim=8, length_q=33, length_k=33),
    "one query": Case(length_q=1),
    "one key": Case(length_k=1),
    "bias": Case(batch=2, heads=1, kv_heads=1, bias=(2, 1, 50, 70)),
    "bias over batches": Case(batch=2, length_k=40, bias=(1, 2, 50, 40)),
    "bias over heads": Case(batch=2, length_k=40, bias=(2, 1, 50, 40), window=_CAUSAL),
    "bias over rows": Case(batch=2, bias=(2, 1, 1, 70), window=_CAUSAL),
    "bias over columns": Case(bias=(1, 2, 50, 1), window=(20, 20)),
    "bias over all": Case(batch=2, length_k=40, bias=(1, 1, 1, 1), window=(30, 9)),
    "bias of heads": Case(batch=2, length_k=40, bias=(1, 2, 1, 1), sinks=True),
    "mask": Case(bias=(1, 1, 50, 70), mask=True),
    "mask of keys": Case(batch=2, length_k=40, bias=(2, 1, 1, 40), mask=True),
    "alibi": Case(batch=2, length_k=40, alibi=2),
    "alibi, causal": Case(alibi=1, window=_CAUSAL, bottom_right=True),
    "softcap": Case(softcap=2.0, size=3.0),
    "sinks": Case(batch=2, length_k=40, sinks=True, dlse=True),
    "dropout": Case(batch=2, length_k=40, dropout_p=0.3),
    "dlse": Case(dlse=True, window=_CAUSAL),
    "negative scale": Case(scale=-0.4),
    "varlen": Case(**_VARLEN),  # type: ignore[arg-type]
    "varlen, everything": Case(  # type: ignore[arg-type]
        heads=4,
        window=(25, 4),
        bottom_right=True,
        alibi=5,
        softcap=3.0,
        sinks=True,
        dropout_p=0.2,
        dlse=True,
        **_VARLEN,
    ),  # fmt: skip
    "everything": Case(
        batch=2,
        length_k=60,
        head_dim=24,
        value_dim=40,
        kv_heads=1,
        window=(40, 9),
        bottom_right=True,
        bias=(2, 1, 50, 60),
        alibi=1,
        softcap=3.0,
        sinks=True,
        dropout_p=0.2,
        dlse=True,
    ),  # fmt: skip
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, device: torch.device) -> None:
    check(CASES[name].inputs(torch.float32, device), CASES[name].settings(), name)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", ("causal", "grouped", "wide values", "everything", "varlen, everything"))
def test_gradients_in_16_bits(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(CASES[name].inputs(dtype, device), CASES[name].settings(), name)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_large_logits(dtype: torch.dtype, device: torch.device) -> None:
    """Of 1e4 and beyond."""
    case = Case(length_k=50, window=_CAUSAL, size=1e4, sinks=True)
    check(case.inputs(dtype, device), case.settings(), "large logits")


@pytest.mark.parametrize("deterministic", (True, False))
def test_very_negative_logits(deterministic: bool, device: torch.device) -> None:
    """exp(0 - logsumexp) overflows, which is what keys beyond the last would weigh."""
    case = Case(length_q=32, length_k=40)
    inputs = case.inputs(torch.float32, device)
    query, key = inputs["query"], inputs["key"]
    assert query is not None and key is not None
    inputs |= {"query": -60 * query.abs(), "key": key.abs()}
    check(inputs, case.settings(), "very negative logits", deterministic)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout: str, device: torch.device) -> None:
    """Values and layout of the gradients are those of the same tensors in one piece."""
    case = Case(batch=2, heads=2, kv_heads=1, length_q=20, length_k=40, head_dim=24, bias=(2, 1, 20, 40))
    inputs = case.inputs(torch.float32, device)
    expected = gradients(inputs, case.settings(), triton_backward.backward)
    laid_out = {
        name: tensor
        if tensor is None
        else testing.LAYOUTS[layout](tensor.transpose(1, 2)).transpose(1, 2)
        if name in ("dout", "query", "key", "value")
        else testing.LAYOUTS[layout](tensor)
        for name, tensor in inputs.items()
    }
    actual = gradients(laid_out, case.settings(), triton_backward.backward)
    for gradient, name in zip(_NAMES, ("query", "key", "value", "bias"), strict=False):
        assert torch.equal(actual[gradient], expected[gradient])
        if name != "bias":
            like = laid_out[name]
            assert actual[gradient].stride() == new_rows(like, like.shape[3]).stride()


def test_an_infinite_gradient_stays_infinite(device: torch.device) -> None:
    """As loss scaling counts on it: what overflows in dout reaches dq, dk and dv."""
    case = Case(length_q=40, length_k=40, window=_CAUSAL)
    inputs = case.inputs(torch.float16, device)
    dout = inputs["dout"]
    assert dout is not None
    dout[0, 0, 37, 3] = torch.inf
    for gradient in list(gradients(inputs, case.settings(), triton_backward.backward).values())[:3]:
        assert not gradient[:, 0].isfinite().all() and gradient[:, 1].isfinite().all()


@pytest.mark.parametrize("name", ("window", "wide values", "mask", "varlen, everything", "everything"))
def test_single_pass(name: str, device: torch.device) -> None:
    """dq by atomic additions: the same within the budget."""
    check(CASES[name].inputs(torch.float32, device), CASES[name].settings(), name, deterministic=False)


@pytest.mark.parametrize("name", ("everything", "varlen, everything"))
def test_gradients_are_bitwise_reproducible(name: str, device: torch.device) -> None:
    inputs, settings = CASES[name].inputs(torch.float32, device), CASES[name].settings()
    first, second = (gradients(inputs, settings, triton_backward.backward) for _ in range(2))
    for gradient in _NAMES:
        assert torch.equal(first[gradient], second[gradient]), gradient


def test_atomics_are_only_where_they_were_asked_for(device: torch.device, monkeypatch: Any) -> None:
    """Reproducible by construction: the interpreter runs programs one by one and can't show the contrary."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an atomic addition")

    inputs, settings = CASES["everything"].inputs(torch.float32, device), CASES["everything"].settings()
    monkeypatch.setattr(triton_backward.tl, "atomic_add", refuse)
    gradients(inputs, settings, triton_backward.backward)


@pytest.mark.parametrize("shape", ((0, 40), (40, 0), (0, 0)))
@pytest.mark.parametrize("sinks", (False, True))
def test_nothing_to_see(shape: tuple[int, int], sinks: bool, device: torch.device) -> None:
    length_q, length_k = shape
    case = Case(length_q=length_q, length_k=length_k, sinks=sinks, dlse=True, bias=(1, 2, 1, length_k))
    with testing.poisoned():
        actual = gradients(case.inputs(torch.float32, device), case.settings(), triton_backward.backward)
    expected = gradients(case.inputs(torch.float32, device), case.settings())
    for gradient in _NAMES:
        torch.testing.assert_close(actual[gradient], expected[gradient])
    assert not any(actual[gradient].any() for gradient in _NAMES[:4])


@pytest.mark.parametrize("case", (
    Case(length_q=90, length_k=40, window=(20, 0), dlse=True),
    Case(length_q=90, length_k=40, window=_CAUSAL, bottom_right=True, sinks=True, dlse=True),
    Case(length_q=60, length_k=40, bias=(1, 1, 60, 40), softcap=2.0),
    Case(length_q=60, length_k=40, bias=(1, 1, 60, 40), sinks=True),
    Case(length_q=60, length_k=40, bias=(1, 1, 60, 40), mask=True),
))  # fmt: skip
@pytest.mark.parametrize("deterministic", (True, False))
def test_what_is_masked_does_not_leak(case: Case, deterministic: bool, device: torch.device) -> None:
    """Rows that see no key and keys that no row sees hold NaN and infinities; their gradients are 0, others
    as if zeros stood there."""
    settings = case.settings()
    clean = case.inputs(torch.float32, device)
    bias = clean["bias"]
    if bias is not None:
        hidden: bool | float = False if case.mask else -torch.inf
        bias[:, :, 7:30] = hidden
        bias[..., 3:25] = hidden
        bias[:, :, 40, :] = hidden
    visible = reference._visible(case.length_q, case.length_k, bias, settings, device)
    visible = visible.expand(case.batch, case.heads, case.length_q, case.length_k)
    dead, unseen = ~visible.any(dim=3), ~visible.any(dim=2)
    assert dead.any() and not dead.all()
    rows = {"dout": dead, "query": dead, "key": unseen, "value": unseen}
    spoilt = dict(clean)
    for name, mask in rows.items():
        tensor = clean[name]
        assert tensor is not None
        for bad in (torch.nan, torch.inf):
            spoilt[name] = tensor.masked_fill(mask[..., None], bad)
            clean[name] = tensor.masked_fill(mask[..., None], 0.0)
    expected = check(clean, settings, "clean", deterministic)
    with testing.poisoned():
        actual = gradients(spoilt, settings, triton_backward.backward, deterministic)
    for gradient in _NAMES:
        assert torch.equal(actual[gradient], expected[gradient]), gradient
    assert not actual["dquery"][dead].any()
    assert not actual["dkey"][unseen].any() and not actual["dvalue"][unseen].any()
