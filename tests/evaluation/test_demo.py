"""A small demonstration through the command line."""

import json

import pytest

from rlsedit_fast.cli import main
from rlsedit_fast.evaluation import demo
from rlsedit_fast.evaluation.ages import age_groups

KEYS = {
    "efficacy_strict",
    "generalization_strict",
    "neighbors_unchanged",
    "same_subject_unchanged",
    "retention_oldest",
    "edits_per_second",
    "deviation",
    "deviation_bound",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--edits", "30", "--batch-size", "5", "--seed", "3", "--out", str(out)]) == 0
    return out, json.loads((out / "demo.json").read_text())


def test_a_short_stream_is_applied_with_few_side_effects(finished):
    _, results = finished
    assert results.keys() >= KEYS
    assert results["edits"] == 30
    assert results["efficacy_strict"] >= 0.97
    assert results["generalization_strict"] >= 0.90
    assert results["neighbors_unchanged"] >= 0.95
    assert results["retention_oldest"] >= 0.95
    assert 0 < results["deviation"] <= results["deviation_bound"]
    assert results["same_subject_unchanged"] >= 0.75


def test_the_saved_model_gives_the_answers_of_the_edited_model(finished):
    out, results = finished
    edited, paraphrase, *kept = results["answers"]
    assert edited["before"] != edited["after"] == edited["reloaded"]
    assert paraphrase["after"] == edited["after"]
    for answer in kept:
        assert answer["reloaded"] == answer["after"]
    assert (out / "model" / "model.safetensors").exists()


def test_the_plot_and_the_table_show_every_age(finished):
    out, results = finished
    assert (out / "retention.png").read_bytes().startswith(b"\x89PNG")
    assert [(age["first"], age["last"]) for age in results["ages"]] == [(i, i + 4) for i in range(1, 30, 5)]
    text = demo.table(results)
    for label in ("first (edits 1 to 5)", "middle (edits 16 to 20)", "last (edits 26 to 30)", "other facts", "bound"):
        assert label in text


@pytest.mark.parametrize(("count", "batch_size"), [(1000, 10), (1000, 30), (7, 10), (1, 1), (1000, 1000)])
def test_age_groups_are_whole_batches_and_cover_the_stream(count, batch_size):
    groups = age_groups(count, batch_size)
    assert [edit for start, stop in groups for edit in range(start, stop)] == list(range(count))
    assert all((stop - start) % batch_size == 0 for start, stop in groups[:-1])


@pytest.mark.parametrize("arguments", [["--edits", "0"], ["--edits", "2001"], ["--batch-size", "0"]])
def test_invalid_numbers_are_rejected_with_a_reason(arguments, tmp_path, capsys):
    command = ["demo", *arguments, "--out", str(tmp_path / "out")]
    if arguments[1] == "0":
        with pytest.raises(SystemExit, match="2"):
            main(command)
    else:
        assert main(command) == 2
    assert "expected" in capsys.readouterr().err
