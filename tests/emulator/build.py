"""Builds csrc for the CPU: the same sources, g++ and the emulator in place of nvcc and a GPU.

``python -m tests.emulator.build [--race]`` prints the path of the extension module, for LLMKERNELS_EXTENSION.
Objects are kept in build/emulator by a hash of what went into them, so that a patched copy of the sources
compiles only the units that see the patch.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

EMULATOR = Path(__file__).resolve().parent
REPOSITORY = EMULATOR.parents[1]
CSRC = REPOSITORY / "csrc"
CACHE = REPOSITORY / "build" / "emulator"
JOBS = 2

# A file relative to the sources, text that it holds exactly once, and the text to replace it.
Patch = tuple[str, str, str]

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-g1",  # lines for reports
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",  # the same bits on every CPU
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to leave a fiber
]
_OPTIMIZED = ["-O2"]
_WATCHED = ["-O1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]


def build(
    race: bool = False,
    defines: Sequence[str] = (),
    patches: Sequence[Patch] = (),
    *,
    patched_units: Sequence[str] = (),
    sources: Path = CSRC,
) -> Path:
    """The extension module ``_C`` of the .cpp and .cu files of a folder, built if it isn't there.

    race: watch every load and store of the kernels. defines: macros, as ``NAME`` or ``NAME=VALUE``. patches:
    applied to a copy of the sources. patched_units: those compiled from that copy, by default all. Raises
    RuntimeError where g++ or pybind11 is missing or a unit does not compile, ValueError for a patch whose
    text does not occur exactly once or a unit that is not there.
    """
    compiler = _Compiler(race, tuple(defines))
    with _tree(sources, patches) as tree:
        paths = (path for path in sources.rglob("*") if path.suffix in (".cpp", ".cu"))
        names = sorted(path.relative_to(sources).as_posix() for path in paths)
        if not set(patched_units) <= set(names):
            raise ValueError(f"patched_units: expected some of {names}, got {list(patched_units)}")
        patched = [name for name in names if patches and (not patched_units or name in patched_units)]
        # Of inline functions that several units hold, the linker takes the first: the patched ones.
        units = [compiler.unit(tree / name, tree) for name in patched]
        units += [compiler.unit(sources / name, sources) for name in names if name not in patched]
        units += [compiler.unit(path, sources) for path in sorted((EMULATOR / "engine").glob("*.cpp"))]
        key = _digest(*(unit.key for unit in units))[:16]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        target = CACHE / f"{'race' if race else 'fast'}-{key}" / f"_C{suffix}"
        if target.exists():
            return target
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(CACHE / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                with ThreadPoolExecutor(JOBS) as pool:
                    objects = list(pool.map(compiler.compile, units))
                compiler.link(objects, target)
    return target


class _Unit(NamedTuple):
    path: Path
    tree: Path  # the sources that it belongs to
    include: list[Path]
    key: str


class _Compiler:
    """g++ with the flags of one kind of build."""

    def __init__(self, race: bool, defines: tuple[str, ...]) -> None:
        self.path, self.version = _gxx()
        self.race = race
        self.flags = [*_FLAGS, *(f"-D{definition}" for definition in ("LLMKERNELS_EMULATOR", *defines))]
        self.python_includes = _python_includes()

    def flags_for(self, unit: Path) -> list[str]:
        # Only kernels are watched: the engine must not be, since it is what the hooks call.
        if unit.suffix == ".cu":
            return [*self.flags, *(_WATCHED if self.race else _OPTIMIZED), "-x", "c++"]
        return [*self.flags, *_OPTIMIZED, *(f"-isystem{path}" for path in self.python_includes)]

    def unit(self, path: Path, tree: Path) -> _Unit:
        """A unit of the sources in `tree`, with the hash of all that its object depends on."""
        include = list(dict.fromkeys((tree, CSRC, EMULATOR)))
        files = sorted(_closure(path, include), key=lambda file: _name(file, tree))
        contents = [part for file in files for part in (_name(file, tree), file.read_text())]
        return _Unit(path, tree, include, _digest(self.version, *self.flags_for(path), *contents))

    def compile(self, unit: _Unit) -> Path:
        target = CACHE / "objects" / f"{unit.path.stem}-{unit.key[:24]}.o"
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = [
            *self.flags_for(unit.path),
            *(f"-I{path}" for path in unit.include),
            f"-ffile-prefix-map={unit.tree}=csrc",
            f"-ffile-prefix-map={REPOSITORY}/=",
        ]
        with _written_whole(target) as output:
            command = [self.path, *flags, "-c", str(unit.path), "-o", str(output)]
            _run(command, f"compile {_name(unit.path, unit.tree)}")
        return target

    def link(self, objects: list[Path], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _written_whole(target) as output:
            _run([self.path, "-shared", *map(str, objects), "-ldl", "-o", str(output)], f"link {target.name}")


@functools.cache
def _gxx() -> tuple[str, str]:
    """g++ and its version. Not any compiler: the watched build takes g++'s own parameters."""
    path = shutil.which("g++")
    if path is None:
        raise RuntimeError("the emulator needs g++ 11 or newer: found no g++ on PATH")
    return path, subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout


def _python_includes() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise RuntimeError("the emulator needs the package pybind11: pip install pybind11") from error
    return [pybind11.get_include(), sysconfig.get_path("include")]


@contextmanager
def _tree(sources: Path, patches: Sequence[Patch]) -> Iterator[Path]:
    """The sources themselves, or for the time of the block a patched copy."""
    if not patches:
        yield sources
        return
    with tempfile.TemporaryDirectory(prefix="llmkernels-") as folder:
        tree = Path(folder) / sources.name
        shutil.copytree(sources, tree)
        for name, old, new in patches:
            text = (tree / name).read_text()
            count = text.count(old)
            if count != 1:
                raise ValueError(f"patches: expected {old!r} once in {name}, found it {count} times")
            (tree / name).write_text(text.replace(old, new))
        yield tree


def _closure(unit: Path, include: list[Path]) -> set[Path]:
    """The unit and the files that it includes by quoted names, directly or not."""
    found: set[Path] = set()
    open_files = [unit.resolve()]
    while open_files:
        path = open_files.pop()
        if path in found:
            continue
        found.add(path)
        for name in _INCLUDE.findall(path.read_text()):
            candidates = ((folder / name).resolve() for folder in (path.parent, *include))
            open_files += [next((candidate for candidate in candidates if candidate.exists()), path)]
    return found


def _name(path: Path, tree: Path) -> str:
    """The path as it reads from the sources, wherever their copy lies."""
    for root in (tree.resolve(), REPOSITORY):
        if root in path.parents:
            return path.relative_to(root).as_posix()
    return path.as_posix()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A path to write to that becomes the target only if the block succeeds."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _run(command: list[str], purpose: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"could not {purpose}:\n{result.stderr}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build csrc for the CPU and print the path of the module.")
    parser.add_argument("--race", action="store_true", help="watch the kernels' loads and stores for races")
    options = parser.parse_args(arguments)
    try:
        print(build(options.race))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
