"""The CUDA library without a GPU: it loads, checks its arguments and fails in words."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from rlsedit_fast import doctor
from rlsedit_fast.errors import BackendError
from rlsedit_fast.ops import cuda


@pytest.fixture
def library():
    loaded = cuda.load_library()
    if isinstance(loaded, str):
        build = doctor.report()["build"]["cuda"]
        if shutil.which("nvcc") and not re.match("left out|no build", build.get("reason", "")):
            pytest.fail(f"nvcc is here, but {loaded}: {build}")
        pytest.skip(loaded)
    return loaded


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        ("downdate", (1, 4, 1, 4, 1, 0, 1, 0, None), "d=0, r=1: expected d >= 1"),
        ("downdate", (1, 3, 1, 4, 1, 4, 1, 0, None), "row strides 3 and 4: expected at least d=4"),
        ("downdate", (1, 4, None, 4, 1, 4, 1, 0, None), "a pointer is null"),
        ("factor", (1,) * 8 + (129, 4, 4, 1, 0, None), "n=129, d_k=4, d_v=4: expected n in 1..128"),
        ("factor", (1,) * 8 + (5, 4, 4, 0, 0, None), "sign=0: expected 1 or -1"),
        ("factor", (None,) * 8 + (5, 4, 4, 1, 0, None), "a pointer is null"),
    ],
)
def test_a_bad_argument_gives_a_status_and_a_text(library, function, arguments, text):
    with pytest.raises(BackendError, match=re.escape(text)):
        cuda.call(f"rlsedit_cuda_{function}", *arguments)
    assert getattr(library, f"rlsedit_cuda_{function}")(*arguments) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_launch_without_a_driver_is_an_error_not_a_crash(library):
    matrix = torch.eye(4)
    with pytest.raises(BackendError, match=r"downdate: choosing the device: .*cuda"):
        cuda.call(
            "rlsedit_cuda_downdate",
            *(matrix.data_ptr(), 4, matrix.data_ptr(), 4, matrix.data_ptr(), 4, 1, 0, None),
        )
    assert torch.equal(matrix, torch.eye(4))
    assert cuda.missing() == "there is no CUDA device (torch.cuda.is_available() is false)"


def test_the_library_exports_its_interface_and_nothing_else(library):
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    listed = subprocess.run(["nm", "-D", "--defined-only", cuda.LIBRARY], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in listed.stdout.splitlines() if " T " in line}
    assert exported == {"rlsedit_cuda_last_error", *cuda._SIGNATURES}


def test_a_library_that_is_lost_or_damaged_is_told(tmp_path):
    assert "was not built" in cuda.load_library(tmp_path / "absent.so")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    assert "cannot be loaded" in cuda.load_library(damaged)
