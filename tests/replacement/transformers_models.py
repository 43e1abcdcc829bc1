"""Small models of transformers with random weights, one of each family, and what runs and compares them."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkernels import testing

WIDTH = 32
_BERT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_WORDS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Family(NamedTuple):
    """What the tests know of a family's small model."""

    model: str
    config: str
    settings: dict[str, Any]
    inputs: str = "text"
    generates: bool = False


FAMILIES: dict[str, Family] = {
    "bert": Family("BertModel", "BertConfig", {**_BERT, "vocab_size": 50}),
    "bert decoder": Family(
        "BertLMHeadModel",
        "BertConfig",
        {**_BERT, "vocab_size": 50, "is_decoder": True, "add_cross_attention": True},
        "cross",
    ),
    "roberta": Family("RobertaModel", "RobertaConfig", {**_BERT, "vocab_size": 50}),
    "distilbert": Family(
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 50},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32, **_WORDS},
        generates=True,
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": WIDTH,
            "max_position_embeddings": 32,
            **_WORDS,
        },
        generates=True,
    ),
    "vit": Family("ViTModel", "ViTConfig", {**_BERT, "image_size": 8, "patch_size": 4}, "image"),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": WIDTH,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_mel_bins": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_source_positions": 8,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "decoder_start_token_id": 1,
            **_WORDS,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            "dropout": 0.1,
            "activation_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "sound",
        generates=True,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_decoder_layers": 1,
            "num_heads": 4,
            **_WORDS,
        }
        | {"decoder_start_token_id": 0},
        "two texts",
        generates=True,
    ),
    "t5 gated": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, **_WORDS}
        | {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
        "two texts",
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_BERT, "num_key_value_heads": 2, "attention_dropout": 0.1, **_WORDS},
        generates=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        {**_BERT, "num_key_value_heads": 1, "sliding_window": 3, **_WORDS},
        generates=True,
    ),
}


def make(family: str, implementation: str = "sdpa", **settings: Any) -> Any:
    """The family's model, always of the same weights, in eval mode."""
    import transformers

    known = FAMILIES[family]
    config = getattr(transformers, known.config)(**{**known.settings, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, known.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are made trivial
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.set_attn_implementation(implementation)
    return model


def batch(family: str) -> dict[str, Tensor]:
    """Arguments of a call, with padding where the model knows of it."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 50, (2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    match FAMILIES[family].inputs:
        case "image":
            return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
        case "sound":
            features = torch.randn(2, 4, 16, generator=generator)
            return {"input_features": features, "decoder_input_ids": words[:, :5]}
        case "two texts":
            return {"input_ids": words, "attention_mask": mask, "decoder_input_ids": words[:, 2:]}
        case "cross":
            states = torch.randn(2, 5, WIDTH, generator=generator)
            text = {"input_ids": words, "attention_mask": mask}
            return {**text, "encoder_hidden_states": states, "encoder_attention_mask": mask[:, :5]}
        case _:
            return {"input_ids": words, "attention_mask": mask}


def run(model: nn.Module, arguments: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The first output, where it is not padding, and the gradients of all parameters."""
    torch.manual_seed(seed)
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    out = model(**{name: t.to(dtype) if t.is_floating_point() else t for name, t in arguments.items()})
    found = out.logits if hasattr(out, "logits") else out.last_hidden_state
    if "attention_mask" in arguments and "decoder_input_ids" not in arguments:
        found = found * arguments["attention_mask"][..., None].to(dtype)
    # Not the sum of squares, which a last norm makes a constant.
    weights = testing.random_tensor(tuple(found.shape), torch.float64, "cpu", 0)
    (found * weights.to(dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": found.detach(), **gradients}


def assert_close(
    actual: dict[str, Tensor], exact: dict[str, Tensor], baseline: dict[str, Tensor], name: str
) -> None:
    """Within the budget of llmkernels.testing: in float32 every output and gradient row by row, in half
    precision each of the two as one row, for single rows depend on how torch rounds what is in between."""
    assert actual.keys() == baseline.keys() == exact.keys()
    if next(iter(actual.values())).dtype != torch.float32:
        for part in (["output"], [each for each in actual if each != "output"]):
            rows = (torch.cat([each[key].flatten() for key in part]) for each in (actual, exact, baseline))
            testing.assert_within_budget(*rows, name=f"{name}: {part[0]}")
        return
    typical = torch.stack([value.abs().amax() for value in exact.values()]).median()
    for key, value in actual.items():
        # Sums in every layer, of terms as large as the largest gradient; those of a key's bias cancel to 0.
        size = torch.maximum(exact[key].abs().amax(), typical)
        testing.assert_within_budget(
            value, exact[key], baseline[key], name=f"{name}: {key}", magnitude=size * WIDTH
        )


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()
