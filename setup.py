"""Packages the project and builds its native parts if their build tools are available.

CPU extension (`rlsedit_fast/ops/_cpu.*.so`): requires a C++17 compiler, CMake, pybind11 and the Python headers. CUDA
library (`rlsedit_fast/ops/librlsedit_cuda.so`): requires nvcc, which is called directly, without CMake and pybind11. No
part requires torch.

A part that cannot be built is omitted with a warning, and the package uses PyTorch instead. The result of both builds
is written to `rlsedit_fast/ops/_build.json`, which `python -m rlsedit_fast` prints.

Environment variables:
    RLSEDIT_BUILD_CPU    0: omit the CPU extension. 1: fail the installation if it cannot be built.
    RLSEDIT_BUILD_CUDA   The same for the CUDA library.
    CXX                  The C++ compiler, also used by nvcc.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "librlsedit_cuda.so"
CUDA_TARGETS = ("80", "90a", "100", "120")  # code for 8.0 also runs on 8.6 and 8.9
PTX_TARGET = "80"  # compiled at load time on newer devices that are not in CUDA_TARGETS
LOG_TAIL = 1500  # characters shown of the log of a failed build
FOLDERS = {"rlsedit_fast.kernels": "kernels/triton", "rlsedit_fast.cuda_sources": "csrc/cuda"}


class CannotBuild(Exception):
    """The build tools of a part are missing, or its compilation failed."""


def find_compiler() -> list[str]:
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    raise CannotBuild("no C++ compiler was found: install one (Debian: apt install g++) or set CXX")


def as_one_command(compiler: list[str], folder: str) -> str:
    """Returns the compiler as one path, which nvcc needs: of several words, such as `ccache g++`, a script."""
    if len(compiler) == 1:
        return compiler[0]
    script = Path(folder, "c++")
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@"\n')
    script.chmod(0o755)
    return str(script)


def run(command: list[str], **environment: str) -> str:
    """Runs `command` and returns its output."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | environment,
    )
    print(shlex.join(command), done.stdout, sep="\n", flush=True)
    if done.returncode:
        raise CannotBuild(f"`{command[0]}` failed with status {done.returncode}:\n{done.stdout[-LOG_TAIL:].strip()}")
    return done.stdout


def build_cpu(out: Path) -> dict[str, str]:
    """Builds the CPU extension in a new folder; a CMake cache would refer to a deleted pip environment."""
    compiler = find_compiler()
    cmake = shutil.which("cmake")
    if cmake is None:
        raise CannotBuild("CMake was not found: pip install cmake, or install without --no-build-isolation")
    if importlib.util.find_spec("pybind11") is None:
        raise CannotBuild("pybind11 was not found: pip install pybind11, or install without --no-build-isolation")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise CannotBuild("Python.h was not found: install the Python headers (Debian: apt install python3-dev)")
    import pybind11

    with tempfile.TemporaryDirectory(prefix="rlsedit-cpu-") as folder:
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", folder),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        log = run(configure, CXX=shlex.join(compiler))
        run([cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)])
    return {"compiler": shlex.join(compiler), "openmp": "yes" if "rlsedit OpenMP: TRUE" in log else "no, one thread"}


def build_cuda(out: Path) -> dict[str, str]:
    """Builds the CUDA library for the targets that nvcc supports."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CannotBuild("nvcc was not found: install the CUDA toolkit and add its bin folder to PATH")
    compiler = find_compiler()
    known = run([nvcc, "--list-gpu-code"]).split()
    targets = [target for target in CUDA_TARGETS if f"sm_{target.rstrip('a')}" in known]
    if not targets:
        raise CannotBuild(f"nvcc supports {', '.join(known)}: expected one of sm_{', sm_'.join(CUDA_TARGETS)}")
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    if f"sm_{PTX_TARGET}" in known:
        codes.append(f"-gencode=arch=compute_{PTX_TARGET},code=compute_{PTX_TARGET}")
    with tempfile.TemporaryDirectory(prefix="rlsedit-cuda-") as folder:
        library, host = Path(folder, CUDA_LIBRARY), as_one_command(compiler, folder)
        sources = sorted(map(str, ROOT.glob("csrc/cuda/*.cu")))
        run(
            [
                nvcc,
                *("-shared", "-O3", "-std=c++17", "-cudart=static", "--threads=0", "-ccbin", host, *codes),
                *("-Xcompiler=-fPIC,-fvisibility=hidden", "-I", str(ROOT / "csrc/include")),
                *("-o", str(library), *sources),
            ]
        )
        shutil.copy2(library, out / CUDA_LIBRARY)
    return {"nvcc": nvcc, "targets": ", ".join(f"sm_{target}" for target in targets)}


PARTS = {
    "cpu": ("RLSEDIT_BUILD_CPU", "CPU extension", build_cpu),
    "cuda": ("RLSEDIT_BUILD_CUDA", "CUDA library", build_cuda),
}


class BuildNative(build_ext):
    """Builds both parts; a part that cannot be built is omitted with a warning."""

    def out(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "rlsedit_fast" / "ops"

    def run(self) -> None:
        out = self.out()
        out.mkdir(parents=True, exist_ok=True)
        for stale in (
            *out.glob("_cpu.*"),
            out / CUDA_LIBRARY,
            out / "_build.json",
        ):  # remove stale results before a build that can fail
            stale.unlink(missing_ok=True)
        facts = {part: self.build_part(*PARTS[part], out) for part in PARTS}
        (out / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    def build_part(self, variable: str, what: str, build, out: Path) -> dict[str, object]:
        setting = os.environ.get(variable, "")
        if setting not in ("", "0", "1"):
            raise SystemExit(f"{variable}={setting}: expected 0 (omit the {what}), 1 (require it) or unset")
        if setting == "0":
            return {"built": False, "reason": f"omitted by {variable}=0"}
        try:
            return {"built": True, **build(out)}
        except CannotBuild as error:
            if setting == "1":
                raise SystemExit(f"the {what} is required by {variable}=1 but cannot be built: {error}") from error
            print(
                f"\nWARNING: rlsedit-fast is installed without its {what} and uses PyTorch instead, because {error}\n"
                "To build it, install what is missing and reinstall with pip install --force-reinstall --no-deps "
                f"--no-cache-dir. Set {variable}=1 to make this an error.\n",
                file=sys.stderr,
            )
            return {"built": False, "reason": str(error)}

    def get_outputs(self) -> list[str]:
        return [str(path) for pattern in ("_cpu.*", CUDA_LIBRARY, "_build.json") for path in self.out().glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install builds in place


setup(
    packages=[*find_packages(include=["rlsedit_fast", "rlsedit_fast.*"]), *FOLDERS],
    # The folder `kernels/` is not a package, because transformers imports another package of that name.
    package_dir=FOLDERS,
    ext_modules=[Extension("rlsedit_fast.ops._cpu", sources=[])],  # makes the wheel platform-specific
    cmdclass={"build_ext": BuildNative},
)
