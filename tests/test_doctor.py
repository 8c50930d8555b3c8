"""The doctor report lists available and unavailable backends, also with missing packages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rlsedit_fast import doctor
from rlsedit_fast.ops import dispatch


def test_report_gives_a_reason_for_every_unavailable_backend():
    for name, backend in doctor.report()["backends"].items():
        assert backend["available"] == (name in dispatch.available_backends())
        assert backend["available"] != bool(backend["reason"])
        assert set(backend["operations"]) <= set(dispatch.OPERATIONS)


def test_json_to_stdout_or_file(tmp_path, capsys):
    assert doctor.main(["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert doctor.main(["--json", str(tmp_path / "report.json")]) == 0
    assert not capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text()) == printed
    assert set(printed) == {
        "versions",
        "machine",
        "backends",
        "backend_wish",
        "cuda_kernels",
        "choices",
        "tuned",
        "build",
    }


def test_text_names_every_backend_and_reason(capsys):
    doctor.main([])
    text = capsys.readouterr().out
    for name, backend in doctor.report()["backends"].items():
        assert name in text
        assert (backend["reason"] or "") in text


@pytest.mark.parametrize("content", [None, "{ not json"])
def test_missing_or_damaged_build_record_is_reported(content, tmp_path, monkeypatch):
    record = tmp_path / "_build.json"
    if content is not None:
        record.write_text(content)
    monkeypatch.setattr(doctor, "BUILD_FACTS", record)
    for part in doctor.report()["build"].values():
        assert not part["built"]
        assert "install" in part["reason"]


def test_report_needs_no_transformers_and_no_triton():
    blocked = "import sys; sys.modules['transformers'] = sys.modules['triton'] = None; "
    code = blocked + "from rlsedit_fast.doctor import main; raise SystemExit(main(['--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["backends"]["reference"]["available"]
