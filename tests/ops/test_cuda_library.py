"""Tests of the CUDA library and its launch plans without a GPU, and of compilation for every target."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from rlsedit_fast import doctor, ops
from rlsedit_fast.errors import BackendError
from rlsedit_fast.ops import cuda, cuda_launch, cuda_plan, dispatch
from rlsedit_fast.ops.cuda_plan import Launch

ROOT = Path(__file__).parents[2]
KERNELS = {"panel4", "panel8", "panel_sum", "gram", "sigma", "factor", "update", "downdate"}
SHARED_LIMIT = 99 << 10  # bytes per block on the supported devices with the smallest limit (sm_86, sm_89)


@pytest.fixture
def library():
    try:
        return cuda_launch.Library()
    except BackendError as error:
        build = doctor.report()["build"]["cuda"]
        if shutil.which("nvcc") and not re.match("omitted|no build", build.get("reason", "")):
            pytest.fail(f"nvcc is available, but {error}: {build}")
        pytest.skip(str(error))


def some_downdate(d=4, r=1, layers=1):
    base = torch.eye(d).expand(layers, d, d).clone()
    return base, cuda_plan.downdate(base, torch.ones(layers, r, d), torch.ones(layers, r))


def some_factor(layers=1, n=5, d_k=7, d_v=4):
    def empty(*shape):
        return torch.empty(shape, device="meta")

    outputs = (empty(layers, n, d_k), empty(layers, n, d_v), empty(layers, n, n), empty(layers))
    workspace = tuple(empty(*shape) for shape in cuda_plan.factor_workspace(layers, n, d_k))
    given = (empty(layers, n, d_k), empty(layers, n, d_k), empty(layers, n, d_v), empty(layers, n))
    return cuda_plan.factor(*given, 1, outputs, workspace)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernel": "absent"}, "there is no kernel absent"),
        ({"arguments": (1, 2.0)}, "downdate: arguments are of types qf: expected pqqppqq"),
        ({"grid": (0, 1, 1)}, "a grid of 0 x 1 x 1 blocks: expected 1 to 2^31 - 1"),
        ({"grid": (1, 65536, 1)}, "a grid of 1 x 65536 x 1 blocks"),
        ({"threads": 128}, "128 threads: expected whole warps, 256 to 256 threads"),
        ({"shared": 1 << 20}, "1048576 bytes of shared memory: expected 0 to 232448"),
    ],
)
def test_invalid_launch_raises(library, change, text):
    _, (launch,) = some_downdate()
    with pytest.raises(BackendError, match=re.escape(text)):
        library.launch(Launch(**{**launch.__dict__, **change}), 0, 0)
    assert library.functions.rlsedit_cuda_launch(None, b"", None, 1, 1, 1, 32, 0, 0, None) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_launch_without_a_driver_raises(library):
    base, launches = some_downdate()
    with pytest.raises(BackendError, match=r"downdate: choosing the device: .*cuda"):
        library.launch(launches[0], 0, 0)
    assert torch.equal(base[0], torch.eye(4))
    assert cuda.unavailable_reason() == "no CUDA device is available (torch.cuda.is_available() is false)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_library_without_a_driver_gives_the_versions(library):
    built = r"the library was built with CUDA \d+\.\d: update the driver"
    assert re.match(rf"the driver supports CUDA 0\.0, but {built}", library.problem(None))
    assert library.problem(0) == library.problem(None)


def forget():
    cuda._too_old.cache_clear()
    cuda._problem.cache_clear()


class Devices:
    """Replaces the launcher and the CUDA devices: `capabilities` by index, `problems` by index, None is the driver."""

    origin = "the test"

    def __init__(self, monkeypatch, capabilities, problems):
        self.problem = problems.get
        forget()
        monkeypatch.setattr(cuda_launch, "launcher", lambda: self)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")

    def reason(self, index):
        """Returns why a flush cannot run on the device, and checks that a list of backends goes on to triton."""
        tensor = types.SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32, shape=(3, 3))
        tensor.dim, tensor.stride = (lambda: 2), (lambda *_: 1)
        reason = dispatch.unsupported_reason("cuda", "downdate_", [tensor])
        if reason:
            assert dispatch.choose("downdate_", "cuda,triton", [tensor]) == "triton"
            with pytest.raises(BackendError, match=re.escape(reason)):
                dispatch.choose("downdate_", "cuda", [tensor])
        else:
            assert dispatch.choose("downdate_", "cuda,triton", [tensor]) == "cuda"
        return reason


@pytest.fixture
def devices(monkeypatch):
    monkeypatch.setattr(dispatch.load("triton"), "unavailable_reason", lambda: None)
    monkeypatch.setattr(dispatch.load("triton"), "unsupported_reason", lambda op, tensors: None)
    yield lambda capabilities, **problems: Devices(
        monkeypatch, capabilities, {None if name == "driver" else 0: text for name, text in problems.items()}
    )
    forget()


def test_old_device_or_driver_is_not_used(devices):
    assert devices([(9, 0)]).reason(0) is None
    turing = devices([(7, 5)])
    expected = "GPU 0 has compute capability 7.5; the kernels need 8.0 or higher"
    assert turing.reason(0) == cuda.unavailable_reason() == expected
    both = devices([(7, 5), (8, 6)])
    assert (both.reason(0), both.reason(1), cuda.unavailable_reason()) == (expected, None, None)
    assert devices([(8, 0)], driver="the driver is old").reason(0) == "the driver is old"
    assert devices([(12, 0)], device="no image").reason(0) == "no image"
    assert cuda.unavailable_reason() is None


def test_library_exports_only_its_interface(library):
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    command = ["nm", "-D", "--defined-only", cuda_launch.LIBRARY]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in listed.stdout.splitlines() if " T " in line}
    assert exported == {"rlsedit_cuda_check", "rlsedit_cuda_last_error", "rlsedit_cuda_launch"}


def test_missing_or_damaged_library_raises(tmp_path):
    with pytest.raises(BackendError, match="was not built"):
        cuda_launch.Library(tmp_path / "absent.so")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    with pytest.raises(BackendError, match="cannot be loaded"):
        cuda_launch.Library(damaged)


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_launch.Library.__init__, "__defaults__", (tmp_path / "absent.so",))
    cuda_launch.launcher.cache_clear()
    yield
    cuda_launch.launcher.cache_clear()


def test_reasons_without_library_and_cupy(no_library, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert re.fullmatch(
        "the CUDA library was not built.*; CuPy cannot be imported.*pip install.*", cuda.unavailable_reason()
    )
    assert doctor.report()["cuda_kernels"] is None
    assert doctor.report()["backends"]["cuda"]["reason"] == cuda.unavailable_reason()
    with pytest.raises(BackendError, match="CuPy cannot be imported"):
        ops.downdate_(torch.eye(3), torch.ones(1, 3), torch.ones(1), backend="cuda")


class FakeCupy:
    """Replaces CuPy and records its calls."""

    class Kernel:
        max_dynamic_shared_size_bytes = 48 << 10

        def __init__(self, owner, name):
            self.owner, self.name = owner, name

        def __call__(self, grid, block, arguments, *, shared_mem):
            assert shared_mem <= self.max_dynamic_shared_size_bytes
            self.owner.calls.append((self.name, grid, block, arguments, shared_mem, tuple(self.owner.current)))

    def __init__(self):
        self.calls, self.current = [], []
        self.versions = [13010, 13000]  # of the driver and the runtime
        runtime = types.SimpleNamespace(
            driverGetVersion=lambda: self.versions[0], runtimeGetVersion=lambda: self.versions[1]
        )
        self.cuda = types.SimpleNamespace(
            Device=self.scope("device"), ExternalStream=self.scope("stream"), runtime=runtime
        )

    def scope(self, kind):
        outer = self

        class Scope:
            def __init__(self, *arguments):
                self.entry = (kind, *arguments)

            def __enter__(self):
                outer.current.append(self.entry)

            def __exit__(self, *_):
                outer.current.remove(self.entry)

        return Scope

    def RawModule(self, *, code, options, backend):
        assert backend == "nvrtc"

        def get_function(name):
            if f"{name}(" not in code:
                raise ValueError(f"no {name}")
            return self.Kernel(self, name)

        return types.SimpleNamespace(get_function=get_function)


def test_cupy_launches_on_the_torch_stream_without_a_library(no_library, monkeypatch):
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cuda_launch, "_where", lambda device: (3, 77))
    assert cuda.kernels() == "the kernel sources, compiled at run time by CuPy"
    assert cuda_launch.launcher().problem(None) is None
    cupy.versions[0] = 12040
    assert "the driver supports CUDA 12.4, but CuPy is for CUDA 13.0" in cuda_launch.launcher().problem(0)
    base, (launch,) = some_downdate(d=130, r=2, layers=2)
    cuda_launch.run([launch], base.device)
    ((name, grid, block, arguments, shared, scopes),) = cupy.calls
    assert (name, grid, block, shared) == ("rlsedit_downdate", (3, 2, 1), (256, 1, 1), launch.shared)
    assert scopes == (("device", 3), ("stream", 77, 3))
    assert [type(argument) for argument in arguments] == [np.uint64, *[np.int64] * 2, *[np.uint64] * 2, *[np.int64] * 2]
    assert arguments[0] == base.data_ptr()
    assert list(map(int, arguments[-2:])) == [130, 2]

    whole = Launch("factor", (1, 1, 1), 128, cuda_plan.factor_shared(128), (1.0,))
    cuda_launch.run([whole], base.device)
    assert isinstance(cupy.calls[-1][3][0], np.float32)
    with pytest.raises(BackendError, match="absent: CuPy cannot compile or launch it: no rlsedit_absent"):
        cuda_launch.run([Launch("absent", (1, 1, 1), 32, 0, ())], base.device)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize(("n", "count"), [(1, 3), (128, 3), (129, 5), (2048, 33)])
def test_factor_launches_fit_every_device(n, count, layers):
    launches = some_factor(layers, n, 14336, 4096)
    assert len(launches) == count
    assert {launch.kernel for launch in launches} <= KERNELS
    for launch in launches:
        assert all(1 <= size <= 65535 for size in launch.grid[1:])
        assert 1 <= launch.grid[0] < 2**31
        assert launch.shared <= SHARED_LIMIT
        assert launch.threads % 32 == 0


@pytest.mark.parametrize("n", [1, 4, 5, 8])
@pytest.mark.parametrize("d", [1, 4096, 28672])
def test_panel_launches_fit_every_device(n, d):
    base, keys = torch.empty(3, d, d, device="meta"), torch.empty(3, n, d, device="meta")
    workspace = tuple(torch.empty(shape, device="meta") for shape in cuda_plan.panel_workspace(3, n, d))
    launches = cuda_plan.panel(base, keys, torch.empty_like(keys), workspace)
    assert [launch.kernel for launch in launches] == ["panel4" if n <= 4 else "panel8", "panel_sum"]
    assert all(launch.shared <= SHARED_LIMIT for launch in launches)
    assert all(1 <= size <= 65535 for launch in launches for size in launch.grid)
    triangle_bytes, kept = 3 * d * d * 2, sum(4 * part.numel() for part in workspace)
    assert d < 4096 or kept <= 0.2 * triangle_bytes


def test_grids_of_the_largest_batch():
    for launch in (*some_factor(1, cuda_plan.MAX_EDITS, 28672, 8192), *some_factor(cuda_plan.MAX_LAYERS, 1, 1, 1)):
        assert all(1 <= size <= 65535 for size in launch.grid[1:])


@pytest.mark.parametrize("n", [1, 64, 65, 100, 128, 500, 2048])
@pytest.mark.parametrize("d", [1, 15, 64, 4096, 14336])
@pytest.mark.parametrize("layers", [1, 5])
def test_gram_splits_cover_every_column_once(layers, n, d):
    splits, columns = cuda_plan.gram_splits(layers, n, d)
    assert (splits - 1) * columns < d <= splits * columns
    assert columns % cuda_plan.GRAM_DEPTH == 0
    tiles = cuda_plan.triangle(cuda_plan.blocks(n, cuda_plan.GRAM_TILE))
    assert splits == 1 or splits * tiles * layers <= cuda_plan.TARGET_BLOCKS


STACKS = {("update", "sm_120"): 48}
"""Bytes of stack of kernels that need a few registers more than two blocks leave, on one target."""


def check_resources(text, targets):
    """Checks the output of ptxas -v: no spills and no stack but STACKS, registers for two blocks of a product."""
    entries = re.findall(
        r"Compiling entry function 'rlsedit_(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    assert {(kernel, target) for kernel, target, *_ in entries} == {(k, t) for k in KERNELS for t in targets}
    for kernel, target, stack, stores, loads, registers in entries:
        allowed = STACKS.get((kernel, target), 0)
        assert int(stack) <= allowed, (kernel, target)
        assert max(int(stores), int(loads)) <= 2 * allowed, (kernel, target)
        threads = {"sigma": 1024, "factor": 128}.get(kernel, 256)
        assert int(registers) <= min(255, 65536 // threads), (kernel, target)
        if kernel in ("update", "downdate"):
            assert int(registers) <= 128, (kernel, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets", [("sm_90a",), pytest.param(("sm_80", "sm_90a", "sm_100", "sm_120"), marks=pytest.mark.soak)]
)
def test_targets_compile_without_warnings_and_spills(targets, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    targets = [target for target in targets if target.rstrip("a") in known]
    assert targets
    codes = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in targets]
    if len(targets) > 1:
        codes.append("-gencode=arch=compute_80,code=compute_80")
    done = subprocess.run(
        [
            *(nvcc, "-c", "-O3", "-std=c++17", "-Xptxas=-v", "--Werror=all-warnings", *codes),
            *("-Xcompiler=-fPIC,-Wall,-Werror", "-I", ROOT / "csrc/include"),
            *(ROOT / "csrc/cuda/launch.cu", "-o", tmp_path / "launch.o"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    check_resources(done.stdout, targets)


@pytest.fixture(scope="module")
def nvrtc():
    """NVRTC from its wheel or from the system."""
    found = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (found.submodule_search_locations if found else None) or ()]
    libraries = [str(path) for place in places for path in sorted(place.glob("*/lib/libnvrtc.so.1[0-9]"))]
    for builtins in (path for place in places for path in place.glob("*/lib/libnvrtc-builtins.so.1*")):
        ctypes.CDLL(str(builtins))  # NVRTC finds it by name once it is loaded
    for name in (*libraries, "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["compute_80", pytest.param("sm_90", marks=pytest.mark.soak)])
def test_nvrtc_compiles_the_installed_sources(nvrtc, target):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    code = cuda_launch.source().encode()
    assert b"#include" not in code
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"rlsedit.cu", 0, None, None) == 0
    options = [option.encode() for option in (*cuda_launch.COMPILER_OPTIONS, f"-arch={target}")]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    assert not log.value.strip()
    kind = "CUBIN" if target.startswith("sm") else "PTX"
    assert getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)) == 0
    made = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc, f"nvrtcGet{kind}")(program, made) == 0
    assert all(f"rlsedit_{kernel}".encode() in made.raw for kernel in KERNELS)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
