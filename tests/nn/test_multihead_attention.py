"""llmkernels.nn.MultiheadAttention: torch.nn's semantics on its slow path, and the same on kernels."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels
from llmkernels.testing import random_tensor

from .exact import assert_exact
from .torch_layers import assert_alike, assert_compiles, assert_raises_alike, ours_like, randomised

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    # Of torch's own decompositions, which forward-mode differentiation loads.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

N, L, S, E, H = 2, 4, 3, 8, 2


def attention(**options: Any) -> nn.MultiheadAttention:
    return randomised(nn.MultiheadAttention(E, H, **options))


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(shape, dtype, "cpu", seed, requires_grad=True)


def inputs(kind: str, batch_first: bool, kdim: int = E, vdim: int = E) -> list[Tensor]:
    """Query, key and value: of one tensor, of two, or of three of their own."""
    seq_first = (lambda n, length, width: (n, length, width)) if batch_first else (lambda n, s, w: (s, n, w))
    query = rows(*seq_first(N, L, E))
    if kind == "self":
        return [query] * 3
    if kind == "memory":
        return [query, *[rows(*seq_first(N, S, E), seed=1)] * 2]
    return [query, rows(*seq_first(N, S, kdim), seed=1), rows(*seq_first(N, S, vdim), seed=2)]


def masks(keys: int) -> dict[str, dict[str, Any]]:
    """Every kind of mask, by its name."""
    padding = torch.zeros(N, keys, dtype=torch.bool)
    padding[1, -1] = True
    hidden = torch.ones(L, keys, dtype=torch.bool).triu(diagonal=1)
    floats = random_tensor((L, keys), torch.float32, "cpu", 7, requires_grad=True)
    each = random_tensor((N * H, L, keys), torch.float32, "cpu", 8, requires_grad=True)
    bias = random_tensor((N, keys), torch.float32, "cpu", 9, requires_grad=True)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": bias},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": floats},
        "bool of each head": {"attn_mask": each > 1},
        "float of each head": {"attn_mask": each},
        "bool and padding": {"attn_mask": hidden, "key_padding_mask": padding},
        "float and float padding": {"attn_mask": floats, "key_padding_mask": bias},
        "float and padding": {"attn_mask": floats, "key_padding_mask": padding},
        "bool of each head and float padding": {"attn_mask": each > 1, "key_padding_mask": bias},
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", masks(1))
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
def test_masks(kind: str, mask: str, need_weights: bool) -> None:
    for batch_first in (False, True):
        theirs = attention(batch_first=batch_first)
        q, k, v = inputs(kind, batch_first)
        options = masks(k.shape[1 if batch_first else 0])[mask]
        assert_alike(ours_like(theirs), theirs, (q, k, v), {"need_weights": need_weights, **options})


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"kdim": 5, "vdim": 6},
        {"kdim": 5, "vdim": 6, "bias": False},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "bias": False, "kdim": 5},
    ],
    ids=lambda options: " ".join(options),
)
def test_constructor_options(options: dict[str, Any], need_weights: bool) -> None:
    theirs = attention(batch_first=True, **options)
    args = inputs("three", True, theirs.kdim, theirs.vdim)
    for mask in ("none", "bool and padding", "float and float padding"):
        call = {"need_weights": need_weights, **masks(S)[mask]}
        assert_alike(ours_like(theirs), theirs, args, call)
        unbatched = {name: t[0] if name == "key_padding_mask" else t for name, t in call.items()}
        assert_alike(ours_like(theirs), theirs, [t[0].detach() for t in args], unbatched)


@pytest.mark.parametrize("average", [True, False])
def test_weights_come_behind_dropout_and_are_averaged_over_heads(average: bool) -> None:
    theirs = attention(dropout=0.4, batch_first=True)
    args = inputs("memory", True)
    call = {"average_attn_weights": average, **masks(S)["padding"]}
    assert_alike(ours_like(theirs), theirs, args, call)
    torch.manual_seed(0)
    _, weights = ours_like(theirs)(*args, **call)
    assert weights.shape == ((N, L, S) if average else (N, H, L, S))
    assert average or (weights[0] == 0).any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_torchs_numbers(batch_first: bool, need_weights: bool, training: bool) -> None:
    theirs = attention(dropout=0.4, batch_first=batch_first).train(training)
    for kind in ("self", "memory"):
        args = inputs(kind, batch_first)
        assert_alike(ours_like(theirs), theirs, args, {"need_weights": need_weights})
        assert_alike(ours_like(theirs), theirs, [t[0] for t in args], {"need_weights": need_weights})


def test_a_dropout_of_one() -> None:
    theirs = attention(dropout=1.0)
    call = {"need_weights": False}
    assert_alike(ours_like(theirs), theirs, inputs("self", False), call)
    with llmkernels.explain() as calls:
        ours_like(theirs)(*inputs("self", False), **call)
    assert "dropout of 1" in str(calls)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_hint_of_causality_is_torchs(padded: bool, need_weights: bool) -> None:
    """A wrong hint: the mask is discarded unless weights or padding want it."""
    theirs = attention(batch_first=True)
    call: dict[str, Any] = {"need_weights": need_weights, "is_causal": True}
    call |= masks(S)["padding"] if padded else {}
    for mask in (torch.zeros(L, S), torch.zeros(L, S, dtype=torch.bool)):
        for kind in ("self", "memory"):
            keys = inputs(kind, True)[1].shape[1]
            wrong = mask[:, :1].expand(L, keys).contiguous()
            if padded:
                call["key_padding_mask"] = torch.zeros(N, keys, dtype=mask.dtype)
            assert_alike(ours_like(theirs), theirs, inputs(kind, True), {**call, "attn_mask": wrong})
    assert_raises_alike(ours_like(theirs), theirs, inputs("self", True), {**call, "attn_mask": None})


def test_dead_rows_are_zero_without_weights_and_nan_with_them() -> None:
    """A query that sees nothing: out_proj's bias, where torch.nn's fast path of eval gives NaN."""
    theirs = attention(batch_first=True).eval()
    dead = torch.zeros(N, S, dtype=torch.bool)
    dead[0] = True
    args = inputs("three", True)
    for need_weights in (False, True):
        call = {"need_weights": need_weights, "key_padding_mask": dead}
        assert_alike(ours_like(theirs), theirs, args, call)
        out, _ = ours_like(theirs)(*args, **call)
        expected = torch.full((L, E), torch.nan) if need_weights else theirs.out_proj.bias.expand(L, E)
        torch.testing.assert_close(out[0], expected, equal_nan=True)


# --- what is refused

_BAD_CALLS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1-D query": ((E,), (S, N, E), (S, N, E), {}),
    "4-D query": ((1, L, N, E), (S, N, E), (S, N, E), {}),
    "2-D key": ((L, N, E), (S, E), (S, N, E), {}),
    "2-D value": ((L, N, E), (S, N, E), (S, E), {}),
    "3-D key of a 2-D query": ((L, E), (S, N, E), (S, E), {}),
    "width of the query": ((L, N, E + 1), (S, N, E), (S, N, E), {}),
    "width of key and value": ((L, N, E), (S, N, E + 1), (S, N, E + 1), {}),
    "width of the value": ((L, N, E), (S, N, E), (S, N, E + 1), {}),
    "lengths": ((L, N, E), (S, N, E), (S + 1, N, E), {}),
    "batch of 1 for keys": ((L, N, E), (S, 1, E), (S, 1, E), {}),
    "batch of the query": ((L, N + 1, E), (S, N, E), (S, N, E), {}),
    "1-D padding": ((L, N, E), (S, N, E), (S, N, E), {"key_padding_mask": torch.zeros(S).bool()}),
    "2-D padding": ((L, E), (S, E), (S, E), {"key_padding_mask": torch.zeros(1, S).bool()}),
    "shape of padding": ((L, N, E), (S, N, E), (S, N, E), {"key_padding_mask": torch.zeros(N, L).bool()}),
    "ints as padding": ((L, N, E), (S, N, E), (S, N, E), {"key_padding_mask": torch.zeros(N, S).long()}),
    "ints as mask": ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(L, S).long()}),
    "1-D mask": ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(S)}),
    "4-D mask": ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(1, 1, L, S)}),
    "mask that broadcasts": ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(1, S)}),
    "shape of a 3-D mask": ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(N, L, S)}),
    "3-D mask, unbatched": ((L, E), (S, E), (S, E), {"attn_mask": torch.zeros(H + 1, L, S)}),
    "float64 mask": ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(L, S).double()}),
    "float16 mask": ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(L, S).half()}),
    "causal without mask": ((L, N, E), (S, N, E), (S, N, E), {"is_causal": True}),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", _BAD_CALLS)
def test_bad_calls_raise_what_torch_raises(name: str, need_weights: bool) -> None:
    *shapes, options = _BAD_CALLS[name]
    theirs = attention()
    args = [rows(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    assert_raises_alike(ours_like(theirs), theirs, args, {"need_weights": need_weights, **options})


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_bad_widths_of_separate_projections(which: str) -> None:
    theirs = attention(kdim=5, vdim=6)
    widths = {"query": E, "key": 5, "value": 6}
    widths[which] += 1
    args = [rows(L, N, width) for width in widths.values()]
    assert_raises_alike(ours_like(theirs), theirs, args, {})


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_dtypes_of_masks() -> None:
    """Which floating mask goes with which query, alone and beside a bool padding."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    padding = torch.zeros(N, L, dtype=torch.bool)
    for of_mask, of_query in itertools.product(dtypes, dtypes[1:]):
        theirs = attention(dtype=of_query)
        query = rows(L, N, E, dtype=of_query)
        for need_weights, key_padding_mask in itertools.product((True, False), (None, padding)):
            mask = torch.zeros(L, L, dtype=of_mask)
            call = {"attn_mask": mask, "key_padding_mask": key_padding_mask, "need_weights": need_weights}
            outcomes = []
            for module in (theirs, ours_like(theirs)):
                try:
                    outcomes.append(module(query, query, query, **call)[0].dtype)
                except RuntimeError:
                    outcomes.append(RuntimeError)
            assert outcomes[0] == outcomes[1], (of_mask, of_query, need_weights, key_padding_mask)


