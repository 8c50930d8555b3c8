"""The Triton kernels without a GPU: right in the interpreter, their precisions by name, their tables whole."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("rlsedit_fast.kernels", reason="needs an installed package: pip install -e .")

from rlsedit_fast.errors import InputError
from rlsedit_fast.kernels import tables
from rlsedit_fast.kernels.precision import PRECISIONS, REJECTED, chosen

TABLES = sorted(path.stem for path in Path(tables.__file__).parent.glob("*.json"))


def old_interpreter_with_new_numpy():
    """Triton 3.6's interpreter turns one-element arrays into integers, which NumPy refuses from 2.4 on."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    return triton < (3, 7) and numpy >= (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(old_interpreter_with_new_numpy(), reason="Triton 3.6 interprets with NumPy before 2.4 only")
def test_every_kernel_in_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own."""
    cases = Path(__file__).with_name("triton_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("RLSEDIT_TRITON_PRECISION", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env=environment, cwd=cases.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_the_precision_is_the_argument_s_else_the_environment_s_else_tf32x3(monkeypatch):
    monkeypatch.delenv("RLSEDIT_TRITON_PRECISION", raising=False)
    assert chosen(None) == "tf32x3"
    monkeypatch.setenv("RLSEDIT_TRITON_PRECISION", "bf16x6")
    assert chosen(None) == "bf16x6"
    assert chosen("ieee") == "ieee"
    monkeypatch.setenv("RLSEDIT_TRITON_PRECISION", "")
    assert chosen(None) == "tf32x3"


@pytest.mark.parametrize("name", REJECTED)
def test_a_coarse_precision_is_refused_with_the_reason(name, monkeypatch):
    with pytest.raises(InputError) as error:
        chosen(name)
    assert f"input_precision={name!r} is not supported" in str(error.value)
    assert REJECTED[name] in str(error.value)
    assert all(good in str(error.value) for good in PRECISIONS)
    monkeypatch.setenv("RLSEDIT_TRITON_PRECISION", name)
    with pytest.raises(InputError, match=f"RLSEDIT_TRITON_PRECISION='{name}' is not supported"):
        chosen(None)


def test_an_unknown_precision_is_an_error_that_lists_the_known_ones():
    with pytest.raises(InputError, match="input_precision='fp32': expected one of tf32x3, bf16x6, ieee"):
        chosen("fp32")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_a_default_and_its_entries_ascend(name):
    table = tables.table(name)
    assert tables.DEFAULT in table
    for entries in table.values():
        rows = [entry["rows"] for entry in entries]
        assert rows == sorted(set(rows))
        assert all(entry.keys() - PRECISIONS.keys() == entries[0].keys() - PRECISIONS.keys() for entry in entries)


def test_the_first_entry_that_holds_the_rows_is_taken_and_a_precision_s_own_settings_replace_others():
    entries = tables.table("correct")["default"]
    first, last = ({**entry} for entry in entries)
    own = first["ieee"]
    assert own
    for rows, precision, expected in (
        (1, "tf32x3", first),
        (first["rows"], "tf32x3", first),
        (first["rows"] + 1, "tf32x3", last),
        (10**6, "bf16x6", last),
        (1, "ieee", first | own),
    ):
        settings = tables.configuration("correct", "sm_75", rows, precision)
        assert settings["enable_fp_fusion"]
        assert settings == {k: v for k, v in expected.items() if k not in ("rows", *PRECISIONS)} | {
            "enable_fp_fusion": True
        }
