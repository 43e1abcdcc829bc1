"""Tensors in guarded memory."""

from __future__ import annotations

from types import ModuleType

import torch

from .guarded import GuardedMemory


def test_guarded_copies(fast_probes: ModuleType) -> None:
    dense = torch.randn(4, 6)
    with GuardedMemory(fast_probes) as memory:
        views = (dense, dense[:, 1:5], dense.t(), dense[0].expand(3, 6), dense[1, 1:], torch.empty(0, 4))
        for tensor in views:
            copy = memory.guarded(tensor)
            assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
            assert tensor.numel() == 0 or copy.data_ptr() % 64 == tensor.data_ptr() % 64
            assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_guarded_outputs(fast_probes: ModuleType) -> None:
    fast_probes.emulator.clear()
    like = torch.ones(2, 3, dtype=torch.bfloat16).t()
    with GuardedMemory(fast_probes) as memory:
        with memory.guarded_outputs():
            made = [
                torch.empty(2, 3),
                torch.empty((2, 3), dtype=torch.float16),
                torch.empty_like(like),
                torch.empty_strided((2, 3), (1, 2), dtype=torch.bfloat16),
                like.new_empty(2, 3),
                like.new_empty((4,), dtype=torch.float32),
            ]
            assert like.new_empty(0).numel() == 0
        assert all(bool(tensor.isnan().all()) for tensor in made)
        assert [tensor.dtype for tensor in made[2:]] == [torch.bfloat16] * 3 + [torch.float32]
        assert made[2].stride() == like.stride() and made[3].stride() == (1, 2)
    assert fast_probes.emulator.report() == []


def test_a_stray_write_names_the_allocation(fast_probes: ModuleType) -> None:
    fast_probes.emulator.clear()
    with GuardedMemory(fast_probes) as memory:
        with memory.guarded_outputs():
            output = torch.empty(31, dtype=torch.int32)
        input = memory.guarded(torch.zeros(32, dtype=torch.int32))
        fast_probes.run("divergent_barrier", input=input.data_ptr(), output=output.data_ptr(), count=32)
    (line,) = fast_probes.emulator.report()
    fast_probes.emulator.clear()
    assert "0 bytes past the end of the 124 bytes of 'test_guarded.py:" in line
