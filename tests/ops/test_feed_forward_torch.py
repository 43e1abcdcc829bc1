"""The feed-forward inside torch: autograd, torch.library, torch.compile, checkpointing, autocast, functorch,
errors."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

import llmkernels
from llmkernels import dispatch, testing
from llmkernels.ops.feed_forward import api
from llmkernels.ops.feed_forward.call import ACTIVATIONS, FeedForwardCall

from .feed_forward_cases import Case

OPS = ("linear_activation", "feed_forward")


def _float64(case: Case) -> dict[str, torch.Tensor]:
    return {n: t.detach().double().requires_grad_() for n, t in case.inputs("cpu").items()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel, recompute", (("reference", False), ("reference", True), ("torch", True)))
def test_gradcheck(kernel: str, activation: str, recompute: bool) -> None:
    """First and second derivatives against finite differences in float64."""
    case = Case(
        shape=(3, 4), hidden=3, out=2, activation=activation, dropout_p=0.3, recompute=recompute, seed=1
    )
    tensors = _float64(case)

    def function(*values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return case.call(dict(zip(tensors, values, strict=True)), kernel)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("kernel", ("reference", "torch"))
def test_gradcheck_of_linear_activation(kernel: str) -> None:
    case = Case("linear_activation", (3, 4), 3, activation="geglu")
    tensors = _float64(case)

    def function(*values: torch.Tensor) -> torch.Tensor:
        return case.call(dict(zip(tensors, values, strict=True)), kernel)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize(
    "activation, recompute, frozen",
    (
        *(("gelu", False, ()), ("gelu", True, ()), ("swiglu", False, ()), ("relu", False, ())),
        *(("gelu", False, ("weight1",)), ("swiglu", False, ("input", "bias1")), ("gelu", False, ("bias1",))),
        *(("gelu", True, ("weight1",)), ("swiglu", True, ("input", "weight1", "bias1"))),
        ("gelu", False, ("input", "weight1", "bias1")),
    ),
)
def test_double_backward(
    kernel_backend: str, device: torch.device, activation: str, recompute: bool, frozen: tuple[str, ...]
) -> None:
    """A gradient penalty: the kernels' backward, differentiated again through the reference, also where
    nothing but the pre-activation is there to differentiate through."""
    case = Case(shape=(6, 20), hidden=24, activation=activation, recompute=recompute)

    def second_order(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = {
            name: tensor.detach().to(dtype).requires_grad_(name not in frozen)
            for name, tensor in case.inputs(device).items()
        }
        leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
        y = case.call(tensors, backend)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    # torch's own, since a graph that is cut would be cut for the reference, too.
    expected, baseline = (second_order("torch", dtype) for dtype in (torch.float64, torch.float32))
    names = [name for name in case.inputs(device) if name not in frozen]
    for name, actual, exact, own in zip(
        names, second_order(kernel_backend, torch.float32), expected, baseline, strict=True
    ):
        # Terms of every size cancel in a second derivative: the largest of the whole tensor sets the
        # rounding.
        magnitude = exact.abs().amax() * 24
        testing.assert_within_budget(actual, exact.cpu(), own.cpu(), name=name, magnitude=magnitude.cpu())


def test_second_derivative_alone(kernel_backend: str, device: torch.device) -> None:
    """A backward through the first derivative only, after which the output's own gradient still comes."""
    results = []
    for backend in (kernel_backend, "torch"):
        tensors = Case().inputs(device)
        y = Case().call(tensors, backend)
        (dx,) = torch.autograd.grad(y.sum(), tensors["input"], create_graph=True)
        first = torch.autograd.grad(dx.square().sum(), tensors["bias1"], retain_graph=True)
        results.append((*first, *torch.autograd.grad(y.sum() + dx.sum(), tensors["weight1"])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("activation, dropout", (("gelu", False), ("swiglu", True)))
@pytest.mark.parametrize("backend", ("reference", "triton", "cuda"), indirect=True)
def test_opcheck(backend: str, device: torch.device, activation: str, dropout: bool) -> None:
    dispatch.load(dict(api.KERNELS)[backend])
    case = Case(shape=(6, 24), activation=activation)
    x, weight1, bias1, weight2, _ = (tensor.detach() for tensor in case.inputs(device).values())
    seed = torch.tensor([123456789], device=device) if dropout else None
    settings = (seed, activation, 0.25 if dropout else 0.0)
    forward = torch.ops.llmkernels.linear_activation_forward.default
    backward = torch.ops.llmkernels.linear_activation_backward.default
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(forward, (x, weight1, bias1, *settings, *wanted, backend))
    torch.library.opcheck(forward, (x, weight1, None, *settings, True, True, backend))
    _, pre = forward(x, weight1, bias1, *settings, True, True, backend)
    dy = torch.ones(6, case.out, device=device)
    for wanted in ((True, True, True), (True, False, False), (False, False, True)):
        torch.library.opcheck(backward, (dy, weight2, pre, *settings, *wanted, backend))
    dy = torch.zeros(6, 50, device=device)[:, 5:45]
    torch.library.opcheck(backward, (dy, None, pre, None, activation, 0.0, True, False, True, backend))


@pytest.mark.parametrize(
    "op, recompute, dynamic",
    (
        ("linear_activation", False, False),
        ("feed_forward", False, True),
        ("feed_forward", True, False),
    ),
)
def test_compile_fullgraph(
    backend: str, device: torch.device, op: str, recompute: bool, dynamic: bool
) -> None:
    """One graph, the same values and gradients as eager, for one shape and for shapes that change."""
    torch._dynamo.reset()
    dropout_p = 0.3 if op == "feed_forward" and backend != "torch" else 0.0
    case = Case(op, (2, 3, 24), activation="swiglu", dropout_p=dropout_p, recompute=recompute)
    compiled = torch.compile(
        lambda tensors: case.call(tensors, backend), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for rows in (3, 5, 8) if dynamic else (3,):
        tensors = dataclasses.replace(case, shape=(2, rows, 24)).inputs(device)
        results = []
        for function in (compiled, lambda tensors: case.call(tensors, backend)):
            torch.manual_seed(1)
            y = function(tensors)
            results.append((y, *torch.autograd.grad(y.square().sum(), list(tensors.values()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recompute", (False, True))
def test_compiled_graphs_call_the_kernels(device: torch.device, recompute: bool) -> None:
    """One kernel forward, one backward (not the reference's many operations), and with recompute the forward
    once more, behind a graph that keeps the input alone."""
    torch._dynamo.reset()
    graphs: dict[str, torch.fx.Graph] = {}

    def keep(name: str):
        def compiler(module: torch.fx.GraphModule, _: object) -> object:
            graphs[name] = module.graph
            return make_boxed_func(module.forward)

        return compiler

    case = Case(shape=(7, 24), hidden=40, recompute=recompute)
    compiler = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    tensors = case.inputs(device)
    torch.compile(lambda: case.call(tensors, "reference"), backend=compiler)().sum().backward()
    calls = {
        name: [str(n.target).split(".")[1] for n in graph.nodes if "llmkernels" in str(n.target)]
        for name, graph in graphs.items()
    }
    forward, backward = "linear_activation_forward", "linear_activation_backward"
    assert calls["forward"] == [forward]
    assert calls["backward"] == ([forward, backward] if recompute else [backward])
    saved = {tuple(node.meta["val"].shape) for node in graphs["forward"].output_node().all_input_nodes}
    assert ((7, 40) in saved) == (not recompute)


def test_compile_by_inductor(backend: str, device: torch.device) -> None:
    """The compiler of torch itself, which fuses around the kernels; frozen first layer, tied biases."""
    torch._dynamo.reset()
    case = Case(shape=(5, 16), hidden=16, out=16)
    tensors = case.inputs(device)
    tensors["bias2"] = tensors["bias1"]
    tensors["weight2"] = tensors["weight1"]

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = llmkernels.feed_forward(x, weight, bias, weight, bias, backend=backend)
        return llmkernels.feed_forward(y, weight.detach(), None, weight, None, backend=backend).sin()

    leaves = [tensors["input"], tensors["weight1"], tensors["bias1"]]
    results = []
    for run in (torch.compile(function, fullgraph=True), function):
        y = run(*leaves)
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_of_the_automatic_rule(device: torch.device) -> None:
    """The default call; explain() sees the traced one."""
    torch._dynamo.reset()
    case = Case(dropout_p=0.0)
    tensors = case.inputs(device)
    compiled = torch.compile(lambda tensors: case.call(tensors, None), fullgraph=True, backend="aot_eager")
    with llmkernels.explain() as calls:
        y = compiled(tensors)
    assert len(calls) >= 1 and calls[0].op == "feed_forward" and calls[0].backend == "torch"
    torch.testing.assert_close(y, case.call(tensors, None))


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing(
    backend: str, device: torch.device, use_reentrant: bool, recompute: bool
) -> None:
    """The recomputed forward draws the same dropout mask."""
    case = Case(dropout_p=0.5, recompute=recompute)
    tensors = case.inputs(device)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(4)

        def run(*values: torch.Tensor) -> torch.Tensor:
            return case.call(dict(zip(tensors, values, strict=True)), backend)

        values = tuple(tensors.values())
        for value in values:
            value.grad = None
        y = checkpoint(run, *values, use_reentrant=use_reentrant) if checkpointed else run(*values)
        y.square().sum().backward()
        results.append([y, *(value.grad.clone() for value in values)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("op", OPS)
def test_autocast(backend: str, device: torch.device, op: str, dtype: torch.dtype) -> None:
    """F.linear's rule: float32 parameters, the work in autocast's dtype, gradients in float32; the backward
    inside the block gives what it gives outside."""
    case = Case(op, (6, 24), activation="geglu")
    tensors = case.inputs(device)
    cast = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    expected = case.call(cast, backend)
    dy = case.output_gradient(expected)
    gradients = torch.autograd.grad(expected, list(cast.values()), dy)
    with torch.autocast(device.type, dtype):
        y = case.call(tensors, backend)
        inside = torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True)
    assert y.dtype == dtype and torch.equal(y, expected)
    for found in (inside, torch.autograd.grad(y, list(tensors.values()), dy)):
        for actual, wanted in zip(found, gradients, strict=True):
            assert actual.dtype == torch.float32
            assert torch.equal(actual, wanted.float())


def test_autocast_takes_mixed_dtypes_but_float64(backend: str, device: torch.device) -> None:
    case = Case()
    tensors = case.inputs(device)
    tensors["input"] = tensors["input"].detach().bfloat16()
    with pytest.raises(RuntimeError, match="weight1: expected torch.bfloat16 .as input., got torch.float32"):
        case.call(tensors, backend)
    with torch.autocast(device.type, torch.bfloat16):
        assert case.call(tensors, backend).dtype == torch.bfloat16
        tensors["weight1"] = tensors["weight1"].detach().double()
        with pytest.raises(RuntimeError, match="weight1: expected .*, got torch.float64"):
            case.call(tensors, backend)


def test_float32_stays_float32_under_autocast_that_is_off(backend: str, device: torch.device) -> None:
    tensors = Case().inputs(device)
    with torch.autocast(device.type, torch.bfloat16), torch.autocast(device.type, enabled=False):
        assert torch.equal(Case().call(tensors, backend), Case().call(tensors, backend))
        assert Case().call(tensors, backend).dtype == torch.float32


@pytest.mark.parametrize("op", OPS)
def test_functorch_falls_back_with_a_reason(device: torch.device, op: str) -> None:
    case = Case(op, (5, 3, 24), recompute=True)
    tensors = {name: tensor.detach() for name, tensor in case.inputs(device).items()}
    x = tensors.pop("input")

    def one(x: torch.Tensor) -> torch.Tensor:
        return case.call({"input": x, **tensors}, None)

    with llmkernels.explain() as calls, llmkernels.use_backend("reference"):
        y = torch.vmap(one)(x)
    assert calls[0].backend == "torch"
    assert any("functorch" in reason for _, reasons in calls[0].passed_over for reason in reasons)
    torch.testing.assert_close(y, one(x))
    assert torch.func.grad(lambda x: one(x).square().sum())(x).shape == x.shape
    with pytest.raises(RuntimeError, match="functorch"):
        torch.vmap(lambda x: case.call({"input": x, **tensors}, "reference"))(x)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("by", ("is_grads_batched", "vmap"))
def test_batched_gradients(backend: str, device: torch.device, by: str, recompute: bool) -> None:
    """Several output gradients in one backward, as torch.autograd.functional.jacobian(vectorize=True) has
    them."""
    case = Case(activation="swiglu", recompute=recompute)
    tensors = case.inputs(device)
    leaves = list(tensors.values())
    y = case.call(tensors, backend)
    batch = torch.linspace(-1, 1, 3 * y.numel(), device=device).view(3, *y.shape)

    def one(dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    if by == "vmap":
        found = torch.vmap(one)(batch)
    else:
        found = torch.autograd.grad(y, leaves, batch, retain_graph=True, is_grads_batched=True)
    for actual, *expected in zip(found, *map(one, batch), strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


def test_functorch_inside_compile(device: torch.device) -> None:
    """Transforms that torch.compile traces: the kernels, which have no rule for them, would be constants."""
    torch._dynamo.reset()
    tensors = Case(shape=(2, 3, 24)).inputs(device)
    x = tensors.pop("input").detach()

    def functions(backend: str | None) -> list[torch.Tensor]:
        def one(x: torch.Tensor) -> torch.Tensor:
            return llmkernels.feed_forward(x, **tensors, backend=backend)

        return [torch.func.grad(lambda x: one(x).sin().sum())(x), torch.func.vmap(one)(x)]

    with llmkernels.use_backend("reference"):
        found = torch.compile(functions, fullgraph=True, backend="aot_eager")(None)
    for actual, expected in zip(found, functions("torch"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_forward_mode_falls_back(device: torch.device) -> None:
    import torch.autograd.forward_ad as fwAD

    tensors = {name: tensor.detach() for name, tensor in Case().inputs(device).items()}
    x = tensors.pop("input")
    with fwAD.dual_level(), llmkernels.use_backend("reference"):
        dual = fwAD.make_dual(x, torch.ones_like(x))
        assert fwAD.unpack_dual(llmkernels.feed_forward(dual, **tensors)).tangent is not None


def test_jit_trace_goes_to_torch() -> None:
    tensors = {name: tensor.detach() for name, tensor in Case().inputs("cpu").items()}
    first, second = tensors.pop("input"), torch.randn(5, 24)
    with llmkernels.use_backend("reference"), torch.no_grad():
        traced = torch.jit.trace(lambda x: llmkernels.feed_forward(x, **tensors), first)
        torch.testing.assert_close(traced(second), llmkernels.feed_forward(second, **tensors))


def test_nested_tensor_goes_to_torch() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    weight = torch.randn(6, 8)
    found = llmkernels.linear_activation(nested, weight)
    for actual, rows in zip(found.unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(actual, F.gelu(F.linear(rows, weight)))


def test_nested_tensor_of_an_asked_backend_is_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(RuntimeError, match="got 'reference': the input is a nested tensor"):
        llmkernels.linear_activation(nested, torch.randn(6, 8), backend="reference")
    with pytest.raises(ValueError, match="got 'cublas'"):
        llmkernels.linear_activation(nested, torch.randn(6, 8), backend="cublas")
    with llmkernels.explain() as calls, llmkernels.use_backend("reference"):
        llmkernels.linear_activation(nested, torch.randn(6, 8))
    assert [call.backend for call in calls] == ["torch"] and "nested" in str(calls)


@pytest.mark.parametrize("kernel", ("reference", "torch"))
def test_meta_tensors(kernel: str) -> None:
    """Shapes without memory, forward and backward; no Triton kernel can run there."""
    case = Case(shape=(2, 3, 24), activation="swiglu", dropout_p=0.2)
    tensors = {name: t.detach().to("meta").requires_grad_() for name, t in case.inputs("cpu").items()}
    y = case.call(tensors, kernel)
    gradients = torch.autograd.grad(y.sum(), list(tensors.values()))
    assert y.is_meta and y.shape == (2, 3, case.out)
    assert [g.shape for g in gradients] == [t.shape for t in tensors.values()]


def test_tensor_subclass_goes_to_torch() -> None:
    class Tagged(torch.Tensor):
        pass

    x, weight = torch.randn(2, 8).as_subclass(Tagged), torch.randn(4, 8)
    assert type(llmkernels.linear_activation(x, weight)) is Tagged
    with pytest.raises(RuntimeError, match="subclass"):
        llmkernels.linear_activation(x, weight, backend="reference")


_LOAD_AND_RUN = """
import sys
import torch
import llmkernels

program, expected = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(torch.ones(3, 24)), expected)
"""


def test_exported_program_runs_in_a_new_process(tmp_path: pathlib.Path) -> None:
    """Where no call has loaded the kernels yet."""
    pytest.importorskip("triton")
    tensors = {name: tensor.detach() for name, tensor in Case().inputs("cpu").items()}

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return llmkernels.feed_forward(**{**tensors, "input": x}, backend="triton")

    program = torch.export.export(Block(), (torch.ones(3, 24),), strict=True)
    assert "llmkernels.linear_activation_forward" in str(program.graph)
    files = [str(tmp_path / name) for name in ("program.pt2", "expected.pt")]
    torch.export.save(program, files[0])
    torch.save(Block()(torch.ones(3, 24)), files[1])
    subprocess.run([sys.executable, "-c", _LOAD_AND_RUN, *files], check=True)


@pytest.mark.parametrize("op", OPS)
def test_fx_traces_one_call(op: str) -> None:
    tensors = [tensor.detach() for tensor in Case(op).inputs("cpu").values()]

    def function(x: torch.Tensor) -> torch.Tensor:
        return getattr(llmkernels, op)(x, *tensors[1:])

    graph = torch.fx.Tracer().trace(function)
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [getattr(llmkernels, op)]


def test_lazily_negated_tensors(backend: str, device: torch.device) -> None:
    """The imaginary part of a conjugate lies in memory with the other sign."""
    values = list(Case().inputs(device).values())

    def run(negated, backend: str) -> list[torch.Tensor]:
        leaves = [negated(value.detach()).detach().requires_grad_() for value in values]
        y = llmkernels.feed_forward(*leaves, backend=backend)
        dy = negated(torch.linspace(-1, 1, y.numel(), device=device).view(y.shape))
        return [y, *torch.autograd.grad(y, leaves, dy)]

    for actual, expected in zip(run(torch._neg_view, backend), run(torch.neg, "torch"), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("compiled", (False, True))
def test_output_takes_in_place_operations(
    backend: str, device: torch.device, op: str, compiled: bool
) -> None:
    torch._dynamo.reset()
    case = Case(op, (2, 3, 24))
    tensors = case.inputs(device)
    leaves = list(tensors.values())
    run = lambda: case.call(tensors, backend).mul_(2).relu_()  # noqa: E731
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    expected = (case.call(tensors, "torch") * 2).relu()
    for actual, own in zip(
        torch.autograd.grad(run().square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, own)


def test_gradients_share_no_memory(backend: str, device: torch.device) -> None:
    """Two backward passes add up in each .grad, in the layout of the parameter."""
    tensors = Case(weight_layout="transposed").inputs(device)
    for _ in range(2):
        Case().call(tensors, backend).sum().backward()
    single = torch.autograd.grad(Case().call(tensors, backend).sum(), list(tensors.values()))
    assert len({tensor.grad.data_ptr() for tensor in tensors.values()}) == len(tensors)
    for tensor, once in zip(tensors.values(), single, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * once)
        assert once.stride() == tensor.stride() or backend == "torch"


@pytest.mark.parametrize("kind", (np.float64, np.float32))
def test_numbers_of_numpy(backend: str, device: torch.device, kind: type) -> None:
    tensors = Case().inputs(device)
    y = llmkernels.feed_forward(**tensors, dropout_p=kind(0.0), backend=backend)
    assert torch.equal(y, Case().call(tensors, backend))


# Which backend, and bad input


def test_automatic_rule_is_torch_until_timed() -> None:
    """On a GPU, too: nothing of ours has been timed against torch."""
    call = FeedForwardCall("feed_forward", torch.device("cuda"), torch.bfloat16)
    with llmkernels.explain() as calls:
        assert dispatch.choose(call, api.KERNELS, api.AUTOMATIC, None) == "torch"
    assert calls[0].reason == "no kernel of ours has been timed against torch's for such a call yet"


def test_float64_goes_to_torch() -> None:
    pytest.importorskip("triton")
    tensors = _float64(Case())
    assert Case().call(tensors, None).dtype == torch.float64
    with pytest.raises(RuntimeError, match="got 'triton': input is torch.float64"):
        Case().call(tensors, "triton")
    with llmkernels.use_backend("triton"), llmkernels.explain() as calls:
        Case().call(tensors, None)
    assert calls[0].backend == "torch" and "float64" in str(calls)


X, W1, B1, W2, B2 = (t.detach() for t in Case(shape=(2, 8), hidden=12, out=4).inputs("cpu").values())
BAD = {
    "no tensor": ((None, W1, B1, W2, B2), {}, TypeError, "input: expected a torch.Tensor, got NoneType"),
    "integers": (
        (X.long(), W1, B1, W2, B2),
        {},
        RuntimeError,
        "input: expected a floating-point dtype, got torch.int64",
    ),
    "a scalar": (
        (X[0, 0], W1, B1, W2, B2),
        {},
        RuntimeError,
        r"input: expected at least one dimension, got \[\]",
    ),
    "no weight1": ((X, None, B1, W2, B2), {}, TypeError, "weight1: expected a torch.Tensor, got NoneType"),
    "no weight2": ((X, W1, B1, None, B2), {}, TypeError, "weight2: expected a torch.Tensor, got NoneType"),
    "weight1's shape": (
        (X, W1.t(), B1, W2, B2),
        {},
        RuntimeError,
        r"weight1: expected a shape of \[\*, 8\] \(input's last dimension\), got \[8, 12\]",
    ),
    "weight1's dimensions": (
        (X, W1[0], B1, W2, B2),
        {},
        RuntimeError,
        r"weight1: expected a shape of \[\*, 8\] .*, got \[8\]",
    ),
    "bias1's shape": (
        (X, W1, B2, W2, B2),
        {},
        RuntimeError,
        r"bias1: expected a shape of \[12\] \(rows of weight1\), got \[4\]",
    ),
    "a chain that breaks": (
        (X, W1, B1, W2[:, :8], B2),
        {},
        RuntimeError,
        r"weight2: expected a shape of \[\*, 12\] \(the hidden size\), got \[4, 8\]",
    ),
    "a gated chain that breaks": (
        (X, W1, B1, W2, B2, "swiglu"),
        {},
        RuntimeError,
        r"weight2: expected a shape of \[\*, 6\] \(the hidden size\), got \[4, 12\]",
    ),
    "odd gated rows": (
        (X, W1[:11], B1[:11], W2[:, :5], B2, "geglu"),
        {},
        RuntimeError,
        "weight1: expected an even number of rows for geglu, gate and up, got 11",
    ),
    "bias2's shape": (
        (X, W1, B1, W2, B1),
        {},
        RuntimeError,
        r"bias2: expected a shape of \[4\] \(rows of weight2\), got \[12\]",
    ),
    "bias2's type": ((X, W1, B1, W2, 1.0), {}, TypeError, "bias2: expected a torch.Tensor, got float"),
    "weight2's dtype": (
        (X, W1, B1, W2.half(), B2),
        {},
        RuntimeError,
        "weight2: expected torch.float32 .as input., got torch.float16",
    ),
    "weight1's device": (
        (X, W1.to("meta"), B1, W2, B2),
        {},
        RuntimeError,
        "weight1: expected device cpu .as input., got meta",
    ),
    "unknown activation": (
        (X, W1, B1, W2, B2, "tanh"),
        {},
        ValueError,
        "activation: expected one of relu, gelu, gelu_tanh, swiglu, geglu, got 'tanh'",
    ),
    "no activation": (
        (X, W1, B1, W2, B2, None),
        {},
        TypeError,
        "activation: expected a string, got NoneType",
    ),
    "dropout_p": (
        (X, W1, B1, W2, B2, "gelu", 1.5),
        {},
        ValueError,
        "dropout_p: expected a probability between 0 and 1, got 1.5",
    ),
    "unknown backend": (
        (X, W1, B1, W2, B2),
        {"backend": "cublas"},
        ValueError,
        "backend: expected one of .*got 'cublas'",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    arguments, options, kind, message = BAD[bad]
    with pytest.raises(kind, match=f"feed_forward: {message}"):
        llmkernels.feed_forward(*arguments, **options)


def test_bad_input_of_linear_activation() -> None:
    """The same checks under the names of its own arguments."""
    with pytest.raises(RuntimeError, match=r"linear_activation: weight: expected a shape of \[\*, 8\]"):
        llmkernels.linear_activation(X, W1.t())
    with pytest.raises(RuntimeError, match=r"linear_activation: bias: expected a shape of \[12\]"):
        llmkernels.linear_activation(X, W1, B2)