def test_masks_of_two_kinds_warn() -> None:
    mask, padding = torch.zeros(L, L), torch.zeros(N, L, dtype=torch.bool)
    query = rows(L, N, E)
    for module in (attention(), ours_like(attention())):
        with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
            module(query, query, query, key_padding_mask=padding, attn_mask=mask)


def test_what_is_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"nn\.MultiheadAttention: input: .* got str"):
        ours_like(attention())("text", "text", "text")


# --- on kernels


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "memory"])
def test_on_kernels(kind: str, batch_first: bool, backend: str) -> None:
    theirs = attention(batch_first=batch_first)
    args = inputs(kind, batch_first)
    keys = args[1].shape[1 if batch_first else 0]
    for mask in ("none", "bool and padding", "float of each head"):
        assert_exact(theirs, args, {"need_weights": False, **masks(keys)[mask]}, backend, {"attention"})


def test_extended_keys_on_kernels(backend: str) -> None:
    theirs = attention(batch_first=True, add_bias_kv=True, add_zero_attn=True)
    call = {"need_weights": False, **masks(S)["bool and padding"]}
    assert_exact(theirs, inputs("memory", True), call, backend, {"attention"})


def test_the_packed_projection_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkernels.nn import multihead_attention

    seen = []

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.extend((query, key, value))
        return llmkernels.attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(multihead_attention, "attention", spy)
    for batch_first in (True, False):
        seen.clear()
        query = rows(N, L, E)
        ours_like(attention(batch_first=batch_first))(query, query, query, need_weights=False)
        assert len({tensor.untyped_storage().data_ptr() for tensor in seen}) == 1
        assert all(tensor.stride(-1) == 1 for tensor in seen)


