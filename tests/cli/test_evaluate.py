"""`rlsedit evaluate`: what it refuses, and streams under rules that cannot take an edit back."""

from __future__ import annotations

import json

import pytest

from rlsedit_fast.cli import main
from rlsedit_fast.editing import EditConfig
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.demo import CONFIG
from rlsedit_fast.evaluation.grounds import GroundSpec, make_ground


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
        (["--tokens", "5"], "--tokens: the demo model has"),
        (["--model", "own", "--data", "a", "--text", "b", "--statistics", "c", "--tokens", "5"], "with --statistics"),
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


def test_a_setting_that_is_given_counts_even_where_it_is_the_usual_one(tmp_path):
    """The demo's own adherence is another than EditConfig's."""
    command = ["evaluate", "--edits", "2", "--seeds", "1", "--adherence", "0.8", "--out", str(tmp_path)]
    assert main(command) == 0
    (run,) = tmp_path.glob("*.json")
    config = json.loads(run.read_text())["plan"]["config"]
    assert config["adherence"] == EditConfig().adherence == 0.8 != CONFIG.adherence
    assert config["search_stop_nll"] == CONFIG.search_stop_nll, "and the others are the demo's"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "own", "--data", "cf.json", "--text", "text.txt", "--preset", "generic"],
            "name them with --layers",
        ),
        (["--rule-settings", "settings.json"], "rome are not among --rules"),
    ],
)
def test_what_would_not_be_read_is_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.json").write_text('{"rome": {"lam": 1.0}}')
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err


def test_text_in_json_lines_is_not_taken_for_running_text(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n' * 20)
    with pytest.raises(InputError, match="not JSON Lines"):
        make_ground(GroundSpec(model="somewhere", text=str(text)))


def test_how_much_is_asked_by_default_is_in_the_result(tmp_path, capsys):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sst2.jsonl").write_text('{"sentence": "good", "label": 1}\n')
    command = ["evaluate", "--edits", "2", "--seeds", "1", "--tasks", str(tasks), "--out", str(tmp_path / "runs")]
    assert main(command) == 0
    (run,) = (tmp_path / "runs").glob("*.json")
    found = json.loads(run.read_text())
    assert (found["plan"]["free"], found["made_of"]["items"]) == (100, 100)
    assert "edits: 100%" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    assert " ".join(capsys.readouterr().out.split()).count("default 100: a standard error of 0.05 at most") == 2
