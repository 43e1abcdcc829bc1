"""llmkernels.nn.TransformerEncoderLayer and TransformerEncoder: torch.nn's semantics on its slow path, what
is fused and what is called, and the same on kernels."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import llmkernels
from llmkernels.nn import _causal
from llmkernels.testing import random_tensor

from .exact import assert_exact
from .torch_layers import (
    assert_alike,
    assert_compiles,
    assert_raises_alike,
    on_device_of,
    ours_like,
    randomised,
)

N, L, E, H, HIDDEN = 2, 4, 8, 2, 12
BLOCKS = [{"norm_first": False}, {"norm_first": True}]


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return randomised(nn.TransformerEncoderLayer(E, H, HIDDEN, **{"dropout": 0.0, **options}))


def stack(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    norm = nn.LayerNorm(E, bias=options.get("bias", True))
    return randomised(nn.TransformerEncoder(layer(**options), layers, norm, enable_nested_tensor=False))


def rows(*shape: int, seed: int = 0) -> Tensor:
    return random_tensor(shape or (N, L, E), torch.float32, "cpu", seed, requires_grad=True)


def causal(dtype: torch.dtype = torch.float32) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    return mask.isinf() if dtype == torch.bool else mask.to(dtype)


def padding() -> Tensor:
    return torch.tensor([[False] * L, [False] * (L - 2) + [True] * 2])


def masks() -> dict[str, dict[str, Any]]:
    bias = random_tensor((L, L), torch.float32, "cpu", 7, requires_grad=True)
    each = random_tensor((N * H, L, L), torch.float32, "cpu", 8, requires_grad=True)
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding()},
        "float": {"src_mask": bias},
        "bool of each head": {"src_mask": each > 1},
        "causal, hint": {"src_mask": causal(), "is_causal": True},
        "causal, hint and padding": {
            "src_mask": causal(torch.bool),
            "is_causal": True,
            "src_key_padding_mask": padding(),
        },
        "float and padding": {"src_mask": bias, "src_key_padding_mask": padding()},
    }


# --- one layer


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_masks(block: dict[str, bool], mask: str) -> None:
    for batch_first in (True, False):
        theirs = layer(batch_first=batch_first, **block)
        src = rows(N, L, E) if batch_first else rows(L, N, E)
        assert_alike(ours_like(theirs), theirs, (src,), masks()[mask])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_dropout_draws_torchs_numbers(block: dict[str, bool], batch_first: bool) -> None:
    """So a training run on the CPU has torch.nn's losses from the same seed. In float64, so that nothing but
    the numbers could differ."""
    theirs = layer(dropout=0.3, batch_first=batch_first, activation="gelu", **block).double()
    ours = ours_like(theirs)
    src = rows().detach().double()
    assert_alike(ours, theirs, (src,))
    assert_alike(ours, theirs, (src[0],))
    torch.manual_seed(0)
    assert not torch.equal(ours(src), ours(src))
    assert_alike(ours.eval(), theirs.eval(), (src,))


def test_each_dropout_is_its_own() -> None:
    """Its probability and its mode are read at each call."""
    theirs = layer(dropout=0.3)
    theirs.dropout1.p, theirs.dropout.p = 1.0, 0.0
    theirs.dropout2.eval()
    assert_alike(ours_like(theirs), theirs, (rows(),))
    theirs.eval().dropout2.train()
    assert_alike(ours_like(theirs), theirs, (rows(),))


ACTIVATIONS: dict[str, tuple[Any, str | None]] = {
    "relu": ("relu", "relu"),
    "gelu": ("gelu", "gelu"),
    "F.relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "F.gelu": (F.gelu, "gelu"),
    "ReLU": (nn.ReLU(), "relu"),
    "GELU": (nn.GELU(), "gelu"),
    "tanh GELU": (nn.GELU("tanh"), "gelu_tanh"),
    "partial": (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    "partial gelu of none": (functools.partial(F.gelu, approximate="none"), None),
    "silu": (F.silu, None),
    "PReLU": (nn.PReLU(), None),
    "lambda": (lambda x: x * 2, None),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that ops.feed_forward knows are recognised, others are called as they are."""
    from llmkernels.nn import _blocks

    activation, expected = ACTIVATIONS[name]
    seen = []
    feed_forward = _blocks.feed_forward

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args[5])
        return feed_forward(*args, **kwargs)

    monkeypatch.setattr(_blocks, "feed_forward", spy)
    theirs = layer(activation=activation)
    ours = ours_like(theirs)
    assert_alike(ours, theirs, (rows(),))
    assert seen == ([] if expected is None else [expected])
    with llmkernels.explain() as calls:
        ours(rows())
    assert ("no kernel for its activation" in str(calls)) == (expected is None)
    assert_alike(ours.eval(), theirs.eval(), (rows(),))


