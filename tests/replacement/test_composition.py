"""Replaced models under what people put around models: checkpointing, compilation, export, autocast, copies,
optimizers, LoRA."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import llmkernels
from llmkernels.replacement import Report
from llmkernels.testing import assert_within_budget, random_tensor

WIDTH = 16


def replace(model: nn.Module, **options: Any) -> Report:
    """Without the trials, which have their own tests."""
    return llmkernels.replace(model, **{"verify": False, **options})


def encoder(dropout: float = 0.0, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)


def replaced_encoder(dropout: float = 0.0, **options: Any) -> nn.TransformerEncoder:
    model = encoder(dropout)
    assert len(replace(model, **options).replaced) == 4
    return model


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor((2, 5, WIDTH), dtype, "cpu", 1)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 1, output.shape[-1])).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input": x.grad, **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, exactly: bool = False) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if exactly:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


# ------------ activation checkpointing ------------


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("backend", (None, "triton", "reference"))
def test_activation_checkpointing_replays_the_dropout(reentrant: bool, backend: str | None) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    layer = replaced_encoder(0.3, backend=backend).layers[0]

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=reentrant)

    torch.manual_seed(3)
    expected = step(layer, rows())
    torch.manual_seed(3)
    found = step(Checkpointed(), rows())
    assert_same({name.removeprefix("layer."): value for name, value in found.items()}, expected, exactly=True)
    torch.manual_seed(4)
    assert not torch.equal(step(layer, rows())["output"], expected["output"])


# ------------ compilation and export ------------


@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
def test_compiles_into_one_graph(train: bool) -> None:
    model = replaced_encoder().train(train)
    expected = step(model, rows())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, rows()).items()}
    assert_same(found, expected)


def test_compiles_with_masks_and_dropout() -> None:
    model = replaced_encoder(0.2)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for hint in (True, False):
        torch.manual_seed(0)
        expected = model(rows(), mask, is_causal=hint)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(rows(), mask, is_causal=hint), expected)
    model.eval()
    expected = model(rows(), src_key_padding_mask=padding)
    torch.testing.assert_close(compiled(rows(), src_key_padding_mask=padding), expected)


def test_a_compiled_model_notices_replace_and_undo() -> None:
    model = encoder().train()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(rows())
    with replace(model, backend="reference"):
        with llmkernels.explain() as calls:
            torch.testing.assert_close(compiled(rows()), expected)
        assert {call.op for call in calls} == {"attention", "add_layer_norm", "feed_forward", "layer_norm"}
    assert torch.equal(compiled(rows()), expected)


def test_export() -> None:
    model = replaced_encoder().eval()
    program = torch.export.export(model, (rows(),))
    torch.testing.assert_close(program.module()(rows()), model(rows()))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(rows()), model(rows()))


# ------------ training loops ------------


def test_autocast_and_grad_scaler() -> None:
    def train(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=x.dtype == torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            output = model(x)
        loss = (output * torch.linspace(-1, 1, WIDTH, dtype=x.dtype)).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        scaler.step(optimizer)
        scaler.update()
        return {"output": output.detach(), **gradients}

    model = encoder()
    exact = train(copy.deepcopy(model).double(), rows(torch.float64))
    baseline = train(copy.deepcopy(model), rows())
    before = copy.deepcopy(model.state_dict())
    replace(model)
    found = train(model, rows())
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name].dtype == baseline[name].dtype
        size = torch.full_like(value, float(value.abs().max()))
        assert_within_budget(found[name], value, baseline[name], name=name, magnitude=size)
    assert not torch.equal(before["norm.weight"], model.norm.weight)


def test_gradients_accumulate() -> None:
    model = replaced_encoder()
    singles = [step(model, scale * rows()) for scale in (1, 2)]
    model.zero_grad()
    for scale in (1, 2):
        output = model(scale * rows())
        (output * torch.linspace(-1, 1, WIDTH)).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, singles[0][name] + singles[1][name]), name


def test_an_optimizer_goes_on_across_replace_and_undo() -> None:
    def train(replaced: range) -> tuple[list[float], nn.Module]:
        model = encoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        report = None
        for index in range(6):
            if index in replaced and report is None:
                report = replace(model)
            elif index not in replaced and report is not None:
                report.undo()
                report = None
            optimizer.zero_grad()
            loss = (model(rows()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert len(optimizer.state) == len(list(model.parameters()))
        return losses, model

    expected, stock = train(range(0))
    found, model = train(range(2, 4))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    assert found[-1] < found[0]
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]


# ------------ copies and checkpoints ------------


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved),
    ids=("deepcopy", "pickle", "save"),
)
def test_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = encoder().eval()
    report = replace(model, backend="reference")
    expected = step(model, rows())
    twin = duplicate(model)
    report.undo()
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert type(twin.layers[0].self_attn) is llmkernels.nn.MultiheadAttention
    with llmkernels.explain() as calls:
        assert_same(step(twin, rows()), expected, exactly=True)
    assert {call.backend for call in calls} == {"reference"}
    assert not set(map(id, twin.parameters())) & set(map(id, model.parameters()))


def test_state_dicts_go_both_ways() -> None:
    stock, ours = encoder(), encoder()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.5)
    names = list(ours.state_dict())
    replace(ours)
    assert list(ours.state_dict()) == names
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(rows()), stock(rows()))
    with torch.no_grad():
        ours.layers[0].linear1.weight.mul_(2)
    stock.load_state_dict(ours.state_dict())
    torch.testing.assert_close(stock(rows()), ours(rows()))


# ------------ LoRA ------------


def _drawn_lora(model: nn.Module) -> None:
    """LoRA's second matrix begins as zeros, with which it does nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def _with_lora(model: nn.Module, modules: list[str]) -> nn.Module:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=modules, lora_dropout=0.0))
    _drawn_lora(adapted)
    return adapted


