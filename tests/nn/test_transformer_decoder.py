"""llmkernels.nn.TransformerDecoderLayer and TransformerDecoder: torch.nn's semantics, and the same on
kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmkernels
from llmkernels.testing import random_tensor

from .exact import assert_exact
from .torch_layers import assert_alike, assert_compiles, assert_raises_alike, ours_like, randomised

N, L, S, E, H, HIDDEN = 2, 4, 3, 8, 2, 12
BLOCKS = [{"norm_first": False}, {"norm_first": True}]
OPS = {"attention", "add_layer_norm", "feed_forward"}


def layer(**options: Any) -> nn.TransformerDecoderLayer:
    return randomised(nn.TransformerDecoderLayer(E, H, HIDDEN, **{"dropout": 0.0, **options}))


def stack(**options: Any) -> nn.TransformerDecoder:
    return randomised(nn.TransformerDecoder(layer(**options), 2, nn.LayerNorm(E)))


def rows(*shape: int, seed: int = 0) -> Tensor:
    return random_tensor(shape, torch.float32, "cpu", seed, requires_grad=True)


def inputs(batch_first: bool = True) -> list[Tensor]:
    tgt, memory = rows(N, L, E), rows(N, S, E, seed=1)
    return [tgt, memory] if batch_first else [t.transpose(0, 1).contiguous().detach() for t in (tgt, memory)]


def causal(dtype: torch.dtype = torch.float32) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    return mask.isinf() if dtype == torch.bool else mask.to(dtype)


def masks() -> dict[str, dict[str, Any]]:
    tgt_padding = torch.tensor([[False] * L, [False] * (L - 1) + [True]])
    memory_padding = torch.tensor([[False] * S, [False] * (S - 1) + [True]])
    bias = random_tensor((L, S), torch.float32, "cpu", 7, requires_grad=True)
    each = random_tensor((N * H, L, L), torch.float32, "cpu", 8, requires_grad=True)
    return {
        "none": {},
        "causal, hint": {"tgt_mask": causal(), "tgt_is_causal": True},
        "causal and padding": {
            "tgt_mask": causal(torch.bool),
            "tgt_key_padding_mask": tgt_padding,
            "memory_key_padding_mask": memory_padding,
        },
        "memory": {"memory_mask": bias, "tgt_mask": each},
        "memory, hint": {"memory_mask": torch.zeros(L, S), "memory_is_causal": True},
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_masks(block: dict[str, bool], mask: str) -> None:
    for batch_first in (True, False):
        theirs = layer(batch_first=batch_first, **block)
        assert_alike(ours_like(theirs), theirs, inputs(batch_first), masks()[mask])
    for bias in (True, False):
        theirs = stack(batch_first=True, **block) if bias else layer(batch_first=True, bias=False, **block)
        call = masks()[mask]
        assert_alike(ours_like(theirs), theirs, inputs(), call)
        call.pop("tgt_is_causal", None)
        assert_alike(ours_like(theirs), theirs, inputs(), call)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_dropout_draws_torchs_numbers(block: dict[str, bool], batch_first: bool) -> None:
    """In float64, so that nothing but the numbers could differ."""
    theirs = layer(dropout=0.3, batch_first=batch_first, activation="gelu", **block).double()
    ours = ours_like(theirs)
    args = [t.detach().double() for t in inputs(batch_first)]
    assert_alike(ours, theirs, args)
    assert_alike(ours, theirs, [t[0] for t in args])
    torch.manual_seed(0)
    assert not torch.equal(ours(*args), ours(*args))
    assert_alike(ours.eval(), theirs.eval(), args)


_NAMES = (
    "norm1",
    "norm2",
    "norm3",
    "linear1",
    "dropout",
    "dropout1",
    "dropout2",
    "dropout3",
    "multihead_attn",
)


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_hooks_of_children_see_their_calls(block: dict[str, bool], name: str) -> None:
    theirs = layer(batch_first=True, **block)
    ours = ours_like(theirs)
    seen: list[str] = []
    getattr(ours, name).register_forward_hook(lambda *_: seen.append("called"))
    assert_alike(ours, theirs, inputs())
    assert seen


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((L, N, E), (S, N, E)), {"tgt_mask": torch.zeros(L, S)}),
        (((L, N, E), (S, N, E)), {"tgt_mask": torch.zeros(L, L).int()}),
        (((L, N, E), (S, N, E)), {"memory_mask": torch.zeros(L, L)}),
        (((L, N, E), (S, N, E)), {"memory_key_padding_mask": torch.zeros(N, L).bool()}),
        (((L, N, E), (S, N, E)), {"tgt_key_padding_mask": torch.zeros(N, L).int()}),
        (((L, N, E), (S, N, E)), {"tgt_is_causal": True}),
        (((L, N, E), (S, N, E)), {"memory_is_causal": True}),
        (((L, N, E), (S, N + 1, E)), {}),
        (((L, N, E), (S, N, E + 1)), {}),
        (((L, N, E), (S, E)), {}),
    ],
    ids=str,
)
def test_bad_calls_raise_what_torch_raises(shapes: Any, options: dict[str, Any]) -> None:
    for theirs in (layer(), stack()):
        assert_raises_alike(ours_like(theirs), theirs, [rows(*shape) for shape in shapes], options)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_on_kernels(block: dict[str, bool], backend: str) -> None:
    ops = OPS | ({"layer_norm"} if block["norm_first"] else set())
    theirs = layer(batch_first=True, activation="gelu", **block)
    assert_exact(theirs, inputs(), masks()["causal and padding"], backend, ops)


def test_dropout_on_kernels() -> None:
    """The masks of forward and backward are those of the reference, in float64."""
    theirs = layer(batch_first=True, dropout=0.3)
    assert_exact(theirs, inputs(), masks()["causal, hint"], "triton", OPS, reference="reference")


def test_the_backend_of_a_stack_reaches_all_in_it() -> None:
    ours = ours_like(stack(batch_first=True), "reference")
    with llmkernels.explain() as calls:
        ours(*inputs())
    assert {call.backend for call in calls} == {"reference"}
    assert [call.op for call in calls].count("attention") == 4


def test_the_layers_hear_of_causality() -> None:
    ours = ours_like(stack(batch_first=True))
    heard = []
    for each in ours.layers:
        each.register_forward_pre_hook(
            lambda _, args, kwargs: heard.append((kwargs["tgt_is_causal"], kwargs["memory_is_causal"])),
            with_kwargs=True,
        )
    ours(*inputs(), tgt_mask=causal(torch.bool))
    ours(*inputs(), tgt_mask=causal(), tgt_is_causal=False)
    ours(*inputs(), memory_mask=torch.zeros(L, S), memory_is_causal=True)
    assert heard == [(True, False)] * 2 + [(False, False)] * 2 + [(False, True)] * 2


@pytest.mark.parametrize("backend", [None, "triton"])
def test_compile_fullgraph(backend: str | None) -> None:
    ours = ours_like(layer(batch_first=True, norm_first=True), backend)
    assert_compiles(ours, inputs(), masks()["causal and padding"])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_fx_and_script() -> None:
    class Model(nn.Module):
        def __init__(self, decoder: nn.Module) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.decoder(x, memory).relu()

    for decoder in (layer(), stack()):
        model = Model(ours_like(decoder))
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["decoder"]
        torch.testing.assert_close(traced(*inputs(False)), model(*inputs(False)))
        with pytest.raises(RuntimeError, match=r"nn\.TransformerDecoder(Layer)?: torch\.jit\.script"):
            torch.jit.script(model)


def test_a_layer_is_made_of_ours() -> None:
    ours = llmkernels.nn.TransformerDecoderLayer(E, H)
    assert type(ours.self_attn) is type(ours.multihead_attn) is llmkernels.nn.MultiheadAttention
    assert {type(norm) for norm in (ours.norm1, ours.norm2, ours.norm3)} == {llmkernels.nn.LayerNorm}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@torch.no_grad()
def test_caches_give_what_the_causal_mask_gives(block: dict[str, bool]) -> None:
    ours = ours_like(stack(batch_first=True, **block)).eval()
    tgt, memory = inputs()
    call = {"memory_key_padding_mask": masks()["causal and padding"]["memory_key_padding_mask"]}
    expected = ours(tgt, memory, tgt_mask=causal(), **call)
    caches = [llmkernels.nn.KVCache(N, L, H, E // H) for _ in ours.layers]
    steps = [ours(x, memory, cache=caches, **call) for x in tgt.split((2, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)
    with pytest.raises(ValueError, match="2 caches, one a layer"):
        ours(tgt, memory, cache=caches * 2)