_NAMES = (
    "norm1",
    "norm2",
    "linear1",
    "linear2",
    "dropout",
    "dropout1",
    "dropout2",
    "activation",
    "self_attn",
)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", _NAMES)
def test_hooks_of_children_see_their_calls(name: str, block: dict[str, bool]) -> None:
    """In eval without gradients, too, where torch.nn's fast path reads weights and calls nobody."""
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        theirs = layer(activation=nn.GELU(), **block)
        ours = ours_like(theirs)
        seen: list[str] = []
        getattr(getattr(ours, name), register)(lambda *_, seen=seen: seen.append("called"))
        assert_alike(ours, theirs, (rows(),))
        assert seen
        if register != "register_full_backward_hook":
            seen.clear()
            with torch.no_grad():
                ours.eval()(rows())
            assert seen
        if name not in (["self_attn", "norm1", "dropout2"] if block["norm_first"] else ["self_attn"]):
            with llmkernels.explain() as calls:
                ours(rows())
            assert "has hooks" in str(calls)


def test_hooks_of_all_modules_see_the_calls() -> None:
    ours = ours_like(layer(activation=nn.GELU()))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        ours(rows())
    finally:
        handle.remove()
    assert {id(module) for module in ours.modules()} == {id(module) for module in seen}


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _give_a_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)  # type: ignore[method-assign]


def _parametrize(module: nn.Module) -> None:
    class Scaled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(module, "weight", Scaled())


def _prune(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.5)


def _subclass(module: nn.Module) -> None:
    module.__class__ = Doubled


class Tagged(Tensor):
    """A tensor subclass, as quantised and distributed weights are."""


def _weight_of_another_kind(module: nn.Module) -> None:
    weight = module.weight.detach().as_subclass(Tagged)
    module.weight = nn.Parameter(weight)


CHANGES: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "forward of an instance": ("norm2", _give_a_forward),
    "parametrized": ("linear1", _parametrize),
    "parametrized norm": ("norm2", _parametrize),
    "pruned": ("linear2", _prune),
    "subclass": ("linear1", _subclass),
    "tensor subclass": ("linear2", _weight_of_another_kind),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_children_that_are_not_plain_are_called(block: dict[str, bool], change: str) -> None:
    name, apply = CHANGES[change]
    theirs = layer(**block)
    ours = ours_like(theirs)
    for module in (theirs, ours):
        torch.manual_seed(0)
        apply(getattr(module, name))
    torch.manual_seed(0)
    expected = theirs(rows())
    torch.testing.assert_close(ours(rows()), expected, check_device=False)
    with llmkernels.explain() as calls:
        ours(rows())
    assert any(call.op == "nn.TransformerEncoderLayer" for call in calls), calls


