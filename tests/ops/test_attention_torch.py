"""attention inside torch: its operators' contracts, autograd, torch.compile, functorch, autocast, torch's own
samples; the choice of a backend and the errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import llmkernels
from llmkernels import dispatch, testing
from llmkernels.ops.attention import api
from llmkernels.ops.attention.call import UNLIMITED, AttentionCall, size_obstacle

from .attention_cases import Case

BACKENDS = ("reference", "torch", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(params=("reference", "triton"))
def own_backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def _rows(
    device: torch.device | str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [
        testing.random_tensor(shape, dtype, device, i, requires_grad=True) for i, shape in enumerate(shapes)
    ]


# --- autograd


@pytest.mark.parametrize("features", ({}, {"softcap": 2.0, "window": (3, 1)}, {"is_causal": True}))
def test_gradcheck(features: dict) -> None:
    """float64 through the explicit formulas; sinks, bias and logsumexp included."""
    q, k, v = _rows("cpu", (1, 4, 5, 3), (1, 2, 6, 3), (1, 2, 6, 4), dtype=torch.float64)
    bias, sinks = _rows("cpu", (1, 4, 1, 6), (4,), dtype=torch.float64)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        options = {"return_lse": True, "enable_gqa": True, "sinks": sinks.double(), **features}
        return llmkernels.attention(q, k, v, bias, **options, backend="reference")

    def with_exact_sinks(*tensors: Tensor) -> tuple[Tensor, ...]:
        # sinks become float32 on their way in, too coarse for finite differences.
        return function(*tensors[:4], sinks.detach())

    assert torch.autograd.gradcheck(with_exact_sinks, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(with_exact_sinks, (q, k, v, bias))


def test_double_backward(own_backend: str, device: torch.device) -> None:
    """A gradient penalty: through the reference, whatever made the first backward."""

    def penalty(backend: str, dtype: torch.dtype) -> list[Tensor]:
        tensors = {
            name: tensor.detach().to(dtype).requires_grad_()
            for name, tensor in Case(7, 9, heads=(4, 2), causal=True).inputs(device).items()
        }
        out = Case(7, 9, heads=(4, 2), causal=True).call(tensors, backend)[0]
        first = torch.autograd.grad(out.square().sum(), list(tensors.values()), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(tensors.values())))

    exact, own = penalty("reference", torch.float64), penalty("reference", torch.float32)
    for i, actual in enumerate(penalty(own_backend, torch.float32)):
        testing.assert_within_budget(
            actual, exact[i].cpu(), own[i].cpu(), name=str(i), magnitude=exact[i].abs().amax().cpu() * 24
        )


def test_frozen_inputs(own_backend: str, device: torch.device) -> None:
    for wanted in (("query",), ("key",), ("value",), ("attn_mask",), ("query", "value")):
        case = Case(9, 11, mask=(9, 11), mask_dtype=torch.float32)
        tensors = case.inputs(device)
        full = torch.autograd.grad(case.call(tensors, own_backend)[0].square().sum(), list(tensors.values()))
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        case.call(tensors, own_backend)[0].square().sum().backward()
        for (name, tensor), expected in zip(tensors.items(), full, strict=True):
            assert tensor.grad is None if name not in wanted else torch.equal(tensor.grad, expected), name


def test_batched_gradients(backend: str, device: torch.device) -> None:
    """Many gradients at once: vmap over a backward, which kernels can't be under."""
    q, k, v = _rows(device, (1, 2, 5, 16), (1, 2, 7, 16), (1, 2, 7, 16))
    out = llmkernels.attention(q, k, v, is_causal=True, backend=backend)
    many = testing.random_tensor((3, *out.shape), torch.float32, device, 9)
    together = torch.autograd.grad(out, (q, k, v), many, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for dout in many]
    for actual, *expected in zip(together, *each, strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


def test_only_the_logsumexp_is_used(own_backend: str, device: torch.device) -> None:
    case = Case(9, 11, lse=True)
    tensors = case.inputs(device)
    _, lse = case.call(tensors, own_backend)
    _, plain = case.plain(tensors, None)
    for actual, expected in zip(
        torch.autograd.grad(lse.square().sum(), list(tensors.values())),
        torch.autograd.grad(plain.square().sum(), list(tensors.values()), materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_outputs_are_not_views(own_backend: str, device: torch.device) -> None:
    """As torch's: a result may be changed in place, and one whose values are saved says so."""
    q, k, v = _rows(device, *[(1, 2, 5, 16)] * 3)
    out = llmkernels.attention(q, k, v, backend=own_backend)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_for_backward(own_backend: str, device: torch.device) -> None:
    """The inputs, out and lse: no scores, no dropout mask."""
    case = Case(64, 80, batch=1, dropout_p=0.5, causal=True)
    tensors = case.inputs(device)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = case.call(tensors, own_backend)[0]
    inputs = sum(tensor.nbytes for tensor in tensors.values())
    statistics, seed = 4 * 2 * 64, 8
    assert sum(saved.values()) == inputs + out.nbytes + statistics + seed


# --- operators, torch.compile, functorch, autocast


@pytest.mark.parametrize(
    "features", ({}, {"mask": (1, 2, 9, 11), "mask_dtype": torch.float32, "sinks": True})
)
@pytest.mark.parametrize("layout", ("bhld", "blhd"))
def test_opcheck(own_backend: str, device: torch.device, layout: str, features: dict) -> None:
    dispatch.load(dict(api.KERNELS)[own_backend])
    case = Case(9, 11, batch=2, layout=layout, dropout_p=0.2, **features)
    tensors = {name: tensor.detach() for name, tensor in case.inputs(device).items()}
    rows = [tensors[name] for name in ("query", "key", "value")]
    seed = torch.tensor([7], device=device)
    mask, sinks = tensors.get("attn_mask"), tensors.get("sinks")
    settings = (0.25, 0.0, 0.2, UNLIMITED, 0, True, 9, 11)
    others = (mask, None, sinks, seed, None, None, *settings)
    forward = torch.ops.llmkernels.attention_forward.default
    backward = torch.ops.llmkernels.attention_backward.default
    torch.library.opcheck(forward, (*rows, *others, own_backend))
    out, lse = forward(*rows, *others, own_backend)
    dout, dlse = torch.ones_like(out), torch.zeros_like(lse)
    final = (mask is not None, True, own_backend)
    torch.library.opcheck(backward, (dout, dlse, *rows, out, lse, *others, *final))


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("features", ({}, {"window": (4, 0), "sinks": True, "lse": True, "dropout_p": 0.3}))
def test_compile_fullgraph(own_backend: str, device: torch.device, features: dict, dynamic: bool) -> None:
    torch._dynamo.reset()
    case = Case(8, 8, heads=(4, 2), layout="blhd", **features)
    compiled = torch.compile(
        lambda tensors: case.call(tensors, own_backend), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for length in (8, 13):
        tensors = Case(length, length, heads=(4, 2), layout="blhd", sinks=case.sinks).inputs(device)
        results = []
        for function in (compiled, lambda tensors: case.call(tensors, own_backend)):
            torch.manual_seed(1)
            outputs = function(tensors)
            loss = sum(y.square().sum() for y in outputs)
            results.append((*outputs, *torch.autograd.grad(loss, list(tensors.values()))))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_compile_of_varlen_and_the_automatic_rule(device: torch.device) -> None:
    torch._dynamo.reset()
    x = testing.random_tensor((12, 2, 16), torch.float32, device, 0, requires_grad=True)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)

    def varlen(x: Tensor) -> Tensor:
        return llmkernels.attention_varlen(x, x, x, bounds, bounds, 7, 7, backend="reference")

    def automatic(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1)[None]
        return llmkernels.attention(rows, rows, rows, is_causal=True)

    for function in (varlen, automatic):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), function(x))


def test_functorch_falls_back_with_a_reason(device: torch.device) -> None:
    q, k, v = (t.detach() for t in _rows(device, *[(3, 1, 2, 6, 16)] * 3))
    with llmkernels.explain() as calls, llmkernels.use_backend("triton"):
        out = torch.vmap(lambda *rows: llmkernels.attention(*rows, window=(2, 0), softcap=3.0))(q, k, v)
    assert calls[0].backend == "torch"
    assert any("functorch" in reason for _, reasons in calls[0].passed_over for reason in reasons)
    each = [llmkernels.attention(*rows, window=(2, 0), softcap=3.0) for rows in zip(q, k, v, strict=True)]
    torch.testing.assert_close(out, torch.stack(each))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.vmap(lambda *rows: llmkernels.attention(*rows, backend="triton"))(q, k, v)


@pytest.mark.parametrize("features", ({}, {"softcap": 5.0}))
def test_autocast_casts_query_key_and_value(own_backend: str, device: torch.device, features: dict) -> None:
    """As torch has it for scaled_dot_product_attention, also where the three differ in dtype."""
    q, k, v = _rows(device, *[(1, 2, 5, 16)] * 3)
    with torch.autocast(device.type, torch.bfloat16):
        out = llmkernels.attention(q, k.detach().bfloat16(), v, **features, backend=own_backend)
        own = F.scaled_dot_product_attention(q, k.detach().bfloat16(), v)
    assert out.dtype == own.dtype == torch.bfloat16
    halves = (t.detach().bfloat16() for t in (q, k, v))
    assert torch.equal(out, llmkernels.attention(*halves, **features, backend=own_backend))
    out.sum().backward()
    assert q.grad.dtype == torch.float32


# --- against torch itself


def _samples() -> list:
    (info,) = (info for info in op_db if info.name == "nn.functional.scaled_dot_product_attention")
    return list(info.sample_inputs("cpu", torch.float32, requires_grad=True))


@pytest.mark.parametrize("index", range(len(_samples())))
def test_torchs_own_samples(backend: str, device: torch.device, index: int) -> None:
    """Shapes of 3 and 4 dimensions, broadcasting, masks: torch's answer and gradients, as near as torch's."""
    sample = _samples()[index]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in sample.kwargs.items()}
    options["dropout_p"] = 0.0

    def run(function: Callable[..., Tensor], dtype: torch.dtype, **more: object) -> list[Tensor]:
        rows = [t.detach().to(device, dtype).requires_grad_() for t in (sample.input, *sample.args)]
        out = function(*rows, **options, **more)
        return [out, *torch.autograd.grad(out.sum(), rows)]

    exact = run(F.scaled_dot_product_attention, torch.float64)
    own = run(F.scaled_dot_product_attention, torch.float32)
    # These values are up to 9: the logits' rounding, relative to their own size, is the results' error.
    magnitude = torch.tensor(9.0 * 9.0 * 9.0 * sample.input.shape[-1] ** 0.5, dtype=torch.float64)
    for i, actual in enumerate(run(llmkernels.attention, torch.float32, backend=backend)):
        assert actual.shape == own[i].shape and actual.dtype == own[i].dtype
        testing.assert_within_budget(actual, exact[i].cpu(), own[i].cpu(), name=str(i), magnitude=magnitude)


