"""replace() on torch.nn's Transformer layers: sites in sites, what is refused, what a wrong kernel does."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import llmkernels
from llmkernels.replacement import Report, capture
from llmkernels.replacement.adapters import ADAPTERS
from llmkernels.replacement.sites import find
from llmkernels.testing import random_tensor

WIDTH = 16


def replace(model: nn.Module, **options: Any) -> Report:
    """Without the interpreter's pass, which its own tests try."""
    return llmkernels.replace(model, **{"interpret": False, **options})


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(WIDTH, 2, 32, **{"batch_first": True, **options})


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    torch.manual_seed(0)
    return nn.TransformerDecoderLayer(WIDTH, 2, 32, **{"batch_first": True, **options})


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(**options), layers, norm=nn.LayerNorm(WIDTH))


def transformer() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(WIDTH, 2, 1, 2, 32, batch_first=True)


def rows(*shape: int) -> Tensor:
    return random_tensor((*(shape or (2, 5)), WIDTH), torch.float32, "cpu", 1)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a replace() and its undo() must leave alone, by value or by identity."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [{key: id(v) for key, v in vars(module).items()} for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "parameters": [(id(p), p.requires_grad, id(p.grad), p._version) for p in model.parameters()],
        "random": torch.get_rng_state().tolist(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
    }


def statuses(report: Report) -> dict[str, str]:
    return {row.name: row.status for row in report.rows}


# ------------ sites ------------


@pytest.mark.parametrize("backend", (None, "reference"))
def test_layers_take_their_attention_and_norms_with_them(backend: str | None) -> None:
    model = transformer()
    before = state_of(model)
    report = replace(model, backend=backend)
    assert statuses(report) == dict.fromkeys(
        (
            *("", "encoder", "encoder.layers.0", "encoder.norm"),
            *("decoder", "decoder.layers.0", "decoder.layers.1", "decoder.norm"),
        ),
        "replaced",
    )
    ours = {type(module).__name__: type(module).__module__ for module in model.modules()}
    kinds = (
        "Transformer",
        "TransformerEncoderLayer",
        "TransformerDecoder",
        "MultiheadAttention",
        "LayerNorm",
    )
    assert all(ours[kind].startswith("llmkernels.nn.") for kind in kinds)
    assert ours["Linear"] == "torch.nn.modules.linear"
    touched = report.undo()
    assert "decoder.layers.1.multihead_attn" in touched
    assert len(touched) == len(report.rows) + 3 + 2 * 5
    assert state_of(model) == before


def test_is_idempotent_and_a_context_manager() -> None:
    model = encoder()
    before = state_of(model)
    with replace(model) as first:
        again = replace(model)
        assert [row.name for row in again.rows] == [row.name for row in first.rows]
        assert {row.reason for row in again.rows} == {"replaced already"}
        assert again.undo() == []
        assert type(model.layers[0]) is llmkernels.nn.TransformerEncoderLayer
    assert state_of(model) == before
    assert first.undo() == []


def test_outputs_are_torchs_before_between_and_after() -> None:
    model = transformer().train()
    inputs = (rows(), rows(2, 3))
    torch.manual_seed(0)
    expected = model(*inputs)
    with replace(model):
        torch.manual_seed(0)
        torch.testing.assert_close(model(*inputs), expected)
    torch.manual_seed(0)
    assert torch.equal(model(*inputs), expected)


def test_a_stack_makes_no_nested_tensors_any_more() -> None:
    model = encoder().eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    seen = []
    model.layers[0].linear1.register_forward_hook(lambda *arguments: seen.append(arguments[-1].shape))
    replace(model)
    with torch.no_grad():
        model(rows(), src_key_padding_mask=padding)
    assert seen == [(2, 5, 32)]


def test_two_layers_show_what_a_stack_does() -> None:
    model = nn.Transformer(WIDTH, 2, 3, 4, 32)
    copied = next(each for each in ADAPTERS if nn.Transformer in each.classes()).copy(model)
    assert (len(copied.encoder.layers), len(copied.decoder.layers)) == (2, 2)
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (3, 4)


def test_attention_and_rms_norm_by_themselves() -> None:
    model = nn.ModuleList(
        (
            nn.MultiheadAttention(WIDTH, 2, batch_first=True),
            nn.MultiheadAttention(WIDTH, 2, kdim=8, vdim=12, bias=False),
            nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True, dropout=0.5),
            nn.RMSNorm(WIDTH),
            nn.RMSNorm(WIDTH, eps=1e-3, elementwise_affine=False, dtype=torch.bfloat16),
        )
    )
    report = replace(model)
    assert set(statuses(report).values()) == {"replaced"}, report
    served = replace(nn.ModuleList((nn.MultiheadAttention(WIDTH, 2), nn.RMSNorm(8))), backend="reference")
    assert [row.backend for row in served.rows] == ["reference", "reference"]


