"""bench/device.sh with an interpreter that only says what it was asked for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Device = Callable[..., tuple[subprocess.CompletedProcess[str], Path]]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Device:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "python $*"\ncase "$*" in *doctor) exit 3;; esac\n')
    python.chmod(0o755)

    def device(*sections: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        output = tmp_path / "output"
        environment = {**os.environ, "PYTHON": str(python), "PEERS": str(tmp_path / "none")}
        command = ["bash", str(ROOT / "bench" / "device.sh"), str(output), *sections]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60), output

    return device


def test_sections_run_alone_and_write_into_one_folder(run: Device) -> None:
    finished, output = run("bench_attention", "bench_layer_norm_float32", "tune_attention_decode")
    assert finished.returncode == 0, finished.stdout
    logs = {path.stem: path.read_text() for path in output.iterdir()}
    assert set(logs) == {"bench_attention", "bench_layer_norm_float32", "tune_attention_decode"}
    options = f"--seconds 420 --save {output}"
    assert f"-m bench attention --device cuda --dtype bfloat16 {options}" in logs["bench_attention"]
    assert f"-m bench layer_norm --device cuda --dtype float32 {options}" in logs["bench_layer_norm_float32"]
    assert "-m bench.tune_attention_decode --seconds 480" in logs["tune_attention_decode"]


def test_a_section_that_fails_is_named_and_the_others_run(run: Device) -> None:
    finished, output = run("doctor", "no_such_section", "build")
    assert finished.returncode == 1
    assert finished.stdout.splitlines()[-1] == "failed: doctor no_such_section"
    assert "llmkernels build" in (output / "build.log").read_text()


def test_the_page_names_every_section(run: Device) -> None:
    _, output = run()
    page = (ROOT / "bench" / "README.md").read_text()
    sections = {path.stem for path in output.glob("*.log")}
    assert {"build", "wrappers", "doctor", "overhead", "bench_generation", "test_nn"} <= sections
    for section in sections:
        assert section.removeprefix("bench_") in page
