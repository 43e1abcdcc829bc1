"""The CUDA C++ kernels of attention alone, against the reference in float64: the test bodies of the Triton
kernels, whose place they take."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from llmkernels import extension, testing
from llmkernels.ops.attention import cuda_kernels
from llmkernels.ops.attention.call import UNLIMITED, AttentionCall, Settings, size_obstacle

from . import test_attention_triton_backward as backward_tests
from . import test_attention_triton_forward as forward_tests

# test_attention.py has windows, layouts and dropout's bits for every backend; the others are Triton's own.
_LEFT_OUT = (
    "test_reasons_name_the_device",
    "test_atomics_are_only_where_they_were_asked_for",
    "test_single_pass",
    "test_windows",
    "test_grouped_heads",
)
for _module in (forward_tests, backward_tests):
    _direction = _module.__name__.rsplit("_", 1)[1]
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and _name not in _LEFT_OUT:
            globals()[f"test_{_direction}_{_name.removeprefix('test_')}"] = _test


@pytest.fixture(autouse=True)
def in_the_place_of_triton(monkeypatch: pytest.MonkeyPatch, cuda_kernels_missing: str | None) -> None:
    if cuda_kernels_missing is not None:
        pytest.skip(cuda_kernels_missing)
    monkeypatch.setattr(forward_tests, "triton_forward", cuda_kernels)
    monkeypatch.setattr(backward_tests, "triton_backward", cuda_kernels)


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    call = AttentionCall("attention", torch.device("cpu"), torch.float16)
    assert cuda_kernels.unsupported(call) == []
    for change, reason in (
        ({"dtype": torch.float64}, "query is torch.float64; the kernels take float16, bfloat16 and float32"),
        ({"size_obstacle": size_obstacle(16, 300)}, "value's head_dim is 300; the kernels take 1 to 256"),
    ):
        assert cuda_kernels.unsupported(call._replace(**change)) == [reason]
    monkeypatch.setattr(extension, "device_obstacle", lambda device: f"no module for {device}")
    assert cuda_kernels.unsupported(call) == ["no module for cpu"]


def test_padded_rows_are_not_read(device: torch.device) -> None:
    """Head dims of any number of bytes, in rows that begin at multiples of 16: what lies between is NaN."""
    settings = Settings(0.3, 0.0, 0.0, UNLIMITED, UNLIMITED, False, 9, 21)

    def rows(length: int, seed: int, fill: float) -> torch.Tensor:
        padded = torch.full((1, 2, length, 24), fill, dtype=torch.bfloat16, device=device)
        padded[..., :13] = testing.random_tensor((1, 2, length, 13), torch.bfloat16, device, seed)
        return padded[..., :13]

    results = []
    for fill in (0.0, float("nan")):
        tensors = (rows(9, 0, fill), rows(21, 1, fill), rows(21, 2, fill))
        out, lse = cuda_kernels.forward(*tensors, None, None, None, None, None, None, settings)
        dout = rows(9, 3, fill)
        saved = (*tensors, out, lse, None, None, None, None, None, None, settings, False, True)
        results.append((out, lse, *cuda_kernels.backward(dout, None, *saved)[:3]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
