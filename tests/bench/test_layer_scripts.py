"""The benchmarks of layers and of generalization at their smallest size, on the demo model."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from rlsedit_fast.editing import EditConfig
from rlsedit_fast.evaluation.demo import anchor_texts
from rlsedit_fast.world import RELATIONS, World, load_demo_model
from rlsedit_fast.world.tokens import save_tokenizer

WORLD = World.generate()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, edits in the EasyEdit layout and a text file."""
    folder = tmp_path_factory.mktemp("files")
    model, tokenizer = load_demo_model()
    model.save_pretrained(folder / "base")
    save_tokenizer(tokenizer, folder / "base")
    relation = RELATIONS[0]
    people = WORLD.people
    records = []
    for i in range(4):
        answer = people[i].facts[relation.name]
        other = people[50 + i]
        wording = i % 2  # the paraphrase of one record is the prompt of another
        records.append(
            {
                "case_id": i,
                "prompt": relation.phrasings[wording].format(people[i].name),
                "subject": people[i].name,
                "target_new": next(value for value in relation.values if value != answer),
                "ground_truth": answer,
                "rephrase_prompt": relation.phrasings[1 - wording].format(people[i].name),
                "locality_prompt": relation.phrasings[0].format(other.name),
                "locality_ground_truth": other.facts[relation.name],
            }
        )
    records[3]["rephrase_prompt"] = f"Where {records[3]['subject']} works, there is"
    (folder / "facts.json").write_text(json.dumps(records))
    (folder / "text.txt").write_text("\n".join(f"{text} {text}" for text in anchor_texts(WORLD, 0)[::40]))
    return folder


@pytest.fixture
def result(files, tmp_path, monkeypatch):
    """Runs a script and returns its result."""

    def run(name, *options):
        path = tmp_path / "result.json"
        given = [
            "--model",
            files / "base",
            "--data",
            files / "facts.json",
            "--text",
            files / "text.txt",
            "--json",
            path,
        ]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, [*given, *options])])
        importlib.import_module(name).main()
        return json.loads(path.read_text())

    return run


def test_other_paraphrases_are_excluded(files):
    edits = importlib.import_module("layer_choice").paraphrased_edits(files / "facts.json", 10)
    assert [edit.subject for edit in edits] == [person.name for person in WORLD.people[:3]]


def test_layer_choice(result):
    options = ["--edits", 2, "--tokens", 300, "--stride", 2, "--widths", "--facts", 1, "--window", 1]
    found = result("layer_choice", *options)
    layers = [row["layers"] for row in found["rows"]]
    assert [1] in layers
    assert all(row["behind_best"] >= 0 for row in found["rows"])
    tracing = found["tracing"]
    assert tracing["facts"] == 1
    assert 0 <= tracing["corrupted"] <= 1
    assert len(tracing["hidden"]) == len(tracing["mlp"]) == found["depth"]
    # Nothing after the last layer reads the state of an earlier token.
    assert tracing["hidden"][-1] == pytest.approx(0, abs=1e-5)


def test_generalization(result):
    found = result(
        "generalization", "--edits", 2, "--tokens", 300, "--settings", "no contexts in a chat", "the prompt alone"
    )
    assert [row["setting"] for row in found["rows"]] == ["no contexts in a chat", "the prompt alone"]
    assert found["rows"][0]["score_difference"] == 0
    assert all(row.keys() >= {"efficacy", "paraphrase_nll", "specificity", "kl", "change"} for row in found["rows"])


def test_settings_are_valid():
    script = importlib.import_module("generalization")
    assert all(isinstance(EditConfig(**changes), EditConfig) for changes in script.SETTINGS.values())
