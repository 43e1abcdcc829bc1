"""replace(model): what it changes, what it leaves, what it reports, and the way back."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import llmkernels
from llmkernels.ops.layer_norm import reference
from llmkernels.replacement import Report, adapters, api, timing
from llmkernels.replacement.adapters import Adapter
from llmkernels.replacement.adapters.layer_norm import LayerNormAdapter
from llmkernels.replacement.sites import Site
from llmkernels.replacement.verification import Service


class Net(nn.Module):
    """Two norms of its own, one of them shared under a second name, and one inside."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.BatchNorm1d(width))
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.body(self.norm(x)))


def replace(model: nn.Module, **options: Any) -> Report:
    """Without the interpreter's pass, which its own tests try."""
    return llmkernels.replace(model, **{"interpret": False, **options})


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a replace() must leave alone, by value or by identity."""
    return {
        "classes": classes(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [dict(module._forward_pre_hooks) for module in model.modules()],
        "parameters": [(id(p), p.requires_grad, id(p.grad), p._version) for p in model.parameters()],
        "buffers": [(id(b), b._version, b.tolist()) for b in model.buffers()],
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


def break_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the reference backend err by a thousandth."""
    correct = reference.forward

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        y, *saved = correct(*arguments)
        return y * 1.001, *saved

    monkeypatch.setattr(reference, "forward", wrong)


