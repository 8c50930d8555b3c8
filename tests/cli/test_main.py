"""How the command line ends: exit codes, and no tracebacks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlsedit_fast
from rlsedit_fast.cli import history, main
from rlsedit_fast.cli.words import OPTIONS


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


def test_what_is_put_into_options_is_what_the_package_says():
    home = Path(rlsedit_fast.__file__).parent
    source = "".join(path.read_text() for path in home.rglob("*.py") if path.parent != home / "cli")
    whole = re.sub(r'"\n\s*f?"', "", source)
    assert [python for python in OPTIONS if python not in whole] == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["show", "--model", "m", "--prompt", "{} is"], "rlsedit show: give --prompt"),
        (["export", "--model", "m", "--edited", "n"], "rlsedit export: name what is to be written"),
        (["show", "--model", "m", "--edits", "bad.jsonl"], "or pass --skip-bad to leave them out"),
    ],
)
def test_errors_speak_of_options(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "{} is"}\n')
    assert main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["undo", "--store", "edits", "--json", "3"], "put ids before --json, or name it ./3"),
        (["show", "--model", "m", "--edits", "facts", "--limit", "-1"], "expected a whole number, at least 1"),
        (["calibrate", "--model", "m", "--edits", "facts", "--pilot", "0"], "expected a whole number, at least 1"),
    ],
)
def test_arguments_that_would_mean_something_else_are_refused(capsys, command, message):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert message in capsys.readouterr().err
