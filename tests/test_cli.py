"""The command line: what each command prints and exits with, and what doctor notices."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from llmkernels import build, cli, doctor
from llmkernels.ops.layer_norm import reference

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m llmkernels`` as a user starts it, without what conftest.py set for the kernels."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("LLMKERNELS_EXTENSION", "TRITON_INTERPRET")
    }
    command = [sys.executable, "-m", "llmkernels", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**environment, **variables}, capture_output=True, text=True, timeout=900
    )


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmkernels {build.version()}\n"
    assert cli.main([]) == 2
    assert {"doctor", "build", "bench"} <= set(capsys.readouterr().out.split())


def test_unknown_command() -> None:
    finished = run("cure")
    assert finished.returncode == 2 and "invalid choice: 'cure'" in finished.stderr


# --- doctor


@pytest.fixture(scope="module")
def here() -> doctor.Report:
    """What doctor finds on this machine, with whatever the test run has set up for its kernels."""
    return doctor.examine()


def test_doctor_runs_every_kernel_that_can(here: doctor.Report) -> None:
    assert here.healthy, doctor.as_text(here)
    assert {found.backend for found in here.backends} == {"cuda", "triton", "reference"}
    for found in here.backends:
        assert bool(found.runs) != bool(found.reasons)
        if found.op == "layer_norm" and found.runs:
            assert {run.name.split()[0] for run in found.runs} == {"layer_norm", "add_layer_norm", "rms_norm"}
    assert {"llmkernels", "python", "torch", "triton"} <= set(here.versions)
    assert here.chosen["layer_norm"].startswith("torch (" if not torch.cuda.is_available() else "triton (")


def test_doctor_says_what_is_not_chosen_and_why(here: doctor.Report) -> None:
    text = doctor.as_text(here)
    cuda = next(found for found in here.backends if found.backend == "cuda")
    said = "Not chosen by default: it has not run on real hardware yet; backend='cuda' asks for it."
    assert (said in text) == (not cuda.automatic)
    assert text.splitlines()[-1].startswith("All ") and "passed" in text.splitlines()[-1]
    assert json.loads(doctor.as_json(here))["healthy"] is True


def test_doctor_does_not_praise_kernels_that_did_not_run(here: doctor.Report) -> None:
    reference = tuple(found for found in here.backends if found.backend == "reference")
    verdict = doctor.as_text(dataclasses.replace(here, backends=reference)).splitlines()[-1]
    assert verdict.startswith("No kernel can run here.")


def test_doctor_without_a_compiled_module_names_the_command_that_mends_it(tmp_path: Path) -> None:
    if list(ROOT.glob("llmkernels/_C.*")):
        pytest.skip("the module is compiled here")
    program = "from llmkernels import doctor; print(doctor._module())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CUDACXX": "/nonexistent/nvcc"}
    environment.pop("LLMKERNELS_EXTENSION", None)
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert said.stdout.startswith("(None, (") and "no nvcc was found: CUDACXX is set" in said.stdout
    assert "run `llmkernels build`" in said.stdout


def test_doctor_finds_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One value off by a hundredth, in half precision only, so that the float64 yardstick stays right."""
    forward = reference.forward

    def wrong(x: torch.Tensor, *rest: object) -> tuple[torch.Tensor, ...]:
        y, *others = forward(x, *rest)  # type: ignore[arg-type]
        return (y if x.dtype == torch.float64 else y.index_fill(0, torch.tensor(0), 0.01), *others)

    monkeypatch.setattr(reference, "forward", wrong)
    doctor._run_kernels("reference")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    runs = {line["run"]["name"]: doctor.Run(**line["run"]) for line in lines if "run" in line}
    assert not runs["layer_norm float32"].passed and runs["layer_norm float32"].detail.startswith("output")


FAILED_RUN = doctor.Run("layer_norm float32", 1.0, 1e-7, 1e-6, False, "output [2, 8], max of row 0 of 2")


def report(*, runs: tuple[doctor.Run, ...] = (), failure: str | None = None) -> doctor.Report:
    found = doctor.Backend("layer_norm", "triton", True, True, "on the GPU", (), runs, failure)
    return doctor.Report({"torch": "2"}, (), None, ("no nvcc",), {"layer_norm": "triton (first)"}, (found,))


@pytest.mark.parametrize("found", (report(runs=(FAILED_RUN,)), report(failure="killed by signal 11")))
def test_doctor_exits_1_where_a_kernel_fails(
    found: doctor.Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: found)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED: layer_norm by triton"
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


@pytest.mark.parametrize(
    ("script", "said"),
    (("kill -9 $$", "killed by signal 9"), ("echo first >&2; echo the reason >&2; exit 3", "the reason")),
)
def test_doctor_survives_a_kernel_that_does_not(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    for found in doctor._examine_backend("reference"):
        assert found.failure == said and not found.healthy


# --- build


def test_build_without_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    assert cli.main(["build"]) == 1
    assert "llmkernels build: no nvcc was found: CUDACXX is set" in capsys.readouterr().err


def test_build_passes_its_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def compile_module(destination: Path, folder: Path, progress: build.Progress) -> Path:
        seen["destination"] = destination
        seen["variables"] = os.environ["LLMKERNELS_CUDA_ARCHS"], os.environ["MAX_JOBS"]
        for done in range(3):
            progress(done, 2, "layer_norm/forward.cu")
        return tmp_path / "build.log"

    monkeypatch.setattr(build, "compile_module", compile_module)
    monkeypatch.setenv("LLMKERNELS_CUDA_ARCHS", "80")
    monkeypatch.setenv("MAX_JOBS", "1")
    assert cli.main(["build", "--architectures", "90a", "--jobs", "3", "--output", str(tmp_path)]) == 0
    assert seen == {"destination": tmp_path / build.module_name(), "variables": ("90a", "3")}
    captured = capsys.readouterr()
    assert captured.out == f"built {tmp_path / build.module_name()}\nlog   {tmp_path / 'build.log'}\n"
    assert [line.split()[0] for line in captured.err.splitlines()] == ["[0/2]", "[1/2]", "[2/2]"]


# --- bench


def test_bench_takes_its_own_options() -> None:
    finished = run("bench", "--help")
    assert finished.returncode == 0, finished.stderr
    assert "bench" in finished.stdout


def test_bench_keeps_its_figures_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for op in bench.OPS.values():
        monkeypatch.setattr(op, "run", lambda *_: [])
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    assert bench.main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv"}
    assert "the plot needs matplotlib: pip install" in capsys.readouterr().out


def test_bench_names_the_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_matplotlib(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(runpy, "run_module", without_matplotlib)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert cli.main(["bench"]) == 1
    assert "llmkernels bench needs matplotlib: pip install 'llmkernels[bench]'" in capsys.readouterr().err
