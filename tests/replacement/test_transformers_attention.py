"""transformers' models on llmkernels.attention: the same outputs and gradients as on its "sdpa"."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import llmkernels
from llmkernels import testing
from llmkernels.replacement import register_attention
from llmkernels.replacement.transformers_attention import attention_forward

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 50}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(num_attention_heads=4, **SMALL))


def llama() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(**heads, **SMALL))


def mistral() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 3}
    return transformers.MistralModel(transformers.MistralConfig(**heads, **SMALL))


def gpt2() -> nn.Module:
    return transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50))


def run(model: nn.Module, padded: bool) -> list[torch.Tensor]:
    numbers = torch.arange(14).view(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[1, 4:] = 0
    model.zero_grad()
    hidden = model(input_ids=numbers, attention_mask=mask).last_hidden_state[mask.bool()]
    # Not the sum of squares, which the last LayerNorm makes a constant.
    weights = testing.random_tensor(tuple(hidden.shape), torch.float64, "cpu", 0).to(hidden.dtype)
    (hidden * weights).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("make", (bert, llama, mistral, gpt2), ids=lambda make: make.__name__)
@pytest.mark.parametrize("padded", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("preferred", (None, "triton"))
def test_models_agree_with_sdpa(make, padded: bool, preferred: str | None) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("sdpa")
    expected = run(model, padded)
    model.set_attn_implementation(register_attention())
    with llmkernels.use_backend(preferred), llmkernels.explain() as calls:
        actual = run(model, padded)
    assert len(calls) == 2 and {call.op for call in calls} == {"attention"}
    assert {call.backend for call in calls} == {"torch" if preferred is None else preferred}
    exact_model = copy.deepcopy(model).double()
    exact_model.set_attn_implementation("sdpa")
    exacts = run(exact_model, padded)
    typical = torch.stack([exact.abs().amax() for exact in exacts]).median()
    for i, (found, exact, right) in enumerate(zip(actual, exacts, expected, strict=True)):
        # Sums in every layer, of terms as large as the largest gradient; those of a key's bias cancel to 0.
        size = torch.maximum(exact.abs().amax(), typical)
        testing.assert_within_budget(found, exact, right, name=str(i), magnitude=size * SMALL["hidden_size"])
    model.set_attn_implementation("sdpa")
    assert all(map(torch.equal, run(model, padded), expected))


def test_generation_with_a_cache() -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**heads, **SMALL)).eval()
    prompt = torch.arange(5)[None]
    generate = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("sdpa")
    expected = model.generate(prompt, **generate)
    model.set_attn_implementation(register_attention())
    assert torch.equal(model.generate(prompt, **generate), expected)


def test_a_position_bias_joins_the_mask() -> None:
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    bias, mask = torch.randn(1, 2, 5, 5), torch.rand(1, 1, 5, 5) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    expected = llmkernels.attention(query, key, value, torch.where(mask, bias, -torch.inf)).transpose(1, 2)
    as_bias = torch.where(mask, 0.0, -torch.inf)
    for given in (mask, as_bias):
        out, weights = attention_forward(nn.Module(), query, key, value, given, position_bias=bias)
        assert weights is None
        torch.testing.assert_close(out, expected)
    out, _ = attention_forward(nn.Module(), query, key, value, None, is_causal=False, position_bias=bias)
    torch.testing.assert_close(out, llmkernels.attention(query, key, value, bias).transpose(1, 2))


def test_softcap_and_sinks_are_passed_on() -> None:
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    sinks = torch.randn(2)
    out, _ = attention_forward(nn.Module(), query, key, value, None, softcap=2.0, s_aux=sinks, scaling=0.3)
    expected = llmkernels.attention(query, key, value, is_causal=True, scale=0.3, softcap=2.0, sinks=sinks)
    assert torch.equal(out, expected.transpose(1, 2))
    with pytest.raises(ValueError, match="paged cache"):
        attention_forward(nn.Module(), query, key, value, None, cache=object())