def test_the_report_names_the_kernels_of_each_op() -> None:
    report = replace(layer(), backend="reference")
    assert report.rows[0].backend == "reference: attention + add_layer_norm + feed_forward"
    report = replace(layer(norm_first=True))
    assert report.rows[0].backend == "torch: layer_norm + attention + add_layer_norm + feed_forward"


def test_a_backend_without_all_kernels_gets_the_children(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("llmkernels.ops.attention.reference")
    monkeypatch.setattr(kernels, "unsupported", lambda call: ["not today"])
    llmkernels.dispatch.forget()
    report = replace(layer(), backend="reference")
    monkeypatch.undo()
    llmkernels.dispatch.forget()
    assert statuses(report) == {
        "": "skipped",
        "self_attn": "skipped",
        "norm1": "replaced",
        "norm2": "replaced",
    }
    assert "not today" in (report.rows[0].reason or "")


# ------------ verification ------------


@pytest.mark.parametrize(
    ("options", "dtype"),
    (({}, torch.float32), ({"norm_first": True, "activation": "gelu", "dropout": 0.0}, torch.bfloat16)),
    ids=("post", "pre"),
)
def test_kernels_hold(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    model = layer(**options).to(dtype)
    (row,) = replace(model, backend=backend, sample_inputs=rows().to(dtype)).rows
    assert row.status == "replaced", row
    assert row.worst is not None and row.worst.passed


@pytest.mark.parametrize("make", (encoder, transformer), ids=lambda make: make.__name__)
def test_sample_inputs_with_masks(make: Callable[[], nn.Module]) -> None:
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    sample: dict[str, Any] = {"src": rows(), "src_key_padding_mask": padding}
    if make is transformer:
        mask = nn.Transformer.generate_square_subsequent_mask(3)
        sample.update(tgt=rows(2, 3), tgt_mask=mask, memory_key_padding_mask=padding)
    model = make()
    before = state_of(model)
    report = replace(model, sample_inputs=sample, backend="reference")
    assert set(statuses(report).values()) == {"replaced"}, report
    report.undo()
    assert state_of(model) == before


def test_a_tensor_given_twice_is_captured_as_one() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model = Attending()
    (inputs,) = capture.capture(model, find(model), rows()).values()
    query, key, value = inputs.args
    assert query is key is value
    assert query.data_ptr() != rows().data_ptr()


PIECES = {
    "attention": {"self_attn"},
    "feed_forward": set[str](),
    "layer_norm": {"norm1", "norm2"},
}


@pytest.mark.parametrize("direction", ("forward", "backward"))
@pytest.mark.parametrize("op", PIECES)
def test_a_wrong_kernel_rolls_the_layer_back_and_its_children_are_tried(
    monkeypatch: pytest.MonkeyPatch, op: str, direction: str
) -> None:
    kernels = importlib.import_module(f"llmkernels.ops.{op}.reference")
    correct = getattr(kernels, direction)

    def wrong(*arguments: Any) -> tuple[Any, ...]:
        first, *others = correct(*arguments)
        return first * 1.01, *others

    model = encoder(1)
    before = state_of(model)
    monkeypatch.setattr(kernels, direction, wrong)
    report = replace(model, backend="reference")
    monkeypatch.undo()
    found = statuses(report)
    assert found[""] == "replaced"
    assert found["layers.0"] == "rolled back"
    for name in ("self_attn", "norm1", "norm2"):
        expected = "rolled back" if name in PIECES[op] else "replaced"
        assert found[f"layers.0.{name}"] == expected, report
        is_torchs = type(getattr(model.layers[0], name)).__module__.startswith("torch.nn.")
        assert is_torchs == (expected == "rolled back")
    assert type(model.layers[0]) is nn.TransformerEncoderLayer
    assert "times its budget" in (report.rows[1].reason or "")
    report.undo()
    assert state_of(model) == before


def test_a_wrong_interpreted_kernel_rolls_all_layers_of_its_kind_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("llmkernels.ops.feed_forward.triton_kernels")
    correct = kernels.forward

    def wrong(*arguments: Any) -> tuple[Any, ...]:
        hidden, *others = correct(*arguments)
        return hidden * 1.05, *others

    monkeypatch.setattr(kernels, "forward", wrong)
    model = encoder(2)
    report = llmkernels.replace(model)
    found = statuses(report)
    assert found["layers.0"] == found["layers.1"] == "rolled back", report
    assert found["layers.1.self_attn"] == found["layers.1.norm2"] == "replaced", report
    assert all(row.reason and row.reason.startswith("triton: ") for row in report.rolled_back)
    assert "layers.0-1.self_attn (2)" in str(report)


@pytest.mark.parametrize("factor", (0.0, 2.0), ids=("forgotten", "doubled"))
def test_a_wrong_dropout_is_rolled_back(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    kernels = importlib.import_module("llmkernels.ops.layer_norm.reference")
    correct = kernels.forward
    assert statuses(replace(layer(dropout=0.2), backend="reference")) == {"": "replaced"}

    def wrong(*arguments: Any) -> tuple[Any, ...]:
        return correct(*arguments[:6], factor * arguments[6], *arguments[7:])

    monkeypatch.setattr(kernels, "forward", wrong)
    report = replace(layer(dropout=0.2), backend="reference")
    assert report.rows[0].status == "rolled back", report
    assert "dropout moves its outputs by" in (report.rows[0].reason or "")


def test_dropout_that_no_seed_decides_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("llmkernels.ops.layer_norm.reference")
    correct = kernels.forward
    calls = iter(range(1000))

    def wrong(*arguments: Any) -> tuple[Any, ...]:
        seed = None if arguments[4] is None else arguments[4] + next(calls)
        return correct(*arguments[:4], seed, *arguments[5:])

    monkeypatch.setattr(kernels, "forward", wrong)
    report = replace(layer(dropout=0.2), backend="reference")
    assert report.rows[0].status == "rolled back"
    assert "differs between two runs in train mode from one seed" in (report.rows[0].reason or "")


# ------------ what is left alone ------------


class Lora(nn.Module):
    """A linear layer with a low-rank addition, of the shape that adapters give it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def _forward(model: nn.TransformerEncoderLayer) -> None:
    model.forward = nn.Identity().forward  # type: ignore[method-assign]


def _subclass(model: nn.TransformerEncoderLayer) -> None:
    class Mine(nn.TransformerEncoderLayer):
        pass

    model.__class__ = Mine


def _dtensor(model: nn.TransformerEncoderLayer) -> None:
    torch.distributed.tensor.distribute_module(model.linear1, init_device_mesh("cpu", (1,)))


def _quantised(model: nn.TransformerEncoderLayer) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def _hook_managed(model: nn.TransformerEncoderLayer) -> None:
    nn.utils.weight_norm(model.linear2)


def _parametrized(model: nn.TransformerEncoderLayer) -> None:
    nn.utils.parametrize.register_parametrization(model, "extra", nn.Identity())


def _pruned(model: nn.TransformerEncoderLayer) -> None:
    model.self_attn.in_proj_weight = nn.Parameter(model.self_attn.in_proj_weight[:6].detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "reason", "replaced"),
    [
        (_forward, "the instance has a forward of its own", ("self_attn", "norm1", "norm2")),
        (
            _subclass,
            "Mine is a subclass of torch.nn.TransformerEncoderLayer",
            ("self_attn", "norm1", "norm2"),
        ),
        (_dtensor, "linear1.weight is a DTensor", ("self_attn", "norm1", "norm2")),
        (_quantised, "linear1 is quantised: torch.ao", ("self_attn", "norm1", "norm2")),
        (_hook_managed, "linear2.weight is no registered parameter", ("self_attn", "norm1", "norm2")),
    ],
    ids=("forward", "subclass", "DTensor", "quantised", "hook"),
)
@pytest.mark.usefixtures("one_process_group")
def test_refuses_a_layer_but_not_its_children(
    change: Callable[[nn.TransformerEncoderLayer], None], reason: str, replaced: tuple[str, ...]
) -> None:
    model = layer()
    change(model)
    before = state_of(model)
    report = replace(model)
    assert reason in (report.rows[0].reason or ""), report
    assert statuses(report)[""] == "skipped"
    assert tuple(row.name for row in report.replaced) == replaced, report
    assert type(model) is before["classes"][0]
    report.undo()
    assert state_of(model) == before


@pytest.mark.filterwarnings("ignore")
def test_refuses_a_scripted_stack_and_all_in_it() -> None:
    report = replace(nn.Sequential(torch.jit.script(layer()), nn.LayerNorm(WIDTH)))
    assert [row.name for row in report.replaced] == ["1"]
    assert all("torch.jit.script" in (row.reason or "") for row in report.skipped)


def test_a_pruned_attention() -> None:
    model = layer()
    _pruned(model)
    report = replace(model.self_attn)
    assert "in_proj_weight has shape [6, 16] where [48, 16] is the whole" in (report.rows[0].reason or "")


def _lora(model: nn.TransformerEncoderLayer) -> None:
    model.linear1 = Lora(model.linear1)  # type: ignore[assignment]


def _weight_parametrized(model: nn.TransformerEncoderLayer) -> None:
    nn.utils.parametrizations.weight_norm(model.linear2)


def _other_norm(model: nn.TransformerEncoderLayer) -> None:
    model.norm2 = nn.RMSNorm(WIDTH)  # type: ignore[assignment]


def _other_activation(model: nn.TransformerEncoderLayer) -> None:
    model.activation = nn.SiLU()


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        (_lora, "a Lora stands where a Linear is known"),
        (_weight_parametrized, "a ParametrizedLinear stands where a Linear is known"),
        (_other_norm, "RMSNorm stands where a LayerNorm is known"),
        (_other_activation, "no kernel for its activation"),
    ],
    ids=("LoRA", "parametrized", "norm", "activation"),
)
def test_children_that_can_not_be_seen_through_are_called(
    change: Callable[[nn.TransformerEncoderLayer], None], remark: str
) -> None:
    model = layer(dropout=0.0)
    change(model)
    kinds = [type(module) for module in model.modules()]
    expected = model(rows())
    calls = []
    for part in (model.linear1, model.linear2, model.norm2):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    with replace(model) as report:
        assert statuses(report) == {"": "replaced"}, report
        assert remark in (report.rows[0].reason or ""), report
        torch.testing.assert_close(model(rows()), expected)
        assert len(calls) == 3
    assert [type(module) for module in model.modules()] == kinds


def test_a_layer_without_a_child_is_skipped() -> None:
    model = layer()
    del model.norm2
    report = replace(model)
    assert report.rows[0].status == "skipped"
    assert report.rows[0].reason == "norm2 is missing"


# ------------ errors leave the model alone ------------


@pytest.mark.parametrize("error", (MemoryError, KeyboardInterrupt))
@pytest.mark.parametrize("at", range(9))
def test_whatever_fails_wherever_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], at: int
) -> None:
    """The last two of nine: in the middle of a swap, and behind it."""
    model = encoder(1).train()
    model.layers[0].linear1.weight.grad = torch.ones(32, WIDTH)
    model.layers[0].eval()
    before = state_of(model)
    targets = (
        "llmkernels.replacement.api.find",
        "llmkernels.replacement.api.capture",
        "llmkernels.replacement.api.serving",
        "llmkernels.replacement.verification.swap",
        "llmkernels.replacement.verification.results",
        "llmkernels.replacement.randomness.problem",
        "llmkernels.replacement.interpreted.verify",
        "llmkernels.replacement.adapters.adapter.Adapter.swap",
        "llmkernels.replacement.adapters.adapter.Adapter.swap",
    )
    module, _, name = targets[at].rpartition(".")
    owner: Any = importlib.import_module("llmkernels.replacement.adapters.adapter").Adapter
    if name != "swap" or not module.endswith("Adapter"):
        owner = importlib.import_module(module)
    correct = getattr(owner, name)
    parts = set(map(id, model.modules()))

    def fail(*arguments: Any, **options: Any) -> Any:
        if at < 7:
            raise error("in the middle")
        if id(arguments[1]) in parts and type(arguments[1]) is nn.LayerNorm:
            if at == 8:
                correct(*arguments, **options)
            raise error("in the middle")
        return correct(*arguments, **options)

    monkeypatch.setattr(owner, name, fail)
    contained = error is MemoryError and 2 <= at <= 5
    if contained:  # of one site's trial: the site is rolled back, and the model's other layers are not
        report = replace(model, sample_inputs=rows(), backend="torch")
        assert not report.replaced
        assert all("MemoryError" in (row.reason or "") for row in report.rolled_back)
    else:
        with pytest.raises(error, match="in the middle"):
            llmkernels.replace(model, sample_inputs=rows(), backend="torch", interpret=at == 6)
    monkeypatch.undo()
    assert state_of(model) == before


def test_adapters_are_pickled_by_their_class() -> None:
    assert [type(each) for each in pickle.loads(pickle.dumps(ADAPTERS))] == [type(each) for each in ADAPTERS]


@pytest.mark.parametrize(("left", "status"), [(1e-7, "replaced"), (1e-4, "rolled back")])
def test_gradients_of_which_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, left: float, status: str
) -> None:
    """Of a single key the weight is 1 whatever query and key are: their gradients are exactly 0 in torch,
    and what rounding leaves of the terms that cancel in a kernel. More than that is a fault."""
    reference = importlib.import_module("llmkernels.ops.attention.reference")
    correct = reference.backward

    def rounded(*arguments: Any) -> tuple[Any, ...]:
        dquery, *others = correct(*arguments)
        return dquery + left, *others

    monkeypatch.setattr(reference, "backward", rounded)
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    memory = torch.randn(2, 1, 16)
    sample = {"query": torch.randn(2, 3, 16), "key": memory, "value": memory, "need_weights": False}
    (row,) = llmkernels.replace(layer, backend="reference", sample_inputs=sample, interpret=False).rows
    assert row.status == status, row
