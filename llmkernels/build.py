"""Compiles llmkernels._C: csrc/bindings.cpp by the host compiler and csrc/**/*.cu by nvcc, through ninja.

The one place that knows how. setup.py loads this file by its path, before the package or torch is there, and
``llmkernels build`` runs it later; so it imports nothing outside the standard library but ninja and pybind11,
where they are needed. No header of torch is used, the CUDA runtime is linked statically and the driver
library not at all: one build serves every torch and imports on a machine without a driver.

Environment: CUDACXX, CUDA_HOME, CUDA_PATH (where nvcc is), CXX (the host compiler), LLMKERNELS_CUDA_ARCHS
(what to compile for), MAX_JOBS (how many compilers at once).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
DEFAULT_NVCC = Path("/usr/local/cuda/bin/nvcc")
# Machine code for each generation; PTX of the oldest for those between, of the newest for those to come. 90a
# is no base for PTX: what is compiled for it runs on 9.0 alone.
DEFAULT_ARCHITECTURES = ("80+PTX", "90a", "100", "120+PTX")
_ARCHITECTURE = re.compile(r"(?:sm_|compute_)?(\d+)(?:\.(\d))?([af]?)(\+PTX)?", re.IGNORECASE)

Progress = Callable[[int, int, str], None]


class BuildError(Exception):
    """The kernels can't be compiled here, and why."""


class MissingTool(BuildError):
    """nvcc, a host compiler, ninja or a header is not there: nothing was compiled."""


class CompileFailed(BuildError):
    """A compiler failed; the message ends with its words and names the log."""


class Nvcc(NamedTuple):
    """A CUDA compiler that runs, and the folders it takes headers and libraries from."""

    path: str
    version: str
    includes: tuple[str, ...]
    libraries: tuple[str, ...]
    known: frozenset[str]  # architectures it compiles for: "80", "90", ...


def version() -> str:
    """The package's version, read without importing the package."""
    found = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise BuildError(f'{PACKAGE / "__init__.py"} has no line __version__ = "..."')
    return found[1]


def sources_folder() -> Path:
    """csrc: inside an installed package, beside it in a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise MissingTool(f"the CUDA C++ sources are not there: no csrc/bindings.cpp in or beside {PACKAGE}")


def module_name() -> str:
    """The compiled module's file name, another for each Python version: they can share a folder."""
    return "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))


def cache_folder() -> Path:
    """Where modules, objects and logs go that have no place in the package: ~/.cache/llmkernels/VERSION."""
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path(os.path.expanduser("~")) / ".cache"
    return home / "llmkernels" / version()


def log_path() -> Path:
    """The log of the last compilation by this Python version."""
    return cache_folder() / f"build-{sys.implementation.cache_tag}.log"


def objects_folder() -> Path:
    """Where `llmkernels build` keeps its objects, one folder for each place of csrc and Python version."""
    place = hashlib.sha256(str(sources_folder()).encode()).hexdigest()[:12]
    return cache_folder() / f"objects-{place}-{sys.implementation.cache_tag}"


def find_module() -> Path | None:
    """The compiled module in the package or in the cache folder, the newer if both have one."""
    candidates = [folder / module_name() for folder in (PACKAGE, cache_folder())]
    return max((c for c in candidates if c.is_file()), key=lambda path: path.stat().st_mtime, default=None)


def default_destination() -> Path:
    """The package's own folder, or the cache folder where that can't be written to."""
    return (PACKAGE if os.access(PACKAGE, os.W_OK) else cache_folder()) / module_name()


def outdated(module: Path) -> bool:
    """Whether a source of a checkout is newer than the module; installed ones have no dates to compare."""
    csrc = PACKAGE.parent / "csrc"
    return csrc.is_dir() and any(f.stat().st_mtime > module.stat().st_mtime for f in csrc.rglob("*.[ch]*"))


