"""Output of the commands."""

from __future__ import annotations

import json
import math

import pytest

from rlsedit_fast import doctor
from rlsedit_fast.cli import main
from rlsedit_fast.cli.output import emit


@pytest.mark.parametrize("to", ["-", "report.json"])
def test_json_has_null_for_nonfinite_numbers(tmp_path, monkeypatch, capsys, to):
    monkeypatch.chdir(tmp_path)
    emit({"bound": math.inf, "of": (1.5, math.nan, {"nested": [-math.inf]}), "text": "nan"}, ["lines"], to)
    text = capsys.readouterr().out if to == "-" else (tmp_path / to).read_text()

    def fail(constant):
        raise AssertionError(f"{constant} is not valid JSON")

    assert json.loads(text, parse_constant=fail) == {
        "bound": None,
        "of": [1.5, None, {"nested": [None]}],
        "text": "nan",
    }


def test_doctor_rejects_an_unwritable_path(tmp_path, capsys):
    assert main(["doctor", "--json", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert "cannot be written (it is a folder)" in output.err
    assert not output.out
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--json", str(tmp_path)])
    assert "cannot write the file (Is a directory)" in capsys.readouterr().err
