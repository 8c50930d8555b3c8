"""How the command line ends: exit codes, and no tracebacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlsedit_fast.cli import history, main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RecursionError("too\ndeep"), 2, "rlsedit history: unforeseen RecursionError: too deep (test_main.py, line "),
        (OSError(28, "No space left on device"), 2, "unforeseen OSError: [Errno 28] No space left on device"),
        (BrokenPipeError(32, "Broken pipe"), 2, "unforeseen BrokenPipeError"),  # of some other pipe than stdout
        (MemoryError(), 2, "rlsedit history: unforeseen MemoryError (test_main.py"),
        (KeyboardInterrupt(), 130, "rlsedit history: interrupted"),
    ],
)
def test_an_error_that_nobody_foresaw_is_a_line_and_exit_code_2(monkeypatch, capsys, error, code, message):
    def fails(_options):
        raise error

    monkeypatch.setattr(history, "run", fails)
    assert main(["history", "--store", "edits"]) == code
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert len(told.splitlines()) == 1


def test_ctrl_c_while_the_commands_are_imported_is_an_interruption(monkeypatch, capsys):
    def pressed(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", pressed)
    assert main(["history", "--store", "edits"]) == 130
    assert capsys.readouterr().err == "rlsedit: interrupted\n"


def test_a_reader_that_goes_away_is_no_news():
    command = "from rlsedit_fast.cli import main; raise SystemExit(main(['doctor', '--json']))"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        told = process.stderr.read().decode()
        assert process.wait() == 141
    assert "Error" not in told
