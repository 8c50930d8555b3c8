"""Contents of an installation, and imports from the root of the repository."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import rlsedit_fast
from rlsedit_fast._version import __version__
from rlsedit_fast.ops import cuda_launch

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "csrc", "kernels", "rlsedit_fast")


def run(*command, cwd, **environment):
    """Runs a command; stdout contains both streams."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def source(tmp_path):
    """A copy of the sources without build outputs."""
    leave = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "build", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=leave)
        else:
            (tmp_path / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def test_transformers_imports_from_the_root_of_the_repository():
    done = run(
        sys.executable, "-c", "import sys; assert not sys.path[0]; from transformers import LlamaForCausalLM", cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


def test_kernels_folder_is_not_a_package():
    assert (ROOT / "kernels" / "triton" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_native_sources_do_not_include_torch():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert not any("#include" in line and "torch" in line for line in path.read_text().splitlines()), path


@pytest.fixture
def installed():
    """The installed distribution; skips if the package is not installed."""
    try:
        found = metadata.distribution("rlsedit-fast")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is imported without being installed")
    return found


def test_installation_has_kernels_version_and_command(installed):
    assert importlib.import_module("rlsedit_fast.kernels").__name__ == "rlsedit_fast.kernels"
    assert "rlsedit_downdate(" in cuda_launch.source()
    assert installed.version == __version__
    assert {entry.name: entry.value for entry in installed.entry_points} == {"rlsedit": "rlsedit_fast.cli:main"}


def test_package_does_not_import_transformers():
    code = "import sys, rlsedit_fast; print('transformers' in sys.modules)"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stdout
    assert Path(rlsedit_fast.__file__).parent == ROOT / "rlsedit_fast"


@pytest.mark.slow
def test_pure_python_wheel_is_complete(source, tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools")
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
    ]
    done = run(*wheel, cwd=source, RLSEDIT_BUILD_CPU="0", RLSEDIT_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout
    (made,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
        facts = json.loads(archive.read("rlsedit_fast/ops/_build.json"))
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "rlsedit_fast").rglob("*.py")}
    expected |= {f"rlsedit_fast/world/model/{path.name}" for path in (ROOT / "rlsedit_fast/world/model").glob("*.*")}
    expected |= {f"rlsedit_fast/kernels/{path.name}" for path in (ROOT / "kernels/triton").glob("*.*")}
    expected |= {f"rlsedit_fast/cuda_sources/{path.name}" for path in (ROOT / "csrc/cuda").glob("*.cuh")}
    assert expected | {"rlsedit_fast/py.typed"} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.endswith(".so") or name.startswith(("kernels", "csrc", "tests")) for name in names)
    assert facts["cpu"] == {"built": False, "reason": "omitted by RLSEDIT_BUILD_CPU=0"}


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["no compiler", "bad source"])
def test_failed_native_build_is_skipped_with_a_reason(problem, source, tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools")
    environment = {"RLSEDIT_BUILD_CUDA": "0"}
    if problem == "no compiler":
        environment.update(PATH="/nonexistent", CXX="")
        reason = "no C++ compiler was found"
    else:
        if not (shutil.which("c++") and shutil.which("cmake") and importlib.util.find_spec("pybind11")):
            pytest.skip("needs a compiler, CMake and pybind11")
        for path in source.glob("csrc/cpu/*.cpp"):
            path.write_text("this is no C++;\n")
        reason = "this is no C++"
    build = [sys.executable, "setup.py", "build_ext", "-b", tmp_path / "out"]

    done = run(*build, cwd=source, **environment)
    assert done.returncode == 0, done.stdout
    assert "WARNING: rlsedit-fast is installed without its CPU extension" in done.stdout
    facts = json.loads((tmp_path / "out/rlsedit_fast/ops/_build.json").read_text())
    assert facts["cpu"]["built"] is False
    assert reason in facts["cpu"]["reason"]
    assert not list(tmp_path.glob("out/rlsedit_fast/ops/_cpu*"))

    done = run(*build, cwd=source, **environment, RLSEDIT_BUILD_CPU="1")
    assert done.returncode != 0
    assert "is required by RLSEDIT_BUILD_CPU=1" in done.stdout
    assert not (tmp_path / "out/rlsedit_fast/ops/_build.json").exists(), "the record of the previous build is removed"
    assert reason in done.stdout


def test_invalid_build_switch_is_rejected(source, tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools")
    done = run(sys.executable, "setup.py", "build_ext", "-b", tmp_path / "out", cwd=source, RLSEDIT_BUILD_CPU="yes")
    assert done.returncode != 0
    assert "RLSEDIT_BUILD_CPU=yes: expected 0" in done.stdout


@pytest.mark.parametrize("processor", ["x86_64", "amd64"])
def test_every_name_of_the_processor_builds_the_sources_that_are_used(processor, tmp_path):
    """Otherwise the extension lacks functions and cannot be imported."""
    if not (shutil.which("c++") and shutil.which("cmake") and importlib.util.find_spec("pybind11")):
        pytest.skip("needs a compiler, CMake and pybind11")
    import pybind11

    done = run(
        *("cmake", "-S", ROOT, "-B", tmp_path, "-DCMAKE_SYSTEM_NAME=Linux"),
        *(f"-DCMAKE_SYSTEM_PROCESSOR={processor}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    commands = {Path(one["file"]).name: one["command"] for one in commands}
    x86 = subprocess.run(["c++", "-dumpmachine"], capture_output=True, text=True).stdout.startswith("x86_64")
    assert ("RLSEDIT_X86" in commands["kernels.cpp"]) == x86
    assert ("-mavx2" in commands["kernels_avx2.cpp"]) == x86
    assert ("-mavx512f" in commands["kernels_avx512.cpp"]) == x86


NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo sm_80; exit; fi
while [ $# -gt 0 ]; do
    case $1 in
        -ccbin) "$2" --version > host || exit 1; shift ;;
        -o) echo library > "$2"; shift ;;
    esac
    shift
done
"""


@pytest.mark.parametrize("compiler", ["ccache g++", "g++ -DONE='1 2'"])
def test_compiler_of_several_words_builds_the_cuda_library(compiler, source, tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("nvcc", NVCC), ("ccache", '#!/bin/sh\n[ -x "$(command -v "$1")" ] && exec "$@"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "g++").write_text('#!/bin/sh\necho "g++ $@"\n')
    (tools / "g++").chmod(0o755)
    done = run(
        *(sys.executable, "setup.py", "build_ext", "-b", tmp_path / "out"),
        cwd=source,
        CXX=compiler,
        PATH=f"{tools}:{os.environ['PATH']}",
        RLSEDIT_BUILD_CPU="0",
        RLSEDIT_BUILD_CUDA="1",
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out/rlsedit_fast/ops/librlsedit_cuda.so").exists()
    expected = ["g++", *(["-DONE=1 2"] if "ONE" in compiler else []), "--version"]
    assert (source / "host").read_text().split("\n")[0] == " ".join(expected)
