"""What works on this machine (doctor), compiling the CUDA C++ kernels (build), measuring (bench).

Each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmkernels", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="say what works on this machine and run every kernel against the reference"
    )
    doctor.add_argument("--json", action="store_true", help="the report as JSON")
    doctor.add_argument(
        "--wrappers",
        action="store_true",
        help="instead, run each instruction of the CUDA C++ kernels by itself, on the GPU or the emulator",
    )

    build = commands.add_parser("build", help="compile the CUDA C++ kernels with nvcc")
    build.add_argument(
        "--architectures",
        metavar="LIST",
        help="such as 90a or 80;120+PTX (LLMKERNELS_CUDA_ARCHS; default: all known)",
    )
    build.add_argument(
        "--jobs", metavar="N", help="compilers at once (MAX_JOBS; default: the cores, 4 at most)"
    )
    build.add_argument("--output", metavar="FOLDER", type=Path, help="where to put the module")

    commands.add_parser("bench", help="measure the kernels beside their peers (bench --help)", add_help=False)
    return parser


def _doctor(json: bool) -> int:
    from . import doctor

    report = doctor.examine()
    print(doctor.as_json(report) if json else doctor.as_text(report))
    return 0 if report.healthy else 1


def _wrappers(json: bool) -> int:
    from . import doctor, wrappers

    device = doctor.chosen_device()
    try:
        outcomes = wrappers.check(device)
    except RuntimeError as error:
        print(f"llmkernels doctor --wrappers: {error}", file=sys.stderr)
        return 1
    print(wrappers.as_json(outcomes, device) if json else wrappers.as_text(outcomes, device))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _build(architectures: str | None, jobs: str | None, output: Path | None) -> int:
    from . import build

    if architectures is not None:
        os.environ["LLMKERNELS_CUDA_ARCHS"] = architectures
    if jobs is not None:
        os.environ["MAX_JOBS"] = jobs
    destination = build.default_destination() if output is None else output / build.module_name()
    try:
        log = build.compile_module(destination, build.objects_folder(), build.ProgressLine())
    except (build.BuildError, OSError) as error:
        print(f"llmkernels build: {error}", file=sys.stderr)
        return 1
    print(f"built {destination}\nlog   {log}")
    return 0


def _bench(arguments: Sequence[str]) -> int:
    package = importlib.import_module(__package__ or "llmkernels")
    if importlib.util.find_spec("llmkernels.bench") is None:
        # Installed, bench is a part of the package; in a checkout that is not installed it lies beside it.
        package.__path__.append(str(Path(__file__).resolve().parent.parent))
    sys.argv = ["llmkernels bench", *arguments]
    try:
        runpy.run_module("llmkernels.bench", run_name="__main__", alter_sys=False)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("llmkernels"):
            raise
        print(f"llmkernels bench needs {error.name}: pip install 'llmkernels[bench]'", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["bench"]:  # whose options are its own
        return _bench(words[1:])
    parser = _parser()
    chosen = parser.parse_args(words)
    if chosen.version:
        from . import build

        print(f"llmkernels {build.version()}")
        return 0
    if chosen.command == "doctor":
        return _wrappers(chosen.json) if chosen.wrappers else _doctor(chosen.json)
    if chosen.command == "build":
        return _build(chosen.architectures, chosen.jobs, chosen.output)
    parser.print_help()
    return 2