def why_missing() -> str:
    """Why there is no compiled module and what mends it, from a look at the machine as it is now."""
    log = log_path()
    if log.is_file() and log.read_text(errors="replace").rstrip().endswith("FAILED"):
        return f"compiling it failed: see {log}, then run `llmkernels build` again"
    try:
        nvcc = find_nvcc()
    except BuildError as error:
        return f"it was not compiled: {error}. Install the CUDA toolkit, then run `llmkernels build`"
    return f"it was not compiled at installation; nvcc {nvcc.version} is here now: run `llmkernels build`"


def _inspect(path: str) -> Nvcc | str:
    """What this nvcc says of itself, or why it is not usable."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
        # Asked of nvcc: the one on PATH is often a wrapper script, in a folder without headers or libraries.
        plan = subprocess.run([path, "--dryrun", "x.cu"], capture_output=True, text=True, timeout=60).stderr
        listed = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run ({error})"
    release = re.search(r"release ([\d.]+)", said.stdout)
    if said.returncode != 0 or release is None:
        return f"{path} --version says no CUDA release"
    folders: dict[str, tuple[str, ...]] = {}
    for name, flag in (("INCLUDES", "-I"), ("LIBRARIES", "-L")):
        line = re.search(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
        words = shlex.split(line[1]) if line else []
        folders[name] = tuple(word[2:] for word in words if word.startswith(flag))
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    if top:  # toolkits laid out by hand may keep their files here instead
        folders["INCLUDES"] += (f"{top[1]}/include",)
        folders["LIBRARIES"] += (f"{top[1]}/lib64", f"{top[1]}/lib")
    includes = tuple(os.path.realpath(f) for f in folders["INCLUDES"] if Path(f, "cuda_runtime.h").is_file())
    libraries = tuple(
        os.path.realpath(f) for f in folders["LIBRARIES"] if Path(f, "libcudart_static.a").is_file()
    )
    if not includes or not libraries:
        lacking = "libcudart_static.a" if includes else "cuda_runtime.h"
        return f"{path} has no {lacking} in its toolkit"
    known = frozenset(re.findall(r"sm_(\d+)", listed))
    return Nvcc(path, release[1], includes[:1], libraries[:1], known)


def find_nvcc() -> Nvcc:
    """The first usable nvcc of CUDACXX (where set, no other), CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda."""
    chosen = os.environ.get("CUDACXX")
    if chosen:
        found = _inspect(shutil.which(chosen) or chosen)
        if isinstance(found, str):
            raise MissingTool(f"no nvcc was found: CUDACXX is set, but {found}")
        return found
    on_path = shutil.which("nvcc")
    candidates = [
        Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    candidates += [Path(on_path)] if on_path else []
    troubles = []
    for candidate in (*candidates, DEFAULT_NVCC):
        if candidate.is_file():
            found = _inspect(str(candidate))
            if not isinstance(found, str):
                return found
            troubles.append(found)
    sentence = "no nvcc was found in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    raise MissingTool("; ".join([sentence, *troubles]))


def architectures(nvcc: Nvcc) -> list[str]:
    """What to compile for, as in "90a" or "80+PTX": LLMKERNELS_CUDA_ARCHS, else the default ones it knows.

    BuildError where LLMKERNELS_CUDA_ARCHS names what is no architecture or what this nvcc doesn't know.
    """
    asked = os.environ.get("LLMKERNELS_CUDA_ARCHS", "")
    words = re.split(r"[;,\s]+", asked.strip()) if asked.strip() else []
    chosen = []
    for word in words:
        found = _ARCHITECTURE.fullmatch(word)
        if found is None:
            raise BuildError(
                f"LLMKERNELS_CUDA_ARCHS: expected architectures such as 80, 9.0a or 120+PTX, got {word!r}"
            )
        chosen.append(f"{found[1]}{found[2] or ''}{found[3].lower()}{'+PTX' if found[4] else ''}")
    unknown = [a for a in chosen if _number(a) not in nvcc.known]
    if unknown:
        known = ", ".join(sorted(nvcc.known, key=int))
        raise BuildError(
            f"LLMKERNELS_CUDA_ARCHS: expected some of {known} (nvcc {nvcc.version}), got {unknown[0]}"
        )
    chosen = chosen or [a for a in DEFAULT_ARCHITECTURES if _number(a) in nvcc.known]
    if not chosen:
        raise MissingTool(
            f"nvcc {nvcc.version} knows none of {', '.join(map(_number, DEFAULT_ARCHITECTURES))}"
        )
    return list(dict.fromkeys(chosen))


def _number(architecture: str) -> str:
    return architecture.removesuffix("+PTX").rstrip("af")


def _gencode(architecture: str) -> str:
    name = architecture.removesuffix("+PTX")
    code = f"[sm_{name},compute_{name}]" if architecture.endswith("+PTX") else f"sm_{name}"
    return f"-gencode=arch=compute_{name},code={code}"


def jobs() -> int:
    """How many compilers run at once, each taking up to gigabytes: MAX_JOBS, else the cores, 4 at most."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise BuildError(f"MAX_JOBS: expected a number >= 1, got {asked!r}")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


