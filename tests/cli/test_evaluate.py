"""`rlsedit evaluate`: what it refuses, and streams under rules that cannot take an edit back."""

from __future__ import annotations

import json

import pytest

from rlsedit_fast.cli import main


def test_a_stream_that_contradicts_itself_finishes_under_a_rule_that_takes_nothing_back(tmp_path):
    command = ["evaluate", "--stream", "conflicting", "--rules", "memit", "--edits", "4", "--seeds", "1"]
    found = tmp_path / "found.json"
    assert main([*command, "--batch-size", "2", "--out", str(tmp_path / "runs"), "--json", str(found)]) == 0
    assert json.loads(found.read_text())["failed"] == []
    (run,) = (tmp_path / "runs").glob("*.json")
    assert json.loads(run.read_text())["made"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "cf.json", "--device", "cuda"], "--data, --device: the demo model has"),
        (["--statistics", "moments"], "--statistics: the demo model has"),
        (["--text", "text.txt"], "--text: the demo model has"),
        (["--among", "5", "--dtype", "bfloat16"], "--among, --dtype: the demo model has"),
        (["--rule", "memit"], "streams run under each of --rules"),
        (["--config", "rule.json"], "rule='memit' is for --rules to say"),
        (["--seeds", "1", "2", "1"], "--seeds: 1 more than once"),
        (["--rules", "rls", "rls"], "--rules: rls more than once"),
        (["--items", "5"], "--tasks DIR"),
        (["--model", "own"], "needs --data FILE"),
        (["--model", "own", "--data", "zsre.json"], "needs --text FILE"),
        (["--model", "own", "--data", "zsre.json", "--text", "text.txt", "--among", "5"], "of zsRE all records"),
        (["--json", "rule.json", "--config", "rule.json"], "is the file of --config too"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.json").write_text('{"rule": "memit"}')
    (tmp_path / "zsre.json").write_text('[{"src": "Who?", "subject": "Who"}]')
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("options", [["--jobs", "0"], ["--items", "-1"], ["--among", "-3"], ["--edits", "0"]])
def test_counts_below_one_are_refused(capsys, options):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *options])
    assert f"argument {options[0]}: '{options[1]}': expected a whole number, at least 1" in capsys.readouterr().err
