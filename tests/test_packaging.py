"""What a user's install does: with nvcc, without, with a broken one; what the sdist and the wheel hold.

Every build runs on a copy of the tree, in this environment and without the network.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from llmkernels import build

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("llmkernels", "csrc", "bench", "tools", ".ci")

_setuptools = importlib.metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
pytestmark = pytest.mark.skipif(
    int(_setuptools.partition(".")[0]) < 77,
    reason=f"building needs setuptools 77 or newer, here is {_setuptools}",
)


def have_nvcc() -> bool:
    try:
        build.find_nvcc()
    except build.BuildError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not have_nvcc(), reason="no nvcc")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built from, without anything compiled."""
    copy = tmp_path / "a tree"  # a path with a space, all the way through ninja and the compilers
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, copy)
    return copy


def run(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python command in ``tree``, with the build's variables set as given and no others."""
    ours = ("CUDACXX", "CXX", "MAX_JOBS", "LLMKERNELS_CUDA", "LLMKERNELS_CUDA_ARCHS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"XDG_CACHE_HOME": str(tree.parent / "cache"), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)


def say(finished: subprocess.CompletedProcess[str]) -> str:
    return finished.stdout + finished.stderr


def backend_call(hook: str, out: Path) -> list[str]:
    """Calls one hook of the build backend, as pip and build do, with torch out of reach."""
    program = f"""
        import sys
        sys.modules["torch"] = None  # any import of it raises
        from setuptools import build_meta
        print("made", getattr(build_meta, {hook!r})({str(out)!r}))
    """
    return ["-c", textwrap.dedent(program)]


NO_NVCC = {"CUDACXX": "/nonexistent/nvcc"}


# --- sdist and wheel


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An sdist, and the wheel made from what that sdist holds: what a user of either gets."""
    folder = tmp_path_factory.mktemp("archives")
    copy = folder / "tree"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "__pycache__", ".*cache")
    )
    finished = run(copy, *backend_call("build_sdist", folder), LLMKERNELS_CUDA="0")
    assert finished.returncode == 0, say(finished)
    sdist = next(folder.glob("*.tar.gz"))
    shutil.unpack_archive(sdist, folder / "unpacked")
    finished = run(
        next((folder / "unpacked").iterdir()), *backend_call("build_wheel", folder), LLMKERNELS_CUDA="0"
    )
    assert finished.returncode == 0, say(finished)
    return {"sdist": sdist, "wheel": next(folder.glob("*.whl"))}


def wheel_names(archives: dict[str, Path]) -> set[str]:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        return set(wheel.namelist())


def test_the_wheel_holds_the_package_and_its_sources(archives: dict[str, Path]) -> None:
    names = wheel_names(archives)
    assert archives["wheel"].name == f"llmkernels-{build.version()}-py3-none-any.whl"
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llmkernels").rglob("*.py")}
    csrc = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".cu", ".cuh", ".h"}]
    sources = {f"llmkernels/{path.relative_to(ROOT).as_posix()}" for path in csrc}
    bench = {f"llmkernels/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "bench").rglob("*.py")}
    assert csrc
    assert package | sources | bench | {"llmkernels/py.typed"} <= names
    assert not [
        name for name in names if name.startswith(("tests", "csrc", "bench")) or name.endswith((".so", ".o"))
    ]


def test_the_sdist_holds_everything(archives: dict[str, Path]) -> None:
    with tarfile.open(archives["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ("llmkernels", "csrc", "bench", "tests", "tools", "examples")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".typed"}
        and "__pycache__" not in path.parts
    }
    wanted |= {"pyproject.toml", "setup.py", "Makefile", "LICENSE", "README.md", ".clang-format", ".ci/run"}
    assert wanted - names == set()
    assert not [name for name in names if name.endswith(".so") or name.startswith(".venv")]


def test_the_metadata(archives: dict[str, Path]) -> None:
    info = f"llmkernels-{build.version()}.dist-info"
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel, f"{info}/")).metadata
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = [re.match(r"[\w-]+[^;]*", line)[0] for line in required]
    assert sorted(names) == ["torch>=2.9", "triton>=3.5"]
    marker = next(line for line in required if line.startswith("triton"))
    assert "Linux" in marker and "x86_64" in marker and "aarch64" in marker
    assert metadata["Version"] == build.version()
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert {"bench", "build", "demo", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert "llmkernels = llmkernels.cli:main" in scripts


# --- what the install does where something is missing


def test_without_nvcc_the_install_succeeds_and_says_so(tree: Path) -> None:
    finished = run(tree, *backend_call("build_wheel", tree.parent), **NO_NVCC)
    assert finished.returncode == 0, say(finished)
    assert "installing without the CUDA C++ kernels: no nvcc was found" in finished.stderr
    assert "llmkernels build" in finished.stderr
    assert list(tree.parent.glob("*-py3-none-any.whl"))


def test_without_nvcc_an_install_that_must_have_it_fails(tree: Path) -> None:
    finished = run(tree, *backend_call("build_wheel", tree.parent), LLMKERNELS_CUDA="1", **NO_NVCC)
    assert finished.returncode != 0
    assert "LLMKERNELS_CUDA=1 asks for the CUDA C++ kernels, but no nvcc was found" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not list(tree.parent.glob("*.whl"))


def test_an_unknown_setting_is_refused(tree: Path) -> None:
    finished = run(tree, "setup.py", "--version", LLMKERNELS_CUDA="yes")
    assert finished.returncode != 0
    assert "LLMKERNELS_CUDA: expected 0, 1 or unset, got 'yes'" in finished.stderr


@needs_nvcc
@pytest.mark.parametrize("must", (False, True))
def test_a_failed_compile_names_the_log(tree: Path, must: bool) -> None:
    """By default the install goes on without the kernels; told that they must be there, it fails."""
    (tree / "csrc" / "bindings.cpp").write_text("#error this line can't be compiled\n")
    for source in tree.glob("csrc/*/*.cu"):
        source.unlink()
    finished = run(
        tree,
        *backend_call("build_wheel", tree.parent),
        LLMKERNELS_CUDA_ARCHS="80",
        **({"LLMKERNELS_CUDA": "1"} if must else {}),
    )
    log = re.search(r"the log is (\S+)", finished.stderr)
    assert log is not None and "this line can't be compiled" in Path(log[1]).read_text()
    assert "this line can't be compiled" in finished.stderr
    wheels = [path.name for path in tree.parent.glob("*.whl")]
    if must:
        assert finished.returncode != 0 and not wheels
        assert "LLMKERNELS_CUDA=1 asks for the CUDA C++ kernels, but" in finished.stderr
    else:
        assert finished.returncode == 0 and len(wheels) == 1, say(finished)
        assert "INSTALLING WITHOUT THE CUDA C++ KERNELS" in finished.stderr
        said = run(
            tree,
            "-c",
            "import llmkernels.build as b; print(b.find_module(), b.why_missing())",
            PYTHONPATH=str(tree),
        )
        assert said.stdout.startswith("None compiling it failed: see ") and log[1] in said.stdout


# --- llmkernels/build.py


def fake_nvcc(folder: Path, *, release: str = "13.0", library: bool = True) -> Path:
    """A program that answers as nvcc does, with a toolkit of its own around it."""
    toolkit = folder / "toolkit"
    (toolkit / "include").mkdir(parents=True)
    (toolkit / "lib").mkdir()
    (toolkit / "include" / "cuda_runtime.h").touch()
    if library:
        (toolkit / "lib" / "libcudart_static.a").touch()
    nvcc = folder / "nvcc"
    nvcc.write_text(
        textwrap.dedent(f"""\
            #!/bin/sh
            case "$1" in
              --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
              --dryrun) echo '#$ TOP={toolkit}' >&2; echo '#$ INCLUDES="-I{toolkit}/include"  ' >&2 ;;
              --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n' ;;
            esac
        """)
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without nvcc, variables or cache."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "LLMKERNELS_CUDA_ARCHS", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(build, "DEFAULT_NVCC", tmp_path / "none" / "nvcc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_toolkit")
class TestFindingNvcc:
    def test_none(self) -> None:
        with pytest.raises(
            build.MissingTool, match="no nvcc was found in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr"
        ):
            build.find_nvcc()
        assert "Install the CUDA toolkit, then run `llmkernels build`" in build.why_missing()

    @pytest.mark.parametrize("variable", ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "default"))
    def test_each_place(self, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "bin").mkdir()
        nvcc = fake_nvcc(tmp_path).rename(tmp_path / "bin" / "nvcc")
        if variable == "default":
            monkeypatch.setattr(build, "DEFAULT_NVCC", nvcc)
        else:
            values = {"CUDACXX": str(nvcc), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
            monkeypatch.setenv(variable, values.get(variable, str(tmp_path)))
        found = build.find_nvcc()
        assert (found.path, found.version) == (str(nvcc), "13.0")
        # Where the wrapper lies has neither: they are where it says that the toolkit is.
        assert found.includes == (str(tmp_path / "toolkit" / "include"),)
        assert found.libraries == (str(tmp_path / "toolkit" / "lib"),)
        assert "run `llmkernels build`" in build.why_missing()

    def test_a_chosen_one_that_does_not_work_is_not_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build, "DEFAULT_NVCC", fake_nvcc(tmp_path))
        monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
        with pytest.raises(build.MissingTool, match="CUDACXX is set, but /nonexistent/nvcc does not run"):
            build.find_nvcc()

    def test_a_toolkit_without_the_static_runtime(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(build, "DEFAULT_NVCC", fake_nvcc(tmp_path, library=False))
        with pytest.raises(build.MissingTool, match="has no libcudart_static.a in its toolkit"):
            build.find_nvcc()

    def test_architectures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "DEFAULT_NVCC", fake_nvcc(tmp_path))
        nvcc = build.find_nvcc()
        assert build.architectures(nvcc) == ["80+PTX", "90a", "100"]  # 120 is not of those it lists
        monkeypatch.setenv("LLMKERNELS_CUDA_ARCHS", "9.0a;8.0+PTX sm_80,80")
        assert build.architectures(nvcc) == ["90a", "80+PTX", "80"]
        monkeypatch.setenv("LLMKERNELS_CUDA_ARCHS", "86")
        with pytest.raises(build.BuildError, match=r"expected some of 75, 80, 90, 100 \(nvcc 13.0\), got 86"):
            build.architectures(nvcc)
        monkeypatch.setenv("LLMKERNELS_CUDA_ARCHS", "hopper")
        with pytest.raises(build.BuildError, match="expected architectures such as .* got 'hopper'"):
            build.architectures(nvcc)

    def test_jobs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert 1 <= build.jobs() <= 4
        monkeypatch.setenv("MAX_JOBS", "7")
        assert build.jobs() == 7
        monkeypatch.setenv("MAX_JOBS", "all")
        with pytest.raises(build.BuildError, match="MAX_JOBS: expected a number >= 1, got 'all'"):
            build.jobs()


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes packages impossible to find."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find_spec(name))


def test_the_headers_of_pybind11_may_be_those_that_torch_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    import pybind11

    assert build._pybind11_include() == pybind11.get_include()
    hide(monkeypatch, "pybind11")
    assert build._pybind11_include() == str(Path(torch.__file__).parent / "include")
    hide(monkeypatch, "pybind11", "torch")
    with pytest.raises(build.MissingTool, match="pybind11 was not found: pip install ninja pybind11"):
        build._pybind11_include()


@pytest.mark.usefixtures("no_toolkit")
def test_each_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(
        build.MissingTool, match="no C\\+\\+ compiler was found: CXX is 'no-such-compiler -O2'"
    ):
        build._host_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    hide(monkeypatch, "ninja")
    with pytest.raises(build.MissingTool, match="ninja was not found: pip install ninja pybind11"):
        build._ninja()
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(build.MissingTool, match="no .*/Python.h"):
        build._python_includes()
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    with pytest.raises(build.MissingTool, match="no csrc/bindings.cpp in or beside"):
        build.sources_folder()
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    with pytest.raises(build.MissingTool, match="for Linux, this is Darwin"):
        build.compile_module(tmp_path / "module")


def test_the_newest_module_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the package's folder or, where that can't be written to, from the cache."""
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(build.PACKAGE / "__init__.py", package)
    monkeypatch.setattr(build, "PACKAGE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.find_module() is None
    assert build.default_destination() == package / build.module_name()
    monkeypatch.setattr(os, "access", lambda *_: False)
    cached = build.default_destination()
    assert cached == tmp_path / "cache" / "llmkernels" / build.version() / build.module_name()
    cached.parent.mkdir(parents=True)
    cached.touch()
    os.utime(cached, (100, 100))
    assert build.find_module() == cached
    (package / build.module_name()).touch()
    assert build.find_module() == package / build.module_name()


# --- the real thing


@needs_nvcc
def test_the_module_compiles_and_imports_without_a_driver(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One architecture: what the module links, what it exports, what it says of itself."""
    monkeypatch.setattr(build, "PACKAGE", tree / "llmkernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree.parent / "cache"))
    monkeypatch.setenv("LLMKERNELS_CUDA_ARCHS", "90a")
    steps: list[tuple[int, int, str]] = []
    module, objects = tree.parent / build.module_name(), tree.parent / "objects"
    log = build.compile_module(module, objects, lambda *step: steps.append(step))
    assert [step[0] for step in steps] == list(range(len(steps))) and steps[-1][0] == steps[-1][1]
    assert "-gencode=arch=compute_90a,code=sm_90a" in log.read_text()

    dynamic = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed and not [name for name in needed if re.match(r"lib(cuda|torch|c10)", name)]
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "-W", module], capture_output=True, text=True, check=True
    ).stdout
    assert "PyInit__C" in symbols
    assert not re.search(r"GLOBAL DEFAULT +\d+ (cuda|cu)[A-Z]", symbols)

    program = f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("llmkernels._C", {str(module)!r})
        compiled = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiled)
        assert compiled.architectures() == ["90a"], compiled.architectures()
        assert compiled.is_emulated() is False
        assert not {{"torch", "numpy", "llmkernels"}} & set(sys.modules)
        if {not torch.cuda.is_available()}:  # the operands are addresses of nothing
            operands = (64, 8, 2), (0, 8, 2), (0, 2), (0, 2), (0, 2), (64, 2), (64, 64), (0, 0.0)
            try:
                compiled.layer_norm_forward(*(word for each in operands for word in each), 4, 8, 1e-5, 0, 0)
            except RuntimeError as error:
                print(error)
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    if not torch.cuda.is_available():
        assert re.match(r"layer_norm_forward: CUDA error \d+ \(.*driver.*\)", finished.stdout), (
            finished.stdout
        )

    # A second build compiles nothing, and puts the module back in one step.
    steps.clear()
    module.unlink()
    build.compile_module(module, objects, lambda *step: steps.append(step))
    assert len(steps) == 1 and module.is_file()