def _host_compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise MissingTool(
        "no C++ compiler was found" + (f": CXX is {asked!r}" if asked else " (c++, g++ or clang++)")
    )


def _ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        bundled = Path(ninja.BIN_DIR, "ninja")
        if bundled.is_file():
            return str(bundled)
    found = shutil.which("ninja")
    if found is None:
        raise MissingTool("ninja was not found: pip install ninja pybind11")
    return found


def _python_includes() -> list[str]:
    """The folders of Python.h and of pybind11."""
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").is_file():
        raise MissingTool(
            f"the headers of Python are not there: no {python}/Python.h (python3-dev on Debian)"
        )
    return [python, _pybind11_include()]


def _pybind11_include() -> str:
    """The headers of pybind11: its own or, where it is not installed, the copy that torch carries."""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")  # found, not imported
    for folder in (torch.submodule_search_locations or []) if torch else []:
        if Path(folder, "include", "pybind11", "pybind11.h").is_file():
            return str(Path(folder, "include"))
    raise MissingTool("pybind11 was not found: pip install ninja pybind11")


def _ninja_file(nvcc: Nvcc, archs: Sequence[str], csrc: Path) -> tuple[str, int]:
    """build.ninja, which makes ``module`` in its folder, and how many steps it has."""

    def path(value: object) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(*words: str) -> str:
        quoted = (
            word if word in ("$in", "$out", "$out.d") else shlex.quote(word).replace("$", "$$")
            for word in words
        )
        return " ".join(quoted)

    compiler = shlex.split(_host_compiler())
    shared = ["-std=c++17", "-O3", f'-DLLMKERNELS_ARCHITECTURES="{",".join(archs)}"', f"-I{csrc}"]
    dependencies = ["-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
    device = [nvcc.path, *shared, "-Xcompiler=-fPIC,-fvisibility=hidden", *map(_gencode, archs)]
    # Machine code too, which nvcc leaves as it is: a third of the size.
    device.append("-Xfatbin=-compress-all")
    # nvcc takes the compiler it finds itself, unless one was asked for.
    device += [f"-ccbin={compiler[0]}"] if os.environ.get("CXX") else []
    includes = [f"-I{folder}" for folder in (*nvcc.includes, *_python_includes())]
    host = [*compiler, *shared, "-fPIC", "-fvisibility=hidden", "-DNDEBUG", *includes]
    link = [*compiler, "-shared", "-o", "$out", "$in"]
    link += [f"-L{folder}" for folder in nvcc.libraries]
    link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    lines = ["ninja_required_version = 1.5"]
    for rule, words in (("nvcc", device + dependencies), ("host", host + dependencies)):
        lines += [f"rule {rule}", f"  command = {command(*words)}", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", f"  command = {command(*link)}"]
    objects = []
    for source in [csrc / "bindings.cpp", *sorted(csrc.rglob("*.cu"))]:
        relative = source.relative_to(csrc)
        objects.append(f"{relative}.o")
        lines.append(
            f"build {path(objects[-1])}: {'nvcc' if source.suffix == '.cu' else 'host'} {path(source)}"
        )
    lines.append(f"build module: link {' '.join(map(path, objects))}")
    return "\n".join([*lines, ""]), len(objects) + 1


def _open_log() -> Path:
    """The log's path, emptied; in the temporary folder where there is no place for it at home."""
    for log in (log_path(), Path(tempfile.gettempdir()) / f"llmkernels-{log_path().name}"):
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("")
            return log
        except OSError:
            continue
    raise BuildError(f"neither {log_path()} nor the temporary folder can be written to")


def _run_ninja(ninja: str, folder: Path, log: Path, steps: int, progress: Progress) -> int:
    environment = {**os.environ, "NINJA_STATUS": "@%f@"}
    arguments = [ninja, "-C", str(folder), "-v", "-j", str(jobs())]
    with (
        log.open("a") as written,
        subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            written.write(line)
            finished = re.match(r"@(\d+)@", line)
            if finished:
                made = re.search(r"-o (\S+)", line)
                progress(int(finished[1]), steps, made[1].removesuffix(".o") if made else "")
    return process.returncode


def no_progress(done: int, total: int, what: str) -> None:
    """A progress that shows nothing."""


def compile_module(destination: Path, folder: Path | None = None, progress: Progress = no_progress) -> Path:
    """Compiles csrc and puts the module at ``destination``; returns the log's path.

    folder: where objects are kept, so that only what changed is compiled again; progress(done, total, what)
    is called before the first step and after each. Raises MissingTool where nothing could be tried and
    CompileFailed where a compiler failed; a module that lay at ``destination`` is then left as it was.
    """
    if platform.system() != "Linux":
        raise MissingTool(f"the CUDA C++ kernels are for Linux, this is {platform.system()}")
    csrc, nvcc, ninja = sources_folder(), find_nvcc(), _ninja()
    archs = architectures(nvcc)
    rules, steps = _ninja_file(nvcc, archs, csrc)
    with tempfile.TemporaryDirectory(prefix="llmkernels-") as temporary:
        objects = Path(temporary) if folder is None else folder.absolute()
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(rules)
        log = _open_log()
        log.write_text(f"llmkernels {version()}: nvcc {nvcc.version} ({nvcc.path}) for {', '.join(archs)}\n")
        progress(0, steps, f"nvcc {nvcc.version}, {', '.join(archs)}, {jobs()} at once")
        if _run_ninja(ninja, objects, log, steps, progress) != 0:
            with log.open("a") as written:
                written.write("FAILED\n")
            with log.open(errors="replace") as lines:
                words = [line for line in lines if not line.startswith("@")]
            raise CompileFailed(
                f"compiling the CUDA C++ kernels failed; the log is {log}\n{''.join(deque(words, 15))}"
            )
        destination.parent.mkdir(parents=True, exist_ok=True)
        # In one step: a process that has the old one loaded keeps it, and none ever sees half a file.
        staged = destination.with_name(f".{destination.name}.{os.getpid()}")
        shutil.copyfile(objects / "module", staged)
        shutil.copymode(objects / "module", staged)
        os.replace(staged, destination)
    return log


class ProgressLine:
    """A counter on one line of a terminal, or a line a step elsewhere."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._live = sys.stderr.isatty()

    def __call__(self, done: int, total: int, what: str) -> None:
        seconds = time.monotonic() - self._start
        line = f"[{done}/{total}] {seconds:4.0f} s  {what}"
        end = "\n" if not self._live or done == total else ""
        start = "\r\x1b[K" if self._live else ""
        print(start + line, end=end, file=sys.stderr, flush=True)
