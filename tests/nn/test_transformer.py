"""llmkernels.nn.Transformer: torch.nn's contract, and its backend in every part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmkernels
from llmkernels.testing import random_tensor

from .torch_layers import OURS, assert_alike, assert_raises_alike, ours_like, randomised

N, L, S, E, H = 2, 4, 3, 8, 2

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


def transformer(**options: Any) -> nn.Transformer:
    return randomised(nn.Transformer(E, H, 1, 1, 12, **{"dropout": 0.0, "batch_first": True, **options}))


def inputs() -> list[Tensor]:
    return [
        random_tensor((N, length, E), torch.float32, "cpu", length, requires_grad=True) for length in (S, L)
    ]


def masks() -> dict[str, Any]:
    padding = torch.tensor([[False] * S, [False] * (S - 1) + [True]])
    return {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L),
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }


@pytest.mark.parametrize("norm_first", [False, True])
def test_masks_and_dropout(norm_first: bool) -> None:
    for dropout in (0.0, 0.3):
        theirs = transformer(norm_first=norm_first, dropout=dropout, activation="gelu")
        assert_alike(ours_like(theirs), theirs, inputs(), masks())
        assert_alike(ours_like(theirs), theirs, inputs(), {**masks(), "tgt_is_causal": True})


def test_all_layers_are_ours() -> None:
    ours = llmkernels.nn.Transformer(E, H, 2, 2, 12)
    assert not [module for module in ours.modules() if type(module) in OURS]
    assert type(ours.encoder.layers[1]) is llmkernels.nn.TransformerEncoderLayer
    assert type(ours.decoder.norm) is llmkernels.nn.LayerNorm


def test_custom_parts_stay_what_they_are() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 12), 1)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 12), 1)
    ours = llmkernels.nn.Transformer(E, H, custom_encoder=encoder, num_decoder_layers=1)
    assert type(ours.encoder) is nn.TransformerEncoder
    assert type(ours.decoder) is llmkernels.nn.TransformerDecoder
    ours = llmkernels.nn.Transformer(E, H, 1, 1, 12, 0.1, "relu", None, decoder)
    assert type(ours.encoder) is llmkernels.nn.TransformerEncoder
    assert type(ours.decoder) is nn.TransformerDecoder
    ours.backend = "reference"
    assert ours(torch.randn(S, N, E), torch.randn(L, N, E)).shape == (L, N, E)


@pytest.mark.parametrize(
    "shapes", [((N, S, E), (N + 1, L, E)), ((N, S, E + 1), (N, L, E)), ((N, S, E), (N, L, E + 1))], ids=str
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_bad_calls_raise_what_torch_raises(shapes: tuple[Any, Any], batch_first: bool) -> None:
    theirs = transformer(batch_first=batch_first)
    args = [torch.randn(*shape) for shape in shapes]
    if not batch_first:
        args = [t.transpose(0, 1) for t in args]
    assert_raises_alike(ours_like(theirs), theirs, args)


def test_the_backend_reaches_all_parts() -> None:
    ours = ours_like(transformer(norm_first=True), "reference")
    with llmkernels.explain() as calls:
        ours(*inputs(), **masks())
    assert {call.backend for call in calls} == {"reference"}
    assert len(calls) == 4 + 1 + 6 + 1


def test_compile_fullgraph() -> None:
    ours = ours_like(transformer())
    expected = ours(*inputs(), **{**masks(), "tgt_is_causal": None})
    ours.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(ours(*inputs(), **masks()), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_fx_and_script() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = ours_like(transformer())

        def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
            return self.transformer(src, tgt).relu()

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["transformer"]
    torch.testing.assert_close(traced(*inputs()), model(*inputs()))
    with pytest.raises(RuntimeError, match=r"nn\.Transformer: torch\.jit\.script"):
        torch.jit.script(model.transformer)


def test_signatures_are_torchs() -> None:
    import inspect

    for theirs, ours in OURS.items():
        assert inspect.signature(ours) == inspect.signature(theirs)
        parameters = list(inspect.signature(ours.forward).parameters.values())
        expected = list(inspect.signature(theirs.forward).parameters.values())
        shared, more = parameters[: len(expected)], parameters[len(expected) :]
        assert [(p.name, p.default, p.kind) for p in shared] == [
            (p.name, p.default, p.kind) for p in expected
        ]
        # torch.jit.script, which takes the norms, has no keyword-only arguments.
        kind = (
            inspect.Parameter.POSITIONAL_OR_KEYWORD
            if "Norm" in theirs.__name__
            else inspect.Parameter.KEYWORD_ONLY
        )
        assert all(p.kind is kind and p.default is None for p in more)
