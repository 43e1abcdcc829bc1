"""The Triton forward of attention against the reference in float64, every feature and their combinations."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from llmkernels import testing
from llmkernels.ops.attention import reference, triton_forward
from llmkernels.ops.attention.call import UNLIMITED, Settings

_INFINITY = float("inf")
_HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call by its sizes; lengths_q and lengths_k of packed sequences, else None. bias: which of the
    dimensions "bhqk" a bias has at full size, None for no bias."""

    b: int = 2
    heads: int = 2
    kv_heads: int = 2
    lq: int = 50
    lk: int = 41
    d: int = 16
    dv: int = 16
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    scale: float | None = None
    left: int = UNLIMITED
    right: int = UNLIMITED
    bottom_right: bool = False
    softcap: float = 0.0
    bias: str | None = None
    bool_bias: bool = False
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    seed: int = 0

    def settings(self) -> Settings:
        return Settings(
            scale=self.d**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout_p,
            left=self.left,
            right=self.right,
            bottom_right=self.bottom_right,
            max_seqlen_q=max((self.lq,) if self.lengths_q is None else self.lengths_q),
            max_seqlen_k=max((self.lk,) if self.lengths_k is None else self.lengths_k),
        )

    def tensors(self, device: torch.device) -> dict[str, Tensor | None]:
        """The tensor arguments of ``forward`` by name."""
        lq, lk, slope_rows = self.lq, self.lk, self.b
        cu_seqlens_q = cu_seqlens_k = None
        if self.lengths_q is not None and self.lengths_k is not None:
            lq, lk, slope_rows = sum(self.lengths_q), sum(self.lengths_k), len(self.lengths_q)
            cu_seqlens_q, cu_seqlens_k = (
                torch.tensor((0, *lengths), device=device).cumsum(0).int()
                for lengths in (self.lengths_q, self.lengths_k)
            )

        def draw(number: int, *shape: int, dtype: torch.dtype = torch.float32, **how: Any) -> Tensor:
            return testing.random_tensor(shape, dtype, device, 100 * self.seed + number, **how)

        def of_heads(number: int, heads: int, length: int, size: int) -> Tensor:
            if self.layout != "tokens":
                return draw(number, self.b, heads, length, size, dtype=self.dtype, layout=self.layout)
            # As a projection of all heads gives it, a slice of wider tokens.
            wide = draw(number, self.b, length, heads, size + 8, dtype=self.dtype)
            return wide[..., :size].transpose(1, 2)

        bias = None
        if self.bias is not None:
            sizes = zip("bhqk", (self.b, self.heads, lq, lk), strict=True)
            bias = draw(4, *(size if name in self.bias else 1 for name, size in sizes), dtype=self.dtype)
            bias = bias > -0.5 if self.bool_bias else torch.where(bias > 1, -_INFINITY, bias)
        return {
            "query": of_heads(1, self.heads, lq, self.d),
            "key": of_heads(2, self.kv_heads, lk, self.d),
            "value": of_heads(3, self.kv_heads, lk, self.dv),
            "bias": bias,
            "alibi_slopes": draw(5, slope_rows, self.heads).abs() if self.alibi else None,
            "sinks": draw(6, self.heads) if self.sinks else None,
            "seed": torch.tensor([2**62 + 12345 + self.seed], device=device) if self.dropout_p else None,
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
        }


