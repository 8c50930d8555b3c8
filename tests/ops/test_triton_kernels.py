"""Tests of the Triton kernels without a GPU: interpreter, precisions and tables."""

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
from rlsedit_fast.kernels.panel import ALIGNMENT
from rlsedit_fast.kernels.precision import PRECISIONS, REJECTED, chosen

TABLES = sorted(path.stem for path in Path(tables.__file__).parent.glob("*.json"))


def old_interpreter_with_new_numpy():
    """The interpreter of Triton 3.6 converts one-element arrays to integers, which NumPy >= 2.4 does not support."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    return triton < (3, 7) and numpy >= (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(old_interpreter_with_new_numpy(), reason="the interpreter of Triton 3.6 requires NumPy < 2.4")
def test_kernels_in_the_interpreter():
    """Runs in a separate process, because Triton reads TRITON_INTERPRET on import."""
    cases = Path(__file__).with_name("triton_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("RLSEDIT_TRITON_PRECISION", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env=environment, cwd=cases.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_precision_from_argument_environment_or_default(monkeypatch):
    monkeypatch.delenv("RLSEDIT_TRITON_PRECISION", raising=False)
    assert chosen(None) == "tf32x3"
    assert chosen(None, "panel", "sm_90") == "tf32x3"
    assert chosen(None, "correct", "sm_80") == "tf32x3"
    assert chosen(None, "correct", "sm_90") == chosen(None, "downdate", "sm_90") == "bf16x6"
    assert chosen("tf32x3", "correct", "sm_90") == "tf32x3"
    monkeypatch.setenv("RLSEDIT_TRITON_PRECISION", "bf16x6")
    assert chosen(None) == "bf16x6"
    assert chosen("ieee") == "ieee"
    monkeypatch.setenv("RLSEDIT_TRITON_PRECISION", "")
    assert chosen(None) == "tf32x3"


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_precision_raises(name, monkeypatch):
    with pytest.raises(InputError) as error:
        chosen(name)
    assert f"input_precision={name!r} is not supported" in str(error.value)
    assert REJECTED[name] in str(error.value)
    assert all(good in str(error.value) for good in PRECISIONS)
    monkeypatch.setenv("RLSEDIT_TRITON_PRECISION", name)
    with pytest.raises(InputError, match=f"RLSEDIT_TRITON_PRECISION='{name}' is not supported"):
        chosen(None)


def test_unknown_precision_lists_the_known_ones():
    with pytest.raises(InputError, match="input_precision='fp32': expected one of tf32x3, bf16x6, ieee"):
        chosen("fp32")


@pytest.mark.parametrize("name", TABLES)
def test_table_has_a_default_and_ascending_entries(name):
    table = tables.table(name)
    assert tables.DEFAULT in table
    for entries in table.values():
        rows = [entry["rows"] for entry in entries]
        assert rows == sorted(set(rows))
        assert all(entry.keys() - PRECISIONS.keys() == entries[0].keys() - PRECISIONS.keys() for entry in entries)


def test_configuration_lookup():
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


def test_padding_of_coefficients_suffices():
    """`finish_kernel` reads `DEPTH` coefficients at a time, and `rows_kernel` writes whole blocks of `ROWS`."""
    for entries in tables.table("panel_finish").values():
        for entry in entries:
            for precision in PRECISIONS:
                assert ALIGNMENT % {**entry, **entry.get(precision, {})}["DEPTH"] == 0
    for entries in tables.table("panel").values():
        assert all(entry["ROWS"] % ALIGNMENT == 0 or ALIGNMENT % entry["ROWS"] == 0 for entry in entries)
