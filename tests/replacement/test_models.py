"""replace() on models as people have them: torch.nn's encoder and a BERT of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmkernels
from llmkernels.replacement import Report
from llmkernels.testing import assert_within_budget


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    return model, {"src": torch.randn(2, 5, 16)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return transformers.BertModel(config), {"input_ids": torch.randint(50, (2, 5)), "attention_mask": mask}


def loss_of(output: Tensor) -> Tensor:
    """A sum that the last norm does not make constant, of weights that every dtype holds exactly."""
    weights = torch.arange(output.numel()) % 5 - 2
    return (output * weights.view_as(output).to(output.dtype)).sum()


def outputs_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**batch)
    output = output if isinstance(output, Tensor) else output.last_hidden_state
    loss_of(output).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients}


def in_float64(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}


def replace(model: nn.Module, **options: Any) -> Report:
    return llmkernels.replace(model, interpret=False, **options)


@pytest.mark.parametrize("make", [encoder, bert])
def test_outputs_and_gradients_before_and_after(make: Any, backend: str) -> None:
    model, batch = make()
    model.train()
    exact = outputs_and_gradients(copy.deepcopy(model).double(), in_float64(batch))
    before = outputs_and_gradients(model, batch)
    report = replace(model, backend=backend, sample_inputs=batch)
    assert report.replaced
    assert not report.rolled_back, report
    assert not [row for row in report.skipped if "backend" in (row.reason or "")], report
    with llmkernels.explain() as calls:
        after = outputs_and_gradients(model, batch)
    assert {call.backend for call in calls} == {backend}
    assert after.keys() == before.keys()
    largest = max(float(value.abs().max()) for value in exact.values())
    for name, value in after.items():
        # A gradient comes through the whole model: the rounding it inherits is that of the sums of 16 terms
        # of the largest one's size.
        size = torch.full_like(exact[name], 16 * largest)
        assert_within_budget(value, exact[name], before[name], name=name, magnitude=size)

    report.undo()
    again = outputs_and_gradients(model, batch)
    assert all(torch.equal(again[name], value) for name, value in before.items())


@pytest.mark.parametrize("make", [encoder, bert])
def test_an_optimizer_goes_on_with_the_replaced_model(make: Any) -> None:
    losses = {}
    for ours in (False, True):
        model, batch = make()
        # Adam's steps are of one size however small a gradient is: of a key's bias, whose own is 0, that is
        # a step along its rounding.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        if ours:
            replace(model)
        losses[ours] = []
        for _ in range(3):
            outputs_and_gradients(model, batch)
            optimizer.step()
            losses[ours].append(float(loss_of(outputs_and_gradients(model, batch)["output"])))
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]))
    assert len(set(losses[True])) == 3


def test_a_half_precision_model(backend: str) -> None:
    model, batch = encoder()
    batch = {"src": batch["src"].bfloat16()}
    report = replace(model.bfloat16(), backend=backend, sample_inputs=batch)
    assert report.replaced, report
    assert not report.rolled_back, report
    assert outputs_and_gradients(model, batch)["output"].dtype == torch.bfloat16