def break_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the reference backend forget a row of the bias's gradient, nothing else."""
    correct = reference.backward

    def wrong(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        dx, dresidual, dweight, dbias = correct(dy, *arguments)
        return dx, dresidual, dweight, dbias - dy[-1].to(dbias.dtype)

    monkeypatch.setattr(reference, "backward", wrong)


# ------------ what changes, and back ------------


@pytest.mark.parametrize("backend", [None, "reference"])
def test_swaps_classes_in_place_and_undoes_exactly(backend: str | None) -> None:
    model = Net()
    names = list(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    fired = []
    model.norm.register_forward_hook(lambda *_: fired.append("hook"))
    before = state_of(model)
    norm, weight = model.norm, model.norm.weight

    report = replace(model, backend=backend)
    assert type(model.norm) is type(model.body[1]) is llmkernels.nn.LayerNorm
    assert model.norm is model.again is norm
    assert model.norm.weight is weight is optimizer.param_groups[0]["params"][0]
    assert list(model.state_dict()) == names
    assert not fired
    model(torch.randn(4, 16))
    assert fired == ["hook", "hook"]

    assert report.undo() == ["norm", "body.1"]
    model.load_state_dict(model.state_dict())
    assert classes(model) == before["classes"]
    assert [sorted(vars(module)) for module in model.modules()] == before["attributes"]
    assert report.undo() == []


def test_leaves_no_other_trace() -> None:
    model = Net().train()
    model.body[2].eval()
    model.norm.weight.requires_grad_(False)
    model(torch.randn(4, 16)).sum().backward()
    before = state_of(model)
    report = replace(model, sample_inputs=torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    report.undo()
    assert state_of(model) == before


def test_works_within_no_grad_inference_and_autocast() -> None:
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        model = Net()
        with context:
            assert len(replace(model).replaced) == 2
            assert torch.is_autocast_enabled("cpu") == isinstance(context, torch.autocast)


def test_outputs_are_bitwise_torchs_on_a_cpu_and_after_undo() -> None:
    model = Net().eval()
    input = torch.randn(4, 16)
    expected = model(input)
    report = replace(model)
    assert torch.equal(model(input), expected)
    report.undo()
    assert torch.equal(model(input), expected)


def test_is_idempotent() -> None:
    model = Net()
    first = replace(model)
    second = replace(model)
    assert [row.reason for row in second.rows] == ["replaced already"] * 2
    assert second.undo() == []
    assert len(first.undo()) == 2
    assert len(replace(model).replaced) == 2


def test_shared_modules_are_one_row_with_all_names() -> None:
    rows = replace(Net()).rows
    assert [(row.name, row.aliases) for row in rows] == [("norm", ("again",)), ("body.1", ())]


def test_the_model_may_be_a_layer_itself() -> None:
    layer = nn.LayerNorm(8)
    report = replace(layer)
    assert type(layer) is llmkernels.nn.LayerNorm
    assert "(the model)" in str(report)


def test_context_manager_undoes_also_after_an_error() -> None:
    model = Net()
    before = classes(model)

    def fail() -> None:
        with replace(model) as report:
            assert len(report.replaced) == 2
            raise KeyError("from the block")

    with pytest.raises(KeyError, match="from the block"):
        fail()
    assert classes(model) == before


def test_copies_and_pickles_of_a_replaced_model_stand_alone() -> None:
    model = Net().eval()
    report = replace(model, backend="reference")
    duplicates = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    report.undo()
    input = torch.randn(4, 16)
    for duplicate in duplicates:
        assert type(duplicate.norm) is llmkernels.nn.LayerNorm
        with llmkernels.explain() as calls:
            torch.testing.assert_close(duplicate(input), model(input))
        assert {call.backend for call in calls} == {"reference"}
        assert len(replace(duplicate).skipped) == 2


def test_undo_leaves_a_module_that_changed_its_class_since() -> None:
    class Other(llmkernels.nn.LayerNorm):
        pass

    model = Net()
    report = replace(model)
    model.norm.__class__ = Other
    assert report.undo() == ["body.1"]
    assert type(model.norm) is Other


@pytest.mark.usefixtures("one_process_group")
def test_composes_with_fully_shard_when_it_comes_first() -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    report = replace(model, backend="reference")
    fully_shard(model[1], mesh=mesh)
    assert isinstance(model[1], llmkernels.nn.LayerNorm)
    with llmkernels.explain() as calls:
        model(torch.randn(2, 8)).sum().backward()
    assert [call.backend for call in calls] == ["reference"]
    assert report.undo() == []
    assert "fully_shard" in (replace(model).skipped[0].reason or "")


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "data parallel"])
def test_sees_through_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    report = replace(wrap(model))
    assert type(model.norm) is llmkernels.nn.LayerNorm
    assert all(row.name.endswith(("norm", "body.1")) for row in report.rows)


def test_a_compiled_model_notices_the_swap() -> None:
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    input = torch.randn(4, 16)
    expected = compiled(input)
    with replace(model, backend="reference"):
        with llmkernels.explain() as calls:
            torch.testing.assert_close(compiled(input), expected)
        assert {call.backend for call in calls} == {"reference"}
    assert torch.equal(compiled(input), expected)


# ------------ what is left alone ------------


def _instance_forward(layer: nn.LayerNorm) -> nn.Module:
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def _own_attribute(layer: nn.LayerNorm) -> nn.Module:
    layer.backend = "mine"  # type: ignore[assignment]
    return layer


def _subclass(layer: nn.LayerNorm) -> nn.Module:
    class MyLayerNorm(nn.LayerNorm):
        pass

    layer.__class__ = MyLayerNorm
    return layer


def _fully_sharded(layer: nn.LayerNorm) -> nn.Module:
    class FSDPModule:
        pass

    layer.__class__ = type("FSDPLayerNorm", (FSDPModule, nn.LayerNorm), {})
    return layer


def _flattened(layer: nn.LayerNorm) -> nn.Module:
    weight = layer.weight.detach()
    del layer._parameters["weight"]
    layer.weight = weight  # type: ignore[assignment]
    return layer


def _sharded(layer: nn.LayerNorm) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight[:3].detach())
    return layer


def _tensor_subclass(layer: nn.LayerNorm) -> nn.Module:
    class Quantised(nn.Parameter):
        pass

    layer.weight = Quantised(layer.weight.detach())
    return layer


def _dtensor(layer: nn.LayerNorm) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    return torch.distributed.tensor.distribute_module(layer, mesh)


def _parametrized(layer: nn.LayerNorm) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def _integer(layer: nn.LayerNorm) -> nn.Module:
    layer.weight = nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)
    return layer


