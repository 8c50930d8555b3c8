"""`rlsedit evaluate`: invalid options, and streams under rules without undo."""

from __future__ import annotations

import json

import pytest

from rlsedit_fast.cli import main
from rlsedit_fast.editing import EditConfig
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.demo import CONFIG
from rlsedit_fast.evaluation.grounds import GroundSpec, make_ground
from rlsedit_fast.evaluation.stability import TOKENS
from rlsedit_fast.evaluation.stream import MOST_TOKENS, TOKENS_PER_DIMENSION


def test_conflicting_stream_finishes_under_a_rule_without_undo(tmp_path):
    command = ["evaluate", "--stream", "conflicting", "--rules", "memit", "--edits", "4", "--seeds", "1"]
    found = tmp_path / "found.json"
    assert main([*command, "--batch-size", "2", "--out", str(tmp_path / "runs"), "--json", str(found)]) == 0
    assert json.loads(found.read_text())["failed"] == []
    (run,) = (tmp_path / "runs").glob("*.json")
    assert json.loads(run.read_text())["made"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "cf.json", "--device", "cuda"], "--data, --device: not supported for the demo model"),
        (["--statistics", "moments"], "--statistics: not supported for the demo model"),
        (["--text", "text.txt"], "--text: not supported for the demo model"),
        (["--among", "5", "--dtype", "bfloat16"], "--among, --dtype: not supported for the demo model"),
        (["--rule", "memit"], "--rule memit is not supported by `rlsedit evaluate`; pass --rules"),
        (["--config", "rule.json"], "the field rule='memit' is not allowed here"),
        (["--seeds", "1", "2", "1"], "--seeds: 1 given more than once"),
        (["--rules", "rls", "rls"], "--rules: rls given more than once"),
        (["--items", "5"], "--items requires --tasks DIR"),
        (["--tokens", "5"], "--tokens: not supported for the demo model"),
        (
            ["--model", "own", "--data", "a", "--text", "b", "--statistics", "c", "--tokens", "5"],
            "has no effect with --statistics",
        ),
        (["--model", "own"], "requires --data FILE"),
        (["--model", "own", "--data", "zsre.json"], "requires --text FILE"),
        (
            ["--model", "own", "--data", "zsre.json", "--text", "text.txt", "--among", "5"],
            "--among supports CounterFact and MQuAKE only",
        ),
        (["--json", "rule.json", "--config", "rule.json"], "is also the input file --config"),
    ],
)
def test_ignored_options_are_rejected(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ("cf.json", "text.txt", "moments", "a", "b", "c"):
        (tmp_path / name).write_text("")
    (tmp_path / "rule.json").write_text('{"rule": "memit"}')
    (tmp_path / "zsre.json").write_text('[{"src": "Who?", "subject": "Who", "alt": "Ann"}]')
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("options", [["--jobs", "0"], ["--items", "-1"], ["--among", "-3"], ["--edits", "0"]])
def test_counts_below_one_are_rejected(capsys, options):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *options])
    assert f"argument {options[0]}: '{options[1]}': expected an integer of at least 1" in capsys.readouterr().err


def test_given_setting_overrides_the_demo_settings(tmp_path):
    """Also if it is the default of EditConfig, which differs from that of the demo."""
    command = ["evaluate", "--edits", "2", "--seeds", "1", "--adherence", "0.8", "--out", str(tmp_path)]
    assert main(command) == 0
    (run,) = tmp_path.glob("*.json")
    config = json.loads(run.read_text())["plan"]["config"]
    assert config["prior"]["adherence"] == EditConfig().prior.adherence == 0.8 != CONFIG.prior.adherence
    assert config["search"]["stop_nll"] == CONFIG.search.stop_nll, "other settings are those of the demo"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule-settings", "settings.json"], "rome not in --rules"),
    ],
)
def test_unused_settings_are_rejected(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ("cf.json", "text.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "settings.json").write_text('{"rome": {"prior": {"lam": 1.0}}}')
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err


def test_json_lines_are_rejected_as_running_text(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n' * 20)
    with pytest.raises(InputError, match="not JSON Lines"):
        make_ground(GroundSpec(model="somewhere", text=str(text)))


def test_default_sample_sizes_are_in_the_result(tmp_path, capsys):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sst2.jsonl").write_text('{"sentence": "good", "label": 1}\n')
    command = ["evaluate", "--edits", "2", "--seeds", "1", "--tasks", str(tasks), "--out", str(tmp_path / "runs")]
    assert main(command) == 0
    (run,) = (tmp_path / "runs").glob("*.json")
    found = json.loads(run.read_text())
    assert (found["plan"]["free"], found["made_of"]["items"]) == (100, 100)
    shown = capsys.readouterr()
    assert "edits: 100%" in shown.err
    assert "samples per run: 2 free answers (--free, standard error at most 0.35); 2000 tokens of text" in shown.out
    assert "(--probed, perplexity " in shown.out
    assert ", standard error " in shown.out
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    explained = " ".join(capsys.readouterr().out.split())
    assert explained.count("default 100, standard error at most 0.05") == 2
    assert f"{TOKENS_PER_DIMENSION} for each dimension of the widest key, at most {MOST_TOKENS})" in explained
    assert f"standard errors are in the results (default {TOKENS})" in explained