class Sequences(nn.Module):
    """An nn.Transformer of one argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(x, x.flip(1))


@pytest.mark.parametrize("modules", (["linear1"], ["linear1", "linear2"], ["self_attn"]), ids="+".join)
@pytest.mark.parametrize("order", ("replace first", "LoRA first"))
def test_lora_on_a_transformer(modules: list[str], order: str) -> None:
    x = rows(torch.float64)
    expected = step(_with_lora(Sequences().double(), modules), x)
    model: nn.Module = Sequences().double()
    if order == "replace first":
        replace(model)
        model = _with_lora(model, modules)
    else:
        model = _with_lora(model, modules)
        report = replace(model)
        assert not report.rolled_back, report
    assert any("lora_" in name for name in expected)
    with llmkernels.explain() as calls:
        assert_same(step(model, x), expected)
    assert "add_layer_norm" in {call.op for call in calls}


def test_lora_counts_in_eval_too() -> None:
    """torch's fused encoder layer reads the weights below the adapter."""
    model = Sequences()
    replace(model)
    model = _with_lora(model, ["linear1"])
    expected = model.train()(rows())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(rows()), expected)


@pytest.mark.parametrize("order", ("replace first", "LoRA first"))
def test_lora_on_bert(order: str) -> None:
    transformers = pytest.importorskip("transformers")

    def bert() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "vocab_size": 50}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.BertModel(transformers.BertConfig(**sizes, **heads)).eval()

    def outcome(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        hidden = model(input_ids=torch.arange(10).view(2, 5)).last_hidden_state
        (hidden * torch.linspace(-1, 1, WIDTH)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"output": hidden.detach(), **gradients}

    modules = ["query", "value", "dense"]
    expected = outcome(_with_lora(bert(), modules))
    model: nn.Module = bert()
    if order == "replace first":
        replace(model)
    model = _with_lora(model, modules)
    if order == "LoRA first":
        assert replace(model).replaced
    assert_same(outcome(model), expected)
