"""Replaced models under DistributedDataParallel, fully_shard() and tensor parallelism: two ranks, gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .two_ranks import CHECKS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank says of each check."""
    folder = tmp_path_factory.mktemp("ranks")
    root = str(Path(__file__).parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.replacement.two_ranks", str(rank), str(folder)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = []
    for rank in ranks:
        try:
            errors.append(rank.communicate(timeout=200)[1])
        except subprocess.TimeoutExpired:
            for each in ranks:
                each.kill()
            errors.append("took too long")
    files = [folder / f"{rank}.json" for rank in (0, 1)]
    assert any(file.exists() for file in files), errors
    return [json.loads(file.read_text()) for file in files if file.exists()]


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_ranks(outcomes: list[dict[str, str]], name: str) -> None:
    assert [outcome.get(name, "not reached") for outcome in outcomes] == ["passed", "passed"], outcomes
