"""The norms inside torch: autograd, torch.library, torch.compile, checkpointing, autocast, functorch,
errors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import llmkernels
from llmkernels import testing
from llmkernels.ops.layer_norm import api

from .layer_norm_cases import Case

OPS = ("layer_norm", "add_layer_norm", "rms_norm")


def _float64(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [
        testing.random_tensor(s, torch.float64, "cpu", i, requires_grad=True) for i, s in enumerate(shapes)
    ]


@pytest.mark.parametrize("backend", ("reference", "torch"))
def test_gradcheck(backend: str) -> None:
    """First and second derivatives against finite differences in float64."""
    x, residual, weight, bias = _float64((3, 2, 5), (3, 2, 5), (5,), (5,))

    def dropped(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return llmkernels.add_layer_norm(*tensors[:2], (5,), *tensors[2:], dropout_p=0.4, backend=backend)

    cases = (
        (lambda x, w, b: llmkernels.layer_norm(x, (5,), w, b, backend=backend), (x, weight, bias)),
        (lambda x, w: llmkernels.rms_norm(x, (5,), w, backend=backend), (x, weight)),
        (dropped, (x, residual, weight, bias)),
    )
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("op", OPS)
def test_double_backward(kernel_backend: str, device: torch.device, op: str) -> None:
    """A gradient penalty: the kernels' backward, differentiated again through the reference."""
    case = Case(op, (4, 24), dropout_p=0.3 if op == "add_layer_norm" else 0.0)

    def second_order(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = {k: v.detach().to(dtype).requires_grad_() for k, v in case.inputs(device).items()}
        torch.manual_seed(0)
        outputs = case.call(tensors, backend)
        first = torch.autograd.grad(
            sum((y * y).sum() for y in outputs), list(tensors.values()), create_graph=True
        )
        return list(torch.autograd.grad(sum((g * g).sum() for g in first), list(tensors.values())))

    expected, baseline = (second_order("reference", dtype) for dtype in (torch.float64, torch.float32))
    for name, actual, exact, own in zip(
        case.inputs(device), second_order(kernel_backend, torch.float32), expected, baseline, strict=True
    ):
        # Terms of every size cancel in a second derivative: the largest of the whole tensor sets the
        # rounding.
        magnitude = exact.abs().amax() * 24
        testing.assert_within_budget(actual, exact.cpu(), own.cpu(), name=name, magnitude=magnitude.cpu())


def _sample(device: torch.device, residual: bool, dropout: bool) -> dict[str, object]:
    case = Case("add_layer_norm" if residual else "layer_norm", (6, 40))
    tensors = {name: tensor.detach() for name, tensor in case.inputs(device).items()}
    seed = torch.tensor([123456789], device=device) if dropout else None
    return {"tensors": tensors, "seed": seed, "dropout_p": 0.25 if dropout else 0.0}


@pytest.mark.parametrize(
    "residual, dropout, rms", ((False, False, False), (False, False, True), (True, True, False))
)
def test_opcheck(backend: str, device: torch.device, residual: bool, dropout: bool, rms: bool) -> None:
    if backend == "torch":
        pytest.skip("torch's own operators are not registered by this package")
    api.dispatch.load(dict(api.KERNELS)[backend])
    sample = _sample(device, residual, dropout)
    tensors, f32 = sample["tensors"], torch.float32
    forward = torch.ops.llmkernels.layer_norm_forward.default
    backward = torch.ops.llmkernels.layer_norm_backward.default
    x, z_in, weight, bias = (tensors.get(k) for k in ("input", "residual", "weight", "bias"))
    options = (1e-5, sample["dropout_p"], rms)
    arguments = (x, z_in, weight, None if rms else bias, sample["seed"], *options, f32, f32, backend)
    torch.library.opcheck(forward, arguments)
    y, z, mean, rstd = forward(*arguments)
    wide = torch.zeros(6, 50, device=device)[:, 5:45]
    for dy in (torch.ones_like(y), wide):
        dz = torch.ones_like(y) if residual else None
        wanted = (True, f32, f32 if dropout else None, True, None if rms else f32)
        torch.library.opcheck(
            backward,
            (dy, dz, z if residual else x, weight, mean, rstd, sample["seed"], *options, *wanted, backend),
        )


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("op", OPS)
def test_compile_fullgraph(backend: str, device: torch.device, op: str, dynamic: bool) -> None:
    """One graph, the same values and gradients as eager, for one shape and for shapes that change."""
    torch._dynamo.reset()
    dropout_p = 0.0 if backend == "torch" else 0.3 if op == "add_layer_norm" else 0.0
    case = Case(op, (4, 48), dropout_p=dropout_p)
    compiled = torch.compile(
        lambda tensors: case.call(tensors, backend), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for rows in (4, 7, 9):
        tensors = Case(op, (rows, 48)).inputs(device)
        results = []
        for function in (compiled, lambda tensors: case.call(tensors, backend)):
            torch.manual_seed(1)
            outputs = function(tensors)
            gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), list(tensors.values()))
            results.append((*outputs, *gradients))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_compile_of_the_automatic_rule(device: torch.device) -> None:
    """The default call, tied weight and bias, an input that is its own residual; explain() sees the traced
    call."""
    torch._dynamo.reset()
    x = testing.random_tensor((4, 16), torch.float32, device, 0, requires_grad=True)
    weight = testing.random_tensor((16,), torch.float32, device, 1, requires_grad=True)

    def function(x: torch.Tensor, weight: torch.Tensor, backend: str | None) -> torch.Tensor:
        y, z = llmkernels.add_layer_norm(x, x, (16,), weight, weight, backend=backend)
        return y + z

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for backend in (None, "reference"):
        with llmkernels.explain() as calls:
            y = compiled(x, weight, backend)
        assert len(calls) >= 1 and calls[0].op == "add_layer_norm"
        torch.testing.assert_close(y, function(x, weight, backend))
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), (x, weight)),
            torch.autograd.grad(function(x, weight, backend).sum(), (x, weight)),
        )


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing(backend: str, device: torch.device, use_reentrant: bool) -> None:
    """The recomputed forward draws the same dropout mask."""
    case = Case("add_layer_norm", (8, 32), dropout_p=0.5)
    tensors = case.inputs(device)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(4)

        def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return case.call(dict(zip(tensors, values, strict=True)), backend)

        values = tuple(tensors.values())
        for value in values:
            value.grad = None
        outputs = checkpoint(run, *values, use_reentrant=use_reentrant) if checkpointed else run(*values)
        sum(y.square().sum() for y in outputs).backward()
        results.append([*outputs, *(value.grad.clone() for value in values)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_autocast_on_the_cpu_changes_nothing(backend: str) -> None:
    """Neither norm is in autocast's lists on the CPU: bf16 stays bf16, float32 stays float32."""
    if torch.cuda.is_available() and backend in ("triton", "cuda"):
        pytest.skip("the kernels take CUDA tensors here")
    for dtype in (torch.bfloat16, torch.float32):
        case = Case("layer_norm", (4, 16), dtype=dtype, parameter_dtype=torch.float32)
        tensors = case.inputs("cpu")
        expected = case.call(tensors, backend)[0]
        with torch.autocast("cpu", torch.bfloat16):
            y = case.call(tensors, backend)[0]
        assert y.dtype == dtype and torch.equal(y, expected)


def test_cuda_autocast_asks_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule itself, where there is no GPU to show it on."""
    for enabled, dtype, expected in (
        (True, torch.bfloat16, torch.float32),
        (False, torch.bfloat16, torch.bfloat16),
        (True, torch.float64, torch.float64),
    ):
        monkeypatch.setattr(
            torch, "is_autocast_enabled", lambda kind, enabled=enabled: enabled and kind == "cuda"
        )
        assert api._output_dtype(SimpleNamespace(is_cuda=True, dtype=dtype)) is expected
        assert api._output_dtype(SimpleNamespace(is_cuda=False, dtype=dtype)) is dtype


@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_float32_output_of_half_rows(
    backend: str, device: torch.device, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autocast asks for: half-precision rows in, float32 out, without a cast of the input."""
    if backend == "torch":
        pytest.skip("torch casts the input")
    case = Case(op, (4, 100), dtype=torch.bfloat16)
    tensors = case.inputs(device)
    monkeypatch.setattr(api, "_output_dtype", lambda input: torch.float32)
    y = case.call(tensors, backend)[0]
    wide = {name: tensor.detach().cpu().float() for name, tensor in tensors.items()}
    exact = case.torch_call({name: tensor.double() for name, tensor in wide.items()}, None)[0]
    testing.assert_within_budget(y, exact, case.torch_call(wide, None)[0], name=op)
    dy = testing.random_tensor((4, 100), torch.float32, device, 3)
    assert torch.autograd.grad(y, tensors["input"], dy)[0].dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast of CUDA tensors")
@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_autocast_on_cuda_gives_float32(backend: str, op: str) -> None:
    """Both norms are in CUDA autocast's float32 list; the kernels write float32 without casting the input
    first."""
    case = Case(op, (4, 64), dtype=torch.bfloat16)
    tensors = case.inputs("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = case.call(tensors, backend)[0]
        own = case.torch_call(tensors, None)[0]
    assert y.dtype == own.dtype == torch.float32
    testing.assert_within_budget(
        y, case.torch_call({k: v.double() for k, v in tensors.items()}, None)[0], own, name=op
    )
    dx = torch.autograd.grad(y.sum(), tensors["input"])[0]
    assert dx.dtype == torch.bfloat16


@pytest.mark.parametrize("op", OPS)
def test_functorch_falls_back_with_a_reason(device: torch.device, op: str) -> None:
    case = Case(op, (5, 3, 16))
    tensors = {name: tensor.detach() for name, tensor in case.inputs(device).items()}
    parameters = {name: tensors[name] for name in ("weight", "bias") if name in tensors}
    rows = {name: tensor for name, tensor in tensors.items() if name not in parameters}

    def one(rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return case.call({**rows, **parameters}, None)[0]

    with llmkernels.explain() as calls, llmkernels.use_backend("triton"):
        y = torch.vmap(one)(rows)
    assert calls[0].backend == "torch"
    assert any("functorch" in reason for _, reasons in calls[0].passed_over for reason in reasons)
    torch.testing.assert_close(y, one(rows))
    gradient = torch.func.grad(lambda rows: one(rows).square().sum())(rows)
    assert gradient["input"].shape == (5, 3, 16)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.vmap(lambda rows: case.call({**rows, **parameters}, "reference")[0])(rows)


@pytest.mark.parametrize("op", OPS)
def test_batched_gradients(backend: str, device: torch.device, op: str) -> None:
    """Many gradients at once: vmap over a backward, which kernels can't be under."""
    tensors = Case(op, (3, 8)).inputs(device)
    outputs = Case(op, (3, 8)).call(tensors, backend)
    leaves = list(tensors.values())
    many = tuple(testing.random_tensor((4, *y.shape), torch.float32, device, 9) for y in outputs)
    together = torch.autograd.grad(outputs, leaves, many, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(outputs, leaves, one, retain_graph=True) for one in zip(*many, strict=True)]
    for actual, *expected in zip(together, *each, strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("preferred", ("reference", "triton"))
def test_functorch_inside_compile(device: torch.device, preferred: str) -> None:
    """Transforms that torch.compile traces: the kernels, which have no rule for them, would be constants."""
    torch._dynamo.reset()
    x = testing.random_tensor((2, 3, 8), torch.float32, device, 0)
    weight = testing.random_tensor((8,), torch.float32, device, 1, requires_grad=True)

    def functions(backend: str | None) -> list[torch.Tensor]:
        def norm(x: torch.Tensor) -> torch.Tensor:
            return llmkernels.layer_norm(x, (8,), weight, backend=backend)

        return [
            torch.func.grad(lambda x: norm(x).sin().sum())(x),
            torch.func.vmap(norm)(x),
        ]

    with llmkernels.use_backend(preferred):
        found = torch.compile(functions, fullgraph=True, backend="aot_eager")(None)
    for actual, expected in zip(found, functions("torch"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_jit_trace_goes_to_torch() -> None:
    """The tracer sees no kernel: it would record the outputs as constants."""
    first, second = (testing.random_tensor((4, 8), torch.float32, "cpu", seed) for seed in range(2))
    with llmkernels.use_backend("reference"), torch.no_grad():
        traced = torch.jit.trace(lambda x: llmkernels.layer_norm(x, (8,)), first)
        torch.testing.assert_close(traced(second), F.layer_norm(second, (8,)))
        with pytest.raises(RuntimeError, match="torch.jit.trace"):
            torch.jit.trace(lambda x: llmkernels.layer_norm(x, (8,), backend="reference"), first)


def test_nested_tensor_goes_to_torch() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    weight, bias = torch.randn(8), torch.randn(8)
    found = llmkernels.layer_norm(nested, (8,), weight, bias)
    for actual, expected in zip(
        found.unbind(), F.layer_norm(nested, (8,), weight, bias).unbind(), strict=True
    ):
        assert torch.equal(actual, expected)


def test_lazily_negated_tensors(backend: str, device: torch.device) -> None:
    """The imaginary part of a conjugate lies in memory with the other sign."""
    x, weight, dy = (
        testing.random_tensor(s, torch.float32, device, i) for i, s in enumerate(((4, 8), (8,), (4, 8)))
    )

    def run(negated, backend: str) -> list[torch.Tensor]:
        leaves = [negated(x).detach().requires_grad_(), negated(weight).detach().requires_grad_()]
        y = llmkernels.layer_norm(leaves[0], (8,), leaves[1], backend=backend)
        return [y, *torch.autograd.grad(y, leaves, negated(dy))]

    for actual, expected in zip(run(torch._neg_view, backend), run(torch.neg, "torch"), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("compiled", (False, True))
def test_outputs_take_in_place_operations(backend: str, device: torch.device, compiled: bool) -> None:
    """As torch's: y is not saved; z is, which backward notices; without a graph both are plain tensors."""
    torch._dynamo.reset()
    x, residual = (
        testing.random_tensor((2, 3, 8), torch.float32, device, i, requires_grad=True) for i in range(2)
    )

    def function(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y, z = llmkernels.add_layer_norm(x, residual, (8,), backend=backend)
        return llmkernels.layer_norm(x, (8,), backend=backend).relu_() + y.relu_() + z

    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    z = x + residual
    expected = F.layer_norm(x, (8,)).relu() + F.layer_norm(z, (8,)).relu() + z
    for actual, own in zip(
        torch.autograd.grad(run(x, residual).square().sum(), (x, residual)),
        torch.autograd.grad(expected.square().sum(), (x, residual)),
        strict=True,
    ):
        torch.testing.assert_close(actual, own)
    if compiled:
        return
    y, z = llmkernels.add_layer_norm(x, residual, (8,), backend=backend)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        y, _ = llmkernels.add_layer_norm(x, residual, (8,), backend=backend)
    y.mul_(x)
    assert y.requires_grad


@pytest.mark.parametrize("compiler", (None, "aot_eager", "inductor"))
@pytest.mark.parametrize("shape", ((6, 8), (2, 3, 8)))
def test_gradients_share_no_memory(
    backend: str, device: torch.device, shape: tuple[int, ...], compiler: str | None
) -> None:
    """Without dropout one tensor is both gradients; two backward passes have to add up in each of the two."""
    x, residual = (
        testing.random_tensor(shape, torch.float32, device, i, requires_grad=True) for i in range(2)
    )

    def function(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y, z = llmkernels.add_layer_norm(x, residual, (8,), backend=backend)
        return z.square().sum() + 0 * y.sum()

    if compiler is not None:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend=compiler)
    for _ in range(2):
        function(x, residual).backward()
    for leaf in (x, residual):
        torch.testing.assert_close(leaf.grad, 4 * (x + residual))
    assert x.grad.data_ptr() != residual.grad.data_ptr()


def test_unused_norm_of_a_constant_row(backend: str, device: torch.device) -> None:
    """With eps 0 the norm is NaN, and only z is used: its gradient is of no NaN."""
    x, residual = (torch.ones(2, 8, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(8, device=device, requires_grad=True)
    _, z = llmkernels.add_layer_norm(x, residual, (8,), weight, eps=0.0, backend=backend)
    z.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, torch.ones_like(x))
    assert weight.grad is None


@pytest.mark.parametrize("kind", (np.float64, np.float32))
def test_numbers_of_numpy(backend: str, kind: type) -> None:
    x = torch.randn(2, 8)
    y, z = llmkernels.add_layer_norm(x, x, (8,), eps=kind(0.5), dropout_p=kind(0.0), backend=backend)
    torch.testing.assert_close(y, F.layer_norm(z, (8,), eps=0.5))


def test_forward_mode_falls_back(device: torch.device) -> None:
    import torch.autograd.forward_ad as fwAD

    x = testing.random_tensor((3, 8), torch.float32, device, 0)
    with fwAD.dual_level(), llmkernels.use_backend("reference"):
        dual = fwAD.make_dual(x, torch.ones_like(x))
        tangent = fwAD.unpack_dual(llmkernels.layer_norm(dual, (8,))).tangent
    # The norm does not move when all of its input does.
    assert tangent is not None and tangent.abs().max() < 1e-4


def test_saved_memory(backend: str, device: torch.device) -> None:
    """Backward keeps the rows once and two float32 statistics a row: no normalised rows, no dropout mask."""
    if backend == "torch":
        pytest.skip("torch saves a dropout mask")
    case = Case("add_layer_norm", (32, 64), dtype=torch.bfloat16, dropout_p=0.5)
    tensors = case.inputs(device)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.call(tensors, backend)
    rows, statistics, weight, seed = 32 * 64 * 2, 2 * 32 * 4, 64 * 2, 8
    assert sum(saved.values()) <= rows + statistics + weight + seed


def test_fx_traces_one_call() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return llmkernels.layer_norm(x, (8,))

    graph = torch.fx.Tracer().trace(function)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [llmkernels.layer_norm]


def test_tensor_subclass_goes_to_torch() -> None:
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(2, 8).as_subclass(Tagged)
    assert type(llmkernels.layer_norm(x, (8,))) is Tagged
    with pytest.raises(RuntimeError, match="subclass"):
        llmkernels.layer_norm(x, (8,), backend="reference")


def test_rms_norm_default_eps(backend: str, device: torch.device) -> None:
    """torch's eps=None is the epsilon of float32 for half-precision rows too."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = testing.random_tensor((4, 32), dtype, device, 0, scale=1e-4)
        y = llmkernels.rms_norm(x, (32,), backend=backend)
        own = F.rms_norm(x.cpu(), (32,))
        exact = F.rms_norm(x.cpu().double(), (32,), eps=torch.finfo(torch.float32).eps)
        testing.assert_within_budget(y, exact, own, name="rms_norm")


# Bad input: the kind of error torch raises, the argument's name, what was expected and what came.

X = torch.zeros(2, 3, 8)
BAD = {
    "no tensor": (lambda f: f("x", (8,)), TypeError, "input: expected a torch.Tensor, got str"),
    "integers": (
        lambda f: f(X.long(), (8,)),
        RuntimeError,
        "input: expected a floating-point dtype, got torch.int64",
    ),
    "an int shape": (lambda f: f(X, 8), TypeError, "normalized_shape: expected a tuple of ints, got int"),
    "a float shape": (lambda f: f(X, (8.0,)), TypeError, "normalized_shape: .* element of type float"),
    "an empty shape": (
        lambda f: f(X, ()),
        RuntimeError,
        r"normalized_shape: expected at least one dimension, got \[\]",
    ),
    "another shape": (
        lambda f: f(X, (3,)),
        RuntimeError,
        r"input: expected a shape of \[\*, 3\], got \[2, 3, 8\]",
    ),
    "too many": (
        lambda f: f(X, (1, 2, 3, 8)),
        RuntimeError,
        r"input: expected a shape of \[\*, 1, 2, 3, 8\]",
    ),
    "weight's shape": (
        lambda f: f(X, (8,), torch.ones(4)),
        RuntimeError,
        r"weight: expected the shape of normalized_shape \[8\], got \[4\]",
    ),
    "weight's dtype": (
        lambda f: f(X, (8,), torch.ones(8).double()),
        RuntimeError,
        "weight: expected torch.float32 .as input., got torch.float64",
    ),
    "weight's dtype beside bf16": (
        lambda f: f(X.bfloat16(), (8,), torch.ones(8).half()),
        RuntimeError,
        "weight: expected torch.bfloat16 .as input. or torch.float32, got torch.float16",
    ),
    "weight's device": (
        lambda f: f(X, (8,), torch.ones(8, device="meta")),
        RuntimeError,
        "weight: expected device cpu .as input., got meta",
    ),
    "weight's type": (lambda f: f(X, (8,), 1.0), TypeError, "weight: expected a torch.Tensor, got float"),
    "negative eps": (lambda f: f(X, (8,), eps=-1e-5), ValueError, "eps: expected a number >= 0, got -1e-05"),
    "NaN eps": (lambda f: f(X, (8,), eps=math.nan), ValueError, "eps: expected a number >= 0, got nan"),
    "eps's type": (lambda f: f(X, (8,), eps="1"), TypeError, "eps: expected a number, got str"),
    "unknown backend": (
        lambda f: f(X, (8,), backend="cudnn"),
        ValueError,
        "backend: expected one of .*got 'cudnn'",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("op", OPS)
def test_bad_input(op: str, bad: str) -> None:
    call, kind, message = BAD[bad]
    if op == "rms_norm" and "dtype" in bad:
        pytest.skip("torch's rms_norm takes weights of any floating dtype")

    def function(input: object, normalized_shape: object, *arguments: object, **options: object) -> object:
        if op == "add_layer_norm":
            return llmkernels.add_layer_norm(input, input, normalized_shape, *arguments, **options)  # type: ignore
        return getattr(llmkernels, op)(input, normalized_shape, *arguments, **options)

    with pytest.raises(kind, match=f"{op}: {message}"):
        call(function)


@pytest.mark.parametrize(
    "arguments, options, kind, message",
    (
        ((X, X[:1]), {}, RuntimeError, r"residual: expected the shape of input \[2, 3, 8\], got \[1, 3, 8\]"),
        ((X, None), {}, TypeError, "residual: expected a torch.Tensor, got NoneType"),
        ((X, X.to("meta")), {}, RuntimeError, "residual: expected device cpu .as input., got meta"),
        (
            (X, X),
            {"dropout_p": 1.5},
            ValueError,
            "dropout_p: expected a probability between 0 and 1, got 1.5",
        ),
        ((X, X), {"dropout_p": "a"}, TypeError, "dropout_p: expected a number, got str"),
        (
            (X, X),
            {"residual_dtype": torch.int8},
            TypeError,
            "residual_dtype: expected a floating-point torch.dtype",
        ),
    ),
)
def test_bad_input_of_add_layer_norm(arguments, options, kind, message) -> None:
    with pytest.raises(kind, match=f"add_layer_norm: {message}"):
        llmkernels.add_layer_norm(*arguments, (8,), **options)


def test_bias_of_another_dtype() -> None:
    with pytest.raises(RuntimeError, match="bias: expected torch.float32 .as weight., got torch.bfloat16"):
        llmkernels.layer_norm(X.bfloat16(), (8,), torch.ones(8), torch.ones(8).bfloat16())


def test_rms_norm_refuses_integer_weights() -> None:
    with pytest.raises(RuntimeError, match="weight: expected a floating-point dtype, got torch.int64"):
        llmkernels.rms_norm(X, (8,), torch.ones(8, dtype=torch.int64))


def test_float64_weight_goes_to_torch(kernel_backend: str) -> None:
    weight = torch.ones(8, dtype=torch.float64)
    assert llmkernels.rms_norm(X, (8,), weight).dtype == torch.float32
    with pytest.raises(RuntimeError, match="weight is torch.float64"):
        llmkernels.rms_norm(X, (8,), weight, backend=kernel_backend)


def test_backend_that_cannot_serve(kernel_backend: str) -> None:
    """Every reason is in the message, and a preference falls back where an order raises."""
    x = torch.zeros(2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"got '{kernel_backend}': input is torch.float64"):
        llmkernels.layer_norm(x, (8,), backend=kernel_backend)
    with llmkernels.use_backend(kernel_backend), llmkernels.explain() as calls:
        llmkernels.layer_norm(x, (8,))
    assert calls[0].backend == "torch" and "float64" in str(calls)
