"""Store commands of the command line: create, resume, list, undo, replace, status and consolidate."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import rlsedit_fast as rf
from rlsedit_fast.cli import main, setup
from rlsedit_fast.world import RELATIONS, World, load_demo_model

PEOPLE = World.generate().people
SETTINGS = {
    "contexts": {"prefixes": [""]},
    "search": {"kl_prompts": ["{} is a"], "steps": 40, "stop_nll": 0.03},
    "prior": {"adherence": 0.95},
}


def records(first, last):
    made = []
    for i, person in enumerate(PEOPLE[first:last], start=first):
        relation = RELATIONS[i % len(RELATIONS)]
        target = next(value for value in relation.values if value != person.facts[relation.name])
        made.append({"name": f"fact {i}", "prompt": relation.phrasings[0], "subject": person.name, "target": target})
    return made


@pytest.fixture(scope="module")
def one_edit(base, tmp_path_factory):
    """A store with one edit."""
    place = tmp_path_factory.mktemp("one") / "edits"
    config = rf.EditConfig(
        layers=(0,), **{name: tuple(v) if isinstance(v, list) else v for name, v in SETTINGS.items()}
    )
    with rf.Editor.from_pretrained(base, config=config, store=place) as editor:
        editor.edit([rf.Edit("{} lives in", PEOPLE[0].name, "Port Alder")])
    return place


@pytest.fixture
def workdir(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    for name, part in (("facts", (0, 6)), ("more", (0, 9))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records(*part)))
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


def test_store_is_resumed_and_edits_are_undone_and_replaced(edit, base, workdir, capsys):
    assert edit("facts.jsonl", *NEW, "--batch-size", "4") == 0
    made = history(capsys)
    assert isinstance(made, list)
    assert [(r["id"], r["state"], r["name"]) for r in made] == [(i, "active", f"fact {i - 1}") for i in range(1, 7)]
    assert {"time", "prompt", "subject", "target", "realized", "rank", "nll", "search_converged"} <= made[0].keys()

    # The settings are those of the store, and edits that it contains are skipped.
    assert edit("more.jsonl", "--store", "edits", "--out", "out", "--json", "report.json") == 0
    report = json.loads((workdir / "report.json").read_text())
    assert report["in_store_already"] == [f"more.jsonl:{line}" for line in range(1, 7)]
    assert [r["place"] for r in report["records"]] == [f"more.jsonl:{line}" for line in range(7, 10)]
    assert (report["made"], report["config"]["batch_size"], report["anchors"]) == (3, 4, "the store's")
    assert edit("more.jsonl", "--store", "edits") == 0
    assert "all 9 edits are already in the store" in capsys.readouterr().out

    assert main(["undo", "--store", "edits", "2", "5", "--out", "undone", "--json", "undo.json"]) == 0
    shown = capsys.readouterr().out
    undone = json.loads((workdir / "undo.json").read_text())["undone"]
    assert [r["id"] for r in undone] == [2, 5]
    for record in undone:
        person, relation = PEOPLE[record["id"] - 1], RELATIONS[(record["id"] - 1) % len(RELATIONS)]
        assert record["answer_before"] == record["target"]
        assert record["answer"] == person.facts[relation.name], "the model gives its original answer again"
        assert f"{record['answer_before']!r} -> {record['answer']!r}" in shown
    changed = load_file(workdir / "undone" / "model.safetensors"), load_file(workdir / "out" / "model.safetensors")
    assert sum(not torch.equal(value, changed[1][name]) for name, value in changed[0].items()) == 1

    other = next(value for value in RELATIONS[2].values if value not in (made[2]["target"],))
    assert main(["replace", "--store", "edits", "--subject", PEOPLE[2].name, "--target", other, "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["replaced"]
    assert (made["id"], made["replaces"], made["answer"]) == (10, 3, other)
    assert main(["undo", "--store", "edits", "--last", "1"]) == 0
    states = [r["state"] for r in history(capsys)]
    assert states == "active undone replaced active undone active active active active undone".split()
    assert [r["id"] for r in history(capsys, "--state", "replaced")] == [3]
    assert main(["history", "--store", "edits", "--name", "fact 2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in shown] == [["id", "name", "time"], ["3", "fact", "2"], ["10", "fact", "2"]]
    assert "replaced" in shown[1]

    assert main(["status", "--store", "edits", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["edits"] == {"active": 6, "undone": 3, "replaced": 1, "skipped": 0}
    assert status["layers"][0]["weight_bound"] > 0
    assert any("no anchors" in warning for warning in status["warnings"])
    assert main(["status", "--store", "edits", "--measure"]) == 0
    measured = capsys.readouterr().out
    assert "drift of C" in measured
    assert "size on disk" in measured
    assert "sample of 6 active edits: the model states 100% of the targets" in measured
    assert "relative change of the keys since their edits, per layer: 0.000" in measured
    assert main(["consolidate", "--store", "edits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"]["edits"]["active"] == 6
    assert [r["state"] for r in history(capsys)] == states


def test_undone_and_replaced_edits_are_skipped_when_the_file_is_applied_again(edit, workdir, capsys):
    assert edit("facts.jsonl", *NEW) == 0
    assert main(["undo", "--store", "edits", "2", "5"]) == 0
    lines = records(0, 6)
    other = next(value for value in RELATIONS[2].values if value != lines[2]["target"])
    assert main(["replace", "--store", "edits", "3", "--target", other]) == 0
    states = [r["state"] for r in history(capsys)]

    assert edit("facts.jsonl", "--store", "edits", "--out", "out", "--json", "report.json") == 1
    assert "skipped 3 edits of the store that are not active (1 replaced, 2 undone)" in capsys.readouterr().out
    report = json.loads((workdir / "report.json").read_text())
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
    assert not (workdir / "nothing").exists()
    assert edit("more.jsonl", "--store", "edits", "--again") == 0
    now = history(capsys)
    assert {r["subject"]: r["target"] for r in now if r["state"] == "active"} == {
        line["subject"]: line["target"] for line in records(0, 9)
    }


def test_exports_are_written_if_all_edits_are_already_in_the_store(base, one_edit, workdir, capsys):
    shutil.copytree(one_edit, workdir / "edits")
    (workdir / "same.jsonl").write_text(
        json.dumps({"prompt": "{} lives in", "subject": PEOPLE[0].name, "target": "Port Alder"})
    )
    command = ["edit", "--model", str(base), "--edits", "same.jsonl", "--store", "edits"]
    assert main([*command, "--out", "out", "--delta", "edits.delta", "--json", "report.json"]) == 0
    assert "checkpoint: out" in capsys.readouterr().out
    assert json.loads((workdir / "report.json").read_text())["files"] == ["checkpoint: out", "delta: edits.delta"]
    assert main(["apply", "--model", str(base), "--delta", "edits.delta", "--out", "applied"]) == 0
    first, second = (load_file(workdir / name / "model.safetensors") for name in ("out", "applied"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["history", "--store", "none"], "does not contain a store"),
        (["undo", "--store", "edit", "1"], "did you mean 'edits'?"),
        (
            ["undo", "--store", "edits", "1", "77", "78"],
            "ids 77 (no such edit), 78 (no such edit): not active (active: 1)",
        ),
        (["undo", "--store", "edits", "77"], "not active (active: 1)"),
        (["undo", "--store", "edits", "1", "1"], "ids 1 given more than once"),
        (["consolidate", "--store", "edit"], "did you mean 'edits'?"),
        (["undo", "--store", "edits"], "no selection given"),
        (["undo", "--store", "edits", "77"], "hint: list the edits with `rlsedit history`"),
        (["undo", "--store", "edits", "--subject", "Nobody"], "no active edit matches"),
        (["undo", "--store", "edits", "1", "--out", "facts.jsonl"], "already exists"),
        (["replace", "--store", "edits", "1", "--target", " "], "is empty"),
        (["status", "--store", "edits", "--budget", "0"], "budget=0"),
        (
            ["edit", "--edits", "more.jsonl", "--store", "edits", "--layers", "1"],
            "hint: omit --config and the options of settings",
        ),
        (
            ["edit", "--edits", "more.jsonl", "--store", "edits", "--no-anchors"],
            "the anchors of the store 'edits' are fixed",
        ),
        (["edit", "--edits", "more.jsonl", "--store", "edits", "--preset", "generic"], "--preset generic"),
    ],
)
def test_invalid_commands_are_rejected_and_modify_nothing(
    base, one_edit, workdir, capsys, monkeypatch, command, message
):
    shutil.copytree(one_edit, workdir / "edits")
    before = history(capsys)
    command = [*command, "--model", str(base)] if command[0] == "edit" else command
    monkeypatch.setattr(setup, "load_model", None)  # nothing is loaded
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert history(capsys) == before


def test_quiet_prints_only_results(base, one_edit, workdir, capsys):
    shutil.copytree(one_edit, workdir / "edits")
    capsys.readouterr()
    assert main(["undo", "--store", "edits", "1", "--quiet"]) == 0
    output = capsys.readouterr()
    assert "1 edit undone" in output.out
    assert output.err == ""
    assert main(["undo", "--store", "edits", "1", "--quiet"]) == 2
    assert "1 (undone): not active" in capsys.readouterr().err
    assert main(["history", "--store", "edits"]) == 0


def test_dry_run_reports_remaining_edits_and_writes_nothing(base, one_edit, workdir, capsys):
    shutil.copytree(one_edit, workdir / "edits")
    first = {"prompt": "{} lives in", "subject": PEOPLE[0].name, "target": "Port Alder"}
    (workdir / "facts.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(records(1, 2)[0]) + "\n")
    files = {
        path: path.read_bytes() for path in (workdir / "edits").rglob("*") if path.is_file() and path.name != "lock"
    }
    command = ["edit", "--model", str(base), "--edits", "facts.jsonl", "--batch-size", "7", "--dry-run", "--json"]
    assert main([*command, "--store", "edits"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["edits"], report["in_store_already"]) == (1, ["facts.jsonl:1"])
    assert {path: path.read_bytes() for path in files} == files
    assert main([*command, "--store", "new"]) == 0
    assert not (workdir / "new").exists()


def test_control_characters_are_escaped(workdir, capsys):
    model, tokenizer = load_demo_model()
    config = rf.EditConfig(layers=(0,), contexts={"prefixes": ("",)}, prior={"lam": 1.0})
    with rf.Editor(model, tokenizer, config=config, store="edits") as editor:
        editor.edit([rf.Edit("{} lives\x1b[2J in\u202e", PEOPLE[0].name, "Port\nAlder")])
    capsys.readouterr()
    assert main(["history", "--store", "edits"]) == 0
    shown = capsys.readouterr().out
    assert f"{PEOPLE[0].name} lives\\x1b[2J in\\u202e -> Port\\nAlder" in shown
    assert len(shown.splitlines()) == 2


def test_other_and_missing_models_are_rejected(one_edit, workdir, capsys):
    shutil.copytree(one_edit, workdir / "edits")
    model, tokenizer = load_demo_model()
    with rf.Editor(model, tokenizer, store="edits") as editor:
        editor.save_pretrained("out")
    assert main(["undo", "--store", "edits", "1", "--model", "out"]) == 2
    assert "load the unedited model" in capsys.readouterr().err
    assert main(["undo", "--store", "edits", "1", "--model", "nowhere/at/all"]) == 2
    assert "the folder does not exist" in capsys.readouterr().err
    assert main(["undo", "--store", "edits", "--since", "2001-01-01"]) == 0
    with pytest.raises(SystemExit):
        main(["undo", "--store", "edits", "--since", "yesterday"])
    assert "expected a time such as" in capsys.readouterr().err


def test_unconverged_replacement_is_reported_as_skipped(edit, base, workdir, capsys):
    (workdir / "settings.json").write_text(json.dumps(SETTINGS | {"unconverged": "skip"}))
    assert edit("facts.jsonl", *NEW) == 0
    capsys.readouterr()
    assert main(["replace", "--store", "edits", "2", "--target", "<pad> <pad> <pad>", "--json", "result.json"]) == 1
    assert "0 edits replaced" in (shown := capsys.readouterr().out)
    assert "1 not replaced, because the value search for the new target did not converge: 2" in shown
    result = json.loads((workdir / "result.json").read_text())
    assert (result["replaced"], [entry["replaces"] for entry in result["skipped"]]) == ([], [2])
    assert [r["state"] for r in history(capsys)] == ["active"] * 6 + ["skipped"]


def test_edits_are_undone_and_replaced_by_name(edit, base, workdir, capsys):
    lines = records(0, 5)
    lines[4]["name"] = "1"
    (workdir / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert edit("facts.jsonl", *NEW) == 0
    assert main(["undo", "--store", "edits", "fact 1", "1"]) == 0
    assert main(["replace", "--store", "edits", "--name", "1", "--target", lines[4]["target"] + "s"]) == 0
    states = ["undone", "undone", "active", "active", "replaced", "active"]
    assert [r["state"] for r in history(capsys)] == states
    for name, message in (("fact 1", "are not active: 2 (undone)"), ("fatc 3", "similar names: 'fact 3', 'fact 2'")):
        assert main(["undo", "--store", "edits", name]) == 2
        assert message in capsys.readouterr().err
    assert [r["state"] for r in history(capsys)] == states


def test_history_matches_subjects_like_undo(edit, base, workdir, capsys):
    assert edit("facts.jsonl", *NEW) == 0
    assert [r["id"] for r in history(capsys, "--subject", PEOPLE[1].name.replace(" ", "  "))] == [2]


def test_prompts_are_protected_only_once(edit, base, workdir, capsys):
    (workdir / "protect.txt").write_text(f"{PEOPLE[20].name} lives in\n{PEOPLE[21].name} lives in\n")
    assert edit("facts.jsonl", *NEW, "--protect", "protect.txt") == 0
    first = capsys.readouterr().err
    assert "tokens of 2 prompts" in first
    with (workdir / "protect.txt").open("a") as more:
        more.write(f"{PEOPLE[22].name} lives in\n")
    assert edit("more.jsonl", "--store", "edits", "--protect", "protect.txt") == 0
    again = capsys.readouterr().err
    assert "2 of 3 prompts are already protected" in again
    assert "tokens of 1 prompts" in again
    with rf.Editor(*load_demo_model(), store="edits") as editor:
        editor.consolidate()
    with rf.Editor(*load_demo_model(), store="edits") as editor:
        assert editor.protected == (workdir / "protect.txt").read_text().splitlines()


def test_prompts_are_protected_if_all_edits_are_already_in_the_store(edit, base, workdir, capsys):
    assert edit("facts.jsonl", *NEW) == 0
    prompt = f"{PEOPLE[20].name} lives in"
    (workdir / "protect.txt").write_bytes(b"\xef\xbb\xbf" + f"{prompt}\n{prompt}\r\n".encode())
    assert edit("facts.jsonl", "--store", "edits", "--protect", "protect.txt") == 0
    assert "tokens of 1 prompts" in capsys.readouterr().err
    with rf.Editor(*load_demo_model(), store="edits") as editor:
        assert editor.protected == [prompt]


def test_without_active_edits_a_checkpoint_but_no_adapter_is_written(one_edit, base, workdir, capsys):
    shutil.copytree(one_edit, "edits")
    assert main(["undo", "--store", "edits", "1", "--out", "out", "--adapter", "adapter"]) == 0
    assert "no delta or adapter was written" in capsys.readouterr().err
    assert (workdir / "out" / "model.safetensors").exists()
    assert not (workdir / "adapter").exists()


def test_interrupt_during_export_reports_that_the_undo_is_applied(one_edit, base, workdir, capsys, monkeypatch):
    shutil.copytree(one_edit, "edits")

    def pressed(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlsedit_fast.cli.stores.write_exports", pressed)
    assert main(["undo", "--store", "edits", "1"]) == 130
    assert "the change is applied and stored" in capsys.readouterr().err
    assert [r["state"] for r in history(capsys)] == ["undone"]


def test_status_rejects_a_model_without_measure(one_edit, base, workdir, capsys):
    assert main(["status", "--store", str(one_edit), "--model", str(base)]) == 2
    assert "add --measure" in capsys.readouterr().err


def test_show_compares_planned_edits_with_those_of_a_store(base, one_edit, workdir, capsys):
    """A repeated subject under another text is flagged; nothing is modified."""
    store = workdir / "edits"
    shutil.copytree(one_edit, store)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file() and path.suffix != ".lock"}
    subjects = [PEOPLE[1].name, PEOPLE[0].name, f"the {PEOPLE[0].name}"]  # a new one, a known one, another text of it
    planned = [{"prompt": "{} speaks", "subject": subject, "target": "Kubeish"} for subject in subjects]
    (workdir / "share.json").write_text('{"overlap_share": 0.6}')
    (workdir / "planned.jsonl").write_text("".join(json.dumps(line) + "\n" for line in planned))
    given = ["--store", str(store), "--edits", "planned.jsonl", "--config", "share.json", "--json", "shown.json"]
    assert main(["show", *given]) == 0
    shown = json.loads((workdir / "shown.json").read_text())["edits"]
    assert [one["overlap"]["flagged"] for one in shown] == [False, False, True]
    assert shown[2]["overlap"]["nearest"] == 1
    printed = capsys.readouterr().out
    assert f"probably 1: '{PEOPLE[0].name} lives in' -> 'Port Alder'" in printed
    assert "1 edit of 3 repeat or contradict edits of the store" in printed
    after = {path: path.read_bytes() for path in before}
    assert [path.name for path in before if before[path] != after[path]] == []


@pytest.mark.parametrize(
    ("options", "text"),
    [(["--edits", "facts.jsonl"], "pass --model MODEL, or --store DIR"), (["--store", "edits"], "planned edits")],
)
def test_show_names_what_is_missing(workdir, capsys, options, text):
    assert main(["show", *options]) == 2
    assert text in capsys.readouterr().err
