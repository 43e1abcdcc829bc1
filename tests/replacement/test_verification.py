"""What the trials of a layer compare, of layers with several arguments and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkernels.replacement import randomness
from llmkernels.replacement.adapters import Adapter, Inputs
from llmkernels.replacement.verification import check, redrawn, results


@dataclasses.dataclass
class Output:
    hidden: Tensor
    weights: Tensor | None
    picked: tuple[Tensor, ...] = ()
    cache: object = None


class Original(nn.Module):
    """Of two tensors, a mask and numbers; returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None, *, ids: Any = None) -> Output:
        hidden = self.linear(query) * key + self.bias
        if mask is not None:
            hidden = hidden + mask
        return Output(hidden, None, (hidden.argmax(-1), query > 0))


class Replacement(Original):
    fault: Callable[[Output], Output] = staticmethod(lambda output: output)

    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None, *, ids: Any = None) -> Output:
        return type(self).fault(super().forward(query, key, mask, ids=ids))


class OriginalAdapter(Adapter):
    original, replacement, kernels, constants = Original, Replacement, (), frozenset({"mask"})

    def synthetic_inputs(self, *_: Any) -> list[Inputs]:
        raise NotImplementedError


def inputs(same: bool = False) -> Inputs:
    query = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    options = {"mask": torch.zeros(4), "ids": [torch.arange(3), None, "text"]}
    return Inputs((query, query if same else query.flip(0)), options)


def run(fault: Callable[[Output], Output] | None = None, monkeypatch: Any = None) -> Any:
    if fault is not None:
        monkeypatch.setattr(Replacement, "fault", staticmethod(fault))
    torch.manual_seed(0)
    return check(OriginalAdapter(), Original(), [inputs()], None, "")


def test_results_by_their_names() -> None:
    found, given = results(OriginalAdapter(), Original(), inputs(), None)
    gradients = {"gradient of linear.weight", "gradient of linear.bias", "gradient of bias"}
    gradients |= {"gradient of query", "gradient of key"}
    assert found.keys() == {"output 0", "output 1", "output 2"} | gradients
    assert [grad.dtype for grad in given][:1] == [torch.float32]
    found, _ = results(OriginalAdapter(), Original(), inputs(same=True), None)
    assert "gradient of key" not in found
    pair = Inputs(([inputs().args[0]],), {})
    found, _ = results(OriginalAdapter(), nn.Identity(), pair, None)
    assert found.keys() == {"output", "gradient of input[0]"}


def test_a_right_replacement_passes() -> None:
    found = run()
    assert found.passed
    assert found.max_error == found.torch_error


@pytest.mark.parametrize(
    ("fault", "worst"),
    [
        (lambda out: dataclasses.replace(out, hidden=out.hidden + 1e-3 * out.hidden.detach()), "output 0"),
        (lambda out: dataclasses.replace(out, picked=(out.picked[0] + 1, out.picked[1])), "output 1"),
        (lambda out: dataclasses.replace(out, picked=(out.picked[0], ~out.picked[1])), "output 2"),
        (lambda out: dataclasses.replace(out, hidden=2 * out.hidden - out.hidden.detach()), "gradient"),
    ],
    ids=("values", "integers", "booleans", "gradients"),
)
def test_a_wrong_one_is_caught(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Output], Output], worst: str
) -> None:
    found = run(fault, monkeypatch)
    assert not found.passed
    assert found.worst.startswith(worst)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda out: dataclasses.replace(out, weights=out.hidden), "4 outputs where torch gives 3"),
        (
            lambda out: dataclasses.replace(out, hidden=out.hidden.double()),
            "output 0 is .3, 4. torch.float64",
        ),
        (lambda out: dataclasses.replace(out, hidden=out.hidden.detach()), "no gradient of"),
    ],
    ids=("one more", "dtype", "no gradient"),
)
def test_another_kind_of_result_raises(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Output], Output], message: str
) -> None:
    with pytest.raises((RuntimeError, TypeError), match=message):
        run(fault, monkeypatch)


def test_arguments_are_copied_for_each_call() -> None:
    class Cache:
        def __init__(self) -> None:
            self.calls = 0

    given = inputs()
    cache = Cache()
    given.kwargs["ids"].append(cache)  # type: ignore[index]
    copies = [given.map(Tensor.clone) for _ in range(2)]
    seen = [each.kwargs["ids"][-1] for each in copies]
    assert len({id(each) for each in (*seen, cache)}) == 3
    assert copies[0].kwargs["ids"][2] == "text"


def test_torchs_error_is_drawn_from_what_is_given() -> None:
    """A ReLU at 0, which rounding decides: torch's one error is nothing, those of its other draws are not."""
    layer = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
    given = Inputs((torch.tensor([[3.0, 3.0]]),), {})
    adapter = OriginalAdapter()
    baseline, gradients = results(adapter, layer, given, None)
    exact = {name: value.double() for name, value in baseline.items()}
    found = redrawn(adapter, layer, given, gradients, exact, baseline)
    name = "gradient of 0.weight"
    assert not baseline[name].any()
    assert (found[name] - exact[name]).abs().min() > 0.1
    assert layer[0].weight.tolist() == [[1.0, -1.0]]


class Threshold(nn.Module):
    """ReLUs of differences that are 0, and so are their gradients, unless rounding has it otherwise."""

    off = 0.0

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.relu(first - second + type(self).off * first)


class RoundedThreshold(Threshold):
    off = torch.finfo(torch.float32).eps


class ThresholdAdapter(OriginalAdapter):
    original, replacement = Threshold, RoundedThreshold


def test_what_rounding_decides_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Inputs((torch.full((2, 64), 3.0),), {})
    assert check(ThresholdAdapter(), Threshold(), [given], None, "").passed
    monkeypatch.setattr(RoundedThreshold, "off", 1.0)
    assert not check(ThresholdAdapter(), Threshold(), [given], None, "").passed


# ------------ dropout ------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x)


class Other(Dropping):
    share = 0.2

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return torch.where(torch.rand_like(x) >= self.share, x / (1 - self.share), 0.0)


class DroppingAdapter(OriginalAdapter):
    original, replacement = Dropping, Other


@pytest.mark.parametrize(
    ("share", "problem"),
    ((0.2, None), (0.3, "dropout moves its outputs by 1"), (0.1, "by 0.3"), (0.0, "applies no dropout")),
)
def test_dropout_is_compared_by_how_far_it_moves(
    monkeypatch: pytest.MonkeyPatch, share: float, problem: str | None
) -> None:
    monkeypatch.setattr(Other, "share", share)
    given = Inputs((torch.randn(32, 16, generator=torch.Generator().manual_seed(0)),), {})
    with torch.random.fork_rng():
        found = randomness.problem(DroppingAdapter(), Dropping(), given, None, torch.device("cpu"))
    assert (found is None) if problem is None else (problem in (found or "")), found


def test_dropout_where_torch_has_none() -> None:
    layer = Dropping()
    layer.dropout.p = 0.0
    given = Inputs((torch.ones(4, 4),), {})
    with torch.random.fork_rng():
        found = randomness.problem(DroppingAdapter(), layer, given, None, torch.device("cpu"))
    assert found == "draws random numbers in train mode where torch draws none"