def test_another_attention_and_another_norm_are_called() -> None:
    class Halved(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            out, weights = super().forward(*args, **kwargs)
            return out / 2, weights

    theirs = layer()
    theirs.self_attn.__class__ = Halved
    theirs.norm2 = randomised(nn.RMSNorm(E))
    ours = ours_like(theirs)
    assert_alike(ours, theirs, (rows(),))
    ours.backend = "torch"
    with llmkernels.explain() as calls:
        ours(rows())
    assert "a RMSNorm stands where a LayerNorm is known" in str(calls)


def test_an_addition_that_broadcasts() -> None:
    class Mean(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            out, weights = super().forward(*args, **kwargs)
            return out.mean(dim=0, keepdim=True), weights

    theirs = layer()
    theirs.self_attn.__class__ = Mean
    ours = ours_like(theirs)
    assert_alike(ours, theirs, (rows(),))
    ours.backend = "torch"
    assert_alike(ours, theirs, (rows(),))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((E,), {}),
        ((1, N, L, E), {}),
        ((N, L, E + 1), {}),
        ((N, L, E), {"src_mask": torch.zeros(L, L).long()}),
        ((N, L, E), {"src_mask": torch.zeros(L + 1, L)}),
        ((N, L, E), {"src_key_padding_mask": torch.zeros(N, L).long()}),
        ((N, L, E), {"src_key_padding_mask": torch.zeros(L, N + 1).bool()}),
        ((N, L, E), {"is_causal": True}),
        ((N, L, E), {"src_mask": torch.zeros(L, L).double()}),
    ],
    ids=str,
)
def test_bad_calls_raise_what_torch_raises(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    theirs = layer(batch_first=True)
    assert_raises_alike(ours_like(theirs), theirs, (rows(*shape),), options)


# --- on kernels


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_on_kernels(block: dict[str, bool], backend: str) -> None:
    ops = {"attention", "add_layer_norm", "feed_forward"} | ({"layer_norm"} if block["norm_first"] else set())
    for mask, activation in (("none", "relu"), ("float and padding", "gelu")):
        theirs = layer(batch_first=True, activation=activation, **block)
        call = masks()[mask]
        if "src_key_padding_mask" in call:
            call["src_key_padding_mask"] = torch.where(padding(), -torch.inf, 0.0)
        assert_exact(theirs, (rows(),), call, backend, ops)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_dropout_on_kernels(block: dict[str, bool]) -> None:
    """The masks of forward and backward are those of the reference, in float64."""
    ops = {"attention", "add_layer_norm", "feed_forward"} | ({"layer_norm"} if block["norm_first"] else set())
    theirs = layer(batch_first=True, dropout=0.3, **block)
    if block["norm_first"]:
        # The last one is no kernel's.
        theirs.dropout2.p = 0.0
    assert_exact(theirs, (rows(),), {}, "triton", ops, reference="reference")


def test_the_backend_of_a_layer_reaches_all_in_it() -> None:
    ours = ours_like(stack(norm_first=True), "reference")
    with llmkernels.explain() as calls:
        ours(rows())
    assert {call.backend for call in calls} == {"reference"}
    assert [call.op for call in calls].count("layer_norm") == 3
    ours.layers[0].backend = "torch"
    ours.layers[1].norm2.backend = "torch"
    with llmkernels.explain() as calls:
        ours(rows())
    assert [call.backend for call in calls] == ["torch"] * 4 + ["reference"] * 2 + ["torch"] + [
        "reference"
    ] * 2
    ours.layers[1].norm1.register_forward_hook(lambda *_: None)
    with llmkernels.explain() as calls:
        ours(rows())
    assert calls[4].op == "layer_norm"
    assert calls[4].backend == "reference"


# --- the stack


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_stacks(block: dict[str, bool]) -> None:
    theirs = stack(batch_first=True, **block)
    for call in masks().values():
        options = {name.replace("src_mask", "mask"): value for name, value in call.items()}
        assert_alike(ours_like(theirs), theirs, (rows(),), options)
        options.pop("is_causal", None)
        assert_alike(ours_like(theirs), theirs, (rows(),), options)
    assert_alike(ours_like(theirs), theirs, (rows(L, E),), {"mask": causal(torch.bool)})


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_stack_keeps_foreign_layers_as_they_are() -> None:
    """They get what torch.nn's stack hands them: masks made float."""

    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor, **masks: Any) -> Tensor:
            assert masks["src_mask"].dtype == masks["src_key_padding_mask"].dtype == torch.float32
            return super().forward(src, **masks)

    theirs = randomised(nn.TransformerEncoder(Layer(E, H, HIDDEN, 0.0), 2))
    ours = ours_like(theirs)
    assert type(ours.layers[0]) is Layer
    call = {"mask": causal(torch.bool), "src_key_padding_mask": padding()}
    for backend in (None, "reference"):
        ours.backend = backend
        assert_alike(ours, theirs, (rows(L, N, E),), call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_a_causal_mask_is_found(dtype: torch.dtype) -> None:
    mask = causal(dtype)
    assert _causal.is_causal_mask(mask, rows(), batch_first=True)
    assert _causal.is_causal_mask(mask, rows(L, N, E), batch_first=False)
    assert _causal.is_causal_mask(mask, rows(L, E), batch_first=True)
    assert not _causal.is_causal_mask(mask, rows(N, L + 1, E), batch_first=True)
    assert not _causal.is_causal_mask(None, rows(), batch_first=True)
    assert not _causal.is_causal_mask(mask.T, rows(), batch_first=True)
    assert not _causal.is_causal_mask(mask.expand(N * H, L, L), rows(), batch_first=True)
    mask[0, 0] = mask[0, 1]
    assert not _causal.is_causal_mask(mask, rows(), batch_first=True)


def test_the_layers_hear_of_causality() -> None:
    ours = ours_like(stack(batch_first=True))
    heard = []
    for each in ours.layers:
        each.register_forward_pre_hook(
            lambda _, args, kwargs: heard.append(kwargs["is_causal"]), with_kwargs=True
        )
    ours(rows(), mask=causal())
    ours(rows(), mask=causal(), is_causal=False)
    ours(rows(), mask=torch.zeros(L, L))
    ours(rows())
    assert heard == [True, True] + [False] * 6


class OnGpu:
    """What _causal asks of a mask that lies on a GPU, with a CPU tensor's values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks = 0
        self.capturing = False
        is_causal = _causal._is_causal

        def look(mask: Tensor) -> bool:
            self.looks += 1
            return is_causal(mask)

        monkeypatch.setattr(_causal, "_is_causal", look)
        monkeypatch.setattr(_causal, "_waits", lambda mask: True)
        monkeypatch.setattr(_causal, "_captured", lambda mask: self.capturing)


def test_a_mask_on_a_gpu_is_looked_at_once_for_each_write(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = OnGpu(monkeypatch)
    mask = causal()

    def found() -> bool:
        return _causal.is_causal_mask(mask, rows(), batch_first=True)

    assert found()
    assert found()
    assert gpu.looks == 1
    mask[0, 0] = -torch.inf
    assert not found()
    assert not found()
    assert gpu.looks == 2
    mask[0, 0] = 0
    assert found()
    mask.data = torch.zeros(L, L)
    assert not found()
    mask = causal()
    gpu.capturing, gpu.looks = True, 0
    assert not found()
    assert gpu.looks == 0
    gpu.capturing = False
    assert found()
    gpu.capturing = True
    assert found()


def test_beside_padding_a_known_causal_mask_is_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the stack's proof counts: a hint alone leaves the mask in force, and so does a write."""
    from llmkernels.nn import multihead_attention

    OnGpu(monkeypatch)
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((tuple(args[3].shape), args[5]))
        return llmkernels.attention(*args, **kwargs)

    monkeypatch.setattr(multihead_attention, "attention", spy)
    theirs = stack(batch_first=True)
    ours = ours_like(theirs)
    mask = causal(torch.bool)
    call = {"mask": mask, "src_key_padding_mask": padding()}
    expected = theirs(rows(), **call)
    torch.testing.assert_close(ours(rows(), **call, is_causal=True), expected)
    torch.testing.assert_close(ours(rows(), **call), expected)
    assert seen == [((N, 1, L, L), False)] * 2 + [((N, 1, 1, L), True)] * 2
    mask[1, 0] = True
    seen.clear()
    torch.testing.assert_close(ours(rows(), **call, is_causal=True), theirs(rows(), **call, is_causal=True))
    assert seen == [((N, 1, L, L), False)] * 2


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_keys_beyond_a_known_causal_mask_stay_visible(
    options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    OnGpu(monkeypatch)
    theirs = randomised(nn.MultiheadAttention(E, H, batch_first=True, **options))
    src, mask = rows(), causal(torch.bool)
    assert _causal.is_causal_mask(mask, src, batch_first=True)
    call = {"attn_mask": mask, "key_padding_mask": padding(), "need_weights": False, "is_causal": True}
    assert_alike(ours_like(theirs), theirs, (src, src, src), call)


def test_a_mask_of_inference_mode_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = OnGpu(monkeypatch)
    with torch.inference_mode():
        mask = causal()
        assert _causal.is_causal_mask(mask, rows(), batch_first=True)
        mask[0, 0] = -torch.inf
        assert not _causal.is_causal_mask(mask, rows(), batch_first=True)
    assert gpu.looks == 2


# --- deviations on purpose (llmkernels/nn/README.md)


@torch.no_grad()
def test_eval_gives_what_training_gives_where_torchs_fast_path_does_not() -> None:
    """A float mask of finite values, and the GELU by tanh: torch.nn's fast path takes the one for bool and
    the other for the exact one."""
    theirs = layer(batch_first=True, activation=nn.GELU("tanh"))
    call = {"src_mask": torch.full((L, L), 0.5).triu()}
    ours = ours_like(theirs)
    for options in (call, {}):
        exact = copy.deepcopy(theirs).double()(rows().double(), **{k: v.double() for k, v in options.items()})
        fast = theirs.eval()(rows(), **options)
        theirs.train()
        torch.testing.assert_close(ours.eval()(rows(), **options), exact.float())
        with pytest.raises(AssertionError):
            torch.testing.assert_close(fast, exact.float())


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
@torch.no_grad()
def test_padding_is_computed_in_eval_as_in_training() -> None:
    """torch.nn's stack makes a nested tensor and fills the padding of its output with zeros."""
    theirs = randomised(nn.TransformerEncoder(layer(batch_first=True), 2)).eval()
    src, hidden = rows(), padding()
    expected = theirs(src, src_key_padding_mask=hidden)
    out = ours_like(theirs)(src, src_key_padding_mask=hidden)
    assert (expected[hidden] == 0).all()
    torch.testing.assert_close(out[~hidden], expected[~hidden])
    torch.testing.assert_close(out, theirs.train()(src, src_key_padding_mask=hidden))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
@pytest.mark.parametrize("backend", [None, "triton"])
@torch.no_grad()
def test_torchs_stack_hands_our_layer_nested_tensors(backend: str | None) -> None:
    theirs = randomised(nn.TransformerEncoder(layer(batch_first=True), 2)).eval()
    mixed = copy.deepcopy(theirs)
    for i in range(2):
        mixed.layers[i] = ours_like(mixed.layers[i], backend)
    mixed, theirs, src, hidden = on_device_of(backend, mixed, theirs, rows(), padding())
    with llmkernels.explain() as calls:
        out = mixed(src, src_key_padding_mask=hidden)
    assert str(calls).count("a nested tensor is padded for the kernels") == 2
    assert backend is None or any(call.backend == backend for call in calls)
    torch.testing.assert_close(out, theirs(src, src_key_padding_mask=hidden))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_other_nested_tensors_raise_what_torch_raises() -> None:
    sequences = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    jagged = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)], layout=torch.jagged)
    for make in (lambda: layer(batch_first=True).eval(), lambda: ours_like(layer(batch_first=True)).eval()):
        with torch.no_grad(), pytest.raises(AssertionError):
            make()(sequences, src_key_padding_mask=torch.zeros(2, 3))
    with torch.no_grad(), pytest.raises(AssertionError):
        ours_like(layer(batch_first=True))(jagged)
    with torch.no_grad(), pytest.raises(AssertionError):
        ours_like(layer())(sequences)


