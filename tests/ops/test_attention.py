"""attention and attention_varlen on every backend: outputs, logsumexps and all gradients against float64."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import llmkernels
from llmkernels import testing

from .attention_cases import Case, check, gradients, kept_mask, magnitudes, to_cpu


@pytest.fixture(params=("reference", "triton", "cuda"))
def own_backend(request: pytest.FixtureRequest) -> str:
    """The backends that keep this package's promises beyond torch's."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cuda" and (reason := request.getfixturevalue("cuda_kernels_missing")) is not None:
        pytest.skip(reason)
    return request.param


# FlashAttention's published lengths and its odd ones, as far as the interpreter is quick.
LENGTHS = ((1, 1), (1, 70), (70, 1), (64, 128), (3, 99), (113, 203), (108, 64), (65, 33))


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("lq, lk", LENGTHS)
def test_lengths(backend: str, device: torch.device, lq: int, lk: int, causal: bool) -> None:
    check(Case(lq, lk, batch=1, causal=causal), backend, device)


@pytest.mark.parametrize("lq, lk", ((0, 5), (5, 0), (0, 0)))
@pytest.mark.parametrize("lse", (False, True))
def test_empty_lengths(backend: str, device: torch.device, lq: int, lk: int, lse: bool) -> None:
    check(Case(lq, lk, lse=lse), backend, device)
    check(Case(lq, lk, sinks=True, lse=lse), backend, device)


@pytest.mark.parametrize("sizes", ({"batch": 0}, {"heads": (0, 0)}), ids=("batch", "heads"))
def test_nothing_to_attend(backend: str, device: torch.device, sizes: dict) -> None:
    check(Case(4, 5, **sizes), backend, device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "head_dims",
    ((1, 1), (16, 16), (40, 40), (59, 64), (64, 32), (96, 111), (128, 128), (24, 129), (256, 256)),
)
def test_head_dims(
    backend: str, device: torch.device, head_dims: tuple[int, int], dtype: torch.dtype
) -> None:
    check(Case(19, 35, batch=1, head_dims=head_dims, dtype=dtype, causal=True), backend, device)


@pytest.mark.parametrize("heads", ((4, 4), (4, 2), (6, 2), (3, 1)), ids=str)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_grouped_heads(backend: str, device: torch.device, heads: tuple[int, int], causal: bool) -> None:
    check(Case(heads=heads, causal=causal, dtype=torch.float16), backend, device)


@pytest.mark.parametrize("align", ("top_left", "bottom_right"))
@pytest.mark.parametrize("window", (None, (-1, 3), (5, -1), (7, 2), (0, 0), (40, 0), (20, 20)), ids=str)
@pytest.mark.parametrize("lq, lk", ((37, 37), (21, 50), (50, 21)))
def test_windows(
    backend: str, device: torch.device, lq: int, lk: int, window: tuple[int, int] | None, align: str
) -> None:
    case = Case(lq, lk, batch=1, heads=(1, 1), window=window, align=align)
    check(case, backend, device)
    check(dataclasses.replace(case, causal=True), backend, device)


MASKS = ((37, 53), (2, 1, 1, 53), (2, 1, 37, 1), (1, 2, 37, 53), (2, 2, 37, 53), (1, 1), (53,))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    "mask_dtype", (torch.bool, torch.float32, torch.bfloat16), ids=("bool", "fp32", "bf16")
)
def test_masks(backend: str, device: torch.device, mask: tuple[int, ...], mask_dtype: torch.dtype) -> None:
    dtype = torch.bfloat16 if mask_dtype == torch.bfloat16 else torch.float32
    check(Case(mask=mask, mask_dtype=mask_dtype, dtype=dtype, batch=2), backend, device)


