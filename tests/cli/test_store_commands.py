"""Edits that last, at the terminal: a store is made, gone on with, read, mended and made small."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import rlsedit_fast as rf
from rlsedit_fast.cli import main
from rlsedit_fast.world import RELATIONS, World, load_demo_model

PEOPLE = World.generate().people
SETTINGS = {
    "context_prefixes": [""],
    "kl_prompts": ["{} is a"],
    "search_steps": 40,
    "search_stop_nll": 0.03,
    "adherence": 0.95,
}


def lines_of(first, last):
    made = []
    for i, person in enumerate(PEOPLE[first:last], start=first):
        relation = RELATIONS[i % len(RELATIONS)]
        target = next(value for value in relation.values if value != person.facts[relation.name])
        made.append({"id": f"fact {i}", "prompt": relation.phrasings[0], "subject": person.name, "target": target})
    return made


@pytest.fixture(scope="module")
def one_edit(base, tmp_path_factory):
    """A store with an edit in it."""
    place = tmp_path_factory.mktemp("one") / "edits"
    config = rf.EditConfig(
        layers=(0,), **{name: tuple(v) if isinstance(v, list) else v for name, v in SETTINGS.items()}
    )
    with rf.Editor.from_pretrained(base, config=config, store=place) as editor:
        editor.edit([rf.Edit("{} lives in", PEOPLE[0].name, "Port Alder")])
    return place


@pytest.fixture
def desk(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    for name, part in (("facts", (0, 6)), ("more", (0, 9))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(*part)))
    return tmp_path


@pytest.fixture
def edit(base):
    def run(facts, *options):
        return main(["edit", "--model", str(base), "--edits", facts, "--no-evaluation", *options])

    return run


def history(capsys, *options):
    capsys.readouterr()
    assert main(["history", "--store", "edits", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


NEW = ("--config", "settings.json", "--layers", "0", "--no-anchors", "--store", "edits")


def test_a_store_is_gone_on_with_and_its_edits_are_taken_back(edit, base, desk, capsys):
    assert edit("facts.jsonl", *NEW, "--batch-size", "4") == 0
    made = history(capsys)
    assert isinstance(made, list)
    assert [(r["id"], r["state"], r["name"]) for r in made] == [(i, "active", f"fact {i - 1}") for i in range(1, 7)]
    assert {"time", "prompt", "subject", "target", "realized", "rank", "nll", "search_converged"} <= made[0].keys()

    # The settings need not be said again; what the store has is left as it is.
    assert edit("more.jsonl", "--store", "edits", "--out", "out", "--json", "report.json") == 0
    report = json.loads((desk / "report.json").read_text())
    assert report["in_store_already"] == [f"more.jsonl:{line}" for line in range(1, 7)]
    assert [r["place"] for r in report["records"]] == [f"more.jsonl:{line}" for line in range(7, 10)]
    assert (report["made"], report["config"]["batch_size"], report["anchors"]) == (3, 4, "the store's")
    assert edit("more.jsonl", "--store", "edits") == 0
    assert "all 9 edits are in the store already" in capsys.readouterr().out

    assert main(["undo", "--store", "edits", "2", "5", "--out", "undone", "--json", "undo.json"]) == 0
    shown = capsys.readouterr().out
    undone = json.loads((desk / "undo.json").read_text())["undone"]
    assert [r["id"] for r in undone] == [2, 5]
    for record in undone:
        person, relation = PEOPLE[record["id"] - 1], RELATIONS[(record["id"] - 1) % len(RELATIONS)]
        assert record["answer_before"] == record["target"]
        assert record["answer"] == person.facts[relation.name], "the model answers as it did before it was told"
        assert f"{record['answer_before']!r} -> {record['answer']!r}" in shown
    changed = load_file(desk / "undone" / "model.safetensors"), load_file(desk / "out" / "model.safetensors")
    assert sum(not torch.equal(value, changed[1][name]) for name, value in changed[0].items()) == 1

    other = next(value for value in RELATIONS[2].values if value not in (made[2]["target"],))
    assert main(["replace", "--store", "edits", "--subject", PEOPLE[2].name, "--target", other, "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["replaced"]
    assert (made["id"], made["replaces"], made["answer"]) == (10, 3, other)
    assert main(["undo", "--store", "edits", "--last", "1"]) == 0
    states = [r["state"] for r in history(capsys)]
    assert states == "active undone replaced active undone active active active active undone".split()
    assert [r["id"] for r in history(capsys, "--state", "replaced")] == [3]
    assert main(["history", "--store", "edits"]) == 0
    assert "replaced" in capsys.readouterr().out

    assert main(["status", "--store", "edits", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["edits"] == {"active": 6, "undone": 3, "replaced": 1, "skipped": 0}
    assert status["layers"][0]["weight_bound"] > 0
    assert any("no anchors" in warning for warning in status["warnings"])
    assert main(["status", "--store", "edits", "--measure"]) == 0
    measured = capsys.readouterr().out
    assert "drift of C" in measured
    assert "on the disk" in measured
    assert "asked again: the model states 100% of 6 active edits" in measured
    assert "keys have moved since their edits were written, per layer (relative): 0.000" in measured
    assert main(["consolidate", "--store", "edits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"]["edits"]["active"] == 6
    assert [r["state"] for r in history(capsys)] == states


def test_what_was_undone_or_replaced_stays_so_when_the_file_is_told_again(edit, desk, capsys):
    assert edit("facts.jsonl", *NEW) == 0
    assert main(["undo", "--store", "edits", "2", "5"]) == 0
    told = lines_of(0, 6)
    other = next(value for value in RELATIONS[2].values if value != told[2]["target"])
    assert main(["replace", "--store", "edits", "3", "--target", other]) == 0
    states = [r["state"] for r in history(capsys)]

    assert edit("facts.jsonl", "--store", "edits", "--out", "out", "--json", "report.json") == 1
    assert "3 edits stay what the store's history has them as (1 replaced, 2 undone)" in capsys.readouterr().out
    report = json.loads((desk / "report.json").read_text())
    assert report["in_store_already"] == [f"facts.jsonl:{line}" for line in (1, 4, 6)]
    assert report["left_as_they_became"] == [
        {"place": f"facts.jsonl:{line}", "state": state}
        for line, state in ((2, "undone"), (3, "replaced"), (5, "undone"))
    ]
    assert [r["state"] for r in history(capsys)] == states
    assert edit("more.jsonl", "--store", "edits") == 1
    assert "1 replaced, 2 undone" in capsys.readouterr().out
    assert [r["state"] for r in history(capsys)] == [*states, "active", "active", "active"]

    assert main(["undo", "--store", "edits", "--until", "2999-01-01"]) == 0
    assert edit("facts.jsonl", "--store", "edits", "--out", "nothing") == 1
    assert "no edit is active" in capsys.readouterr().err
    assert not (desk / "nothing").exists()
    assert edit("more.jsonl", "--store", "edits", "--again") == 0
    now = history(capsys)
    assert {r["subject"]: r["target"] for r in now if r["state"] == "active"} == {
        line["subject"]: line["target"] for line in lines_of(0, 9)
    }


def test_exports_are_written_also_where_the_store_has_all_edits_already(base, one_edit, desk, capsys):
    shutil.copytree(one_edit, desk / "edits")
    (desk / "told.jsonl").write_text(
        json.dumps({"prompt": "{} lives in", "subject": PEOPLE[0].name, "target": "Port Alder"})
    )
    command = ["edit", "--model", str(base), "--edits", "told.jsonl", "--store", "edits"]
    assert main([*command, "--out", "out", "--delta", "edits.delta", "--json", "report.json"]) == 0
    assert "checkpoint: out" in capsys.readouterr().out
    assert json.loads((desk / "report.json").read_text())["files"] == ["checkpoint: out", "delta: edits.delta"]
    assert main(["apply", "--model", str(base), "--delta", "edits.delta", "--out", "applied"]) == 0
    first, second = (load_file(desk / name / "model.safetensors") for name in ("out", "applied"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["history", "--store", "none"], "is no store"),
        (["undo", "--store", "edits"], "which edits"),
        (["undo", "--store", "edits", "77"], "are not those of active edits; see `rlsedit history`"),
        (["undo", "--store", "edits", "--subject", "Nobody"], "no active edit fits"),
        (["undo", "--store", "edits", "1", "--out", "facts.jsonl"], "exists already"),
        (["replace", "--store", "edits", "1", "--target", " "], "is empty"),
        (["status", "--store", "edits", "--budget", "0"], "budget=0"),
        (
            ["edit", "--edits", "more.jsonl", "--store", "edits", "--layers", "1"],
            "Leave out --config and the options of settings",
        ),
        (["edit", "--edits", "more.jsonl", "--store", "edits", "--no-anchors"], "has its anchors already"),
        (["edit", "--edits", "more.jsonl", "--store", "edits", "--preset", "generic"], "--preset generic"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(base, one_edit, desk, capsys, command, message):
    shutil.copytree(one_edit, desk / "edits")
    before = history(capsys)
    command = [*command, "--model", str(base)] if command[0] == "edit" else command
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert history(capsys) == before


def test_a_dry_run_says_what_is_left_to_do_and_writes_nothing(base, one_edit, desk, capsys):
    shutil.copytree(one_edit, desk / "edits")
    first = {"prompt": "{} lives in", "subject": PEOPLE[0].name, "target": "Port Alder"}
    (desk / "facts.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(lines_of(1, 2)[0]) + "\n")
    files = {path: path.read_bytes() for path in (desk / "edits").rglob("*") if path.is_file() and path.name != "lock"}
    command = ["edit", "--model", str(base), "--edits", "facts.jsonl", "--batch-size", "7", "--dry-run", "--json"]
    assert main([*command, "--store", "edits"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["edits"], report["in_store_already"]) == (1, ["facts.jsonl:1"])
    assert {path: path.read_bytes() for path in files} == files
    assert main([*command, "--store", "new"]) == 0
    assert not (desk / "new").exists()


def test_what_would_move_the_cursor_is_escaped(desk, capsys):
    model, tokenizer = load_demo_model()
    config = rf.EditConfig(layers=(0,), context_prefixes=("",), values="gradient", lam=1.0)
    with rf.Editor(model, tokenizer, config=config, store="edits") as editor:
        editor.edit([rf.Edit("{} lives\x1b[2J in\u202e", PEOPLE[0].name, "Port\nAlder")])
    capsys.readouterr()
    assert main(["history", "--store", "edits"]) == 0
    shown = capsys.readouterr().out
    assert f"{PEOPLE[0].name} lives\\x1b[2J in\\u202e -> Port\\nAlder" in shown
    assert len(shown.splitlines()) == 2


def test_another_model_and_a_model_that_is_gone_are_refused(one_edit, desk, capsys):
    shutil.copytree(one_edit, desk / "edits")
    model, tokenizer = load_demo_model()
    with rf.Editor.open("edits", model, tokenizer) as editor:
        editor.save_pretrained("out")
    assert main(["undo", "--store", "edits", "1", "--model", "out"]) == 2
    assert "load the model as it was before any edit" in capsys.readouterr().err
    assert main(["undo", "--store", "edits", "1", "--model", "nowhere/at/all"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert main(["undo", "--store", "edits", "--since", "2001-01-01"]) == 0
    with pytest.raises(SystemExit):
        main(["undo", "--store", "edits", "--since", "yesterday"])
    assert "is no time" in capsys.readouterr().err


def test_a_replacement_that_falls_short_is_told_apart(edit, base, desk, capsys):
    (desk / "settings.json").write_text(json.dumps(SETTINGS | {"unconverged": "skip"}))
    assert edit("facts.jsonl", *NEW) == 0
    capsys.readouterr()
    assert main(["replace", "--store", "edits", "2", "--target", "<pad> <pad> <pad>", "--json", "told.json"]) == 1
    assert "0 edits replaced" in (shown := capsys.readouterr().out)
    assert "1 left as they were, since the search for the new target fell short: 2" in shown
    told = json.loads((desk / "told.json").read_text())
    assert (told["replaced"], [entry["replaces"] for entry in told["skipped"]]) == ([], [2])
    assert [r["state"] for r in history(capsys)] == ["active"] * 6 + ["skipped"]


def test_the_history_of_a_subject_is_found_as_undo_finds_it(edit, base, desk, capsys):
    assert edit("facts.jsonl", *NEW) == 0
    assert [r["id"] for r in history(capsys, "--subject", PEOPLE[1].name.replace(" ", "  "))] == [2]


def test_prompts_are_protected_once_however_often_the_command_is_run(edit, base, desk, capsys):
    (desk / "protect.txt").write_text(f"{PEOPLE[20].name} lives in\n{PEOPLE[21].name} lives in\n")
    assert edit("facts.jsonl", *NEW, "--protect", "protect.txt") == 0
    first = capsys.readouterr().err
    assert "tokens of 2 prompts are protected" in first
    with (desk / "protect.txt").open("a") as more:
        more.write(f"{PEOPLE[22].name} lives in\n")
    assert edit("more.jsonl", "--store", "edits", "--protect", "protect.txt") == 0
    again = capsys.readouterr().err
    assert "2 of 3 prompts are protected already, and stay so" in again
    assert "tokens of 1 prompts are protected" in again
    with rf.Editor.open("edits", *load_demo_model()) as editor:
        editor.consolidate()
    with rf.Editor.open("edits", *load_demo_model()) as editor:
        assert editor.protected == (desk / "protect.txt").read_text().splitlines()


def test_prompts_to_protect_are_held_where_every_edit_is_there_already(edit, base, desk, capsys):
    assert edit("facts.jsonl", *NEW) == 0
    prompt = f"{PEOPLE[20].name} lives in"
    (desk / "protect.txt").write_bytes(b"\xef\xbb\xbf" + f"{prompt}\n{prompt}\r\n".encode())
    assert edit("facts.jsonl", "--store", "edits", "--protect", "protect.txt") == 0
    assert "tokens of 1 prompts are protected" in capsys.readouterr().err
    with rf.Editor.open("edits", *load_demo_model()) as editor:
        assert editor.protected == [prompt]


def test_with_nothing_left_to_take_back_a_checkpoint_is_written_and_no_adapter(one_edit, base, desk, capsys):
    shutil.copytree(one_edit, "edits")
    assert main(["undo", "--store", "edits", "1", "--out", "out", "--adapter", "adapter"]) == 0
    assert "no delta or adapter was written" in capsys.readouterr().err
    assert (desk / "out" / "model.safetensors").exists()
    assert not (desk / "adapter").exists()


def test_an_undo_that_is_interrupted_behind_its_change_says_that_it_is_made(one_edit, base, desk, capsys, monkeypatch):
    shutil.copytree(one_edit, "edits")

    def pressed(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlsedit_fast.cli.stores.write_exports", pressed)
    assert main(["undo", "--store", "edits", "1"]) == 130
    assert "the change is made, and in the store" in capsys.readouterr().err
    assert [r["state"] for r in history(capsys)] == ["undone"]


def test_a_model_that_status_would_not_load_is_refused(one_edit, base, desk, capsys):
    assert main(["status", "--store", str(one_edit), "--model", str(base)]) == 2
    assert "add --measure" in capsys.readouterr().err