def test_why_no_kernel_serves_is_explained() -> None:
    query = rows(L, N, E)
    with llmkernels.explain() as calls:
        ours_like(attention())(query, query, query)
    assert [(call.op, call.backend) for call in calls] == [("nn.MultiheadAttention", "torch")]
    assert "need_weights=True" in calls[0].reason


def test_an_explicit_backend_is_an_order() -> None:
    ours = ours_like(attention(), "reference")
    query = rows(L, N, E)
    with llmkernels.explain() as calls:
        ours(query, query, query, need_weights=False)
    assert [call.backend for call in calls] == ["reference"]
    ours.backend = "fastest"
    with pytest.raises(ValueError, match="fastest"):
        ours(query, query, query, need_weights=False)
    assert ours_like(attention()).backend is None
    with pytest.raises(ValueError, match="fastest"):
        ours_like(attention())(query, query, query, need_weights=False, backend="fastest")


# --- deviations on purpose (llmkernels/nn/README.md)


def test_out_proj_is_called() -> None:
    ours = ours_like(attention())
    seen = []
    ours.out_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    query = rows(L, N, E)
    out, _ = ours(query, query, query)
    assert len(seen) == 1
    torch.testing.assert_close(out, seen[0])


@torch.no_grad()
def test_the_results_of_eval_are_those_of_training() -> None:
    """torch.nn's fast path, which only eval without gradients takes, is never taken: what it would hand back
    for a query that sees nothing is NaN."""
    theirs = attention(batch_first=True)
    query = rows(N, L, E).detach()
    dead = torch.tensor([[False] * L, [True] * L])
    assert theirs.eval()(query, query, query, dead, need_weights=False)[0].isnan().any()
    ours = ours_like(theirs)
    expected, _ = ours.train()(query, query, query, dead, need_weights=False)
    out, _ = ours.eval()(query, query, query, dead, need_weights=False)
    assert not out.isnan().any()
    torch.testing.assert_close(out, expected)


