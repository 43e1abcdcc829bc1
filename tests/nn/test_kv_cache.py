"""llmkernels.nn.KVCache: whatever the steps by which it is filled, each token sees itself and those before
it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmkernels
from llmkernels.nn import KVCache, TransformerEncoder, TransformerEncoderLayer
from llmkernels.testing import assert_within_budget, poisoned, random_tensor

HEADS, HEAD_DIM = 2, 16


@pytest.fixture(params=("reference", "torch", "triton"))
def op_backend(request: pytest.FixtureRequest) -> str:
    """The backends that both of the cache's ops have."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def tokens(
    batch: int, length: int, device: torch.device | str, dtype: torch.dtype = torch.float32, group: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value of whole sequences, [batch, heads, length, head_dim]."""
    heads = (HEADS * group, HEADS, HEADS)
    return tuple(  # type: ignore[return-value]
        random_tensor((batch, count, length, HEAD_DIM), dtype, device, seed)
        for seed, count in enumerate(heads)
    )


def make(
    batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> KVCache:
    with poisoned():
        return KVCache(batch, capacity, HEADS, HEAD_DIM, dtype=dtype, device=device)


def part(rows: Sequence[Tensor], starts: Sequence[int], length: int) -> tuple[Tensor, ...]:
    """The next ``length`` tokens of each sequence, from a place of its own on. Beyond a sequence's end comes
    padding: numbers that would show."""
    found = []
    for tensor in rows:
        padded = F.pad(tensor, (0, 0, 0, length), value=1e4)
        stretches = [padded[i, :, start : start + length] for i, start in enumerate(starts)]
        found.append(torch.stack(stretches))
    return tuple(found)


def causal64(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Causal attention over whole sequences in float64, and the sizes of its sums' terms."""
    query, key, value = (tensor.detach().cpu().double() for tensor in rows)
    key, value = (tensor.repeat_interleave(query.shape[1] // HEADS, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(HEAD_DIM)
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=3)
    return weights @ value, weights @ value.abs()


def check(rows: Sequence[Tensor], outs: Tensor) -> None:
    """Holds the outputs of whole sequences to the budget."""
    expected, size = causal64(rows)
    baseline = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    assert outs.dtype == rows[0].dtype
    assert_within_budget(outs, expected, baseline, name="out", magnitude=size)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("group", (1, 3))
@pytest.mark.parametrize("steps", ((5, 1, 1, 1), (1, 1, 4, 2), (3, 5)), ids=str)
def test_steps_of_any_size_are_the_full_causal_attention(
    op_backend: str, device: torch.device, steps: tuple[int, ...], group: int, dtype: torch.dtype
) -> None:
    rows = tokens(2, sum(steps), device, dtype, group)
    cache = make(2, 8, device, dtype)
    outs, held = [], 0
    for length in steps:
        outs.append(cache.attend(*part(rows, (held, held), length), backend=op_backend))
        held += length
        assert cache.longest == held
        assert cache.lengths.tolist() == [held, held]
    check(rows, torch.cat(outs, dim=2))
    # The layout that attention_decode reads: each token in its place, nothing behind it written.
    assert torch.equal(cache.key[:, :, :held], rows[1])
    assert torch.equal(cache.value[:, :, :held], rows[2])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_prompts_of_different_lengths(op_backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Padded and prefilled together, truncated, then grown side by side, each sequence from its own end."""
    prompts, steps = (6, 2, 1), (1, 3, 1, 2)
    rows = tokens(3, max(prompts) + sum(steps), device, dtype)
    cache = make(3, 16, device, dtype)
    outs = torch.full_like(rows[0], torch.nan)

    def put(out: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> None:
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            outs[i, :, start : start + length] = out[i, :, :length]

    padded = tuple(tensor[:, :, :6].clone() for tensor in rows)
    for tensor in padded:
        for i, length in enumerate(prompts):
            tensor[i, :, length:] = 1e4
    put(cache.attend(*padded, backend=op_backend), (0, 0, 0), prompts)
    cache.truncate(prompts)
    held = list(prompts)
    for length in steps:
        assert cache.lengths.tolist() == held
        put(cache.attend(*part(rows, held, length), backend=op_backend), held, (length,) * 3)
        held = [count + length for count in held]
    for i, length in enumerate(held):
        check([tensor[i : i + 1, :, :length] for tensor in rows], outs[i : i + 1, :, :length])


def test_views_of_a_packed_projection(op_backend: str, device: torch.device) -> None:
    """What a layer hands over: heads that lie inside the rows of one projection."""
    packed = random_tensor((2, 7, 3, HEADS, HEAD_DIM), torch.float32, device, 0)
    rows = packed.permute(2, 0, 3, 1, 4).unbind(0)
    cache = make(2, 7, device)
    first = cache.attend(*(tensor[:, :, :6] for tensor in rows), backend=op_backend)
    last = cache.attend(*(tensor[:, :, 6:] for tensor in rows), backend=op_backend)
    check(rows, torch.cat((first, last), dim=2))


def test_scale(op_backend: str, device: torch.device) -> None:
    query, key, value = tokens(1, 5, device)
    cache, scaled = make(1, 5, device), make(1, 5, device)
    for start, end in ((0, 3), (3, 5)):
        steps = [tensor[:, :, start:end] for tensor in (query, key, value)]
        expected = cache.attend(steps[0] * (0.5 * math.sqrt(HEAD_DIM)), *steps[1:], backend=op_backend)
        torch.testing.assert_close(scaled.attend(*steps, scale=0.5, backend=op_backend), expected)


def test_truncate_takes_back(op_backend: str, device: torch.device) -> None:
    """Tokens tried out and dropped leave no trace, whichever way their number is given."""
    rows = tokens(2, 6, device)
    cache = make(2, 8, device)
    first = cache.attend(*part(rows, (0, 0), 4), backend=op_backend)
    for lengths in (4, [4, 4], (4, 4), torch.tensor([4, 4]), torch.tensor([4, 4], dtype=torch.int32)):
        cache.attend(*(torch.full_like(tensor, 50.0) for tensor in part(rows, (0, 0), 3)), backend=op_backend)
        cache.truncate(lengths)
        assert (cache.longest, cache.lengths.tolist()) == (4, [4, 4])
    check(rows, torch.cat((first, cache.attend(*part(rows, (4, 4), 2), backend=op_backend)), dim=2))


def test_reset_begins_again(op_backend: str, device: torch.device) -> None:
    rows = tokens(2, 5, device)
    cache = make(2, 5, device)
    for _ in range(2):
        check(rows, cache.attend(*rows, backend=op_backend))
        cache.reset()
        assert (cache.longest, cache.lengths.tolist()) == (0, [0, 0])


def test_reorder_follows_the_beams(op_backend: str, device: torch.device) -> None:
    """Beams that were dropped are gone, those that were kept go on, and memory stays where it was."""
    rows = tokens(3, 4, device)
    cache = make(3, 6, device)
    cache.attend(*part(rows, (0, 0, 0), 4), backend=op_backend)
    cache.truncate([4, 2, 3])
    places = [tensor.data_ptr() for tensor in (cache.key, cache.value, cache.lengths)]
    beams = torch.tensor([2, 0, 2], device=device)
    cache.reorder(beams)
    assert places == [tensor.data_ptr() for tensor in (cache.key, cache.value, cache.lengths)]
    assert cache.lengths.tolist() == [3, 4, 3]
    following = tokens(3, 5, device)
    out = cache.attend(*(tensor[:, :, 4:] for tensor in following), backend=op_backend)
    for i, length in enumerate((3, 4, 3)):
        before = [tensor[beams[i], :, :length] for tensor in rows]
        whole = [
            torch.cat((old, new[i, :, 4:]), dim=1)[None] for old, new in zip(before, following, strict=True)
        ]
        expected, size = causal64(whole)
        baseline = F.scaled_dot_product_attention(*whole, is_causal=True)
        last = slice(length, length + 1)
        assert_within_budget(
            out[i : i + 1],
            expected[:, :, last],
            baseline[:, :, last],
            name=f"beam {i}",
            magnitude=size[:, :, last],
        )


def state(cache: KVCache) -> tuple[Any, ...]:
    """All that a cache holds, comparable to the bit."""
    return cache.longest, cache.lengths.tolist(), pickle.dumps((cache.key, cache.value))


@pytest.mark.parametrize("prefilled", (False, True))
def test_a_full_cache_refuses_and_loses_nothing(
    op_backend: str, device: torch.device, prefilled: bool
) -> None:
    rows = tokens(2, 9, device)
    cache = make(2, 8, device)
    if prefilled:
        first = cache.attend(*part(rows, (0, 0), 6), backend=op_backend)
        cache.truncate((6, 3))
    before = state(cache)
    room = "2 more tokens" if prefilled else "8 more tokens"
    with pytest.raises(ValueError, match=rf"KVCache: key: expected at most {room} \(capacity 8\), got"):
        cache.attend(*part(rows, (6, 3) if prefilled else (0, 0), 9), backend=op_backend)
    assert state(cache) == before
    if prefilled:
        out = cache.attend(*part(rows, (6, 3), 2), backend=op_backend)
        check([tensor[:1, :, :8] for tensor in rows], torch.cat((first[:1], out[:1]), dim=2))


BAD_CALLS: dict[str, tuple[Callable[[KVCache, list[Any]], Any], type[Exception], str]] = {
    "no tensor": (
        lambda c, r: c.attend([1.0], *r[1:]),
        TypeError,
        "query: expected a torch.Tensor, got list",
    ),
    "three dimensions": (
        lambda c, r: c.attend(r[0][0], *r[1:]),
        RuntimeError,
        "query: expected 4 dimensions",
    ),
    "dtype": (lambda c, r: c.attend(r[0], r[1].half(), r[2]), RuntimeError, "key: expected torch.float32"),
    "device": (lambda c, r: c.attend(*r[:2], r[2].to("meta")), RuntimeError, "value: expected device cpu"),
    "batch": (lambda c, r: c.attend(*(t[:1] for t in r)), RuntimeError, r"key: expected the shape \[2, 2, 3"),
    "batch of queries": (
        lambda c, r: c.attend(r[0][:1], *r[1:]),
        RuntimeError,
        r"query: expected the shape \[2",
    ),
    "key heads": (lambda c, r: c.attend(r[0], r[1][:, :1], r[2]), RuntimeError, "key: expected the shape"),
    "query heads": (lambda c, r: c.attend(r[0][:, :1], *r[1:]), RuntimeError, "a multiple of 2"),
    "lengths": (
        lambda c, r: c.attend(r[0][:, :, :2], *r[1:]),
        RuntimeError,
        r"key: expected the shape \[2, 2, 2",
    ),
    "head_dim": (lambda c, r: c.attend(*(t[..., :8] for t in r)), RuntimeError, "key: expected the shape"),
    "gradients": (lambda c, r: c.attend(r[0].requires_grad_(), *r[1:]), RuntimeError, "torch.no_grad"),
    "backend": (lambda c, r: c.attend(*r, backend="fastest"), ValueError, "fastest"),
    "scale": (lambda c, r: c.attend(*r, scale="large"), TypeError, "scale: expected a number"),
    "truncate to text": (lambda c, r: c.truncate("12"), TypeError, "lengths: expected an int"),
    "truncate to fractions": (
        lambda c, r: c.truncate(torch.ones(2)),
        TypeError,
        "lengths: expected integers",
    ),
    "truncate to three": (lambda c, r: c.truncate([1, 1, 1]), RuntimeError, "expected 2 lengths, got 3"),
    "truncate to a table": (
        lambda c, r: c.truncate(torch.ones(1, 2, dtype=torch.int32)),
        RuntimeError,
        r"expected the shape \[2\], got \[1, 2\]",
    ),
    "truncate to more": (lambda c, r: c.truncate([2, 3]), ValueError, "tokens held, got"),
    "truncate to less than nothing": (
        lambda c, r: c.truncate(torch.tensor([-1, 1])),
        ValueError,
        "from 0 to",
    ),
    "reorder by a list": (lambda c, r: c.reorder([0, 1]), TypeError, "indices: expected a torch.Tensor"),
    "reorder by floats": (
        lambda c, r: c.reorder(torch.zeros(2)),
        RuntimeError,
        "indices: expected torch.int32",
    ),
    "reorder to another batch": (
        lambda c, r: c.reorder(torch.tensor([0, 1, 1])),
        RuntimeError,
        r"indices: expected the shape \[2\]",
    ),
    "reorder beyond": (lambda c, r: c.reorder(torch.tensor([0, 2])), IndexError, "out of range"),
}


@pytest.mark.parametrize("steps", (0, 2))
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_so_and_change_nothing(name: str, steps: int) -> None:
    call, kind, message = BAD_CALLS[name]
    rows = list(tokens(2, 3, "cpu"))
    cache = make(2, 8, "cpu")
    if steps:
        cache.attend(*(tensor[:, :, :steps] for tensor in rows))
    before = state(cache)
    with pytest.raises(kind, match=message):
        call(cache, rows)
    assert state(cache) == before


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    (
        ((1.5, 8, 2, 16), TypeError, "KVCache: batch: expected an int, got float"),
        ((-1, 8, 2, 16), ValueError, "batch: expected at least 0, got -1"),
        ((1, 0, 2, 16), ValueError, "capacity: expected at least 1"),
        ((1, 8, True, 16), TypeError, "num_heads: expected an int, got bool"),
        ((1, 8, 2, 0), ValueError, "head_dim: expected at least 1"),
    ),
)
def test_bad_sizes(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        KVCache(*arguments)


def test_an_integer_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype: expected a floating-point dtype, got torch.int32"):
        KVCache(1, 8, 2, 16, dtype=torch.int32)


def test_made_in_inference_mode_and_used_outside(device: torch.device) -> None:
    rows = tokens(1, 3, device)
    with torch.inference_mode():
        cache = make(1, 4, device)
        first = cache.attend(*part(rows, (0,), 2))
    check(rows, torch.cat((first.clone(), cache.attend(*part(rows, (2,), 1))), dim=2))


@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16), ids=str)
def test_autocast(op_backend: str, device: torch.device, stored: torch.dtype) -> None:
    """Results are autocast's, whatever the tensors come in; the cache keeps its dtype, and both steps agree
    with what attention gives under autocast."""
    rows = tokens(2, 5, device)
    cache = make(2, 5, device, stored)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outs = [cache.attend(*part(rows, (0, 0), 4), backend=op_backend)]
        lower = [tensor.bfloat16() for tensor in rows]
        outs += [cache.attend(*part(lower, (4, 4), 1), backend=op_backend)]
    assert cache.key.dtype == cache.value.dtype == stored
    check(lower, torch.cat(outs, dim=2))
    other = torch.float32 if stored == torch.bfloat16 else torch.bfloat16
    with pytest.raises(RuntimeError, match="query: expected"):
        make(2, 5, device, stored).attend(*(tensor.to(other) for tensor in rows))


def test_autocast_leaves_float64_alone() -> None:
    rows = [tensor.double() for tensor in tokens(2, 5, "cpu")]
    cache = make(2, 5, "cpu", torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cache.attend(*rows)
        with pytest.raises(RuntimeError, match="query: expected torch.float32"):
            make(2, 5, "cpu").attend(*rows)
        with pytest.raises(TypeError, match="query: expected a torch.Tensor"):
            make(2, 5, "cpu").attend([1.0], *rows[1:])
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, causal64(rows)[0])


def test_compiled_steps_share_one_graph(op_backend: str, device: torch.device) -> None:
    """A prefill and any number of steps: two graphs, in which the host's count goes on."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def step(cache: KVCache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cache.attend(query, key, value, backend=op_backend)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    rows = tokens(2, 8, device)
    cache = make(2, 8, device)
    outs = [compiled(cache, *part(rows, (0, 0), 4))]
    outs += [compiled(cache, *part(rows, (held, held), 1)) for held in range(4, 8)]
    check(rows, torch.cat(outs, dim=2))
    assert len(graphs) == 2
    assert (cache.longest, cache.lengths.tolist()) == (8, [8, 8])
    with pytest.raises(ValueError, match="at most 0 more tokens"):
        cache.attend(*part(rows, (7, 7), 1))


def test_aot_compiled_steps_write_the_cache(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(KVCache.attend, fullgraph=True, backend="aot_eager")
    rows = tokens(2, 8, device)
    cache = make(2, 8, device)
    outs = [compiled(cache, *part(rows, (0, 0), 5))]
    outs += [compiled(cache, *part(rows, (held, held), 1)) for held in range(5, 8)]
    check(rows, torch.cat(outs, dim=2))
    assert torch.equal(cache.key, rows[1])


@pytest.mark.parametrize("norm_first", (False, True))
@torch.no_grad()
def test_a_stack_generates_what_its_full_causal_forward_gives(
    backend: str, device: torch.device, norm_first: bool
) -> None:
    """Layers over layers: prompts of different lengths, padded, then steps of one token and of two."""
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(32, 2, 48, batch_first=True, norm_first=norm_first, device=device)
    model = TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    prompts, steps = (4, 2), (1, 2, 1)
    x = random_tensor((2, 8, 32), torch.float32, device, 0)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(8, device=device)
    expected = model(x, mask, is_causal=True)
    caches = [KVCache(2, 8, 2, 16, device=device) for _ in model.layers]
    with llmkernels.use_backend(backend):
        out = model(x[:, :4], cache=caches)
        for i, length in enumerate(prompts):
            torch.testing.assert_close(out[i, :length], expected[i, :length])
        for cache in caches:
            cache.truncate(prompts)
        held = list(prompts)
        for length in steps:
            pieces = [x[i, start : start + length] for i, start in enumerate(held)]
            out = model(torch.stack(pieces), cache=caches)
            for i, start in enumerate(held):
                torch.testing.assert_close(out[i], expected[i, start : start + length])
                held[i] += length
    assert all(cache.lengths.tolist() == held for cache in caches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
def test_a_cuda_graph_sees_the_cache_grow() -> None:
    rows = tokens(2, 8, "cuda")
    cache = make(2, 8, "cuda")
    outs = [cache.attend(*part(rows, (0, 0), 4))]
    static = [tensor.clone() for tensor in part(rows, (4, 4), 1)]
    cache.attend(*static)  # compiles
    cache.truncate(4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.attend(*static)
    for held in range(4, 8):
        for tensor, new in zip(static, part(rows, (held, held), 1), strict=True):
            tensor.copy_(new)
        graph.replay()
        outs.append(out.clone())
    check(rows, torch.cat(outs, dim=2))


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))))
def test_copies_go_their_own_way(duplicate: Callable[[KVCache], KVCache], device: torch.device) -> None:
    rows = tokens(1, 5, device)
    cache = make(1, 8, device)
    first = cache.attend(*part(rows, (0,), 4))
    other = duplicate(cache)
    cache.attend(*(tensor * 2 for tensor in part(rows, (0,), 3)))
    check(rows, torch.cat((first, other.attend(*part(rows, (4,), 1))), dim=2))


def test_the_ops_and_their_backend(device: torch.device) -> None:
    """Several tokens into an empty cache are a prefill; backend= is an order to either op."""
    rows = tokens(1, 5, device)
    cache = make(1, 8, device)
    with llmkernels.explain() as calls:
        for start, length in ((0, 3), (3, 1), (4, 1)):
            cache.attend(*part(rows, (start,), length), backend="reference")
    assert [(call.op, call.backend) for call in calls] == [
        ("attention", "reference"),
        ("attention_decode", "reference"),
        ("attention_decode", "reference"),
    ]
    before = state(cache)
    with pytest.raises(RuntimeError, match="no cuda kernels"):
        cache.attend(*part(rows, (4,), 1), backend="cuda")
    assert state(cache) == before


def test_no_sequences_and_no_tokens(op_backend: str, device: torch.device) -> None:
    empty = make(0, 4, device)
    assert empty.attend(*tokens(0, 2, device), backend=op_backend).shape == (0, HEADS, 2, HEAD_DIM)
    empty.truncate([])
    cache = make(2, 4, device)
    assert cache.attend(*tokens(2, 0, device), backend=op_backend).shape == (2, HEADS, 0, HEAD_DIM)
    assert cache.longest == 0


def test_it_prints_what_it_is() -> None:
    cache = KVCache(2, 8, HEADS, HEAD_DIM)
    assert (cache.batch, cache.capacity, cache.longest) == (2, 8, 0)
    assert repr(cache) == "KVCache(2, 8, 2, 16, dtype=torch.float32, device='cpu'): 0 tokens"