def _scripted(layer: nn.LayerNorm) -> nn.Module:
    return torch.jit.script(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_instance_forward, "forward of its own"),
        (_own_attribute, "attribute 'backend'"),
        (_subclass, "MyLayerNorm is a subclass of torch.nn.LayerNorm"),
        (_fully_sharded, "replace.. comes before fully_shard"),
        (_flattened, "weight is no registered parameter"),
        (_sharded, "weight has shape .3. and normalized_shape is .16."),
        (_tensor_subclass, "weight is a Quantised, a tensor subclass"),
        (_dtensor, "weight is a DTensor, a tensor subclass"),
        (_parametrized, "parametrized"),
        (_integer, "weight is torch.int8: it is quantised"),
        (_scripted, "compiled by torch.jit.script"),
    ],
)
@pytest.mark.usefixtures("one_process_group")
def test_skips_with_a_reason(make: Callable[[nn.LayerNorm], nn.Module], reason: str) -> None:
    layer = make(nn.LayerNorm(16))
    before = type(layer), sorted(vars(layer))
    report = replace(nn.Sequential(layer, nn.LayerNorm(16)))
    (row,) = report.skipped
    assert row.name == "0"
    assert re.search(reason, row.reason or "")
    assert (type(layer), sorted(vars(layer))) == before
    assert [other.name for other in report.replaced] == ["1"]


def test_an_explicit_backend_that_can_not_serve_skips_with_its_reasons() -> None:
    model = Net().double()
    report = replace(model, backend="triton")
    assert not report.replaced
    assert all("backend 'triton' can't serve it" in (row.reason or "") for row in report.skipped)
    assert type(model.norm) is nn.LayerNorm
    assert "backend" not in vars(model.norm)


def test_float64_is_served_by_torch() -> None:
    (row, _) = replace(Net().double()).replaced
    assert row.backend == "torch"


def test_meta_modules_are_replaced_unverified() -> None:
    report = replace(Net().to("meta"))
    assert len(report.replaced) == 2
    assert all("nothing to verify" in (row.reason or "") for row in report.rows)


def test_says_where_torchs_fused_layer_bypasses_a_norm() -> None:
    def reasons(**options: Any) -> list[str | None]:
        layer = nn.TransformerEncoderLayer(16, 2, 32, **{"batch_first": True, **options})
        _keep_the_layer(layer)
        rows = replace(layer, verify=False).replaced
        assert [row.name for row in rows] == ["self_attn", "norm1", "norm2"]
        return [row.reason and row.reason.split()[0] for row in rows[1:]]

    assert reasons() == ["bypassed", "bypassed"]
    assert reasons(batch_first=False) == [None, None]
    assert reasons(activation=nn.functional.silu) == [None, None]


def _keep_the_layer(layer: nn.Module) -> None:
    """Has replace() skip the layer itself."""
    layer.backend = "mine"  # type: ignore[assignment]


def _without_a_norm(layer: nn.TransformerEncoderLayer) -> None:
    del layer.norm2


def _with_an_identity(layer: nn.TransformerEncoderLayer) -> None:
    layer.norm2 = nn.Identity()


def _with_another_attention(layer: nn.TransformerEncoderLayer) -> None:
    layer.self_attn = nn.Linear(16, 16)


@pytest.mark.parametrize("change", [_without_a_norm, _with_an_identity, _with_another_attention])
def test_an_encoder_layer_may_have_other_children(
    change: Callable[[nn.TransformerEncoderLayer], None],
) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    change(layer)
    _keep_the_layer(layer)
    report = replace(layer)
    assert [row.status for row in report.rows[1:]] == ["replaced"] * (len(report.rows) - 1)
    assert all(row.reason is None for row in report.rows[1:])


def test_the_remark_on_torchs_fused_layer_is_true() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    input = torch.randn(2, 3, 16)
    _keep_the_layer(model)
    replace(model)
    with torch.no_grad(), llmkernels.explain() as fused:
        model(input)
    with llmkernels.explain() as slow:
        model(input)
    assert [call.op for call in fused] == []
    assert [call.op for call in slow] == ["attention", "layer_norm", "layer_norm"]


# ------------ verification ------------


@pytest.mark.parametrize("breakage", [break_forward, break_backward])
@pytest.mark.parametrize("sampled", [True, False], ids=["sample inputs", "synthetic inputs"])
def test_a_wrong_kernel_is_rolled_back(
    monkeypatch: pytest.MonkeyPatch, breakage: Callable[[pytest.MonkeyPatch], None], sampled: bool
) -> None:
    model = Net()
    sample = torch.randn(4, 16) if sampled else None
    assert len(replace(model, backend="reference", sample_inputs=sample).replaced) == 2
    model = Net()
    before = state_of(model)
    breakage(monkeypatch)
    report = replace(model, backend="reference", sample_inputs=sample)
    assert [row.status for row in report.rows] == ["rolled back"] * 2
    assert all("times its budget" in (row.reason or "") for row in report.rows)
    assert state_of(model) == before
    assert len(replace(model, backend="reference", verify=False).replaced) == 2


