"""`rlsedit edit --gate` and `rlsedit check`: exit codes, results and what stays applied."""

from __future__ import annotations

import json
import shlex

import pytest

from rlsedit_fast.cli import main
from rlsedit_fast.world import RELATIONS, World

PEOPLE = World.generate().people[:6]
PROMPT = RELATIONS[0].phrasings[0]
SETTINGS = {"contexts": {"prefixes": [""]}, "prior": {"lam": 0.05}, "refine": 0, "layers": [0], "batch_size": 2}


def asked(person):
    return PROMPT.replace("{}", person.name)


def target(person):
    return next(value for value in RELATIONS[0].values if value != person.facts[RELATIONS[0].name])


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    lines = [{"prompt": PROMPT, "subject": person.name, "target": target(person)} for person in PEOPLE]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "held-out.txt").write_text("\n\n".join(f"{asked(one)} {target(one)} ." for one in PEOPLE))
    gates = {"unchanged": [{"prompt": asked(PEOPLE[3]), "tokens": 2}]}
    (tmp_path / "gates.yaml").write_text(json.dumps(gates))
    good = {
        "answers": [{"prompt": asked(PEOPLE[5]), "contains": target(PEOPLE[5])}],
        "text": "held-out.txt",
        "limits": {"kl": 20, "perplexity": 1e9, "deviation": 1},
        "retention": 1,
    }
    (tmp_path / "good.json").write_text(json.dumps(good))
    return tmp_path


@pytest.fixture
def edit(base):
    def run(*options):
        given = ["--config", "settings.json", "--no-anchors", "--no-evaluation", "--edits", "facts.jsonl"]
        return main(["edit", "--model", str(base), *given, *options])

    return run


def states(capsys, store="edits"):
    capsys.readouterr()
    assert main(["history", "--store", store, "--json"]) == 0
    return [record["state"] for record in json.loads(capsys.readouterr().out)]


def test_violated_gate_stops_or_undoes_with_exit_code_3(edit, base, workdir, capsys):
    assert edit("--store", "edits", "--gate", "gates.yaml", "--json", "stopped.json") == 3
    out, err = capsys.readouterr()
    assert "gates: 0 passed, 1 violated" in out
    assert f"unchanged: {asked(PEOPLE[3])!r}: before" in err
    assert "The first 4 of 6 edits are applied." in err
    found = json.loads((workdir / "stopped.json").read_text())
    assert len(found["not_made"]) == 2
    (result,) = found["gates"]["results"]
    assert (result["outcome"], result["prompt"]) == ("violated", asked(PEOPLE[3]))
    assert found["gates"]["checks"] == 2
    assert len(states(capsys)) == 4

    undo = ("--gate", "gates.yaml", "--on-violation", "undo", "--json", "undone.json")
    assert edit("--store", "other", *undo) == 3
    assert "The first 2 of 6 edits are applied." in capsys.readouterr().err
    assert json.loads((workdir / "undone.json").read_text())["gates"]["on_violation"] == "undo"
    assert len(states(capsys, "other")) == 2
    assert edit("--store", "third", "--check-every", "3", *undo) == 3
    assert states(capsys, "third") == []


def test_outputs_are_written_only_if_the_gates_passed(edit, base, workdir, capsys):
    outputs = ("--out", "edited", "--adapter", "a dapter", "--rank", "1")
    assert edit("--store", "edits", "--gate", "gates.yaml", *outputs, "--json", "found.json") == 3
    assert not {"edited", "a dapter"} & {path.name for path in workdir.iterdir()}
    out = capsys.readouterr().out
    assert "not written, because the gates did not pass: --out edited, --adapter a dapter\n" in out
    command = "rlsedit export --store edits --out edited --adapter 'a dapter' --rank 1"
    assert f"`{command}` writes them nevertheless" in out
    assert json.loads((workdir / "found.json").read_text())["withheld"] == ["--out edited", "--adapter a dapter"]

    # The same file, with its rest left to do, and with all edits in the store.
    with_all = ["edit", "--model", str(base), "--no-evaluation", "--edits", "facts.jsonl", "--store", "edits"]
    assert main(with_all) == 0
    assert main([*with_all, "--gate", "gates.yaml", "--out", "edited", "--delta", "edits.delta"]) == 3
    assert not (workdir / "edited").exists()
    assert not (workdir / "edits.delta").exists()
    assert main(shlex.split(command)[1:]) == 0
    assert (workdir / "edited").is_dir()
    assert main([*with_all, "--gate", "good.json", "--out", "edited", "--overwrite"]) == 0

    # Taken back: what is left has passed a check in between, not the one at the end.
    assert edit("--store", "other", "--gate", "gates.yaml", "--on-violation", "undo", "--out", "undone") == 3
    assert not (workdir / "undone").exists()