def _converted(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors in float64 as far as they are floating point."""
    return {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _weights(tensors: dict[str, Tensor | None], settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The weights [B, Hq, Lq, Lk] as rounded to the tensors' dtype, the logsumexp, and what the weights
    multiply, per query head and finite: the reference's weights are its output for the identity as values."""
    value = tensors["value"]
    assert value is not None
    identity = torch.eye(value.shape[2], dtype=value.dtype, device=value.device)
    identity = identity.expand(*value.shape[:2], -1, -1)
    weights, lse = reference.forward(*(tensors | {"value": identity}).values(), settings)
    return weights, lse, _repeated(value, weights.shape[1])


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0).repeat_interleave(heads // tensor.shape[1], dim=1)


def _magnitudes(tensors: dict[str, Tensor | None], settings: Settings) -> tuple[Tensor, Tensor]:
    """Sizes of the float32 intermediates of out and lse: the rounding of a logit, relative to the sizes of
    its terms, is the relative error of its weight."""
    query, key, bias = tensors["query"], tensors["key"], tensors["bias"]
    assert query is not None and key is not None
    sizes = _repeated(query, query.shape[1]).abs() @ _repeated(key, query.shape[1]).abs().transpose(2, 3)
    sizes = 1 + sizes * abs(settings.scale)
    if bias is not None and bias.is_floating_point():
        sizes = sizes + torch.where(bias.isfinite(), bias.abs(), 0.0)
    if (slopes := tensors["alibi_slopes"]) is not None:
        largest = slopes.amax(dim=0)[:, None, None]
        sizes = sizes + largest * max(settings.max_seqlen_q, settings.max_seqlen_k)
    if (sinks := tensors["sinks"]) is not None:
        sizes = sizes + sinks.abs()[:, None, None]
    weights, lse, value = _weights(tensors, settings)
    of_lse = (_weights(tensors | {"seed": None}, settings)[0] * sizes).sum(dim=3) + lse.abs() + 1
    return (weights * sizes) @ value.abs(), of_lse


def check(
    case: Case, device: torch.device, changed: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """out and lse of the case, with some tensors exchanged for others, held to the budget; its tensors.

    The baseline rounds the weights to the tensors' dtype before they meet the values, as torch's operators
    do.
    """
    tensors, settings = case.tensors(device) | (changed or {}), case.settings()
    with testing.poisoned():
        out, lse = triton_forward.forward(**tensors, settings=settings)
    weights, lse_baseline, value = _weights(tensors, settings)
    tensors64 = _converted(tensors)
    out64, lse64 = reference.forward(*tensors64.values(), settings)
    of_out, of_lse = _magnitudes(tensors64, settings)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    testing.assert_within_budget(out, out64, weights @ value, name="out", magnitude=of_out)
    testing.assert_within_budget(lse, lse64, lse_baseline, name="lse", magnitude=of_lse)
    return out, lse, tensors


def random_case(seed: int) -> Case:
    """Any combination of what the kernel takes, at small sizes."""
    draw = random.Random(seed)
    kv_heads = draw.choice((1, 2))
    lengths = {}
    packed = draw.random() < 0.4
    if packed:
        count = draw.randint(1, 3)
        lengths = {
            name: tuple(draw.choice((0, 1, 5, 32, 45, 65)) for _ in range(count))
            for name in ("lengths_q", "lengths_k")
        }
    dtype = draw.choice((torch.float32, *_HALF))
    return Case(
        b=1 if packed else draw.randint(1, 2),
        heads=kv_heads * draw.choice((1, 2, 3)),
        kv_heads=kv_heads,
        lq=draw.choice((1, 7, 31, 33, 64, 70)),
        lk=draw.choice((1, 2, 15, 17, 32, 50, 67)),
        d=draw.choice((3, 16, 24, 33, 40)),
        # The error of a single column may be far from its usual size, torch's too.
        dv=draw.choice((1 if dtype == torch.float32 else 17, 16, 20, 48)),
        dtype=dtype,
        layout=draw.choice((*testing.LAYOUTS, "tokens", "tokens")),
        scale=draw.choice((None, None, 0.7, -0.4, 0.0)),
        left=draw.choice((UNLIMITED, UNLIMITED, 0, 3, 20)),
        right=draw.choice((UNLIMITED, 0, 0, 2, 18)),
        bottom_right=draw.random() < 0.5,
        softcap=draw.choice((0.0, 0.0, 1.5, 20.0)),
        bias=None if packed else draw.choice((None, "", "k", "bk", "hqk", "bhqk", "bq")),
        bool_bias=draw.random() < 0.5,
        alibi=draw.random() < 0.3,
        sinks=draw.random() < 0.3,
        dropout_p=draw.choice((0.0, 0.0, 0.25)),
        seed=seed,
        **lengths,
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(device: torch.device, seed: int) -> None:
    check(random_case(seed), device)


@pytest.mark.parametrize("lq, lk", ((1, 1), (1, 70), (70, 1), (33, 70), (70, 33), (64, 64)))
@pytest.mark.parametrize("bottom_right", (False, True))
def test_windows(device: torch.device, lq: int, lk: int, bottom_right: bool) -> None:
    """Every position of a window's edges relative to those of tiles, and rows that see nothing."""
    for left, right in ((UNLIMITED, 0), (0, UNLIMITED), (0, 0), (15, 0), (16, 1), (40, 17), (5, UNLIMITED)):
        check(Case(b=1, lq=lq, lk=lk, left=left, right=right, bottom_right=bottom_right), device)


@pytest.mark.parametrize("bottom_right", (False, True))
def test_packed_sequences(device: torch.device, bottom_right: bool) -> None:
    """Each sequence has its own bounds, alignment and distances; some have no query, no key or neither."""
    case = Case(
        b=1, heads=4, lengths_q=(33, 0, 64, 5, 0, 20), lengths_k=(40, 7, 64, 0, 0, 50), left=25, right=3,
        bottom_right=bottom_right, alibi=True, sinks=True, dropout_p=0.3, layout="tokens",
    )  # fmt: skip
    check(case, device)


@pytest.mark.parametrize("lq, lk", ((0, 5), (5, 0), (0, 0)))
@pytest.mark.parametrize("sinks", (False, True))
def test_no_queries_or_no_keys(device: torch.device, lq: int, lk: int, sinks: bool) -> None:
    out, lse, tensors = check(Case(lq=lq, lk=lk, sinks=sinks), device)
    assert (out == 0).all()
    expected = tensors["sinks"] if sinks else torch.tensor(-_INFINITY)
    assert expected is not None
    torch.testing.assert_close(lse, expected.reshape(1, -1, 1).expand_as(lse))


def test_no_sequences(device: torch.device) -> None:
    tensors = Case(b=1, lengths_q=(0,), lengths_k=(0,)).tensors(device)
    tensors["cu_seqlens_q"] = tensors["cu_seqlens_k"] = torch.zeros(1, dtype=torch.int32, device=device)
    out, lse = triton_forward.forward(**tensors, settings=Case(lq=0, lk=0).settings())
    assert out.shape == (1, 2, 0, 16) and lse.shape == (1, 2, 0)


@pytest.mark.parametrize("dtype", _HALF)
@pytest.mark.parametrize("d, dv", ((64, 64), (80, 40), (16, 96)))
def test_half_precision(device: torch.device, dtype: torch.dtype, d: int, dv: int) -> None:
    check(Case(b=1, lq=40, lk=90, d=d, dv=dv, dtype=dtype, right=0, bottom_right=True), device)


def test_wide_heads(device: torch.device) -> None:
    check(Case(b=1, heads=1, kv_heads=1, lq=40, lk=40, d=256, dv=192, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("bias", ("", "k", "q", "bk", "hq", "hqk", "bhqk"))
@pytest.mark.parametrize("bool_bias", (False, True))
def test_biases(device: torch.device, bias: str, bool_bias: bool) -> None:
    """Broadcast over any dimensions, also where a row is masked whole by it."""
    check(Case(bias=bias, bool_bias=bool_bias, right=30, dtype=torch.float16), device)


@pytest.mark.parametrize("dtype", (torch.float32, *_HALF))
@pytest.mark.parametrize("sinks", (False, True))
def test_dead_rows(device: torch.device, dtype: torch.dtype, sinks: bool) -> None:
    """A row that sees no key has output 0 and the sink, or -inf, as logsumexp: by the causal mask, by a
    window, by a boolean mask and by a bias of -inf, whatever stands in keys and values."""
    lq, lk = 70, 40
    mask = torch.ones(1, 1, lq, lk, dtype=torch.bool, device=device)
    mask[:, :, 35:50] = False
    float_mask = torch.where(mask, 0.0, -_INFINITY).to(dtype)
    base = Case(lq=lq, lk=lk, sinks=sinks, dtype=dtype)
    causal = dataclasses.replace(base, right=0, bottom_right=True)
    window = dataclasses.replace(base, left=3)
    for case, changed, dead in (
        (causal, {}, slice(0, lq - lk)),
        (window, {}, slice(lk + 3, lq)),
        (base, {"bias": mask}, slice(35, 50)),
        (base, {"bias": float_mask}, slice(35, 50)),
    ):
        out, lse, tensors = check(case, device, changed)
        assert (out[:, :, dead] == 0).all()
        if sinks:
            assert tensors["sinks"] is not None
            expected = tensors["sinks"][:, None].expand_as(lse[:, :, dead])
            torch.testing.assert_close(lse[:, :, dead], expected)
        else:
            assert (lse[:, :, dead] == -_INFINITY).all()


@pytest.mark.parametrize("spoilt", (torch.nan, _INFINITY, -_INFINITY))
def test_what_is_masked_never_leaks(device: torch.device, spoilt: float) -> None:
    """NaN and infinities in keys and values reach the rows that see them, as in the reference, and no
    other."""
    mask = torch.rand(2, 1, 50, 41, generator=torch.Generator().manual_seed(0)).to(device) > 0.3
    mask[:, :, :, 7] = mask[:, :, :, 38] = False
    for case, changed in (
        (Case(right=0), {}),
        (Case(left=4, right=2, dtype=torch.bfloat16), {}),
        (Case(), {"bias": mask}),
        (Case(dtype=torch.float16), {"bias": torch.where(mask, 0.0, -_INFINITY).half()}),
    ):
        tensors = case.tensors(device)
        for name in ("key", "value"):
            changed[name] = tensors[name].clone()  # type: ignore[union-attr]
            changed[name][:, :, [7, 38], 3] = spoilt
        if "bias" in changed:
            out, _, _ = check(case, device, changed)
            assert out.isfinite().all()
            continue
        # What comes of infinite logits is of no use; of the other rows only what the clean tensors give.
        out, lse = triton_forward.forward(**(tensors | changed), settings=case.settings())
        row, key = torch.arange(50, device=device)[:, None], torch.arange(41, device=device)
        seen = (key >= row - case.left) & (key <= row + case.right)
        sees = seen[:, [7, 38]].any(dim=1)
        clean, clean_lse = triton_forward.forward(**tensors, settings=case.settings())
        assert sees.any() and not sees.all()
        assert torch.equal(out[:, :, ~sees], clean[:, :, ~sees])
        assert torch.equal(lse[:, :, ~sees], clean_lse[:, :, ~sees])
        assert spoilt == spoilt or out[:, :, sees, 3].isnan().all()


def test_spoilt_values_reach_who_sees_them(device: torch.device) -> None:
    """Of values alone the outcome is defined to the element: what the row's weights make of them."""
    for case in (Case(right=0), Case(left=9), Case(bias="hqk", bool_bias=True)):
        value = case.tensors(device)["value"]
        assert value is not None
        value[0, :, 3, 5], value[1, :, 20, 2], value[1, :, 21, 4] = torch.nan, _INFINITY, -_INFINITY
        check(case, device, {"value": value})


def test_what_lies_beyond_a_sequence_never_leaks(device: torch.device) -> None:
    case = Case(b=1, lengths_q=(20, 30), lengths_k=(18, 33), right=5)
    tensors = case.tensors(device)
    changed = {name: tensors[name].clone() for name in ("key", "value")}  # type: ignore[union-attr]
    for tensor in changed.values():
        tensor[:, :, 18:] = torch.nan
    clean, _ = triton_forward.forward(**tensors, settings=case.settings())
    out, _ = triton_forward.forward(**(tensors | changed), settings=case.settings())
    assert torch.equal(out[:, :, :20], clean[:, :, :20]) and out[:, :, 20:].isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, *_HALF))
@pytest.mark.parametrize("right", (0, UNLIMITED))
def test_large_logits(device: torch.device, dtype: torch.dtype, right: int) -> None:
    """Logits of 1e4 and beyond: exp of any of them overflows, and their maximum moves from tile to tile."""
    case = Case(lq=40, lk=70, dtype=dtype, scale=1.0, right=right, bottom_right=True)
    tensors = case.tensors(device)
    grown = {name: tensors[name] * 60 for name in ("query", "key")}  # type: ignore[operator]
    _, lse, _ = check(case, device, grown)
    assert lse.abs().max() > 1e4


@pytest.mark.parametrize("scale", (-0.7, 0.0))
@pytest.mark.parametrize("right", (3, UNLIMITED))
def test_scales_that_are_not_positive(device: torch.device, scale: float, right: int) -> None:
    check(Case(scale=scale, right=right, softcap=0.0), device)
    check(Case(scale=scale, right=right, softcap=2.0, alibi=True), device)


@pytest.mark.parametrize("heads, kv_heads", ((6, 2), (3, 1), (4, 4)))
def test_grouped_heads(device: torch.device, heads: int, kv_heads: int) -> None:
    check(Case(heads=heads, kv_heads=kv_heads, alibi=True, sinks=True, bias="hk"), device)


@pytest.mark.parametrize("dropout_p", (0.1, 0.5, 1.0))
@pytest.mark.parametrize("b, lk", ((2, 41), (1, 3)))
def test_dropout_is_the_reference_mask(device: torch.device, dropout_p: float, b: int, lk: int) -> None:
    """The weights themselves: the identity as values shows which of them are kept."""
    case = Case(b=b, heads=3, kv_heads=1, lq=37, lk=lk, dv=lk, dropout_p=dropout_p, right=20)
    identity = torch.eye(lk, device=device).expand(b, 1, lk, lk)
    out, _, tensors = check(case, device, {"value": identity})
    seed = tensors["seed"]
    assert seed is not None
    rows = torch.arange(b * 3 * 37, device=device).reshape(b, 3, 37)
    kept = reference.dropout_mask(seed, rows, lk, (lk + 3) // 4, dropout_p)
    seen = torch.arange(lk, device=device) <= torch.arange(37, device=device)[:, None] + 20
    assert torch.equal(out != 0, kept & seen)


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Batches, heads and rows more than 2^31 elements apart; the memory between them is never touched."""
    case = Case(b=2, lq=40, lk=40, dtype=torch.float16, right=0)
    small = case.tensors(device)
    far = {}
    memory = torch.empty(2**31 + 2**20, dtype=torch.float16, device=device)
    for number, name in enumerate(("query", "key", "value")):
        dense = small[name]
        assert dense is not None
        far[name] = memory[number * 2**17 :].as_strided(dense.shape, (2**31, 2**14, 2**8, 1))
        far[name].copy_(dense)
    expected, expected_lse = triton_forward.forward(**small, settings=case.settings())
    out, lse = triton_forward.forward(**(small | far), settings=case.settings())
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("layout", (*testing.LAYOUTS, "tokens"))
def test_layouts(device: torch.device, layout: str) -> None:
    """Any strides; the output has its heads where the query has them."""
    case = Case(layout=layout, d=24, dv=40, heads=3, kv_heads=3)
    out, _, tensors = check(case, device)
    assert tensors["query"] is not None
    assert out.transpose(1, 2).is_contiguous() == (layout == "tokens")


def test_expanded_inputs(device: torch.device) -> None:
    """Heads and batches of stride 0, and masks expanded to their full shape."""
    case = Case(b=2, heads=2)
    key = case.tensors(device)["key"]
    assert key is not None
    mask = torch.rand(50, 41, generator=torch.Generator().manual_seed(1)).to(device) > 0.2
    padding = torch.rand(2, 1, 1, 41, generator=torch.Generator().manual_seed(1)).to(device) > 0.2
    check(case, device, {"key": key[:1, :1].expand_as(key), "bias": mask.expand(2, 2, 50, 41)})
    check(case, device, {"bias": padding.expand(2, 2, 50, 41)})
    check(case, device, {"bias": mask.t().contiguous().t()[None, None]})


def test_reasons_name_the_device(device: torch.device) -> None:
    from llmkernels.ops.attention import triton_kernels
    from llmkernels.ops.attention.call import AttentionCall

    def reasons(name: str, dtype: torch.dtype = torch.float16) -> list[str]:
        return triton_kernels.unsupported(AttentionCall("attention", torch.device(name), dtype))

    assert reasons(device.type) == []
    assert reasons("meta") == ["the input is on meta; the Triton kernels serve NVIDIA GPUs"]
    assert "query is torch.float64" in reasons(device.type, torch.float64)[0]