def test_what_can_not_be_timed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a layer is timed on synthetic inputs: they may not fit it, or not fit in the memory."""

    def speed_up(adapter: Adapter, *_: Any) -> float:
        raise MemoryError("too large")

    monkeypatch.setattr(timing, "speed_up", speed_up)
    site = Site(LayerNormAdapter(), nn.LayerNorm(8), ["norm"], [], None, torch.device("cuda"), torch.float32)
    trials = [api._Trial(site, "replaced", []) for _ in range(2)]
    for trial in trials:
        trial.service = Service((("layer_norm", "triton"),))
    assert api._time(trials, None) == ["norm: not timed: MemoryError: too large"]
    assert [trial.speed_up for trial in trials] == [None, None]


def test_a_kernel_that_raises_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ArithmeticError("the kernel broke")

    monkeypatch.setattr(reference, "backward", fail)
    model = Net()
    report = replace(model, backend="reference")
    assert all("ArithmeticError: the kernel broke" in (row.reason or "") for row in report.rolled_back)
    assert len(report.rolled_back) == 2
    assert type(model.norm) is nn.LayerNorm


def test_only_the_failing_site_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = reference.forward

    def wrong(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        y, *saved = correct(x, *arguments)
        return y + (x.shape[1] == 8), *saved

    monkeypatch.setattr(reference, "forward", wrong)
    model = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(8))
    report = replace(model, backend="reference")
    assert [row.status for row in report.rows] == ["replaced", "rolled back"]
    assert [type(module) for module in model] == [llmkernels.nn.LayerNorm, nn.LayerNorm]


def test_verifies_on_what_the_layer_gets_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    correct = reference.forward

    def record(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        seen.append(x.detach().clone())
        return correct(x, *arguments)

    monkeypatch.setattr(reference, "forward", record)
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(6))
    sample = torch.randn(5, 2, 3)
    replace(model, backend="reference", sample_inputs=(sample,))
    assert all(torch.equal(x, sample.flatten(1)) for x in seen)
    assert seen


def test_half_precision_rows_beside_float32_parameters() -> None:
    model = nn.Sequential(nn.LayerNorm(16))
    report = replace(model, backend="reference", sample_inputs=torch.randn(4, 16, dtype=torch.bfloat16))
    assert len(report.replaced) == 1


def test_a_layer_without_a_finite_result_prints_as_torchs() -> None:
    report = replace(nn.LayerNorm(16, eps=0.0), sample_inputs=torch.ones(2, 16))
    assert [row.status for row in report.rows] == ["replaced"]
    json.dumps(report.to_dict(), allow_nan=False)


def test_unusual_layers_are_verified() -> None:
    model = nn.Sequential(
        nn.LayerNorm(1),
        nn.LayerNorm((3, 4)),
        nn.LayerNorm(7, elementwise_affine=False),
        nn.LayerNorm(7, bias=False),
        nn.LayerNorm(8, dtype=torch.bfloat16),
        nn.LayerNorm(8, dtype=torch.float16),
    )
    report = replace(model, backend="reference")
    assert len(report.replaced) == 6, report
    assert all(row.worst is not None and row.worst.passed for row in report.rows)


# ------------ errors leave the model alone ------------


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got function"):
        replace(lambda x: x)  # type: ignore[arg-type]
    model = Net()
    with pytest.raises(ValueError, match="got 'fastest'"):
        replace(model, backend="fastest")
    assert type(model.norm) is nn.LayerNorm


def test_a_sample_that_the_model_refuses() -> None:
    model = Net()
    sample = torch.randn(4, 15)
    before = state_of(model)
    with pytest.raises(RuntimeError):
        replace(model, sample_inputs=sample)
    assert state_of(model) == before


def test_buffers_survive_a_model_that_changes_them_in_eval_mode() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x[0]
            torch.rand(1)
            return self.norm(x)

    model = Counting()
    sample = {"x": torch.randn(2, 8)}
    buffers, random = dict(model.named_buffers()), torch.get_rng_state()
    replace(model, sample_inputs=sample).undo()
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sample_of_a_model_with_scripted_parts() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(8), nn.LayerNorm(8)))
    frozen = torch.jit.freeze(torch.jit.script(nn.Linear(8, 8).eval()))
    model = nn.Sequential(scripted, frozen, nn.LayerNorm(8))
    before = copy.deepcopy(scripted.state_dict())
    report = replace(model, sample_inputs=torch.randn(4, 8))
    assert [row.status for row in report.rows] == ["skipped", "replaced"]
    assert scripted.training
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in scripted.state_dict().items())


def test_an_error_in_the_middle_of_the_swap_takes_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before = state_of(model)
    correct = LayerNormAdapter.swap

    def fail_at_the_second(self: LayerNormAdapter, module: nn.Module, backend: str | None) -> None:
        correct(self, module, backend)
        if module is model.body[1]:
            raise MemoryError("in the middle")

    monkeypatch.setattr(LayerNormAdapter, "swap", fail_at_the_second)
    with pytest.raises(MemoryError, match="in the middle"):
        replace(model, backend="torch")
    assert state_of(model) == before


# ------------ the report ------------


def test_the_report_prints_and_is_plain_data() -> None:
    model = Net()
    model.body[1].forward = nn.Identity().forward  # type: ignore[method-assign]
    report = replace(model)
    text = str(report)
    assert text.splitlines()[0].split()[:3] == ["site", "class", "kernel"]
    assert "norm = again" in text
    assert text.endswith("1 replaced, 0 rolled back, 1 skipped")
    assert "1 replaced" in repr(report)
    data = json.loads(json.dumps(report.to_dict()))
    assert 0 < data["rows"][0]["checks"][0]["budget_used"] <= 1
    assert data["rows"][1]["reason"] == report.skipped[0].reason
    assert str(replace(nn.Linear(2, 2))).endswith("no layer of a kind that this package replaces")


# ------------ other families ------------


class Doubling(nn.Sequential):
    """A layer of a made-up family whose replacement computes what its children compute."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class FastDoubling(Doubling):
    def forward(self, input: Tensor) -> Tensor:
        return nn.Sequential.forward(self, input) * 2