def test_edits_without_a_store_are_kept_in_a_delta_if_a_gate_is_violated(edit, base, workdir, capsys):
    assert edit("--out", "edited", "--gate", "gates.yaml") == 3
    assert not (workdir / "edited").exists()
    (kept,) = workdir.glob("edited-*.delta.safetensors")
    assert f"the edits are in the delta {kept}" in capsys.readouterr().out
    assert main(["apply", "--model", str(base), "--delta", str(kept), "--out", "later"]) == 0
    assert main(["check", "--model", str(base), "--edited", "later", "--gate", "gates.yaml"]) == 3
    assert edit("--out", "none", "--gate", "gates.yaml", "--on-violation", "undo", "--check-every", "3") == 3
    assert list(workdir.glob("none*")) == []
    assert "no edit is active: nothing was written" in capsys.readouterr().err


def test_check_of_a_store_and_of_checkpoints(edit, base, workdir, capsys):
    assert edit("--store", "edits", "--out", "edited", "--gate", "good.json") == 0
    assert "gates: 5 passed, 0 violated" in capsys.readouterr().out
    assert main(["check", "--store", "edits", "--gate", "good.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["violated"] == 0
    assert main(["check", "--store", "edits", "--gate", "gates.yaml"]) == 3
    out = capsys.readouterr().out
    assert f"violated: unchanged: {asked(PEOPLE[3])!r}: before {PEOPLE[3].facts[RELATIONS[0].name]!r}" in out

    # A file whose edits are all in the store is checked as well.
    again = ["edit", "--model", str(base), "--edits", "facts.jsonl", "--store", "edits"]
    assert main([*again, "--gate", "gates.yaml"]) == 3
    assert "violated: unchanged" in capsys.readouterr().out
    assert main([*again, "--gate", "good.json"]) == 0

    pair = ["check", "--model", str(base), "--edited", "edited"]
    assert main([*pair, "--gate", "gates.yaml"]) == 3
    assert main([*pair, "--gate", "good.json"]) == 1
    out = capsys.readouterr().out
    assert "gates: 4 passed, 0 violated, 1 not measured" in out
    assert "not measured: retention (requires the store of the edits)" in out

    alone = ["check", "--model", "edited", "--gate"]
    assert main([*alone, "good.json"]) == 1
    out = capsys.readouterr().out
    assert "gates: 2 passed, 0 violated, 3 not measured" in out
    assert "not measured: kl (the unedited model is not given)" in out
    assert main([*alone, "gates.yaml"]) == 1
    assert main(["check", "--model", str(base), "--gate", "good.json"]) == 3  # the base does not state the target


def test_gate_options_are_checked_before_the_model_is_loaded(edit, base, workdir, capsys, monkeypatch):
    from rlsedit_fast.cli import setup

    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("the model was loaded"))
    (workdir / "wrong.yaml").write_text("unchanged:\n  - prompt: a\n    chats: true\n")
    for options, expected in (
        (("--gate", "wrong.yaml"), "line 3: unknown key 'unchanged[0].chats'; did you mean 'chat'?"),
        (("--gate", "missing.yaml"), "the file does not exist"),
        (("--check-every", "2"), "require --gate FILE"),
        (("--on-violation", "undo"), "require --gate FILE"),
    ):
        assert edit("--store", "edits", *options) == 2
        assert expected in capsys.readouterr().err
    assert main(["check", "--gate", "gates.yaml"]) == 2
    assert main(["check", "--store", "no", "--gate", "gates.yaml"]) == 2
    assert main(["check", "--model", str(base), "--gate", "wrong.yaml"]) == 2
    assert main(["check", "--store", "no", "--edited", str(base), "--gate", "gates.yaml"]) == 2


def test_interrupted_run_reports_the_last_check(edit, workdir, capsys, monkeypatch):
    import os
    import signal

    from rlsedit_fast.evaluation.gates import BoundGates

    measure = BoundGates.measure

    def press(self, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return measure(self, **options)

    monkeypatch.setattr(BoundGates, "measure", press)
    (workdir / "loose.yaml").write_text("retention: 0\n")
    outputs = ("--out", "edited", "--json", "found.json")
    assert edit("--store", "edits", "--gate", "loose.yaml", *outputs) == 130
    out = capsys.readouterr().out
    assert "not checked at the end" in out
    assert "not written, because the gates did not pass: --out edited" in out
    assert not (workdir / "edited").exists()
    assert json.loads((workdir / "found.json").read_text())["gates"]["final"] is False
