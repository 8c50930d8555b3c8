"""`rlsedit report`: measured in the model or made from the records, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest

import rlsedit_fast as rf
from rlsedit_fast.cli import main
from rlsedit_fast.world import RELATIONS, World, load_demo_model
from rlsedit_fast.world.tokens import save_tokenizer

PEOPLE = World.generate().people[:8]
LIVES = RELATIONS[0]


def target(person, relation=LIVES):
    return next(value for value in relation.values if value != person.facts[relation.name])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint with a chat template, and a store of edits of it of which some are undone and replaced."""
    folder = tmp_path_factory.mktemp("report")
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = "{{ messages[0].content }}"
    model.save_pretrained(folder / "base")
    save_tokenizer(tokenizer, folder / "base")
    (folder / "base" / "chat_template.jinja").write_text(tokenizer.chat_template)
    config = rf.EditConfig(layers=[0], prior={"lam": 0.05}, contexts={"prefixes": [""]}, refine=0, batch_size=4)
    with rf.Editor.from_pretrained(folder / "base", config=config, store=folder / "edits") as editor:
        editor.protect([LIVES.phrasings[0].replace("{}", PEOPLE[7].name)])
        edits = [
            rf.Edit(
                LIVES.phrasings[0],
                person.name,
                target(person),
                name="<b>first</b>" if person is PEOPLE[0] else None,
                paraphrases=(LIVES.phrasings[1],),
                neighborhood=(LIVES.phrasings[0].replace("{}", PEOPLE[6].name),),
            )
            for person in PEOPLE[:6]
        ]
        editor.edit(edits)
        editor.undo([2])
        other = next(value for value in LIVES.values if value not in (target(PEOPLE[2]), PEOPLE[2].facts[LIVES.name]))
        editor.replace(3, other)
    return folder


@pytest.fixture
def workdir(made, tmp_path, monkeypatch):
    shutil.copytree(made / "edits", tmp_path / "edits")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.txt").write_text(
        f"{LIVES.phrasings[0].replace('{}', PEOPLE[0].name)}\n{PEOPLE[7].name} plays the\n"
    )
    (tmp_path / "gates.yaml").write_text(f"answers:\n  - prompt: {PEOPLE[1].name} lives in\n    contains: Nowhere\n")
    return tmp_path


def test_report_with_the_model_compares_with_the_unedited_one(workdir, capsys):
    options = ["report", "--store", "edits", "--out", "report.html", "--ask", "ask.txt", "--json", "report.json"]
    assert main([*options, "--gate", "gates.yaml", "--title", "Release 7"]) == 3
    out = capsys.readouterr().out
    assert "report: report.html" in out
    assert "violated: answers" in out
    page = (workdir / "report.html").read_text()
    assert "<title>Change report: Release 7</title>" in page
    assert "&lt;b&gt;first&lt;/b&gt;" in page
    assert "<b>first" not in page
    found = json.loads((workdir / "report.json").read_text())
    assert found["measured"]
    assert [row["state"] for row in found["edits"]] == "active undone replaced active active active active".split()
    for row, person in zip(found["edits"], PEOPLE, strict=False):
        if row["id"] <= 6:
            assert row["before"] == person.facts[LIVES.name], "the answer of the unedited model"
            assert row["chat_before"].startswith(person.facts[LIVES.name])
        if row["state"] == "active" and row["id"] <= 6:
            assert (row["now"], row["stated"]) == (target(person), True)
            assert row["chat_stated"] == (target(person).casefold() in row["chat_now"].casefold())
            assert row["paraphrases"][1] == 1
    assert found["edits"][1]["now"] == PEOPLE[1].facts[LIVES.name], "the original answer after undo"
    assert found["edits"][2]["note"] == "replaced by edit 7"
    assert found["edits"][6]["before"] == PEOPLE[2].facts[LIVES.name]
    others = {(row["kind"], row["prompt"], row["chat"]): row for row in found["others"]}
    asked = LIVES.phrasings[0].replace("{}", PEOPLE[0].name)
    assert others["asked", asked, False]["moved"]
    assert others["asked", asked, True]["before"].startswith(PEOPLE[0].facts[LIVES.name])
    assert {kind for kind, _, _ in others} == {"asked", "protected", "neighborhood"}
    assert found["gates"]["violated"] == 1
    assert found["status"]["layers"][0]["weight"] > 0

    assert main([*options]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*options, "--overwrite", "--no-chat"]) == 0
    out = capsys.readouterr().out
    assert "not measured: gates: none were given" in out
    assert "in a chat: pass --chat" in out


def test_report_of_the_records_does_not_load_the_model(workdir, capsys, monkeypatch):
    from rlsedit_fast.cli import setup

    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert main(["report", "--store", "edits", "--out", "new/report.html", "--no-model", "--json", "report.json"]) == 0
    assert "not measured: answers: the model was not loaded" in capsys.readouterr().out
    found = json.loads((workdir / "report.json").read_text())
    assert not found["measured"]
    assert found["edits"][0]["now"] == target(PEOPLE[0])
    assert all(row["moved"] is None for row in found["others"])
    assert "From the records of the store" in (workdir / "new" / "report.html").read_text()
    for options, expected in (
        (["--no-model", "--ask", "ask.txt"], "--ask requires the model"),
        (["--no-model", "--gate", "gates.yaml"], "--gate requires the model"),
        (["--no-model", "--budget", "0"], "budget"),
        (["--ask", "missing.txt"], "does not exist"),
        (["--out", "edits"], "is a folder"),
    ):
        given = [*options] if "--out" in options else ["--out", "other.html", *options]
        assert main(["report", "--store", "edits", *given]) == 2
        assert expected in capsys.readouterr().err
    assert not (workdir / "other.html").exists()
    assert main(["report", "--store", "absent", "--out", "other.html", "--no-model"]) == 2
