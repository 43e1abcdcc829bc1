"""replace() on each family of transformers' models: the same outputs and gradients, and the way back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import llmkernels
from llmkernels.replacement import Report

from .transformers_models import FAMILIES, assert_close, batch, in_float64, make, run

pytest.importorskip("transformers")

# Ops called in one forward of each family's small model, beside the layer_norm of the norms that stand alone.
CALLS = {
    "bert": {"attention": 2, "linear_activation": 2, "add_layer_norm": 4},
    "bert decoder": {"attention": 4, "linear_activation": 2, "add_layer_norm": 6},
    "roberta": {"attention": 2, "linear_activation": 2, "add_layer_norm": 4},
    "distilbert": {"attention": 2, "feed_forward": 2},
    "gpt2": {"attention": 2, "feed_forward": 2},
    "opt": {"attention": 2},
    "vit": {"attention": 2, "feed_forward": 2},
    "whisper": {"attention": 3},
    "t5": {"attention": 4, "feed_forward": 3, "rms_norm": 9},
    "t5 gated": {"attention": 3, "rms_norm": 7},
    "llama": {"attention": 2, "rms_norm": 5},
    "mistral": {"attention": 2, "rms_norm": 5},
}
# Whose layers are left to transformers, by the beginning of the reason.
LEFT = {
    "opt": "fc1, its activation and fc2 stand amid",
    "whisper": "fc1, its activation and fc2 stand amid",
    "t5 gated": "its gate and up projections are two weights",
    "llama": "its gate and up projections are two weights",
    "mistral": "its gate and up projections are two weights",
}
GENERATING = [family for family, known in FAMILIES.items() if known.generates]


def replace(model: nn.Module, **options: Any) -> Report:
    return llmkernels.replace(model, **{"interpret": False, **options})


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_gradients_and_undo(family: str, implementation: str) -> None:
    model, arguments = make(family, implementation), batch(family)
    exact_model = in_float64(model)
    exact_model.set_attn_implementation("sdpa")
    exact = run(exact_model, arguments)
    before = run(model, arguments)
    report = replace(model, verify=False)
    assert report.replaced
    assert all((row.reason or "").startswith(LEFT[family]) for row in report.skipped), report
    with llmkernels.explain() as calls:
        after = run(model, arguments)
    assert_close(after, exact, before, family)
    counted = Counter(call.op for call in calls)
    del counted["layer_norm"]
    assert counted == CALLS[family]

    # Dropout draws the same numbers on the CPU: of another mask the loss would be another one.
    trained = run(model.train(), arguments)
    report.undo()
    exact = run(exact_model.train(), arguments)
    assert_close(trained, exact, run(model, arguments), f"{family} in train mode")
    assert all(torch.equal(value, before[name]) for name, value in run(model.eval(), arguments).items())
    assert not any(hasattr(module, "_llmkernels_original") for module in model.modules())


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("family", ("bert", "gpt2", "vit", "t5", "llama"))
def test_half_precision(family: str, implementation: str) -> None:
    model, arguments = make(family, implementation), batch(family)
    model.bfloat16()
    exact = run(in_float64(model), arguments)
    before = run(model, arguments)
    assert replace(model, verify=False).replaced
    assert_close(run(model, arguments), exact, before, family)


@pytest.mark.parametrize("family", ("bert", "gpt2", "vit", "whisper", "t5", "llama", "mistral"))
def test_on_the_kernels(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr("llmkernels.replacement.api.SYNTHETIC_ROWS", 6)  # through the interpreter
    model, arguments = make(family, "eager" if family in ("bert", "t5") else "sdpa"), batch(family)
    exact = run(in_float64(model), arguments)
    before = run(model, arguments)
    report = replace(model, backend="triton", verify=False)
    assert len(report.replaced) >= 4
    with llmkernels.explain() as calls:
        after = run(model, arguments)
    assert {call.backend for call in calls} == {"triton"}
    assert_close(after, exact, before, family)


@pytest.mark.parametrize(
    ("implementation", "cache"), [("sdpa", "dynamic"), ("sdpa", "static"), ("eager", "dynamic")]
)
@pytest.mark.parametrize("family", GENERATING)
@pytest.mark.filterwarnings("ignore")
def test_generates_the_same_tokens(family: str, cache: str, implementation: str) -> None:
    model = make(family, implementation)
    prompt = batch(family)
    prompt.pop("decoder_input_ids", None)
    if "attention_mask" in prompt and not model.config.is_encoder_decoder:
        prompt["attention_mask"] = prompt["attention_mask"].flip(1)  # padding stands before the words
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    expected = model.generate(**prompt, **options)
    assert expected.shape[1] >= 5
    report = replace(model, verify=False)
    with llmkernels.explain() as calls:
        assert torch.equal(model.generate(**prompt, **options), expected)
    assert (
        sum(call.op == "attention" for call in calls) >= 5 * len(model.model.decoder.layers)
        if (family == "whisper")
        else sum(call.op == "attention" for call in calls) >= 5
    )
    assert report.undo()


@pytest.mark.parametrize(
    "family", ("bert", "roberta", "distilbert", "gpt2", "opt", "vit", "whisper", "t5", "llama")
)
def test_verification_finds_no_fault(family: str) -> None:
    report = replace(make(family))
    assert not report.rolled_back, report
    assert all(row.checks for row in report.replaced), report
    assert all((row.reason or "").startswith(LEFT[family]) for row in report.skipped), report


@pytest.mark.parametrize("family", ("bert", "llama"))
def test_verification_in_half_precision(family: str) -> None:
    report = replace(make(family, "eager").bfloat16())
    assert not report.rolled_back, report


@pytest.mark.parametrize("family", ("gpt2", "whisper"))
def test_verification_on_a_sample(family: str) -> None:
    report = replace(make(family), sample_inputs=batch(family))
    assert not report.rolled_back, report
