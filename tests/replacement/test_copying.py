"""Copies of layers to try things out on: they have all of the original's, and nothing together with it."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn

from llmkernels.replacement.copying import duplicate, signature


class Layer(nn.Module):
    """One of everything that a layer may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = self.first
        self.dropout = nn.Dropout(0.25)
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("count", torch.tensor(3), persistent=False)
        self.register_parameter("none", None)
        self.width: Any = 4
        self.activation = functools.partial(torch.nn.functional.gelu, approximate="tanh")
        self.lock = threading.Lock()
        self.unregistered = [self.second, {"scale": self.scale}, (1, "two")]
        self.run = self.compute

    def compute(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.first(x)))
        return self.unregistered[0](hidden) * self.unregistered[1]["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_shares_nothing_and_computes_the_same() -> None:
    layer = Layer().eval()
    layer.first.weight.requires_grad_(False)
    layer.first.weight.grad = torch.ones(4, 4)
    fired = []
    layer.first.register_forward_hook(lambda *_: fired.append(1))
    layer.register_full_backward_hook(lambda *_: fired.append(2))
    state = torch.get_rng_state()
    copied = duplicate(layer)
    assert torch.equal(torch.get_rng_state(), state)

    x = torch.randn(2, 4)
    output = copied(x)
    output.sum().backward()
    assert not fired
    assert torch.equal(output, layer(x))
    assert copied.second.weight is copied.first.weight
    assert copied.again is copied.first
    assert copied.unregistered[0] is copied.second
    assert copied.unregistered[1]["scale"] is copied.scale
    assert copied.run.__self__ is copied
    assert copied.lock is layer.lock
    assert copied.none is None
    assert copied.dropout.p == 0.25
    assert not copied.training and not copied.dropout.training
    assert copied.count == 3 and "count" not in copied.state_dict()
    assert all(p.requires_grad and p.grad is not None for p in copied.parameters())
    assert layer.first.bias.grad is None
    mine = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    assert not mine & {t.data_ptr() for t in (*copied.parameters(), *copied.buffers())}
    assert [name for name, _ in copied.named_modules(remove_duplicate=False)] == [
        name for name, _ in layer.named_modules(remove_duplicate=False)
    ]


def test_another_dtype_and_a_part_left_out() -> None:
    layer = Layer()
    copied = duplicate(layer, torch.float64, [layer.dropout])
    assert {t.dtype for t in (*copied.parameters(), copied.scale)} == {torch.float64}
    assert copied.count.dtype == torch.int64
    assert not hasattr(copied, "dropout")
    assert torch.equal(copied.first.weight, layer.first.weight.double())


def test_a_signature_tells_kinds_and_sizes_but_not_values() -> None:
    def kind(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        layer = nn.TransformerEncoderLayer(8, 2, *arguments, **options)
        layer.layer_idx = torch.randint(100, ()).item()  # type: ignore[assignment]
        return signature(layer, {"layer_idx"})

    assert kind(16) == kind(16)
    different = [kind(16), kind(24), kind(16, norm_first=True), kind(16, 0.2), kind(16, dtype=torch.float16)]
    different += [kind(16, activation="gelu"), kind(16, bias=False), kind(16, layer_norm_eps=1e-6)]
    assert len(set(different)) == len(different)