@pytest.mark.parametrize("layout", ("blhd", "qkv"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_layouts(backend: str, device: torch.device, layout: str, dtype: torch.dtype) -> None:
    check(Case(layout=layout, dtype=dtype, heads=(4, 2), causal=True), backend, device)


FEATURES: dict[str, dict[str, object]] = {
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "lse": {"lse": True},
    "scale": {"scale": -0.7},
    "causal mask": {"mask": (37, 53), "causal": True},
    "bias, softcap and sinks": {
        "mask": (1, 1, 37, 53), "mask_dtype": torch.float32, "softcap": 3.0, "sinks": True, "lse": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_features(backend: str, device: torch.device, feature: str, dtype: torch.dtype) -> None:
    if backend == "torch" and dtype != torch.float32:
        pytest.skip("in half precision torch's own operators are the yardstick")
    check(Case(dtype=dtype, **FEATURES[feature]), backend, device)  # type: ignore[arg-type]


def _random_case(seed: int) -> Case:
    draw = random.Random(seed)
    lq, lk = draw.randint(1, 70), draw.randint(1, 70)
    kv_heads = draw.choice((1, 2))
    heads = (kv_heads * draw.choice((1, 2)), kv_heads)
    batch = draw.choice((1, 1, 2))
    broadcast = tuple(draw.choice((1, size)) for size in (batch, heads[0], lq, lk))
    dtype = draw.choice((torch.float32, torch.float16, torch.bfloat16))
    return Case(
        lq,
        lk,
        batch,
        heads,
        (draw.choice((8, 16, 24, 33, 64)), draw.choice((16, 20, 32))),
        dtype,
        causal=draw.random() < 0.5,
        align=draw.choice(("top_left", "bottom_right")),
        window=draw.choice((None, None, (draw.randint(-1, 40), draw.randint(-1, 40)))),
        softcap=draw.choice((None, None, 2.0)),
        mask=draw.choice((None, broadcast)),
        mask_dtype=draw.choice((torch.bool, torch.float32, dtype)),
        alibi=draw.random() < 0.3,
        sinks=draw.random() < 0.3,
        dropout_p=draw.choice((0.0, 0.0, 0.3)),
        lse=draw.random() < 0.5,
        layout=draw.choice(("bhld", "blhd", "qkv")),
        deterministic=draw.random() < 0.7,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(30))
def test_random_combinations(own_backend: str, device: torch.device, seed: int) -> None:
    check(_random_case(seed), own_backend, device)


@pytest.mark.parametrize("seed", range(40))
def test_random_combinations_by_torch(device: torch.device, seed: int) -> None:
    check(dataclasses.replace(_random_case(seed), dropout_p=0.0), "torch", device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("magnitude", (10.0, 100.0))
def test_large_logits(backend: str, device: torch.device, magnitude: float, dtype: torch.dtype) -> None:
    """Logits of 1e2 and 1e4: one key takes all the weight, and nothing overflows."""
    check(Case(magnitude=magnitude, dtype=dtype, lse=True, causal=True), backend, device)


# --- dead rows and what lies in masked slots


@pytest.mark.parametrize("sinks", (False, True))
@pytest.mark.parametrize("mask_dtype", (torch.bool, torch.float32), ids=("bool", "float"))
def test_dead_rows(backend: str, device: torch.device, mask_dtype: torch.dtype, sinks: bool) -> None:
    x = testing.random_tensor((1, 2, 40, 16), torch.float32, device, 0, requires_grad=True)
    visible = torch.ones(40, 40, dtype=torch.bool, device=device)
    visible[3:35] = False
    mask = (
        visible
        if mask_dtype == torch.bool
        else torch.zeros(40, 40, device=device).masked_fill(~visible, -math.inf)
    )
    sink = torch.tensor([0.5, -1.0], device=device, requires_grad=True) if sinks else None
    out, lse = llmkernels.attention(x, x, x, mask, sinks=sink, return_lse=True, backend=backend)
    dead = slice(3, 35)
    assert torch.equal(out[:, :, dead], torch.zeros_like(out[:, :, dead]))
    expected = torch.full_like(lse, -math.inf) if sink is None else sink.detach()[:, None].expand_as(lse)
    torch.testing.assert_close(lse[:, :, dead], expected[:, :, dead])
    dlse = torch.where(lse.isinf(), 0.0, torch.ones_like(lse))
    (dx, *dsink) = torch.autograd.grad(
        (out, lse), [x, *([] if sink is None else [sink])], (out.detach(), dlse)
    )
    assert dx.isfinite().all() and all(g.isfinite().all() for g in dsink)


@pytest.mark.parametrize("kind", ("padding", "causal", "window", "bias"))
@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_masked_slots_do_not_leak(
    own_backend: str, device: torch.device, kind: str, poison: float, dtype: torch.dtype
) -> None:
    """Keys and values that a query can't see may hold anything; only the order of the sums may change, where
    a kernel walks more carefully past what is not finite."""
    length, first_bad = 48, 41
    # Of the queries those that must not see the bad keys, which only some of the keys' tile are.
    lengths = (first_bad if kind in ("causal", "window") else length, length, length)
    query, key, value = (
        testing.random_tensor((1, 2, rows, 16), dtype, device, i) for i, rows in enumerate(lengths)
    )
    options: dict[str, object] = {
        "padding": {"attn_mask": torch.arange(length, device=device) < first_bad},
        "causal": {"is_causal": True},
        "window": {"window": (-1, 0)},
        "bias": {
            "attn_mask": torch.zeros(length, device=device).masked_fill(
                torch.arange(length, device=device) >= first_bad, -math.inf
            )
        },
    }[kind]

    def run(bad: float) -> list[Tensor]:
        k, v = key.clone(), value.clone()
        k[:, :, first_bad:] = bad
        v[:, :, first_bad:] = bad
        leaves = [t.detach().requires_grad_() for t in (query, k, v)]
        out = llmkernels.attention(*leaves, **options, backend=own_backend)  # type: ignore[arg-type]
        grads = torch.autograd.grad(out.square().sum(), leaves)
        return [out, grads[0], *(g[:, :, :first_bad] for g in grads[1:])]

    for actual, expected in zip(run(poison), run(0.0), strict=True):
        torch.testing.assert_close(actual, expected)


def test_what_is_seen_is_not_hidden(own_backend: str, device: torch.device) -> None:
    """A NaN among the visible values of a masked tile comes out."""
    q, k, v = (testing.random_tensor((1, 1, 24, 16), torch.float32, device, i) for i in range(3))
    v[0, 0, 20, 3] = math.nan
    out = llmkernels.attention(q, k, v, is_causal=True, backend=own_backend)
    assert out[0, 0, 20:, 3].isnan().all()
    out[0, 0, 20:, 3] = 0
    assert out.isfinite().all()


# --- dropout


@pytest.mark.parametrize("lk", (64, 61))
def test_dropout_keeps_its_share(own_backend: str, device: torch.device, lk: int) -> None:
    """With equal weights and values that are an identity, out shows the mask."""
    q, k = torch.zeros(1, 2, 96, 16, device=device), torch.zeros(1, 2, lk, 16, device=device)
    v = torch.eye(lk, device=device).expand(1, 2, lk, lk)
    torch.manual_seed(5)
    out = llmkernels.attention(q, k, v, dropout_p=0.25, backend=own_backend)
    kept = out > 0
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / lk / 0.75))
    torch.manual_seed(5)
    case = Case(96, lk, batch=1, dropout_p=0.25)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    assert torch.equal(kept.cpu(), kept_mask(case, seed))


def test_dropout_follows_the_generator(backend: str, device: torch.device) -> None:
    tensors = Case().inputs(device)
    case = Case(dropout_p=0.5)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return case.call(tensors, backend)[0]

    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_replays_dropout(own_backend: str, device: torch.device, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    case = Case(dropout_p=0.5, causal=True)

    def run(checkpointed: bool) -> dict[str, Tensor]:
        tensors = case.inputs(device)
        torch.manual_seed(3)

        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return case.call({"query": query, "key": key, "value": value}, own_backend)[0]

        if checkpointed:
            out = checkpoint(function, *tensors.values(), use_reentrant=reentrant)
        else:
            out = function(**tensors)
        out.square().sum().backward()
        return {name: tensor.grad for name, tensor in tensors.items()}

    for actual, expected in zip(run(True).values(), run(False).values(), strict=True):
        assert torch.equal(actual, expected)


# --- reproducibility


@pytest.mark.parametrize(
    "features", ({}, {"mask": (1, 1, 37, 53), "mask_dtype": torch.float32, "sinks": True})
)
def test_gradients_are_reproducible(own_backend: str, device: torch.device, features: dict) -> None:
    case = Case(heads=(2, 1), dtype=torch.bfloat16, lse=True, **features)
    tensors = case.inputs(device)

    def run() -> list[Tensor]:
        outputs = case.call(tensors, own_backend)
        return [*outputs, *gradients(outputs, tensors, tuple(y.detach() for y in outputs)).values()]

    first = run()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_deterministic_algorithms_override(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from llmkernels.ops.attention import reference

    asked = []
    backward = reference.backward
    monkeypatch.setattr(
        reference, "backward", lambda *arguments: asked.append(arguments[-1]) or backward(*arguments)
    )
    case = Case(4, 4, deterministic=False)
    for strict in (False, True):
        torch.use_deterministic_algorithms(strict)
        try:
            tensors = case.inputs(device)
            case.call(tensors, "reference")[0].sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


# --- packed sequences


VARLEN: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, bottom right": {"is_causal": True, "causal_align": "bottom_right"},
    "window, grouped": {"window": (6, 1), "enable_gqa": True},
    "all": {"softcap": 2.0, "alibi": True, "sinks": True, "window": (20, -1), "causal_align": "bottom_right"},
}


@pytest.mark.parametrize("features", VARLEN)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_varlen_is_attention_of_each(
    backend: str, device: torch.device, features: str, dtype: torch.dtype
) -> None:
    options = dict(VARLEN[features])
    lengths_q, lengths_k = [17, 0, 40, 1, 5], [23, 4, 33, 0, 70]
    heads = (4, 2) if options.get("enable_gqa") else (2, 2)
    shapes = {"query": (sum(lengths_q), heads[0], 24)}
    shapes |= {name: (sum(lengths_k), heads[1], 24) for name in ("key", "value")}
    leaves = {
        name: testing.random_tensor(shape, dtype, device, i, requires_grad=True)
        for i, (name, shape) in enumerate(shapes.items())
    }
    slopes = testing.random_tensor((5, heads[0]), torch.float32, device, 8).abs()
    alibi = options.pop("alibi", False)
    if options.pop("sinks", False):
        leaves["sinks"] = testing.random_tensor((heads[0],), torch.float32, device, 9, requires_grad=True)
    bounds_q, bounds_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    dout = testing.random_tensor(shapes["query"], dtype, device, 5)

    def together(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return llmkernels.attention_varlen(  # type: ignore[return-value]
            *(tensors[name] for name in shapes),
            bounds_q.to(device),
            bounds_k.to(device, torch.int32),
            max(lengths_q),
            max(lengths_k),
            return_lse=True,
            sinks=tensors.get("sinks"),
            alibi_slopes=slopes if alibi else None,
            **options,
            backend=backend,
        )

    def each(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outs, lses = [], []
        for i in range(5):
            rows, keys = (slice(int(bounds[i]), int(bounds[i + 1])) for bounds in (bounds_q, bounds_k))
            parts = (tensors["query"][rows], tensors["key"][keys], tensors["value"][keys])
            out, lse = llmkernels.attention(
                *(part.transpose(0, 1)[None] for part in parts),
                return_lse=True,
                sinks=tensors.get("sinks"),
                alibi_slopes=slopes[i].cpu() if alibi else None,
                **options,
                backend="reference",
            )
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, dim=1)

    def run(function: Callable, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out, lse = function(tensors)
        dlse = torch.where(lse.isinf(), 0.0, torch.ones_like(lse))
        grads = torch.autograd.grad(
            (out, lse), list(tensors.values()), (dout.to(out.device, out.dtype), dlse)
        )
        return {"out": out, "lse": lse, **dict(zip(tensors, grads, strict=True))}

    with testing.poisoned():
        found = run(together, leaves)
    exact_leaves = to_cpu(leaves, torch.float64)
    expected, own = run(each, exact_leaves), run(each, to_cpu(leaves, None))
    case = Case(max(lengths_q), max(lengths_k), 1, heads, (24, 24), dtype, alibi=alibi, lse=True)
    grads64 = (dout.cpu().double(), torch.ones(1, dtype=torch.float64))
    sizes = magnitudes(case, exact_leaves | {"alibi_slopes": slopes}, grads64)
    for name, actual in found.items():
        assert actual.shape == own[name].shape and actual.dtype == own[name].dtype, name
        testing.assert_within_budget(actual, expected[name], own[name], name=name, magnitude=sizes[name])


def test_varlen_dropout_is_reproducible(own_backend: str, device: torch.device) -> None:
    x = testing.random_tensor((30, 2, 16), torch.float32, device, 0, requires_grad=True)
    bounds = torch.tensor([0, 12, 30], dtype=torch.int32, device=device)

    def run(seed: int, backend: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        out = llmkernels.attention_varlen(x, x, x, bounds, bounds, 18, 18, 0.4, True, backend=backend)
        return out, torch.autograd.grad(out.sum(), x)[0]

    for actual, expected in zip(run(1, own_backend), run(1, "reference"), strict=True):
        torch.testing.assert_close(actual, expected)
    assert not torch.equal(run(1, own_backend)[0], run(2, own_backend)[0])


# --- work and memory


def _visits(monkeypatch: pytest.MonkeyPatch, lq: int, lk: int, **options: object) -> tuple[int, int]:
    """How many tiles of scores the forward and the backward of one head go over: matrix products in the
    interpreter, 2 a tile forward, 4 a tile for dk and dv, 3 for dq."""
    from triton.runtime.interpreter import InterpreterBuilder

    products = 0
    create_dot = InterpreterBuilder.create_dot

    def counted(*arguments: object) -> object:
        nonlocal products
        products += 1
        return create_dot(*arguments)

    tensors = Case(lq, lk, batch=1, heads=(1, 1)).inputs("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", counted)
        out = llmkernels.attention(**tensors, **options, backend="triton")  # type: ignore[arg-type]
        forward = products // 2
        out.sum().backward()
    return forward, (products - 2 * forward) // 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")
def test_only_tiles_with_visible_keys_are_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 queries by 16 keys forward; 16 queries by 32 keys and 32 by 16 backward."""
    pytest.importorskip("triton")
    assert _visits(monkeypatch, 128, 128) == (4 * 8, 4 * 8)
    # Causal: query tile t of four sees 2 (t + 1) tiles of keys; as many, seen from the keys.
    assert _visits(monkeypatch, 128, 128, is_causal=True) == (20, 20)
    # A window of 16 keys back and itself: the tiles of 32 queries see two of their own and one before.
    assert _visits(monkeypatch, 128, 128, window=(16, 0)) == (11, 11)
    # Bottom right: the 32 queries stand at the end.
    options = {"is_causal": True, "causal_align": "bottom_right", "window": (15, 0)}
    assert _visits(monkeypatch, 32, 128, **options) == (3, 3)
    assert _visits(monkeypatch, 32, 128, is_causal=True)[0] == 2


# --- what only a GPU can run


@pytest.mark.skipif(not torch.cuda.is_available(), reason="large shapes on a GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("head_dim", (32, 64, 96, 128, 192, 256))
@pytest.mark.parametrize("heads", ((6, 6), (6, 2), (6, 1)), ids=str)
def test_published_grid(backend: str, head_dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    for lq, lk in ((239, 1), (799, 3), (640, 128), (1023, 1024), (2047, 2048)):
        case = Case(lq, lk, 1, heads, (head_dim, head_dim), dtype, lse=True)
        for change in (
            {},
            {"causal": True},
            {"causal": True, "align": "bottom_right"},
            {"window": (200, 31)},
        ):
            check(dataclasses.replace(case, **change), backend, "cuda")


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
    reason="40 GB of GPU memory",
)
def test_offsets_past_2_to_the_31() -> None:
    """A batch of more than 2^31 elements: its last head is as it would be alone."""
    query = torch.randn(4, 1, 2**15, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    wide = query.expand(4, 160, 2**15, 128).contiguous().detach().requires_grad_()
    assert wide.numel() > 2**31
    out = llmkernels.attention(wide, wide, wide, window=(64, 0), backend="triton")
    out[-1, -1].sum().backward()
    alone = wide[-1:, -1:].detach().requires_grad_()
    expected = llmkernels.attention(alone, alone, alone, window=(64, 0), backend="triton")
    expected.sum().backward()
    assert torch.equal(out[-1:, -1:], expected)
    assert torch.equal(wide.grad[-1:, -1:], alone.grad)
