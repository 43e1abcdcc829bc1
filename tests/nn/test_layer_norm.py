"""llmkernels.nn.LayerNorm against torch.nn.LayerNorm: the same contract, sample by sample and tool by
tool."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import llmkernels
from llmkernels.testing import assert_within_budget, random_tensor

from .exact import assert_exact
from .torch_layers import assert_compiles, randomised

common_modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)

INFO = next(info for info in common_modules.module_db if info.module_cls is nn.LayerNorm)


def samples(dtype: torch.dtype, training: bool) -> list[Any]:
    return list(
        INFO.module_inputs_func(INFO, device="cpu", dtype=dtype, requires_grad=True, training=training)
    )


def ours_like(theirs: nn.LayerNorm, backend: str | None = None) -> llmkernels.nn.LayerNorm:
    """Our layer with torch's state, through the constructor and load_state_dict."""
    ours = llmkernels.nn.LayerNorm(
        theirs.normalized_shape,
        theirs.eps,
        theirs.elementwise_affine,
        theirs.bias is not None,
        dtype=None if theirs.weight is None else theirs.weight.dtype,
    )
    ours.load_state_dict(theirs.state_dict())
    ours.backend = backend
    return ours.train(theirs.training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_module_db(dtype: torch.dtype, training: bool, backend: str) -> None:
    if dtype == torch.float64 and backend in ("triton", "cuda"):
        pytest.skip("the kernels take no float64")
    for sample in samples(dtype, training):
        constructor, call = sample.constructor_input, sample.forward_input
        theirs = nn.LayerNorm(*constructor.args, **constructor.kwargs, dtype=dtype).train(training)
        assert_exact(randomised(theirs), call.args, {}, backend, {"layer_norm"})


@pytest.mark.parametrize(
    "arguments",
    [
        ((8,), {}),
        (([2, 4],), {"eps": 1e-3}),
        ((8, 1e-5, False), {}),
        ((8,), {"bias": False, "dtype": torch.bfloat16}),
    ],
    ids=["int", "two dimensions", "no affine", "no bias"],
)
def test_constructor_state_and_representation_are_torchs(arguments: tuple[Any, Any]) -> None:
    args, kwargs = arguments
    torch.manual_seed(0)
    theirs = nn.LayerNorm(*args, **kwargs)
    torch.manual_seed(0)
    ours = llmkernels.nn.LayerNorm(*args, **kwargs)
    assert isinstance(ours, nn.LayerNorm)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_errors_have_torchs_types() -> None:
    theirs, ours = nn.LayerNorm(8), llmkernels.nn.LayerNorm(8)
    for bad in (
        torch.randn(2, 7),
        torch.randn(()),
        torch.ones(2, 8, dtype=torch.int64),
        torch.randn(2, 8).double(),
    ):
        with pytest.raises(RuntimeError):
            theirs(bad)
        with pytest.raises(RuntimeError):
            ours(bad)
    with pytest.raises(TypeError):
        theirs("text")
    with pytest.raises(TypeError):
        ours("text")


def test_an_explicit_backend_is_an_order() -> None:
    layer = llmkernels.nn.LayerNorm(8)
    layer.backend = "reference"
    with llmkernels.explain() as calls:
        layer(torch.randn(2, 8))
    assert [call.backend for call in calls] == ["reference"]
    layer.backend = "fastest"
    with pytest.raises(ValueError, match="fastest"):
        layer(torch.randn(2, 8))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("duplicate", ["pickle", "deepcopy", "torch.save"])
def test_copies_keep_values_class_and_backend(duplicate: str, backend: str | None) -> None:
    layer = llmkernels.nn.LayerNorm(8)
    randomised(layer)
    if backend is not None:
        layer.backend = backend
    if duplicate == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif duplicate == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is llmkernels.nn.LayerNorm
    assert other.backend == backend
    assert ("backend" in vars(other)) == (backend is not None)
    input = random_tensor((3, 8), torch.float32, "cpu", 0)
    assert torch.equal(other(input), layer(input))


def test_a_pickle_from_before_there_was_a_backend_loads() -> None:
    layer = llmkernels.nn.LayerNorm(8)
    state = {name: value for name, value in vars(layer).items() if name != "backend"}
    other = llmkernels.nn.LayerNorm.__new__(llmkernels.nn.LayerNorm)
    other.__setstate__(state)
    assert other.backend is None
    assert other(torch.randn(2, 8)).shape == (2, 8)


def test_meta_and_skip_init() -> None:
    meta = llmkernels.nn.LayerNorm(8, device="meta")
    assert meta(torch.empty(2, 8, device="meta")).shape == (2, 8)
    layer = torch.nn.utils.skip_init(llmkernels.nn.LayerNorm, 8)
    assert layer.weight.device.type == "cpu"
    assert meta.to_empty(device="cpu")(torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_on_a_cpu_gives_torchs_dtypes(dtype: torch.dtype) -> None:
    input = random_tensor((3, 8), dtype, "cpu", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert llmkernels.nn.LayerNorm(8)(input).dtype == nn.LayerNorm(8)(input).dtype


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_compile_fullgraph(backend: str | None) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    input = random_tensor((3, 8), torch.float32, "cpu", 0, requires_grad=True)
    assert_compiles(ours_like(randomised(nn.LayerNorm(8)), backend), (input,))


def test_export() -> None:
    layer = randomised(llmkernels.nn.LayerNorm(8))
    input = random_tensor((3, 8), torch.float32, "cpu", 0)
    program = torch.export.export(layer, (input,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    more = random_tensor((5, 8), torch.float32, "cpu", 1)
    assert torch.equal(program.module()(more), layer(more))


def test_fx_trace_keeps_the_layer_as_one_call() -> None:
    model = nn.Sequential(randomised(llmkernels.nn.LayerNorm(8)), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [llmkernels.layer_norm]
    input = random_tensor((3, 8), torch.float32, "cpu", 0)
    assert torch.equal(traced(input), model(input))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", [None, "triton"])
def test_script_compiles_torchs_operator(backend: str | None) -> None:
    layer = randomised(llmkernels.nn.LayerNorm(8))
    if backend is not None:
        layer.backend = backend
    scripted = torch.jit.script(layer)
    assert "aten::layer_norm" in str(scripted.inlined_graph)
    input = random_tensor((3, 8), torch.float32, "cpu", 0)
    assert torch.equal(
        scripted(input), nn.functional.layer_norm(input, (8,), layer.weight, layer.bias, layer.eps)
    )


def test_vmap_and_grad_transforms() -> None:
    layer = randomised(llmkernels.nn.LayerNorm(8))
    input = random_tensor((4, 3, 8), torch.float32, "cpu", 0)
    assert_within_budget(torch.vmap(layer)(input), layer(input).double(), layer(input), name="vmap")
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(input)
    assert gradient.shape == input.shape
