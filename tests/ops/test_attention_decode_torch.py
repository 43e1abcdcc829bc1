"""attention_decode inside torch: torch.library, torch.compile, autograd, functorch, the choice of a backend,
errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import llmkernels
from llmkernels import testing
from llmkernels.ops.attention_decode import api

from .attention_decode_cases import Case, same_bits
from .test_attention_decode import backend  # noqa: F401, a fixture


@pytest.mark.parametrize("page_size", (0, 4))
def test_opcheck(backend: str, device: torch.device, page_size: int) -> None:  # noqa: F811
    if backend == "torch":
        pytest.skip("torch's own operators are not registered by this package")
    api.dispatch.load(dict(api.KERNELS)[backend])
    case = Case((5, 11), query_length=2, new_tokens=2, capacity=16, page_size=page_size, alibi=1, sinks=True)
    tensors = case.inputs(device)
    for name in ("key_cache", "value_cache"):
        tensors[name].nan_to_num_(0.0)  # opcheck compares with ==
    query, table = tensors["query"], tensors.get("block_table")
    caches, lengths = (tensors["key_cache"], tensors["value_cache"]), tensors["cache_seqlens"]
    append = (*caches, tensors["key"], tensors["value"], lengths, table, backend)
    torch.library.opcheck(torch.ops.llmkernels.attention_decode_append.default, append)
    for window, softcap, num_splits in (((-1, 0), 0.0, 0), ((4, 2), 3.0, 2)):
        features = (tensors["alibi_slopes"], tensors["sinks"], 2, 0.25, *window, softcap, num_splits)
        arguments = (query, *caches, lengths, table, *features, backend)
        torch.library.opcheck(torch.ops.llmkernels.attention_decode_forward.default, arguments)


@pytest.mark.parametrize("dynamic, page_size", ((False, 4), (True, 0)))
def test_compile_fullgraph(backend: str, device: torch.device, dynamic: bool, page_size: int) -> None:  # noqa: F811
    """One graph, the same results and the same caches as eager, for one shape and for shapes that change."""
    torch._dynamo.reset()

    def step(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        out, lse = llmkernels.attention_decode(
            **tensors, window=(9, -1), softcap=5.0, return_lse=True, backend=backend
        )
        return out, lse, llmkernels.attention_decode(tensors["query"] * 2, **_read(tensors), backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, query_length in ((3, 2), (4, 3)) if dynamic else ((2, 1),):
        case = Case(
            (5, 11, 0, 3)[:batch], query_length=query_length, new_tokens=query_length, capacity=16,
            page_size=page_size, alibi=2, sinks=True,
        )  # fmt: skip
        ours, eager = case.inputs(device), case.inputs(device)
        for found, expected in zip(compiled(ours), step(eager), strict=True):
            torch.testing.assert_close(found, expected)
        assert all(same_bits(ours[name], eager[name]) for name in ours)


def _read(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments of a call that appends nothing."""
    return {name: tensor for name, tensor in tensors.items() if name not in ("query", "key", "value")}


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compiled_steps_write_the_cache_they_are_given(device: torch.device, compiler: str) -> None:
    """The default call, step after step over one cache: the append is seen by the next step."""
    torch._dynamo.reset()
    compiled = torch.compile(llmkernels.attention_decode, fullgraph=True, backend=compiler)
    ours, eager = (Case((5, 11), capacity=20).inputs(device) for _ in range(2))
    for _ in range(3):
        found, expected = compiled(**ours), llmkernels.attention_decode(**eager)
        torch.testing.assert_close(found, expected)
        for tensors in (ours, eager):
            tensors["cache_seqlens"] += 1
    assert all(same_bits(ours[name], eager[name]) for name in ours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
@pytest.mark.parametrize("page_size", (0, 16))
def test_cuda_graph(page_size: int) -> None:
    """Captured once with empty sequences, replayed as they grow."""
    case = Case((0, 5), capacity=300, page_size=page_size, dtype=torch.bfloat16)
    ours, eager = case.inputs("cuda"), case.inputs("cuda")
    if page_size:
        for tensors in (ours, eager):
            tensors["block_table"].copy_(torch.arange(38, device="cuda").view(2, 19))
    state = {name: tensor.clone() for name, tensor in ours.items()}
    llmkernels.attention_decode(**ours, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = llmkernels.attention_decode(**ours, backend="triton")
    for name, tensor in state.items():
        ours[name].copy_(tensor)
    for _ in range(200):
        graph.replay()
        assert same_bits(out, llmkernels.attention_decode(**eager, backend="triton"))
        for tensors in (ours, eager):
            tensors["cache_seqlens"] += 1


def test_nothing_to_differentiate(backend: str, device: torch.device) -> None:  # noqa: F811
    tensors = Case((5, 11)).inputs(device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("query", "key", "value_cache"):
        tensors[name].requires_grad_()
        with pytest.raises(RuntimeError, match="attention_decode: it has no gradient.*torch.no_grad"):
            llmkernels.attention_decode(**tensors, backend=backend)
        with torch.no_grad():
            out = llmkernels.attention_decode(**tensors, backend=backend)
        assert not out.requires_grad
        with torch.no_grad():
            for other, tensor in tensors.items():
                tensor.copy_(before[other])
        tensors[name] = tensors[name].detach()
    with torch.inference_mode():
        assert torch.equal(llmkernels.attention_decode(**tensors, backend=backend), out)


def test_float32_products_follow_torchs_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from llmkernels.ops.attention_decode import triton_forward

    seen = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **_: seen.append(arguments[names.index("PRECISION")])

    names = triton_forward._attention_decode_kernel.arg_names
    monkeypatch.setattr(triton_forward, "_attention_decode_kernel", Kernel())
    tensors = Case((5, 11), new_tokens=0).inputs("cuda" if torch.cuda.is_available() else "cpu")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            llmkernels.attention_decode(**tensors, num_splits=1, backend="triton")
            half = {n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}
            llmkernels.attention_decode(**half, num_splits=1, backend="triton")
    finally:
        matmul.fp32_precision = before
    assert seen == ["ieee", "ieee", "tf32", "ieee"]


# The choice of a backend


def _serves(tensors: dict[str, Any], preferred: str, **options: Any) -> str:
    with llmkernels.explain() as calls, llmkernels.use_backend(preferred):
        llmkernels.attention_decode(**tensors, **options)
    return str(calls)


def test_reasons(device: torch.device) -> None:
    """What the kernels can't serve goes to torch with the reason; asked for by name, it raises."""
    pytest.importorskip("triton")
    tensors = Case((5, 11)).inputs(device)
    assert "attention_decode: triton (preferred" in _serves(tensors, "triton")
    wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    large = Case((5, 11), head_dim=16, value_dim=264).inputs(device)
    strided = dict(tensors)
    strided["key_cache"] = tensors["key_cache"].transpose(2, 3).contiguous().transpose(2, 3)
    negated = {**tensors, "query": torch._neg_view(tensors["query"])}
    for arguments, reason in (
        (wide, "query is torch.float64"),
        (large, "a head dim is larger than 256"),
        (strided, "the last stride of a cache is not 1"),
        (negated, "lazily negated"),
    ):
        said = _serves(arguments, "triton")
        assert "attention_decode: torch" in said and reason in said
        with pytest.raises(RuntimeError, match=reason):
            llmkernels.attention_decode(**arguments, backend="triton")
    assert "this op has no cuda kernels" in _serves(tensors, "cuda")


@pytest.mark.parametrize("return_lse", (False, True))
def test_float64(device: torch.device, return_lse: bool) -> None:
    """By torch, with a logsumexp of its own precision."""
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in Case((5, 11)).inputs(device).items()}
    found = llmkernels.attention_decode(**tensors, return_lse=return_lse)
    expected = llmkernels.attention_decode(**tensors, return_lse=True, backend="reference")
    assert expected[1].dtype == torch.float64
    torch.testing.assert_close(found, expected if return_lse else expected[0])


def test_lazily_negated_queries(device: torch.device) -> None:
    tensors = Case((5, 11)).inputs(device)
    negated = {**tensors, "query": torch._neg_view(tensors["query"])}
    tensors["query"] = -tensors["query"]
    torch.testing.assert_close(
        llmkernels.attention_decode(**negated), llmkernels.attention_decode(**tensors, backend="reference")
    )


@pytest.mark.parametrize("return_lse", (False, True))
def test_autocast_changes_nothing(backend: str, device: torch.device, return_lse: bool) -> None:  # noqa: F811
    q, k, v = (testing.random_tensor((2, 2, 9, 16), torch.float32, device, i) for i in range(3))
    lengths = torch.tensor([4, 9], device=device)

    def step() -> tuple[torch.Tensor, ...]:
        results = llmkernels.attention_decode(
            q[:, :, :1], k, v, lengths, return_lse=return_lse, backend=backend
        )
        return results if return_lse else (results,)

    with torch.autocast(device.type, torch.bfloat16):
        cast = step()
    for actual, expected in zip(cast, step(), strict=True):
        assert torch.equal(actual, expected)


def test_functorch_falls_back_with_a_reason(device: torch.device) -> None:
    tensors = Case((5, 11), new_tokens=0).inputs(device)
    held = _read(tensors)
    queries = torch.stack([tensors["query"], 2 * tensors["query"]])
    with llmkernels.explain() as calls, llmkernels.use_backend("reference"):
        found = torch.vmap(lambda query: llmkernels.attention_decode(query, **_finite(held)))(queries)
    assert calls[0].backend == "torch" and "functorch" in str(calls)
    for query, out in zip(queries, found, strict=True):
        torch.testing.assert_close(out, llmkernels.attention_decode(query, **_finite(held)))


def _finite(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.nan_to_num(0.0) for name, tensor in tensors.items()}


def test_fx_traces_one_call() -> None:
    def function(query, key_cache, value_cache, cache_seqlens):  # type: ignore[no-untyped-def]
        return llmkernels.attention_decode(query, key_cache, value_cache, cache_seqlens, window=(4, 0))

    graph = torch.fx.Tracer().trace(function)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [llmkernels.attention_decode]
    assert calls[0].kwargs["window"] == (4, 0)


def test_numbers_of_numpy(backend: str, device: torch.device) -> None:  # noqa: F811
    tensors = Case((5, 11), new_tokens=0).inputs(device)
    numbers = {"scale": np.float32(0.5), "softcap": np.float64(4), "window": (np.int64(3), np.int32(0))}
    found = llmkernels.attention_decode(**tensors, **numbers, num_splits=np.int64(2), backend=backend)
    expected = llmkernels.attention_decode(**tensors, scale=0.5, softcap=4, window=(3, 0), backend=backend)
    torch.testing.assert_close(found, expected)


# Bad input: the kind of error, the argument's name, what was expected and what came; and nothing is touched.

F16, I16, META = torch.float16, torch.int16, torch.device("meta")


def _with(**changes: Any) -> Any:
    """The call with some of its arguments changed: by a function of the argument, or to a value."""

    def arguments(tensors: dict[str, Any]) -> dict[str, Any]:
        for name, change in changes.items():
            tensors[name] = change(tensors[name]) if callable(change) else change
        return tensors

    return arguments


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor": (_with(query=1.0), TypeError, "query: expected a torch.Tensor, got float"),
    "ints": (_with(query=lambda q: q.int()), RuntimeError, "query: expected a floating-point dtype"),
    "dimensions": (
        _with(query=lambda q: q[0]),
        RuntimeError,
        r"query: expected \[batch, heads, length, head_dim\]",
    ),
    "cache's dimensions": (_with(key_cache=lambda c: c[0]), RuntimeError, "key_cache: expected 4 dimensions"),
    "head dim": (
        _with(key_cache=lambda c: c[..., :24]),
        RuntimeError,
        r"key_cache: expected the shape \[2, 2, 20, 32\], got \[2, 2, 20, 24\]",
    ),
    "no head dim": (
        _with(value_cache=lambda c: c[..., :0]),
        RuntimeError,
        r"query: expected head dims of at least 1, got \[32, 0\]",
    ),
    "cache lengths": (
        _with(value_cache=lambda c: c[:, :, :19]),
        RuntimeError,
        r"value_cache: expected the shape \[2, 2, 20, 32\], got \[2, 2, 19, 32\]",
    ),
    "batch": (
        _with(key_cache=lambda c: c[:1]),
        RuntimeError,
        r"key_cache: expected the shape \[2, 2, 20, 32\]",
    ),
    "heads": (
        _with(query=lambda q: q[:, :3]),
        RuntimeError,
        "query: expected heads in a multiple of the cache's 2, got 3",
    ),
    "cache's dtype": (
        _with(value_cache=lambda c: c.half()),
        RuntimeError,
        r"value_cache: expected torch.float32 \(as query\), got torch.float16",
    ),
    "key's dtype": (_with(key=lambda k: k.half()), RuntimeError, r"key: expected torch.float32 \(as query\)"),
    "device": (
        _with(key_cache=lambda c: c.to(META)),
        RuntimeError,
        r"key_cache: expected device .* got meta",
    ),
    "lengths' device": (
        _with(cache_seqlens=lambda c: c.to(META)),
        RuntimeError,
        "cache_seqlens: expected device",
    ),
    "lengths' type": (
        _with(cache_seqlens=[5, 11]),
        TypeError,
        "cache_seqlens: expected a torch.Tensor, got list",
    ),
    "lengths' dtype": (
        _with(cache_seqlens=lambda c: c.to(I16)),
        RuntimeError,
        "cache_seqlens: expected torch.int32 or torch.int64, got torch.int16",
    ),
    "lengths' shape": (
        _with(cache_seqlens=lambda c: c[:1]),
        RuntimeError,
        r"cache_seqlens: expected the shape \[2\], got \[1\]",
    ),
    "key alone": (_with(value=None), RuntimeError, "value: expected a torch.Tensor beside key, got None"),
    "value alone": (_with(key=None), RuntimeError, "key: expected a torch.Tensor beside value, got None"),
    "new heads": (_with(key=lambda k: k[:, :1]), RuntimeError, r"key: expected the shape \[2, 2, 3, 32\]"),
    "new tokens": (
        _with(value=lambda v: v[:, :, :2]),
        RuntimeError,
        r"value: expected the shape \[2, 2, 3, 32\], got \[2, 2, 2, 32\]",
    ),
    "table's dtype": (
        _with(block_table=torch.zeros(2, 2)),
        RuntimeError,
        "block_table: expected torch.int32 or torch.int64, got torch.float32",
    ),
    "table's shape": (
        _with(block_table=torch.zeros(3, 2, dtype=torch.int32)),
        RuntimeError,
        r"block_table: expected \[2, max_blocks\], got \[3, 2\]",
    ),
    "empty pages": (
        _with(
            block_table=torch.zeros(2, 2, dtype=torch.int32),
            key_cache=lambda c: c[:, :, :0],
            value_cache=lambda c: c[:, :, :0],
        ),
        RuntimeError,
        "key_cache: expected pages of at least 1 token, got 0",
    ),
    "huge table": (
        _with(block_table=torch.zeros(1, dtype=torch.int32).expand(2, 2**27)),
        RuntimeError,
        "key_cache: expected room for less than 2\\^30 tokens a sequence, got 2684354560",
    ),
    "scale": (_with(scale="1"), TypeError, "scale: expected a number or None, got str"),
    "causal": (_with(is_causal=1), TypeError, "is_causal: expected a bool, got int"),
    "window": (_with(window=3), TypeError, r"window: expected two ints \(left, right\) or None, got 3"),
    "window's length": (_with(window=(1,)), TypeError, "window: expected two ints"),
    "window's type": (_with(window=(1, 0.5)), TypeError, "window: expected two ints"),
    "boolean window": (_with(window=(1, True)), TypeError, "window: expected two ints"),
    "negative window": (
        _with(window=(-2, 0)),
        ValueError,
        r"window: expected sizes >= 0, or -1 for no bound, got \(-2, 0\)",
    ),
    "softcap": (_with(softcap=-1), ValueError, "softcap: expected a finite number >= 0"),
    "NaN softcap": (
        _with(softcap=math.nan),
        ValueError,
        "softcap: expected a finite number >= 0",
    ),
    "softcap's type": (_with(softcap="2"), TypeError, "softcap: expected a number or None, got str"),
    "slopes": (
        _with(alibi_slopes=torch.ones(3)),
        RuntimeError,
        r"alibi_slopes: expected the shape \[4\] or \[2, 4\], got \[3\]",
    ),
    "slopes' dtype": (
        _with(alibi_slopes=torch.ones(4).int()),
        RuntimeError,
        "alibi_slopes: expected a floating",
    ),
    "sinks": (_with(sinks=torch.ones(2)), RuntimeError, r"sinks: expected the shape \[4\], got \[2\]"),
    "splits": (_with(num_splits=0), ValueError, "num_splits: expected at least 1 or None, got 0"),
    "splits' type": (_with(num_splits=1.5), TypeError, "num_splits: expected an int or None, got float"),
    "unknown backend": (_with(backend="cudnn"), ValueError, "backend: expected one of .*got 'cudnn'"),
}

# What can be read at once, on the CPU alone.
BAD_VALUES = {
    "negative length": (
        _with(cache_seqlens=torch.tensor([5, -1])),
        ValueError,
        "cache_seqlens: expected lengths >= 0, got -1",
    ),
    "no room": (
        _with(cache_seqlens=torch.tensor([5, 18])),
        ValueError,
        "cache_seqlens: expected lengths <= 17 beside 3 new tokens, got 18",
    ),
    "too long": (
        _with(cache_seqlens=torch.tensor([5, 21]), key=None, value=None),
        ValueError,
        "cache_seqlens: expected lengths <= 20, got 21",
    ),
    "no such page": (
        _with(block_table=torch.tensor([[0, 1], [2, 0]])),
        ValueError,
        "block_table: expected pages in use from 0 to 1, got 2",
    ),
    "page for the new tokens": (
        _with(block_table=torch.tensor([[0, -1], [1, -1]]), cache_seqlens=torch.tensor([18, 17])),
        ValueError,
        "block_table: expected pages in use from 0 to 1, got -1",
    ),
}


@pytest.mark.parametrize("bad", (*BAD, *BAD_VALUES))
def test_bad_input(device: torch.device, bad: str) -> None:
    if bad in BAD_VALUES and device.type != "cpu":
        pytest.skip("values on a GPU are not waited for")
    change, kind, message = {**BAD, **BAD_VALUES}[bad]
    tensors = Case((5, 11), new_tokens=3, capacity=20).inputs(device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    arguments = change(dict(tensors))
    arguments = {
        n: v.to(device) if isinstance(v, torch.Tensor) and v.is_cpu else v for n, v in arguments.items()
    }
    with pytest.raises(kind, match=f"attention_decode: {message}"):
        llmkernels.attention_decode(**arguments)
    assert all(same_bits(tensor, before[name]) for name, tensor in tensors.items())


def test_unused_pages_may_be_anything(backend: str) -> None:  # noqa: F811
    """Entries behind the last page in use are not read."""
    case = Case((5, 11), new_tokens=1, capacity=24, page_size=4)
    tensors = case.inputs("cpu")
    assert (tensors["block_table"] == 10**6).any()
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels take CUDA tensors here")
    assert llmkernels.attention_decode(**tensors, backend=backend).isfinite().all()


def test_results_of_random_tensors_differ() -> None:
    """The cases are not trivial: every feature changes the result."""
    plain = Case((40, 60), query_length=3, new_tokens=3)
    base = llmkernels.attention_decode(**plain.inputs("cpu"))
    for change in ({"is_causal": False}, {"window": (5, 0)}, {"softcap": 0.7}, {"alibi": 1}, {"sinks": True}):
        case = Case((40, 60), query_length=3, new_tokens=3, return_lse=False, **change)  # type: ignore[arg-type]
        other = llmkernels.attention_decode(**case.inputs("cpu"), **case.options())
        assert not testing.measure(other, base.double(), base).passed