@pytest.mark.parametrize(
    "shapes",
    (
        [(5, 16), (7, 16), (7, 8)],
        [(2, 5, 16), (2, 7, 16), (2, 7, 8)],
        [(3, 2, 5, 16), (1, 2, 7, 16), (1, 2, 7, 8)],
        [(3, 2, 5, 16), (2, 7, 16), (3, 1, 7, 8)],
        [(1, 1, 5, 16), (3, 4, 7, 16), (3, 4, 7, 8)],
        [(2, 4, 5, 16), (2, 1, 7, 16), (2, 1, 7, 8)],
    ),
    ids=str,
)
def test_broadcasting_is_torchs(backend: str, device: torch.device, shapes: list) -> None:
    rows = _rows(device, *shapes)
    out = llmkernels.attention(*rows, backend=backend)
    expected = F.scaled_dot_product_attention(*rows)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected)
    for actual, own in zip(
        torch.autograd.grad(out.sum(), rows), torch.autograd.grad(expected.sum(), rows), strict=True
    ):
        torch.testing.assert_close(actual, own)


def test_groups_of_keys_and_values_may_differ(backend: str, device: torch.device) -> None:
    rows = _rows(device, (2, 4, 5, 16), (2, 2, 7, 16), (2, 1, 7, 8))
    out = llmkernels.attention(*rows, enable_gqa=True, backend=backend)
    expected = F.scaled_dot_product_attention(*rows, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    for actual, own in zip(
        torch.autograd.grad(out.sum(), rows), torch.autograd.grad(expected.sum(), rows), strict=True
    ):
        torch.testing.assert_close(actual, own)


def test_five_dimensions_and_nested_tensors_are_torchs(device: torch.device) -> None:
    q, k, v = (t.detach() for t in _rows(device, *[(2, 2, 2, 5, 16)] * 3))
    torch.testing.assert_close(
        llmkernels.attention(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    with pytest.raises(RuntimeError, match="at most 4"):
        llmkernels.attention(q, k, v, backend="reference")
    with pytest.raises(RuntimeError, match="2 to 4 dimensions"):
        llmkernels.attention(q, k, v, softcap=1.0)


def test_float64_is_torchs(device: torch.device) -> None:
    q, k, v = (t.detach().double() for t in _rows(device, *[(1, 2, 5, 16)] * 3))
    with llmkernels.explain() as calls, llmkernels.use_backend("triton"):
        llmkernels.attention(q, k, v)
    assert calls[0].backend == "torch" and "float64" in str(calls[0])


def test_tensor_subclasses_see_the_function() -> None:
    """torch's override protocol: a stand-in for a tensor gets the call."""

    class Recorder:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, args, kwargs

    function, args, kwargs = llmkernels.attention(Recorder(), 1, 2, softcap=3.0)
    assert function is llmkernels.attention and args[1:3] == (1, 2) and kwargs["softcap"] == 3.0


# --- what users hand over: odd tensors, numbers and sizes


@pytest.mark.parametrize("packed", (False, True))
def test_lazily_negated_tensors(backend: str, device: torch.device, packed: bool) -> None:
    """Their memory holds the other sign, which only torch's dispatcher knows."""
    q, k, v, dout = (testing.random_tensor((1, 2, 5, 16), torch.float32, device, i) for i in range(4))
    bounds = torch.tensor([0, 5], dtype=torch.int32, device=device)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        *rows, mask, dout = tensors
        rows = [t.detach().requires_grad_() for t in rows]
        if packed:
            q, k, v = (t[0].transpose(0, 1) for t in rows)
            out = llmkernels.attention_varlen(q, k, v, bounds, bounds, 5, 5, backend=backend).transpose(0, 1)
        else:
            out = llmkernels.attention(*rows, mask, backend=backend)[0]
        return out, *torch.autograd.grad(out, rows, dout[0])

    tensors = (q, k, v, q[..., :5], dout)
    results = (gradients(*(torch._neg_view(t) for t in tensors)), gradients(*(-t for t in tensors)))
    for lazy, plain in zip(*results, strict=True):
        torch.testing.assert_close(lazy, plain)


@pytest.mark.parametrize("mask_dtype", (torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("features", ({}, {"softcap": 3.0}, {"window": (4, 4)}))
def test_floating_masks_of_another_dtype(
    device: torch.device, features: dict, mask_dtype: torch.dtype
) -> None:
    """torch's kernel on the CPU reads a float32 mask beside a float64 query as float64."""
    q, k, v = (testing.random_tensor((2, 2, 33, 16), torch.float64, device, i) for i in range(3))
    mask = testing.random_tensor((33, 33), mask_dtype, device, 3)
    expected = llmkernels.attention(q, k, v, mask.double(), **features)
    torch.testing.assert_close(llmkernels.attention(q, k, v, mask, **features), expected)
    q, k, v = (t.float() for t in (q, k, v))
    actual = llmkernels.attention(q, k, v, mask, backend="reference", **features)
    torch.testing.assert_close(actual, expected.float())


@pytest.mark.parametrize("name", ("alibi_slopes", "sinks"))
def test_float64_goes_all_the_way(device: torch.device, name: str) -> None:
    rows = [testing.random_tensor((2, 3, 33, 16), torch.float64, device, i) for i in range(3)]
    option = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64, device=device)
    logits = rows[0] @ rows[1].transpose(2, 3) / 4
    if name == "sinks":
        logits = torch.cat((logits, option[:, None, None].expand(2, 3, 33, 1)), dim=3)
    else:
        positions = torch.arange(33, device=device)
        logits = logits - option[:, None, None] * (positions[:, None] - positions).abs()
    expected = logits.softmax(dim=3)[..., :33] @ rows[2]
    # Slopes or sinks that were rounded to float32 would show at 1e-8.
    actual = llmkernels.attention(*rows, **{name: option})
    testing.assert_within_budget(actual, expected, expected, name=name, magnitude=rows[2])


def test_sinks_of_minus_infinity(backend: str, device: torch.device) -> None:
    """A head without a sink, where a row sees no key either, has no NaN to give."""
    rows = _rows(device, *[(1, 2, 5, 16)] * 3)
    sinks = torch.tensor([-math.inf, 0.5], device=device, requires_grad=True)
    mask = torch.arange(5, device=device)[:, None].expand(5, 5) > 1
    out, lse = llmkernels.attention(*rows, mask, sinks=sinks, return_lse=True, backend=backend)
    assert (out[0, 0, :2] == 0).all() and (lse[0, 0, :2] == -math.inf).all()
    for gradient in torch.autograd.grad(out.square().sum(), (*rows, sinks)):
        assert gradient.isfinite().all()


def test_numbers_of_other_libraries(backend: str, device: torch.device) -> None:
    numpy = pytest.importorskip("numpy")
    q, k, v = (t.detach() for t in _rows(device, *[(5, 2, 16)] * 3))
    bounds = torch.tensor([0, 2, 5], device=device)
    expected = llmkernels.attention_varlen(q, k, v, bounds, bounds, 3, 3, scale=0.5, backend=backend)
    for integer, real in ((numpy.int64, numpy.float32), (torch.tensor, torch.tensor)):
        longest = integer(3)
        actual = llmkernels.attention_varlen(
            q, k, v, bounds, bounds, longest, longest, scale=real(0.5), backend=backend
        )
        torch.testing.assert_close(actual, expected)


def test_no_sequences_and_no_heads(backend: str, device: torch.device) -> None:
    x = torch.zeros(0, 2, 16, device=device, requires_grad=True)
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    out, lse = llmkernels.attention_varlen(x, x, x, bounds, bounds, 0, 0, return_lse=True, backend=backend)
    (out.sum() + lse.sum()).backward()
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0) and x.grad is not None
    y, none = torch.zeros(2, 0, 5, 16, device=device), torch.zeros(0, device=device)
    assert llmkernels.attention(y, y, y, alibi_slopes=none, sinks=none, backend=backend).shape == y.shape


@pytest.mark.parametrize("features", ({}, {"softcap": 2.0}, {"window": (2, 0), "sinks": torch.zeros(2)}))
def test_meta_tensors(features: dict) -> None:
    x = torch.empty(1, 2, 5, 16, device="meta", requires_grad=True)
    features = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in features.items()}
    out = llmkernels.attention(x, x, x, **features)
    assert out.shape == x.shape and out.is_meta


def test_nested_tensors_without_a_shape(device: torch.device) -> None:
    x = torch.nested.nested_tensor([torch.ones(2, n, 8, device=device) for n in (3, 5)])
    out = llmkernels.attention(x, x, x)
    assert [tuple(t.shape) for t in out.unbind()] == [(2, 3, 8), (2, 5, 8)]


@pytest.mark.parametrize("shape", ((), (7,), (1, 7), (5, 1)))
def test_masks_of_few_dimensions(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    q, k, v = (t.detach() for t in _rows(device, (2, 2, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16)))
    mask = (
        testing.random_tensor(shape, torch.float32, device, 3) if shape else torch.tensor(2.0, device=device)
    )
    expected = F.scaled_dot_product_attention(q, k, v, mask.expand(5, 7))
    torch.testing.assert_close(llmkernels.attention(q, k, v, mask, backend=backend), expected)


def test_autocast_leaves_float64_alone(backend: str, device: torch.device) -> None:
    q, k, v = (t.detach() for t in _rows(device, *[(1, 2, 5, 16)] * 3))
    with (
        torch.autocast(device.type, torch.bfloat16),
        pytest.raises(RuntimeError, match="expected torch.bfloat16 .as query., got torch.float64"),
    ):
        llmkernels.attention(q, k.double(), v, backend=backend)


@pytest.mark.parametrize("features", ({}, {"is_causal": True}, {"window": (2, 0)}))
def test_compile_of_torchs_with_symbolic_sizes(device: torch.device, features: dict) -> None:
    torch._dynamo.reset()

    def function(*rows: Tensor) -> Tensor:
        return llmkernels.attention(*rows, backend="torch", **features)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 7):
        rows = [t.detach() for t in _rows(device, *[(2, 3, length, 16)] * 3)]
        torch.testing.assert_close(compiled(*rows), function(*rows))


# --- the choice of a backend


def _gpu_call(**changes: object) -> AttentionCall:
    return AttentionCall("attention", torch.device("cuda", 0), torch.bfloat16)._replace(**changes)


def test_the_automatic_rule() -> None:
    """Ours for what torch has no kernel for, and for gradients that are promised to be the same bits."""
    assert api._automatic(_gpu_call()) == ()
    assert api._automatic(_gpu_call(gradients=True, deterministic=False)) == ()
    for ours in ({"gradients": True}, {"beyond_torch": True}, {"varlen": True}):
        assert api._automatic(_gpu_call(**ours)) == ("triton",)


@pytest.mark.parametrize(
    "change, reason",
    (
        ({"dtype": torch.float64}, "query is torch.float64"),
        ({"mask_dtype": torch.float64}, "attn_mask is torch.float64"),
        ({"size_obstacle": size_obstacle(257, 8)}, "query's head_dim is 257; the kernels take 1 to 256"),
        ({"size_obstacle": size_obstacle(8, 0)}, "value's head_dim is 0"),
        ({"obstacle": "x"}, "x"),
    ),
)
def test_reasons_against_the_kernels(change: dict, reason: str) -> None:
    assert any(reason in found for found in _gpu_call(**change).unsupported_by_kernels())
    assert _gpu_call().unsupported_by_kernels() == []


def test_a_head_dim_beyond_the_kernels_goes_to_torch(device: torch.device) -> None:
    q, k, v = (t.detach() for t in _rows(device, *[(1, 1, 4, 300)] * 3))
    with llmkernels.use_backend("triton"):
        torch.testing.assert_close(llmkernels.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(RuntimeError, match="head_dim is 300"):
        llmkernels.attention(q, k, v, backend="triton")


def test_slopes_that_want_a_gradient_get_it(device: torch.device) -> None:
    q, k, v = (t.detach() for t in _rows(device, *[(1, 2, 4, 8)] * 3))
    slopes = torch.tensor([0.5, 0.25], device=device, requires_grad=True)
    with llmkernels.explain() as calls, llmkernels.use_backend("reference"):
        llmkernels.attention(q, k, v, alibi_slopes=slopes).square().sum().backward()
    assert "alibi_slopes want a gradient" in str(calls[0])
    assert slopes.grad.abs().min() > 0


# --- errors

_R = [(2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 8)]


@pytest.mark.parametrize(
    "shapes, options, kind, message",
    (
        (
            [_R[0], (2, 4, 7, 12), _R[2]],
            {},
            RuntimeError,
            "key: expected a head_dim of 16 .as query., got 12",
        ),
        ([_R[0], _R[1], (2, 4, 6, 8)], {}, RuntimeError, "value: expected 7 rows .as key., got 6"),
        ([_R[0], (3, 4, 7, 16), _R[2]], {}, RuntimeError, "batch sizes that broadcast, got"),
        ([_R[0], (2, 3, 7, 16), _R[2]], {}, RuntimeError, "numbers of heads that broadcast"),
        (
            [_R[0], (2, 3, 7, 16), (2, 3, 7, 8)],
            {"enable_gqa": True},
            RuntimeError,
            "divides query's 4, got 3",
        ),
        ([_R[0], (2, 2, 7, 16), (2, 3, 7, 8)], {"enable_gqa": True}, RuntimeError, "query's 4, got 3"),
        ([(16,), _R[1], _R[2]], {}, RuntimeError, "query: expected at least 2 dimensions"),
        (
            _R,
            {"attn_mask": torch.ones(5, 6).bool()},
            RuntimeError,
            "attn_mask: expected a shape that broadcasts",
        ),
        (_R, {"attn_mask": torch.ones(1, 2, 4, 5, 7).bool()}, RuntimeError, "attn_mask: expected a shape"),
        (_R, {"attn_mask": torch.ones(5, 7).int()}, RuntimeError, "attn_mask: expected torch.bool or"),
        (_R, {"attn_mask": [[True]]}, TypeError, "attn_mask: expected a torch.Tensor, got list"),
        (_R, {"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability of at least 0 and below 1"),
        (_R, {"dropout_p": -0.1}, ValueError, "dropout_p"),
        (_R, {"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number, got str"),
        (_R, {"scale": "1"}, TypeError, "scale: expected a number"),
        (_R, {"scale": torch.ones(1)}, TypeError, "scale: expected a number, got Tensor"),
        (_R, {"scale": torch.tensor(1.0, requires_grad=True)}, TypeError, "scale: expected a number"),
        (_R, {"is_causal": 1}, TypeError, "is_causal: expected a bool, got .*int"),
        (_R, {"window": (-2, 0)}, ValueError, "window: expected a pair .left, right. of ints >= -1"),
        (_R, {"window": 5}, TypeError, "window"),
        (_R, {"window": (1.5, 0)}, TypeError, "window"),
        (_R, {"window": (1, 2, 3)}, TypeError, "window"),
        (_R, {"softcap": -1.0}, ValueError, "softcap: expected a finite number >= 0"),
        (_R, {"softcap": math.nan}, ValueError, "softcap"),
        (_R, {"causal_align": "left"}, ValueError, "causal_align: expected one of top_left, bottom_right"),
        (
            _R,
            {"alibi_slopes": torch.ones(3)},
            RuntimeError,
            r"alibi_slopes: expected shape \[4\] or \[2, 4\]",
        ),
        (_R, {"alibi_slopes": torch.ones(4).int()}, RuntimeError, "alibi_slopes: expected a floating"),
        (_R, {"sinks": torch.ones(2, 4)}, RuntimeError, r"sinks: expected shape \[4\], got \[2, 4\]"),
        (_R, {"backend": "flash"}, ValueError, "backend"),
        (
            _R,
            {"backend": "cuda", "alibi_slopes": torch.ones(4, requires_grad=True)},
            RuntimeError,
            "got 'cuda': alibi_slopes want a gradient, which the kernels don't compute",
        ),
    ),
)
def test_errors(shapes: list, options: dict, kind: type[Exception], message: str) -> None:
    rows = [torch.randn(shape) for shape in shapes]
    with pytest.raises(kind, match=message):
        llmkernels.attention(*rows, **options)


def test_errors_of_dtypes_and_devices() -> None:
    q, k, v = (torch.randn(shape) for shape in _R)
    with pytest.raises(TypeError, match="query: expected a torch.Tensor, got list"):
        llmkernels.attention([1], k, v)
    with pytest.raises(RuntimeError, match="key: expected torch.float32 .as query., got torch.float16"):
        llmkernels.attention(q, k.half(), v)
    with pytest.raises(RuntimeError, match="query: expected a floating-point dtype"):
        llmkernels.attention(q.int(), k, v)
    with pytest.raises(RuntimeError, match="value: expected device cpu .as query., got meta"):
        llmkernels.attention(q, k, v.to("meta"))


_BOUNDS = torch.tensor([0, 3, 8], dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, kind, message",
    (
        ({"cu_seqlens_q": torch.tensor([0, 5, 3, 8])}, ValueError, "don't decrease and end with 8"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 8])}, ValueError, "begin with 0"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 9])}, ValueError, "end with 8"),
        ({"cu_seqlens_q": torch.tensor([0.0, 3.0, 8.0])}, RuntimeError, "torch.int32 or torch.int64"),
        ({"cu_seqlens_q": _BOUNDS[None]}, RuntimeError, r"cu_seqlens_q: expected shape \[sequences \+ 1\]"),
        (
            {"cu_seqlens_k": torch.tensor([0, 8]), "max_seqlen_k": 8},
            RuntimeError,
            "cu_seqlens_k: expected 3 bounds",
        ),
        ({"max_seqlen_q": 4}, ValueError, "max_seqlen_q: expected at least the longest sequence, 5, got 4"),
        ({"max_seqlen_k": 2.5}, TypeError, "max_seqlen_k: expected an int"),
        ({"query": torch.randn(1, 8, 2, 16)}, RuntimeError, "query: expected 3 dimensions"),
        ({"key": torch.randn(8, 1, 16), "value": torch.randn(8, 1, 16)}, RuntimeError, "enable_gqa=True"),
        ({"value": torch.randn(7, 2, 16)}, RuntimeError, "value: expected .8, 2. tokens and heads"),
        ({"alibi_slopes": torch.ones(3, 2)}, RuntimeError, r"alibi_slopes: expected shape \[2\] or \[2, 2\]"),
    ),
)
def test_errors_of_varlen(changes: dict, kind: type[Exception], message: str) -> None:
    arguments = {
        **{name: torch.randn(8, 2, 16) for name in ("query", "key", "value")},
        "cu_seqlens_q": _BOUNDS,
        "cu_seqlens_k": _BOUNDS,
        "max_seqlen_q": 5,
        "max_seqlen_k": 5,
    }
    with pytest.raises(kind, match=message):
        llmkernels.attention_varlen(**{**arguments, **changes})


def test_autocast_rule_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule itself, where there is no GPU to show it on: float64 stays, all else is cast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    rows = [
        SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, to=lambda dtype: dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]
    assert api._autocast(*rows) == (torch.float16, rows[1], torch.float16)  # type: ignore[arg-type]
