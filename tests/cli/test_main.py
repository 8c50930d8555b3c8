"""Exit codes and error messages of the command line."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import pytest

from rlsedit_fast.cli import COMMANDS, history, main
from rlsedit_fast.errors import InputError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            RecursionError("too\ndeep"),
            2,
            "rlsedit history: error: unexpected RecursionError: too deep (test_main.py, line ",
        ),
        (OSError(28, "No space left on device"), 2, "unexpected OSError: [Errno 28] No space left on device"),
        (BrokenPipeError(32, "Broken pipe"), 2, "unexpected BrokenPipeError"),  # of a pipe other than stdout
        (MemoryError(), 2, "rlsedit history: error: unexpected MemoryError (test_main.py"),
        (KeyboardInterrupt(), 130, "rlsedit history: interrupted"),
    ],
)
def test_unexpected_error_prints_one_line_and_exits_with_2(monkeypatch, capsys, error, code, message):
    def fails(_options):
        raise error

    monkeypatch.setattr(history, "run", fails)
    assert main(["history", "--store", "edits"]) == code
    stderr = capsys.readouterr().err
    assert message in stderr
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1


def test_ctrl_c_while_commands_are_imported_exits_with_130(monkeypatch, capsys):
    def pressed(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", pressed)
    assert main(["history", "--store", "edits"]) == 130
    assert capsys.readouterr().err == "rlsedit: interrupted\n"


def test_closed_stdout_exits_with_141_and_no_message():
    command = "from rlsedit_fast.cli import main; raise SystemExit(main(['doctor', '--json']))"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        stderr = process.stderr.read().decode()
        assert process.wait() == 141
    assert "Error" not in stderr


def test_hint_is_printed_on_a_line_of_its_own(monkeypatch, capsys):
    def fails(_options):
        raise InputError("a is 1, expected 2", hint="pass --a 2")

    monkeypatch.setattr(history, "run", fails)
    assert main(["history", "--store", "edits"]) == 2
    assert capsys.readouterr().err == "rlsedit history: error: a is 1, expected 2\nhint: pass --a 2\n"


ONE = ("--prompt", "{} is", "--subject", "a", "--target", "b")


@pytest.mark.parametrize("hint", [None, "pass b=2"])
def test_hint_survives_pickling(hint):
    error = pickle.loads(pickle.dumps(InputError("b is 1", hint)))
    assert (error.message, error.hint) == ("b is 1", hint)
    assert str(error) == "b is 1" + ("\nhint: pass b=2" if hint else "")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["show", "--model", "m", "--prompt", "{} is"],
            "rlsedit show: error: --target is missing; a single",
        ),
        (["edit", "--model", "m", "--dry-run", "--target", "x", "--subject", "y"], "error: --prompt is missing"),
        (
            ["edit", "--model", "m", "--dry-run", "--name", "x", "--edits", "-"],
            "--name cannot be combined with --edits",
        ),
        (["edit", "--model", "m", "--dry-run"], "no edits given; pass --edits FILE, or a single edit by --prompt"),
        (["edit", "--model", "m", "--dry-run", *ONE, "--limit", "2"], "--limit requires --edits FILE"),
        (["edit", "--model", "m", "--dry-run", *ONE[:-1], " "], "the given edit: target: is blank (' ')"),
        (["export", "--model", "m", "--edited", "n"], "rlsedit export: error: no output given; pass --out DIR"),
        (["show", "--model", "m", "--edits", "bad.jsonl"], "or pass --skip-bad to skip them"),
    ],
)
def test_errors_name_options(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    good = '{"prompt": "{} is", "subject": "a", "target": "b"}'
    (tmp_path / "bad.jsonl").write_text(f'{good}\n{{"prompt": "{{}} is"}}\n')
    assert main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_short_usage_and_names_every_option(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    shown = capsys.readouterr().out
    usage, _, rest = shown.partition("\n\n")
    assert usage.startswith(f"usage: rlsedit {name} ")
    assert len(usage.splitlines()) <= 2
    assert "--quiet" in rest
    for option in re.findall(r"--[a-z-]+", usage):
        assert f"  {option}" in rest


def test_rejected_options_are_not_in_the_help_of_evaluate(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert "--rule " not in shown
    assert "generic" not in shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "--edit", "3"], "unrecognized arguments: --edit 3; did you mean '--edits'?"),
        (["evaluate", "--preset", "generic"], "invalid choice: 'generic'"),
        (["undo", "--store", "edits", "--json", "3"], "put ids before --json, or write ./3"),
        (["show", "--model", "m", "--edits", "facts", "--limit", "-1"], "expected an integer of at least 1"),
        *(
            ([*command, "0"], "expected an integer of at least 1")
            for command in (
                ["calibrate", "--model", "m", "--edits", "facts", "--pilot"],
                ["edit", "--model", "m", "--edits", "facts", "--tokens"],
                ["edit", "--model", "m", "--edits", "facts", "--batch-size"],
                ["edit", "--model", "m", "--edits", "facts", "--search-ahead"],
                ["edit", "--model", "m", "--edits", "facts", "--rank"],
                ["undo", "--store", "edits", "--last"],
            )
        ),
        (["show", "--model", "m", "--dtype", "fp16"], "argument --dtype: dtype 'fp16': expected one of"),
        (
            ["calibrate", "--model", "m", "--edits", "facts", "--adherences", "0.9", "90"],
            "'90': expected a number above 0",
        ),
        (["show", "--model", "m", "--dtype", "fp16"], "did you mean float16?"),
    ],
)
def test_misread_arguments_are_rejected(capsys, command, message):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert message in capsys.readouterr().err