def test_the_memory_of_batch_first_outputs() -> None:
    """In training on the CPU as torch.nn's, where dropout draws its numbers in the order of memory."""
    theirs = attention(batch_first=True)
    query = rows(N, L, E)
    for module in (theirs, ours_like(theirs)):
        assert module(query, query, query, need_weights=False)[0].stride() == (E, N * E, 1)
    assert ours_like(theirs).eval()(query, query, query, need_weights=False)[0].is_contiguous()


# --- nested tensors


def nested(*lengths: int) -> Tensor:
    return torch.nested.nested_tensor([random_tensor((n, E), torch.float32, "cpu", n) for n in lengths])


@pytest.mark.parametrize("need_weights", [True, False])
@torch.no_grad()
def test_nested_tensors_as_torchs_fast_path_serves_them(need_weights: bool) -> None:
    theirs = attention(batch_first=True).eval()
    sequences = nested(3, 5, 1)
    expected, weights = theirs(sequences, sequences, sequences, need_weights=need_weights)
    with llmkernels.explain() as calls:
        out, ours = ours_like(theirs)(sequences, sequences, sequences, need_weights=need_weights)
    assert out.is_nested
    for mine, torchs in zip(out.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(mine, torchs)
    assert "nested tensor is padded" in str(calls)
    assert (ours is None) == (weights is None)
    if ours is not None:
        assert ours.shape == weights.shape


def test_other_nested_tensors_raise_what_torch_raises() -> None:
    sequences, others = nested(3, 5), nested(3, 5)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    empty = torch.nested.nested_tensor([])
    ours, theirs = ours_like(attention(batch_first=True)), attention(batch_first=True)
    for module in (ours, theirs):
        with pytest.raises(AssertionError):
            module(sequences, others, others)
        with pytest.raises(AssertionError):
            module(sequences, sequences, sequences, key_padding_mask=padding)
        with pytest.raises(AssertionError):
            module(empty, empty, empty)
    with pytest.raises(AssertionError):
        ours_like(attention())(sequences, sequences, sequences)


@pytest.mark.parametrize("heads", [1, 2])
def test_nested_tensors_outside_of_torchs_fast_path(heads: int) -> None:
    """With gradients and an odd number of heads: torch.nn raises AssertionError."""
    theirs = randomised(nn.MultiheadAttention(E, heads, batch_first=True))
    sequences = nested(3, 5, 1)
    with pytest.raises(AssertionError):
        theirs(sequences, sequences, sequences)
    ours = ours_like(theirs)
    out, _ = ours(sequences, sequences, sequences, need_weights=False)
    sum(each.square().sum() for each in out.unbind()).backward()
    nested_gradient = ours.in_proj_weight.grad.clone()
    ours.zero_grad()
    each = [ours(x, x, x, need_weights=False)[0] for x in sequences.unbind()]
    sum(y.square().sum() for y in each).backward()
    torch.testing.assert_close(nested_gradient, ours.in_proj_weight.grad)


# --- tools


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_on_a_cpu_gives_torchs_dtypes(dtype: torch.dtype, need_weights: bool) -> None:
    theirs = attention()
    query = rows(L, N, E).to(dtype)
    mask = torch.zeros(L, L)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = theirs(query, query, query, attn_mask=mask, need_weights=need_weights)
        actual = ours_like(theirs)(query, query, query, attn_mask=mask, need_weights=need_weights)
    for mine, torchs in zip(actual, expected, strict=True):
        assert getattr(mine, "dtype", None) == getattr(torchs, "dtype", None)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("duplicate", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_copies_keep_values_class_and_backend(duplicate: Any, backend: str | None) -> None:
    ours = ours_like(attention(), backend)
    other = duplicate(ours)
    assert type(other) is llmkernels.nn.MultiheadAttention
    assert other.backend == backend
    assert ("backend" in vars(other)) == (backend is not None)
    query = rows(L, N, E)
    call = {"need_weights": False}
    assert torch.equal(other(query, query, query, **call)[0], ours(query, query, query, **call)[0])


def test_a_pickle_of_an_old_torchs_layer_loads() -> None:
    state = {name: v for name, v in vars(ours_like(attention())).items() if name != "_qkv_same_embed_dim"}
    other = llmkernels.nn.MultiheadAttention.__new__(llmkernels.nn.MultiheadAttention)
    other.__setstate__(state)
    query = rows(L, N, E)
    assert other(query, query, query)[0].shape == (L, N, E)


def test_projections_can_be_taken_away() -> None:
    """A bias of None, set later, is no bias."""
    theirs = attention()
    theirs.in_proj_bias = None
    assert_alike(ours_like(theirs), theirs, inputs("memory", False), {"need_weights": False})


@pytest.mark.parametrize("call", [{"need_weights": False}, {"need_weights": False, "padded": True}, {}])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_compile_fullgraph(backend: str | None, call: dict[str, Any]) -> None:
    theirs = attention(batch_first=True)
    call = dict(call)
    if call.pop("padded", False):
        call["key_padding_mask"] = torch.tensor([[False] * L, [False] * (L - 1) + [True]])
    query = rows(N, L, E)
    assert_compiles(ours_like(theirs, backend), (query,) * 3, call)


def test_export() -> None:
    ours = ours_like(attention(batch_first=True))
    query = rows(N, L, E).detach()
    lengths = torch.export.Dim("length", min=2, max=64)
    dynamic = {"query": {1: lengths}, "key": {1: lengths}, "value": {1: lengths}, "need_weights": None}
    options = {"need_weights": False}
    program = torch.export.export(ours, (query,) * 3, options, dynamic_shapes=dynamic)
    longer = rows(N, L + 3, E, seed=5).detach()
    torch.testing.assert_close(
        program.module()(*[longer] * 3, **options)[0], ours(*[longer] * 3, **options)[0]
    )


def test_functional_transforms() -> None:
    """vmap, grad, jvp and a Hessian of it; torch.nn's raises at the last two."""
    ours = ours_like(attention(batch_first=True))
    query = rows(3, N, L, E).detach()

    def run(x: Tensor) -> Tensor:
        return ours(x, x, x, need_weights=False)[0]

    torch.testing.assert_close(torch.vmap(run)(query), torch.stack([run(x) for x in query]))
    tangent = random_tensor((N, L, E), torch.float32, "cpu", 3)
    _, forward = torch.func.jvp(run, (query[0],), (tangent,))
    (jacobian,) = torch.func.jacrev(run, argnums=(0,))(query[0])
    torch.testing.assert_close(forward, torch.einsum("abcdef,def->abc", jacobian, tangent))
    assert torch.func.hessian(lambda x: run(x).square().sum())(query[0]).shape == (N, L, E) * 2
    with llmkernels.explain() as calls:
        torch.vmap(run)(query)
    assert "functorch" in str(calls)


def test_second_derivatives() -> None:
    ours = attention_in_float64()
    query = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ours(x, x, x), query)
    assert torch.autograd.gradgradcheck(lambda x: ours(x, x, x), query)
    ours.backend = "reference"
    without = lambda x: ours(x, x, x, need_weights=False)[0]  # noqa: E731
    assert torch.autograd.gradcheck(without, query)
    assert torch.autograd.gradgradcheck(without, query)


def attention_in_float64() -> Any:
    return ours_like(randomised(nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)))