# --- tools


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_on_a_cpu(dtype: torch.dtype, backend: str | None, block: dict[str, bool]) -> None:
    theirs = layer(**block)
    ours = ours_like(theirs, backend)
    src = rows().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, out = theirs(src), ours(src)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast of CUDA")
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [None, "torch", "triton"])
def test_autocast_on_a_gpu(backend: str | None, dtype: torch.dtype, block: dict[str, bool]) -> None:
    theirs = stack(batch_first=True, **block).cuda()
    src = rows().cuda().to(dtype)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert ours_like(theirs, backend)(src).dtype == theirs(src).dtype


@pytest.mark.parametrize("duplicate", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_copies_keep_values_classes_and_backend(duplicate: Any, backend: str | None) -> None:
    ours = ours_like(stack(), backend)
    other = duplicate(ours)
    assert [type(module) for module in other.modules()] == [type(module) for module in ours.modules()]
    assert other.backend == backend
    assert torch.equal(other(rows()), ours(rows()))


def test_a_layer_is_made_of_ours() -> None:
    ours = llmkernels.nn.TransformerEncoderLayer(E, H)
    assert type(ours.self_attn) is llmkernels.nn.MultiheadAttention
    assert type(ours.norm1) is type(ours.norm2) is llmkernels.nn.LayerNorm


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_compile_fullgraph(block: dict[str, bool], backend: str | None) -> None:
    theirs = stack(1, batch_first=True, **block)
    call = {"mask": causal(), "src_key_padding_mask": padding()}
    assert_compiles(ours_like(theirs, backend), (rows(),), call)


def test_a_compiled_child_is_called() -> None:
    theirs = layer()
    ours = ours_like(theirs)
    calls = []
    ours.norm1._compiled_call_impl = lambda *args: calls.append(args) or theirs.norm1(*args)
    torch.testing.assert_close(ours(rows()), theirs(rows()))
    assert len(calls) == 1


def test_export() -> None:
    ours = ours_like(stack(batch_first=True)).eval()
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(ours, (rows().detach(),), dynamic_shapes=({1: length},))
    longer = rows(N, L + 3, E)
    torch.testing.assert_close(program.module()(longer), ours(longer))


def test_functional_transforms() -> None:
    ours = ours_like(layer(dropout=0.3)).double().eval()
    src = rows(3, N, L, E).detach().double()
    torch.testing.assert_close(torch.vmap(ours)(src), torch.stack([ours(x) for x in src]))
    parameters = dict(ours.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, parameters, (x,)).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, src)
    for i, x in enumerate(src):
        grads = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        for name, gradient in zip(parameters, grads, strict=True):
            torch.testing.assert_close(each[name][i], gradient)
    assert torch.func.jvp(ours, (src[0],), (src[1],))[1].shape == (N, L, E)


