"""What PyTorch's own suite (test/nn/test_multihead_attention.py, test/test_transformers.py) claims of these
layers, claimed of ours, but for its fast path, which ours never take."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from llmkernels.nn import (
    MultiheadAttention,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

from .torch_layers import randomised

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


# --- attention


def formula(
    layer: MultiheadAttention, query: Tensor, memory: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and averaged weights by the formula, head by head, [L, N, E] inputs."""
    width, heads = layer.embed_dim, layer.num_heads
    weights = layer.in_proj_weight.chunk(3)
    biases = layer.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, memory, memory), weights, biases, strict=True))
    batch = query.shape[1]
    if layer.bias_k is not None:
        k = torch.cat([k, layer.bias_k.expand(1, batch, width)])
        v = torch.cat([v, layer.bias_v.expand(1, batch, width)])
    if layer.add_zero_attn:
        k, v = (torch.cat([t, torch.zeros(1, batch, width, dtype=t.dtype)]) for t in (k, v))
    size = width // heads
    outs, shares = [], []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = torch.einsum("lnd,snd->nls", q[..., part], k[..., part]) / math.sqrt(size)
        if padding is not None:
            hidden = torch.nn.functional.pad(padding, (0, k.shape[0] - padding.shape[1]))
            logits = logits.masked_fill(hidden[:, None], -torch.inf)
        shares.append(logits.softmax(dim=-1))
        outs.append(torch.einsum("nls,snd->lnd", shares[-1], v[..., part]))
    out = torch.cat(outs, dim=-1) @ layer.out_proj.weight.T + layer.out_proj.bias
    return out, torch.stack(shares).mean(dim=0)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("bias_kv", "zero_attn"), list(itertools.product([False, True], repeat=2)))
def test_attention_is_its_formula(bias_kv: bool, zero_attn: bool, need_weights: bool) -> None:
    layer = randomised(
        MultiheadAttention(12, 3, add_bias_kv=bias_kv, add_zero_attn=zero_attn, dtype=torch.float64)
    )
    query, memory = torch.randn(4, 2, 12).double(), torch.randn(5, 2, 12).double()
    for padding in (None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])):
        expected, shares = formula(layer, query, memory, padding)
        out, weights = layer(query, memory, memory, padding, need_weights)
        torch.testing.assert_close(out, expected)
        if need_weights:
            torch.testing.assert_close(weights, shares)
        else:
            assert weights is None


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_mask_for_each_sequence_is_each_sequences_mask(need_weights: bool) -> None:
    layer = randomised(MultiheadAttention(8, 4))
    query, memory = torch.randn(2, 3, 8), torch.randn(4, 3, 8)
    masks = torch.zeros(3, 2, 4).masked_fill(torch.rand(3, 2, 4) < 0.4, -torch.inf)
    masks[..., 0] = 0
    every = masks.repeat_interleave(4, dim=0)
    out, _ = layer(query, memory, memory, attn_mask=every, need_weights=need_weights)
    for i in range(3):
        row, keys = query[:, i : i + 1], memory[:, i : i + 1]
        alone, _ = layer(row, keys, keys, attn_mask=masks[i], need_weights=need_weights)
        torch.testing.assert_close(out[:, i : i + 1], alone)