class DoublingAdapter(adapters.Adapter):
    original, replacement, kernels, covers_children = Doubling, FastDoubling, (), True

    def synthetic_inputs(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
    ) -> list[adapters.Inputs]:
        return [adapters.Inputs((torch.randn(rows, 8, dtype=dtype, device=device),), {})]


def test_a_family_is_one_entry_in_the_list_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkernels.replacement.sites.ADAPTERS", [*adapters.ADAPTERS, DoublingAdapter()])
    model = nn.Sequential(Doubling(nn.LayerNorm(8)), nn.LayerNorm(8))
    before = state_of(model)
    report = replace(model)
    assert [(row.name, row.status) for row in report.rows] == [("0", "replaced"), ("1", "replaced")], report
    assert [type(module) for module in model] == [FastDoubling, llmkernels.nn.LayerNorm]
    assert type(model[0][0]) is llmkernels.nn.LayerNorm
    again = replace(model)
    assert [(row.name, row.reason) for row in again.rows] == [
        ("0", "replaced already"),
        ("1", "replaced already"),
    ]
    assert report.undo() == ["0", "0.0", "1"]
    assert {**state_of(model), "random": None} == {**before, "random": None}


# ------------ a large model ------------


def test_a_hundred_sites_make_a_short_report() -> None:
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"first": nn.LayerNorm(8), "second": nn.RMSNorm(8)}) for _ in range(60)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "norm": nn.LayerNorm(8)})
    with torch.no_grad():
        blocks[7]["first"].weight.mul_(1e3)
    blocks[3]["second"].forward = nn.Identity().forward  # type: ignore[method-assign]
    report = replace(model)
    assert len(report.rows) == 121
    text = str(report)
    table = [line for line in text.split("\n\n")[0].splitlines()[2:] if line]
    assert [line.split("  ")[0] for line in table] == [
        "blocks.0-59.first (60)",
        "blocks.0-2,4-59.second (59)",
        "blocks.3.second",
        "norm",
    ]
    largest = max(row.checks[0].max_error for row in report.rows if row.name.endswith("first"))
    assert f"{largest:.2e}" in table[0]
    assert f"{report.rows[0].checks[0].max_error:.2e}" not in table[0]
    assert "a line of several sites: the worst of them in each column" in text
    assert len(report.to_dict()["rows"]) == 121