def test_fx_keeps_the_layer_as_one_call() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = ours_like(attention())

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.attention(x, x, x, need_weights=False)
            return F.relu(out)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention"]
    query = rows(L, N, E)
    torch.testing.assert_close(traced(query), model(query))


def test_script_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"nn\.MultiheadAttention: torch\.jit\.script"):
        torch.jit.script(ours_like(attention()))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace() -> None:
    ours = ours_like(attention()).eval()
    query = rows(L, N, E).detach()
    traced = torch.jit.trace(ours, (query, query, query))
    torch.testing.assert_close(traced(query, query, query), ours(query, query, query))


def test_meta_and_skip_init() -> None:
    meta = llmkernels.nn.MultiheadAttention(E, H, device="meta")
    query = torch.empty(L, N, E, device="meta")
    assert meta(query, query, query, need_weights=False)[0].shape == (L, N, E)
    assert (
        torch.nn.utils.skip_init(llmkernels.nn.MultiheadAttention, E, H).in_proj_weight.device.type == "cpu"
    )


# --- the cache


def test_a_cache_wants_the_causal_call_alone() -> None:
    ours = ours_like(attention(batch_first=True)).eval()
    query = rows(N, L, E).detach()
    call: dict[str, Any] = {"need_weights": False, "cache": llmkernels.nn.KVCache(N, 8, H, E // H)}
    for wrong in (
        {"need_weights": True},
        {"attn_mask": torch.zeros(L, L)},
        {"key_padding_mask": torch.zeros(N, L, dtype=torch.bool)},
    ):
        with torch.no_grad(), pytest.raises(ValueError, match="beside cache"):
            ours(query, query, query, **{**call, **wrong})
    ours.train().dropout = 0.1
    with torch.no_grad(), pytest.raises(ValueError, match="dropout"):
        ours(query, query, query, **call)


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_a_cache_gives_what_the_causal_mask_gives(batch_first: bool) -> None:
    ours = ours_like(attention(batch_first=batch_first)).eval()
    query = rows(N, L, E) if batch_first else rows(L, N, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    expected, _ = ours(query, query, query, need_weights=False, attn_mask=mask)
    cache = llmkernels.nn.KVCache(N, L, H, E // H)
    dim = 1 if batch_first else 0
    steps = [ours(x, x, x, need_weights=False, cache=cache)[0] for x in query.split((L - 2, 1, 1), dim)]
    torch.testing.assert_close(torch.cat(steps, dim), expected)
