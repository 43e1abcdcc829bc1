"""llmkernels.nn's positional encodings: the formula, where a sequence begins, and one contract for both
kinds."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkernels.nn import LearnedPositionalEncoding, PositionalEncoding
from llmkernels.testing import assert_within_budget, random_tensor

KINDS = (PositionalEncoding, LearnedPositionalEncoding)
Kind = type[PositionalEncoding] | type[LearnedPositionalEncoding]


def rows_of(layer: nn.Module) -> Tensor:
    """[max_len, d_model], a vector for each position."""
    return layer.table if isinstance(layer, PositionalEncoding) else layer.weight.detach()  # type: ignore[return-value]


def formula(width: int, length: int) -> Tensor:
    """The table of Attention Is All You Need, element by element."""
    table = torch.empty(length, width, dtype=torch.float64)
    for position in range(length):
        for column in range(width):
            angle = position / 10000 ** ((column - column % 2) / width)
            table[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("width", (1, 2, 7, 16))
def test_the_table_is_the_papers(width: int, dtype: torch.dtype) -> None:
    """Rounded once from float64, at odd widths too."""
    layer = PositionalEncoding(width, max_len=60, dtype=dtype)
    expected = formula(width, 60)
    assert layer.table.dtype == dtype
    assert_within_budget(layer.table, expected, expected.to(dtype), name="table")


def test_far_positions_are_exact() -> None:
    """Where an angle in float32 would have lost what tells positions apart."""
    layer = PositionalEncoding(4, max_len=100_001)
    expected = torch.tensor([math.sin(1e5), math.cos(1e5), math.sin(1e3), math.cos(1e3)], dtype=torch.float64)
    assert_within_budget(layer.table[-1], expected, expected.float(), name="position 100000")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "offset", (0, 4, torch.tensor(4), torch.tensor([4, 0, 7], dtype=torch.int32)), ids=str
)
def test_every_token_gets_the_vector_of_its_position(
    kind: Kind, dtype: torch.dtype, offset: int | Tensor
) -> None:
    batch, length, width = 3, 5, 6
    layer = kind(width, dropout=0.0, max_len=12, dtype=dtype)
    x = random_tensor((batch, length, width), dtype, "cpu", 0)
    starts = torch.as_tensor(offset).expand(batch)
    sums = torch.stack([x[i] + rows_of(layer)[start : start + length] for i, start in enumerate(starts)])
    assert torch.equal(layer(x.transpose(0, 1), offset), sums.transpose(0, 1))
    for i, start in enumerate(starts):
        assert torch.equal(layer(x[i], start), sums[i])
        assert torch.equal(layer(x[i], int(start)), sums[i])
    layer.batch_first = True
    assert torch.equal(layer(x, offset=offset), sums)
    assert torch.equal(layer(x[1], starts[1]), sums[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_pieces_is_the_sequence(kind: Kind) -> None:
    """Generation: what a cache holds is where the next token stands, up to the last position there is."""
    layer = kind(8, dropout=0.0, max_len=10, batch_first=True)
    x = random_tensor((2, 10, 8), torch.float32, "cpu", 0)
    pieces = [layer(x[:, start:end], start) for start, end in ((0, 6), (6, 7), (7, 10))]
    assert torch.equal(torch.cat(pieces, dim=1), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_the_sum_in_training(kind: Kind) -> None:
    layer = kind(6, dropout=0.5, max_len=9)
    x = random_tensor((9, 2, 6), torch.float32, "cpu", 0)
    whole = layer.eval()(x)
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(whole, 0.5)
    torch.manual_seed(3)
    assert torch.equal(layer.train()(x), expected)
    assert (expected == 0).any()


@pytest.mark.parametrize("offset", (2, torch.tensor([2, 0, 2])), ids=("int", "tensor"))
def test_learned_vectors_get_their_gradients(offset: int | Tensor) -> None:
    layer = LearnedPositionalEncoding(4, dropout=0.0, max_len=6, batch_first=True)
    x = torch.zeros(3, 3, 4, requires_grad=True)
    layer(x, offset).sum().backward()
    times = [0, 0, 3, 3, 3, 0] if isinstance(offset, int) else [1, 1, 3, 2, 2, 0]
    assert torch.equal(layer.weight.grad, torch.tensor(times, dtype=torch.float32)[:, None].expand(6, 4))
    assert torch.equal(x.grad, torch.ones_like(x))


def test_learned_vectors_begin_as_berts() -> None:
    torch.manual_seed(0)
    layer = LearnedPositionalEncoding(64, max_len=512)
    assert abs(float(layer.weight.detach().std()) / 0.02 - 1) < 0.05
    assert abs(float(layer.weight.detach().mean())) < 0.001


def test_state_is_an_embeddings_or_nothing() -> None:
    """A checkpoint of a model with torch.nn.Embedding in its place loads; the sinusoids take no room in
    one."""
    learned = LearnedPositionalEncoding(4, max_len=6)
    embedding = nn.Embedding(6, 4)
    learned.load_state_dict(embedding.state_dict())
    embedding.load_state_dict(learned.state_dict())
    assert torch.equal(learned.weight, embedding.weight)
    sines = PositionalEncoding(4, max_len=6)
    assert not sines.state_dict() and not list(sines.parameters())
    assert sines.to(torch.float64).table.dtype == torch.float64


def test_the_result_has_the_dtype_of_x() -> None:
    for kind in KINDS:
        layer = kind(4, dropout=0.0, max_len=6)
        x = random_tensor((6, 1, 4), torch.bfloat16, "cpu", 0)
        actual = layer(x)
        # One rounding, after the sum.
        assert torch.equal(actual, (x.float() + rows_of(layer)[:, None]).bfloat16())
        assert kind(4, max_len=6, dtype=torch.bfloat16)(x.double()).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        (([1.0],), TypeError, "x: expected a torch.Tensor, got list"),
        ((torch.ones(2, 3, 4, dtype=torch.int64),), RuntimeError, "x: expected a floating-point dtype"),
        ((torch.zeros(2, 3, 5),), RuntimeError, r"x: expected \[N, L, 4\] or \[L, 4\], got \[2, 3, 5\]"),
        ((torch.zeros(4),), RuntimeError, r"x: expected \[N, L, 4\]"),
        ((torch.zeros(1, 2, 3, 4),), RuntimeError, r"x: expected \[N, L, 4\]"),
        ((torch.zeros(2, 9, 4),), ValueError, r"at most 8 tokens at offset 0 \(max_len 8\), got 9"),
        ((torch.zeros(2, 3, 4), 6), ValueError, r"at most 2 tokens at offset 6 \(max_len 8\), got 3"),
        ((torch.zeros(2, 3, 4), 9), ValueError, "at most 0 tokens at offset 9"),
        ((torch.zeros(2, 3, 4), torch.tensor([0, 6])), ValueError, "at most 2 tokens at offset 6"),
        ((torch.zeros(2, 3, 4), torch.tensor(6)), ValueError, "at most 2 tokens at offset 6"),
        ((torch.zeros(2, 3, 4), -1), ValueError, "offset: expected at least 0, got -1"),
        ((torch.zeros(2, 3, 4), torch.tensor([0, -1])), ValueError, "offset: expected at least 0, got -1"),
        ((torch.zeros(2, 3, 4), 1.0), TypeError, "offset: expected an int, got float"),
        ((torch.zeros(2, 3, 4), torch.zeros(2)), TypeError, "offset: expected an int, torch.int32 or"),
        (
            (torch.zeros(2, 3, 4), torch.tensor([0, 0, 0])),
            RuntimeError,
            r"offset: expected the shape \[\] or \[N\]",
        ),
        ((torch.zeros(3, 4), torch.tensor([0])), RuntimeError, r"offset: expected the shape \[\], got \[1\]"),
        (
            (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int32, device="meta")),
            RuntimeError,
            "device cpu",
        ),
    ),
    ids=str,
)
def test_bad_calls(kind: Kind, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    layer = kind(4, max_len=8, batch_first=True)
    with pytest.raises(error, match=f"^{kind.__name__}: {message}|{message}"):
        layer(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_constructions(kind: Kind) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: d_model: expected at least 1, got 0"):
        kind(0)
    with pytest.raises(TypeError, match="max_len: expected an int, got float"):
        kind(4, max_len=3.5)
    with pytest.raises(ValueError, match="dropout"):
        kind(4, dropout=1.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_tensor", (False, True))
def test_compile_fullgraph(kind: Kind, as_tensor: bool) -> None:
    """One graph for every offset."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    layer = kind(4, dropout=0.0, max_len=20, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    x = random_tensor((2, 1, 4), torch.float32, "cpu", 0)
    for offset in range(2, 8):
        where = torch.tensor([offset, offset + 1]) if as_tensor else offset
        assert torch.equal(compiled(x, where), layer(x, where))
    assert len(graphs) == (1 if as_tensor else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_copies_and_export(kind: Kind) -> None:
    layer = kind(4, dropout=0.0, max_len=8, batch_first=True)
    x = random_tensor((2, 3, 4), torch.float32, "cpu", 0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, 2), layer(x, 2))
    assert torch.equal(torch.export.export(layer, (x, 2)).module()(x, 2), layer(x, 2))
    meta = kind(4, max_len=8, device="meta", batch_first=True)
    assert meta(x.to("meta")).shape == x.shape
    real = meta.to_empty(device="cpu")
    real.reset_parameters()
    assert rows_of(real).isfinite().all()
    if kind is PositionalEncoding:
        assert torch.equal(rows_of(real), rows_of(layer))


def test_it_prints_what_it_is() -> None:
    assert "4, max_len=8, batch_first=True" in repr(PositionalEncoding(4, max_len=8, batch_first=True))