def test_one_mask_is_the_same_mask_for_each() -> None:
    layer = randomised(MultiheadAttention(8, 2))
    query = torch.randn(4, 3, 8)
    mask = torch.rand(4, 4) < 0.4
    mask.fill_diagonal_(False)
    each, _ = layer(query, query, query, attn_mask=mask.expand(6, 4, 4))
    torch.testing.assert_close(each, layer(query, query, query, attn_mask=mask)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("attn_dims", [None, 2, 3])
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_attention_in_eval_is_as_in_training(padded: bool, attn_dims: int | None, dtype: torch.dtype) -> None:
    layer = randomised(MultiheadAttention(8, 4, batch_first=True))
    query = torch.randn(2, 4, 8)
    random = torch.testing.make_tensor
    attn_mask = None if attn_dims is None else random((8, 4, 4)[3 - attn_dims :], dtype=dtype, device="cpu")
    padding = random((2, 4), dtype=dtype, device="cpu") if padded else None
    call: dict[str, Any] = {"attn_mask": attn_mask, "key_padding_mask": padding, "need_weights": False}
    expected, _ = layer.train()(query, query, query, **call)
    out, _ = layer.eval()(query, query, query, **call)
    assert not out.isnan().any()
    torch.testing.assert_close(out, expected)


def test_no_bias_is_none_in_either_projection() -> None:
    layer = MultiheadAttention(8, 4, bias=False)
    assert layer.in_proj_bias is None
    assert layer.out_proj.bias is None


_ROWS, _BATCH, _HIDDEN = torch.randn(4, 4), torch.randn(4, 4, 4), torch.zeros(4, dtype=torch.bool)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("args", "masks", "complaint"),
    [
        ((_BATCH, _ROWS, _BATCH), {}, "`key` and `value` to be 3-D but found 2-D and 3-D tensors"),
        ((_BATCH, _BATCH, _ROWS), {}, "`key` and `value` to be 3-D but found 3-D and 2-D tensors"),
        (
            (_BATCH,) * 3,
            {"key_padding_mask": _HIDDEN},
            "`key_padding_mask` to be `None` or 2-D but found 1-D",
        ),
        ((_BATCH,) * 3, {"attn_mask": _HIDDEN}, "`attn_mask` to be `None`, 2-D or 3-D but found 1-D"),
        ((_ROWS, _BATCH, _ROWS), {}, "`key` and `value` to be 2-D but found 3-D and 2-D tensors"),
        ((_ROWS,) * 3, {"key_padding_mask": _HIDDEN[None]}, "`None` or 1-D but found 2-D"),
        ((_ROWS,) * 3, {"attn_mask": torch.zeros(5, 4, 4)}, r"`attn_mask` shape to be \(4, 4, 4\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_about_shapes_have_torchs_words(
    args: Any, masks: dict[str, Any], complaint: str, batch_first: bool
) -> None:
    layer = MultiheadAttention(4, 4, batch_first=batch_first)
    for training in (True, False):
        with torch.set_grad_enabled(training), pytest.raises(AssertionError, match=complaint):
            layer.train(training)(*args, **masks)


def test_masks_of_another_dtype_than_the_query() -> None:
    layer = MultiheadAttention(4, 1)
    query = torch.ones(1, 2, 4).double()
    padding, mask = torch.full((2, 1), -torch.inf), torch.ones(1, 1, dtype=torch.bool)
    with pytest.warns(UserWarning, match="mismatched"), pytest.raises(RuntimeError):
        layer(query, query, query, need_weights=False, key_padding_mask=padding, attn_mask=mask)


def test_causality_is_a_hint_that_wants_its_mask() -> None:
    layer = randomised(MultiheadAttention(4, 1, batch_first=True))
    query = torch.randn(1, 5, 4)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for need_weights in (True, False):
        call = {"attn_mask": mask, "need_weights": need_weights}
        expected, _ = layer(query, query, query, **call)
        torch.testing.assert_close(layer(query, query, query, **call, is_causal=True)[0], expected)
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            layer(query, query, query, is_causal=True, need_weights=need_weights)


# --- layers and stacks


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
def test_the_fast_path_is_never_taken(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the attention, the layer or the stack, whatever the masks."""
    taken = MagicMock(side_effect=AssertionError("torch's fast path"))
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", taken)
    monkeypatch.setattr(torch, "_native_multi_head_attention", taken)
    layer = TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stack = TransformerEncoder(layer, 2)
    for module in (layer, stack):
        module.train(mode == "train")
    src, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    modes = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}
    with modes.get(mode, torch.enable_grad()):
        for padded in ({}, {"src_key_padding_mask": padding}):
            assert layer(src, **padded).shape == stack(src, **padded).shape == src.shape
            assert stack(src, torch.zeros(4, 4).bool(), **padded).shape == src.shape
        assert layer.self_attn(src, src, src)[0].shape == src.shape
        nested = torch.nested.nested_tensor([src[0], src[1, :2]])
        assert layer(nested).is_nested
        assert stack(nested).is_nested


@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_layer_in_eval_is_as_in_training(norm_first: bool, heads: int) -> None:
    layer = randomised(
        TransformerEncoderLayer(8, heads, 32, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    )
    src = torch.randn(2, 4, 8)
    for mask in (
        None,
        torch.zeros(4, 4, dtype=torch.bool),
        torch.ones(4, 4).triu(1).bool(),
        torch.randn(4, 4),
    ):
        expected = layer.train()(src, src_mask=mask)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(src, src_mask=mask), expected)


@pytest.mark.parametrize("enable_nested_tensor", [True, False])
def test_an_encoder_in_eval_is_as_in_training(enable_nested_tensor: bool) -> None:
    layer = TransformerEncoderLayer(12, 4, 12, 0.0, batch_first=True)
    model = randomised(TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor))
    for length, padded in ((2, (1, 1, 2)), (40, (2, 10)), (7, (0, 3, 6))):
        src = torch.rand(len(padded), length, 12)
        padding = torch.arange(length) >= length - torch.tensor(padded)[:, None]
        expected = model.train()(src, src_key_padding_mask=padding)
        with torch.no_grad():
            out = model.eval()(src, src_key_padding_mask=padding)
        torch.testing.assert_close(out, expected, equal_nan=True)
        assert not out[~padding].isnan().any()


@pytest.mark.parametrize("training", [True, False])
def test_as_many_sequences_as_positions(training: bool) -> None:
    """Nothing takes the batch for the length where they are equal."""
    layer = TransformerEncoderLayer(4, 2, 16, 0.0, batch_first=True)
    model = randomised(TransformerEncoder(layer, 2)).train(training)
    src = torch.randn(2, 2, 4)
    mask = torch.tensor([[False, True], [False, False]])
    out = model(src, mask=mask)
    for i in range(2):
        torch.testing.assert_close(out[i], model(src[i], mask=mask))
    torch.testing.assert_close(out[:, 0], model(src[:, :1])[:, 0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_masks_of_ints_are_refused(training: bool, dtype: torch.dtype) -> None:
    layer = TransformerEncoderLayer(2, 2, 4, 0.0, "gelu", batch_first=True)
    encoder = TransformerEncoder(layer, 2).train(training)
    src, ints = torch.randn(1, 4, 2), torch.tensor([[1, 1, 0, 0]], dtype=dtype)
    for mask in ({"src_key_padding_mask": ints}, {"mask": torch.zeros(4, 4, dtype=dtype)}):
        with (
            torch.set_grad_enabled(training),
            pytest.raises(AssertionError, match="only bool and floating types"),
        ):
            encoder(src, **mask)


def test_bool_masks_do_not_warn() -> None:
    encoder = TransformerEncoder(TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, nn.LayerNorm(16))
    decoder = TransformerDecoder(TransformerDecoderLayer(16, 2, 32, batch_first=True), 2, nn.LayerNorm(16))
    src, memory = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    mask, padding = torch.ones(3, 3).bool().triu(1), torch.tensor([[False] * 3, [False, False, True]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(src, mask=mask, src_key_padding_mask=padding)
        decoder(src, memory, tgt_mask=mask, tgt_key_padding_mask=padding, memory_key_padding_mask=padding)


def test_an_encoder_layer_takes_the_hint() -> None:
    layer = randomised(TransformerEncoderLayer(3, 1, 6, batch_first=True)).eval()
    src = torch.randn(1, 5, 3)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(layer(src, src_mask=mask, is_causal=True), layer(src, src_mask=mask))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(layer(src), layer(src, src_mask=mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_any_layer_in_a_stack_hears_of_causality(dtype: torch.dtype) -> None:
    src = torch.randn(1, 2, 2)
    encoder = TransformerEncoder(TransformerEncoderLayer(2, 1, 4, 0.0, batch_first=True), 2)
    layer = MagicMock(nn.TransformerEncoderLayer(2, 1), return_value=src)
    encoder.layers[1] = layer
    mask = torch.full((2, 2), -torch.inf).triu(1)
    encoder(src, mask=mask.bool() if dtype == torch.bool else mask)
    assert layer.call_args.kwargs["is_causal"] is True
    assert set(layer.call_args.kwargs) == {"src_mask", "is_causal", "src_key_padding_mask"}


def test_training_with_a_hint() -> None:
    encoder = TransformerEncoder(TransformerEncoderLayer(2, 1, 4, 0.0, "gelu", batch_first=True), 2)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    src = torch.randn(1, 2, 2)
    mask = nn.Transformer.generate_square_subsequent_mask(2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (encoder(src, mask=mask, is_causal=True) - src).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_trailing_columns_of_padding() -> None:
    layer = TransformerEncoderLayer(16, 4, 32, activation="gelu")
    encoder = TransformerEncoder(layer, 3)
    padding = torch.ones(6, 10, dtype=torch.bool)
    padding[0, :] = False
    assert encoder(torch.randn(10, 6, 16), src_key_padding_mask=padding).shape == (10, 6, 16)


def test_constructors_warn_as_torchs() -> None:
    layer = TransformerEncoderLayer(8, 4, bias=False, batch_first=True)
    with pytest.warns(UserWarning, match="encoder_layer.self_attn was passed bias=False"):
        TransformerEncoder(layer, 1)
    with pytest.warns(UserWarning, match="self_attn was passed bias=False"):
        model = Transformer(8, 4, 1, 1, 16, bias=False, batch_first=True).eval()
    src = torch.randn(2, 3, 8)
    assert model(src, src).shape == src.shape


def test_subclasses_of_ours() -> None:
    """Of layers in stacks, and with a forward that doesn't know of our arguments."""

    class Layer(TransformerEncoderLayer):
        def forward(self, src: Tensor, *args: Any, **masks: Any) -> Tensor:  # type: ignore[override]
            assert "backend" not in masks
            return super().forward(src, *args, **masks)

    encoder = TransformerEncoder(Layer(8, 2, 16, 0.0, batch_first=True), 2)
    assert all(type(layer) is Layer for layer in encoder.layers)
    src = torch.randn(2, 3, 8)
    expected = encoder(src)
    encoder.backend = "reference"
    torch.testing.assert_close(encoder(src), expected)
