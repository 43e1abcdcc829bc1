"""python -m tests.replacement.two_ranks RANK FOLDER: one of the two processes of test_two_ranks.py.

Each check is a function; what it returns, or its traceback, is written to FOLDER/RANK.json by its name.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import llmkernels
from llmkernels.replacement import Report


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)


def replace(model: nn.Module) -> Report:
    return llmkernels.replace(model, interpret=False)


def batch() -> Tensor:
    return torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))


def mine(rows: Tensor) -> Tensor:
    return rows.chunk(2)[dist.get_rank()]


def gradients(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, 16)
    (model(rows) * weights).mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items() if g is not None
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(found) == len(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def data_parallel(mesh: DeviceMesh) -> None:
    """Replaced before and after DistributedDataParallel."""
    expected = gradients(encoder(), batch())
    for first in (True, False):
        model = encoder()
        if first:
            replace(model)
        wrapped = DistributedDataParallel(model)
        if not first:
            report = replace(wrapped)
            assert [row.name for row in report.replaced][:2] == ["module", "module.layers.0"], report
        assert type(model.layers[0]) is llmkernels.nn.TransformerEncoderLayer
        found = gradients(wrapped, mine(batch()))
        assert_same({name.removeprefix("module."): value for name, value in found.items()}, expected)


def fully_sharded(mesh: DeviceMesh) -> None:
    """fully_shard() after replace(), of each layer and the whole; undo() then leaves those alone."""
    model = encoder()
    expected = gradients(copy.deepcopy(model), batch())
    output = model(batch())
    report = replace(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with llmkernels.explain() as calls:
        torch.testing.assert_close(model(mine(batch())), mine(output))
    assert [call.op for call in calls].count("feed_forward") == 2, calls
    assert not [call for call in calls if "." in call.op], calls
    assert_same(gradients(model, mine(batch())), expected)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    assert report.undo() == ["norm"]
    model(mine(batch()))
    refused = {row.name: row.reason for row in replace(model).skipped}
    assert "comes before fully_shard" in refused[""] and "comes before fully_shard" in refused["layers.0"]


def tensor_parallel(mesh: DeviceMesh) -> None:
    """Weights that lie on several ranks stay with those who put them there, before and after replace()."""
    expected = gradients(encoder(), batch())
    plan = {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    for first in (True, False):
        model = encoder()
        if first:
            replace(model)
        for layer in model.layers:
            parallelize_module(layer, mesh, plan)
        if not first:
            report = replace(model)
            refused = {row.name: row.reason or "" for row in report.skipped}
            assert "linear1.weight is a DTensor" in refused["layers.0"], report
            inner = [row.name for row in report.replaced if row.name.startswith("layers.0.")]
            assert inner == ["layers.0.self_attn", "layers.0.norm1", "layers.0.norm2"], report
        assert isinstance(model.layers[0].linear1.weight, DTensor)
        assert_same(gradients(model, batch()), expected)


CHECKS = (data_parallel, fully_sharded, tensor_parallel)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for check in CHECKS:
        try:
            check(mesh)
            found[check.__name__] = "passed"
        except Exception:
            found[check.__name__] = traceback.format_exc()
            break  # the other rank may wait for this one
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    # Without a teardown: gloo's threads want the interpreter's lock while its group is destroyed under it.
    os._exit(0)
