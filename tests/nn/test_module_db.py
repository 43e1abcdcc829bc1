"""torch.testing's own samples of every layer that is torch.nn's, too: ours against torch's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from .torch_layers import OURS, assert_alike, ours_like, randomised

common_modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)

INFOS = {info.module_cls: info for info in common_modules.module_db if info.module_cls in OURS}


def samples(kind: type[nn.Module], dtype: torch.dtype, training: bool) -> list[Any]:
    info = INFOS[kind]
    inputs = info.module_inputs_func
    return list(inputs(info, device="cpu", dtype=dtype, requires_grad=True, training=training))


def test_every_layer_of_torchs_has_samples() -> None:
    # torch has none of decoders as such; those of Transformer go through one.
    assert set(OURS) - set(INFOS) == {nn.TransformerDecoder}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", INFOS, ids=lambda kind: kind.__name__)
def test_module_db(kind: type[nn.Module], training: bool) -> None:
    """In float64: some samples are so large that gradients of float32 say little."""
    cases = samples(kind, torch.float64, training)
    assert cases
    for sample in cases:
        constructor, call = sample.constructor_input, sample.forward_input
        options = {} if kind is nn.TransformerEncoder else {"dtype": torch.float64}
        theirs = randomised(kind(*constructor.args, **constructor.kwargs, **options)).train(training)
        assert_alike(ours_like(theirs), theirs, call.args, call.kwargs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", INFOS, ids=lambda kind: kind.__name__)
def test_constructors_make_the_same_layer(kind: type[nn.Module]) -> None:
    """The same initial values under one seed, state, representation and the next random number."""
    for sample in samples(kind, torch.float32, True):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        made = []
        for make in (kind, OURS[kind]):
            torch.manual_seed(0)
            made.append(make(*copy.deepcopy(args), **kwargs))
            made.append(torch.rand(1))
        theirs, their_next, ours, our_next = made
        assert isinstance(ours, kind)
        assert repr(ours) == repr(theirs)
        assert torch.equal(our_next, their_next)
        assert vars(ours).keys() == vars(theirs).keys()
        assert_same_state(ours, theirs)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    (
        (nn.MultiheadAttention, (0, 1)),
        (nn.MultiheadAttention, (8, 0)),
        (nn.MultiheadAttention, (8, 3)),
        (nn.TransformerEncoderLayer, (8, 3)),
        (nn.TransformerEncoderLayer, (8, 2, 16, 1.5)),
        (nn.TransformerEncoderLayer, (8, 2, 16, 0.1, "swish")),
        (nn.TransformerDecoderLayer, (8, 2, 16, 0.1, "swish")),
        (nn.TransformerDecoderLayer, (8,)),
        (nn.Transformer, (8, 3)),
        (nn.Transformer, (8, 2, 1, 1, 16, 0.1, "swish")),
        (nn.TransformerEncoder, (nn.Linear(2, 2),)),
    ),
)
def test_constructors_refuse_the_same(kind: type[nn.Module], arguments: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as theirs:
            kind(*arguments)
        with pytest.raises(Exception) as ours:
            OURS[kind](*arguments)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)