def test_gradcheck() -> None:
    theirs = randomised(nn.TransformerEncoderLayer(4, 2, 4, 0.0, dtype=torch.float64))
    src = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    for backend in (None, "reference"):
        assert torch.autograd.gradcheck(ours_like(theirs, backend), src)
    assert torch.autograd.gradgradcheck(ours_like(theirs, "reference"), src)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_activation_checkpointing_draws_the_same_dropout(backend: str | None, reentrant: bool) -> None:
    ours = ours_like(layer(dropout=0.3), backend)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ours

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=reentrant)

    results = []
    for module in (ours, Checkpointed()):
        module.zero_grad()
        src = rows()
        torch.manual_seed(0)
        out = module(src)
        out.square().sum().backward()
        results.append((out, src.grad, [parameter.grad.clone() for parameter in module.parameters()]))
    torch.testing.assert_close(results[1], results[0])


def test_fx_keeps_layers_as_one_call() -> None:
    class Model(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.encoder(x, mask).relu()

    for encoder in (layer(), stack()):
        model = Model(ours_like(encoder))
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["encoder"]
        mask = torch.zeros(N, N)
        torch.testing.assert_close(traced(rows(), mask), model(rows(), mask))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_is_refused() -> None:
    for module in (layer(), stack()):
        with pytest.raises(RuntimeError, match=r"nn\.TransformerEncoder(Layer)?: torch\.jit\.script"):
            torch.jit.script(nn.Sequential(ours_like(module)))


def test_training_goes_as_torchs() -> None:
    """Losses of some steps with dropout from one seed."""
    losses = []
    for make in (copy.deepcopy, ours_like):
        model = make(stack(batch_first=True, dropout=0.2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        steps = []
        for step in range(5):
            loss = (model(rows(seed=step), mask=causal()) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.detach())
        losses.append(torch.stack(steps))
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@torch.no_grad()
def test_caches_give_what_the_causal_mask_gives(block: dict[str, bool]) -> None:
    ours = ours_like(stack(batch_first=True, **block)).eval()
    expected = ours(rows(), mask=causal())
    caches = [llmkernels.nn.KVCache(N, L, H, E // H) for _ in ours.layers]
    steps = [ours(x, cache=caches) for x in rows().split((2, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)
    with pytest.raises(ValueError, match="2 caches, one a layer"):
        ours(rows(), cache=caches[:1])
    with pytest.raises(ValueError, match="beside cache"):
        ours(rows(), mask=causal(), cache=caches)
