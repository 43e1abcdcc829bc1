"""attention_decode on every backend against float64: results, what is appended, what must not be touched."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

import llmkernels
from llmkernels import testing
from llmkernels.ops.attention_decode import reference

from .attention_decode_cases import CACHE_LAYOUTS, Case, appended, check, same_bits

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(params=("reference", "torch", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """The backends of this op."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def random_case(seed: int) -> Case:
    """Any combination of what the op takes, at small sizes."""
    draw = random.Random(seed)
    capacity = draw.choice((1, 5, 64, 100, 150))
    new_tokens = min(capacity, draw.choice((0, 0, 1, 1, 2, 5)))
    most = capacity - new_tokens
    lengths = tuple(draw.choice((0, most, draw.randint(0, most))) for _ in range(draw.randint(1, 3)))
    kv_heads = draw.randint(1, 2)
    head_dim = draw.choice((1, 3, 16, 24, 40, 64, 80))
    windows = (None, None, None, (0, 0), (7, 0), (40, -1), (-1, 3), (20, 2))
    return Case(
        lengths=lengths,
        heads=kv_heads * draw.choice((1, 2, 4, 8)),
        kv_heads=kv_heads,
        query_length=draw.choice((1, 1, 2, 3, 5)),
        new_tokens=new_tokens,
        head_dim=head_dim,
        value_dim=draw.choice((None, None, 5, 32, 72)),
        capacity=capacity,
        page_size=draw.choice((0, 0, 1, 7, 16, 64)),
        dtype=draw.choice((torch.float32, *HALF)),
        is_causal=draw.random() < 0.7,
        window=draw.choice(windows),
        softcap=draw.choice((None, None, 0.7, 20.0)),
        alibi=draw.choice((0, 0, 1, 2)),
        sinks=draw.random() < 0.3,
        scale=draw.choice((None, None, 0.3)),
        return_lse=draw.random() < 0.7,
        num_splits=draw.choice((None, 1, 2, 3, 4, 5)),
        layout=draw.choice(CACHE_LAYOUTS),
        index_dtype=draw.choice((torch.int32, torch.int64)),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(backend: str, device: torch.device, seed: int) -> None:
    check(random_case(seed), backend, device)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
@pytest.mark.parametrize(
    "head_dim, value_dim", ((1, 16), (59, 59), (128, 128), (192, 128), (256, 256), (96, 33))
)
def test_head_dims(
    backend: str, device: torch.device, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    case = Case((70, 3), head_dim=head_dim, value_dim=value_dim, capacity=80, dtype=dtype, num_splits=2)
    check(case, backend, device)


@pytest.mark.parametrize("heads, kv_heads, query_length", ((8, 1, 3), (6, 2, 5), (20, 1, 4), (3, 3, 40)))
def test_rows_that_share_a_key_head(
    backend: str, device: torch.device, heads: int, kv_heads: int, query_length: int
) -> None:
    """Groups that are no power of two, more rows than one program holds, a window for each query."""
    case = Case(
        (60, 0, 20), heads=heads, kv_heads=kv_heads, query_length=query_length, new_tokens=query_length,
        capacity=100, window=(17, 0), num_splits=2,
    )  # fmt: skip
    check(case, backend, device)


@pytest.mark.parametrize("page_size", (1, 5, 16, 64, 128, 256))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_pages(backend: str, device: torch.device, page_size: int, dtype: torch.dtype) -> None:
    """Tiles inside a page, tiles of many pages, pages of any size; new tokens that start a page."""
    case = Case(
        (63, 128, 150), new_tokens=3, query_length=3, capacity=160, page_size=page_size, dtype=dtype,
        num_splits=3, window=(100, -1),
    )  # fmt: skip
    check(case, backend, device)


@pytest.mark.parametrize("features", ({}, {"sinks": True}, {"softcap": 5.0, "alibi": 1}, {"page_size": 16}))
def test_any_number_of_splits_gives_the_same(
    backend: str, device: torch.device, features: dict[str, object]
) -> None:
    """Within the budget for every number, bitwise the same on every run, and to the bit the same for any
    number of splits that gives each tile one of its own."""
    results = {}
    for num_splits in (1, 2, 3, 4, 5, 19):
        case = Case((150, 1), heads=2, kv_heads=1, capacity=160, num_splits=num_splits, **features)  # type: ignore[arg-type]
        results[num_splits] = check(case, backend, device)
        out, lse = llmkernels.attention_decode(**case.inputs(device), **case.options(), backend=backend)
        assert same_bits(out, results[num_splits]["out"]) and same_bits(lse, results[num_splits]["lse"])
    assert all(same_bits(results[5][name], value) for name, value in results[19].items())


@pytest.mark.parametrize("garbage", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("page_size", (0, 16))
def test_what_no_query_sees_does_not_leak(
    backend: str, device: torch.device, garbage: float, page_size: int
) -> None:
    """Beyond the length and left of the window: results to the bit as if zeros stood there."""
    case = Case(
        (50, 7, 0),
        query_length=2,
        new_tokens=0,
        window=(20, 0),
        page_size=page_size,
        num_splits=2,
        capacity=96,
    )
    results = []
    for filling in (0.0, garbage):
        tensors = case.inputs(device)
        caches = {name: tensors.pop(name) for name in ("key_cache", "value_cache")}
        for name, cache in caches.items():
            table = tensors.get("block_table")
            held = reference.gathered(cache, table, 96).nan_to_num(filling)
            for sequence, length in enumerate(case.lengths):
                held[sequence, :, : max(0, length - 22)] = filling
                held[sequence, :, length:] = filling
            caches[name] = held
        tensors.pop("block_table", None)
        results.append(llmkernels.attention_decode(**tensors, **caches, **case.options(), backend=backend))
    assert not results[1][0].isnan().any()
    assert all(same_bits(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("num_splits", (1, 3))
@pytest.mark.parametrize("sinks", (False, True))
def test_large_logits(backend: str, device: torch.device, num_splits: int, sinks: bool) -> None:
    """Scores near 1e4: the softmax is close to one-hot and its pivot decides all."""
    case = Case((200, 33), amplitude=1e4, capacity=210, head_dim=16, num_splits=num_splits, sinks=sinks)
    check(case, backend, device)
    check(case.__class__(**{**vars(case), "amplitude": -3e3, "softcap": 30.0}), backend, device)


@pytest.mark.parametrize("softcap", (3.0, 50.0, 2000.0))
def test_caps_keep_the_digits_of_small_scores(backend: str, device: torch.device, softcap: float) -> None:
    """Scores far below the cap, where tanh is nearly the identity, near it and beyond."""
    for amplitude in (1.0, 30.0):
        check(Case((80, 5), amplitude=amplitude, softcap=softcap, capacity=90), backend, device)


def test_large_logits_in_many_splits(backend: str, device: torch.device) -> None:
    """More splits than the merge takes at once, where the largest score of a row may lie in any of them."""
    case = Case((340,), heads=8, amplitude=1e4, capacity=350, head_dim=256, value_dim=16, num_splits=22)
    check(case, backend, device)


@pytest.mark.parametrize("num_splits", (1, 2))
def test_rows_that_see_nothing(backend: str, device: torch.device, num_splits: int) -> None:
    """An empty sequence, queries that stand before its first token, windows beyond it: out 0 and lse -inf, or
    the sink."""
    case = Case((0, 2, 40), query_length=4, new_tokens=0, num_splits=num_splits)
    found = check(case, backend, device)
    dead = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4], device=device)
    dead = dead[:, None].expand(3, 4, 4)
    assert (found["out"][dead] == 0).all() and (found["lse"][dead] == -torch.inf).all()
    assert found["lse"][~dead].isfinite().all()
    case = Case((0, 2, 40), query_length=4, new_tokens=0, num_splits=num_splits, sinks=True)
    found, sinks = check(case, backend, device), case.inputs(device)["sinks"]
    assert (found["out"][dead] == 0).all()
    torch.testing.assert_close(found["lse"][dead], sinks[None, :, None].expand(3, 4, 4)[dead])


def test_nan_in_a_query_stays_in_its_row(backend: str, device: torch.device) -> None:
    for num_splits in (1, 3):
        tensors = Case((70, 20), query_length=2, new_tokens=0, capacity=150).inputs(device)
        tensors["query"][1, 2, 0, 3] = torch.nan
        out = llmkernels.attention_decode(**tensors, num_splits=num_splits, backend=backend)
        broken = out.isnan().any(dim=3)
        assert broken[1, 2, 0] and broken.sum() == 1


def test_a_window_is_a_slice_of_the_cache(backend: str, device: torch.device) -> None:
    tensors = Case((60, 60), new_tokens=0).inputs(device)
    windowed = llmkernels.attention_decode(**tensors, window=(9, 0), backend=backend)
    for name in ("key_cache", "value_cache"):
        tensors[name] = tensors[name][:, :, 50:]
    tensors["cache_seqlens"] -= 50
    torch.testing.assert_close(windowed, llmkernels.attention_decode(**tensors, backend=backend))


def test_prefill_and_steps_are_one_attention(backend: str, device: torch.device) -> None:
    """A prompt and then token by token through a paged cache: what torch gives for the whole sequence."""
    length, prompt, heads, kv_heads, dim, page_size = 23, 17, 4, 2, 16, 4
    q, k, v = (
        testing.random_tensor((2, n, length, dim), torch.float32, device, i)
        for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    caches = [torch.full((16, kv_heads, page_size, dim), torch.nan, device=device) for _ in range(2)]
    table = torch.randperm(16, generator=torch.Generator().manual_seed(0)).view(2, 8).to(device)
    lengths, outs = torch.zeros(2, dtype=torch.int64, device=device), []
    for begin, end in ((0, prompt), *((i, i + 1) for i in range(prompt, length))):
        part = slice(begin, end)
        outs.append(
            llmkernels.attention_decode(
                q[:, :, part],
                *caches,
                lengths,
                key=k[:, :, part],
                value=v[:, :, part],
                block_table=table,
                backend=backend,
            )  # fmt: skip
        )
        lengths += end - begin
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(torch.cat(outs, dim=2), expected)


def test_empty_calls(backend: str, device: torch.device) -> None:
    """No sequence, no query, no room: the shapes that follow, and the append all the same."""
    none = Case((), capacity=8).inputs(device)
    out, lse = llmkernels.attention_decode(**none, return_lse=True, backend=backend)
    assert out.shape == (0, 4, 1, 32) and lse.shape == (0, 4, 1)
    case = Case((3, 5), query_length=0, new_tokens=2)
    tensors = case.inputs(device)
    after = appended(case, tensors)
    out = llmkernels.attention_decode(**tensors, backend=backend)
    assert out.shape == (2, 4, 0, 32)
    assert all(same_bits(tensors[name], cache) for name, cache in after.items())
    for page_size in (0, 4):
        full = Case((0, 0), new_tokens=0, capacity=0, page_size=page_size).inputs(device)
        out, lse = llmkernels.attention_decode(**full, return_lse=True, backend=backend)
        assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_strides(backend: str, device: torch.device, layout: str) -> None:
    """Caches token by token or inside a wider buffer, queries of a packed projection, an expanded cache."""
    case = Case((30, 60), layout=layout, head_dim=24, query_length=2)
    check(case, backend, device)
    tensors = case.inputs(device)
    expected = llmkernels.attention_decode(**case.inputs(device), backend=backend)
    packed = torch.cat([tensors["query"].transpose(1, 2)] * 3, dim=3)
    tensors["query"] = packed[..., 24:48].transpose(1, 2)
    tensors["key"] = tensors["key"].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(llmkernels.attention_decode(**tensors, backend=backend), expected)
    one = Case((30,), new_tokens=0, layout=layout).inputs(device)
    both = {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in one.items()}
    out = llmkernels.attention_decode(**both, backend=backend)
    assert torch.equal(out[0], out[1])
    torch.testing.assert_close(out[:1], llmkernels.attention_decode(**one, backend=backend))


def test_offsets_past_2_to_the_31(backend: str, device: torch.device) -> None:
    """The second sequence starts 2^31 elements in, and so do its new tokens."""
    stride = 2**31 + 8
    case = Case((20, 30), kv_heads=1, dtype=torch.bfloat16, capacity=40)
    tensors = case.inputs(device)
    dense = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("key_cache", "value_cache"):
        memory = torch.empty(stride + 40 * 32, dtype=torch.bfloat16, device=device)
        far = memory.as_strided((2, 1, 40, 32), (stride, 40 * 32, 32, 1))
        tensors[name] = far.copy_(dense[name])
    found = llmkernels.attention_decode(**tensors, backend=backend)
    assert torch.equal(found, llmkernels.attention_decode(**dense, backend=backend))
    assert all(same_bits(tensors[name], dense[name]) for name in ("key_cache", "value_cache"))


@pytest.mark.parametrize("page_size", (0, 4))
@pytest.mark.parametrize("kernels", ("reference", "triton_kernels"))
def test_nothing_is_written_out_of_bounds(device: torch.device, kernels: str, page_size: int) -> None:
    """What a GPU can't refuse without a wait: tokens beyond the capacity and on pages that are not there are
    dropped, lengths and pages are clamped for reads, and nothing around the cache changes."""
    if kernels == "triton_kernels":
        pytest.importorskip("triton")
    module = __import__(f"llmkernels.ops.attention_decode.{kernels}", fromlist=["forward"])
    blocks, tokens = (4, 8) if not page_size else (6, page_size)
    memory = [torch.full((blocks + 2, 1, tokens, 16), 7.0, device=device) for _ in range(2)]
    caches = [buffer[1:-1] for buffer in memory]
    table = None
    if page_size:
        table = torch.tensor([[0, 1], [2, 6], [-1, 3], [4, 5]], dtype=torch.int32, device=device)
    lengths = torch.tensor([7, 3, -5, 10**9], dtype=torch.int32, device=device)
    key, value = (testing.random_tensor((4, 1, 3, 16), torch.float32, device, i) for i in range(2))
    module.append(*caches, key, value, lengths, table)
    # Block and row of the cache, sequence and new token.
    written = [
        (0, 7, 0, 0),
        (1, 3, 1, 0),
        (1, 4, 1, 1),
        (1, 5, 1, 2),
        (2, 0, 2, 0),
        (2, 1, 2, 1),
        (2, 2, 2, 2),
    ]
    if page_size:
        written = [(1, 3, 0, 0), (2, 3, 1, 0)]
    for buffer, new in zip(memory, (key, value), strict=True):
        expected = torch.full_like(buffer, 7.0)
        for block, row, sequence, token in written:
            expected[1 + block, :, row] = new[sequence, :, token]
        assert torch.equal(buffer, expected)
    for buffer in memory:
        buffer[0], buffer[-1] = torch.nan, torch.nan
    query = testing.random_tensor((4, 2, 1, 16), torch.float32, device, 2)
    out, lse = module.forward(query, *caches, lengths, table, None, None, 3, 0.25, -1, 0, 0.0, 2)
    assert out.isfinite().all() and lse.isfinite().all()
