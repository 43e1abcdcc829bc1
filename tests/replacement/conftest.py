"""What the tests of replace() share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture(autouse=True, scope="session")
def cuda_kernels_offered(cuda_kernels_missing: str | None) -> None:
    """The CUDA kernels are built before anything asks for them: what is found missing once stays missing."""


@pytest.fixture
def one_process_group() -> Iterator[None]:
    """A group of one rank without communication. Gloo's threads want the interpreter's lock as its group is
    destroyed, which holds it: in one process with other tests that has hung."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
