"""What `edit` reports at the end, and the commands that look at the result: ask, export, history."""

from __future__ import annotations

import json

import pytest

from rlsedit_fast.cli import main
from rlsedit_fast.store import Store
from rlsedit_fast.world import World, load_demo_model
from rlsedit_fast.world.tokens import save_tokenizer

PERSON, OTHER = World.generate().people[:2]
PROMPT = f"{PERSON.name} plays the"
GOOD = {"prompt": "{} plays the", "subject": PERSON.name, "target": "harp"}
POOR = {"prompt": "{} lives in", "subject": OTHER.name, "target": "Zinc harp harp Kubeish"}
STRONG = ("--layers", "0", "--no-anchors", "--lam", "0.5")
WEAK = ("--layers", "0", "--no-anchors", "--lam", "100")


@pytest.fixture
def workdir(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    settings = {"contexts": {"prefixes": [""]}, "search": {"kl_prompts": ["{} is a"], "steps": 20}, "refine": 0}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.fixture
def edit(base, workdir):
    def run(facts, *options):
        (workdir / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
        return main(
            [
                *("edit", "--model", str(base), "--edits", "facts.jsonl", "--config", "settings.json"),
                *("--no-stability", *options, "--json", "report.json"),
            ]
        )

    return run


def report(workdir):
    return json.loads((workdir / "report.json").read_text())


def test_the_end_of_a_run_names_what_the_model_states(edit, workdir, capsys):
    assert edit([GOOD], *STRONG, "--out", "out") == 0
    out = capsys.readouterr().out
    assert "1 written; the model states all 1 targets" in out
    (record,) = report(workdir)["records"]
    assert (record["answer_before"], record["answer"]) == (PERSON.facts["instrument"], "harp")
    assert record["stated"] is True
    assert record["chat_answer"] is None, "the tokenizer has no chat template"


def test_edits_that_are_not_stated_are_listed_with_their_answers(edit, workdir, capsys):
    assert edit([GOOD, POOR], *WEAK, "--out", "out") == 1
    out = capsys.readouterr().out
    assert "2 written; the model states 0 targets, 2 not: facts.jsonl:1, facts.jsonl:2" in out
    was = PERSON.facts["instrument"]
    assert f"facts.jsonl:1: {PROMPT} -> 'harp'; before {was!r}, now {was!r} (target: rank" in out
    assert "to improve: pass --retry-failed" in out
    assert report(workdir)["not_stated"] == ["facts.jsonl:1", "facts.jsonl:2"]


@pytest.mark.parametrize("name", ["--require-stated", "--require-said"])
def test_a_batch_that_is_not_stated_is_taken_back(edit, workdir, capsys, name):
    assert edit([GOOD], *STRONG, "--store", "edits") == 0
    before = {path.name: path.stat().st_size for path in (workdir / "edits" / "changes").iterdir()}
    assert edit([GOOD, POOR], "--store", "edits", name) == 2
    assert "of 1 edits of a batch; the batch was not applied" in capsys.readouterr().err
    assert {path.name: path.stat().st_size for path in (workdir / "edits" / "changes").iterdir()} == before
    assert main(["history", "--store", "edits", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["target"], record["state"]) == ("harp", "active")


def test_failed_edits_are_applied_again(edit, workdir, capsys):
    assert edit([GOOD], *WEAK, "--store", "edits") == 1
    assert edit([GOOD], "--store", "edits") == 0, "already in the store"
    assert edit([GOOD], "--store", "edits", "--retry-failed") == 1
    assert report(workdir)["applied_again"] == ["facts.jsonl:1"]
    capsys.readouterr()
    assert main(["history", "--store", "edits", "--json"]) == 0
    states = [record["state"] for record in json.loads(capsys.readouterr().out)]
    assert states == ["replaced", "replaced", "active"]


def test_the_change_on_other_text_is_measured(base, workdir, capsys):
    (workdir / "facts.jsonl").write_text(json.dumps(GOOD))
    people = World.generate().people[50:450]
    (workdir / "text.txt").write_text("\n\n".join(f"{p.name} plays the {p.facts['instrument']} ." for p in people))
    common = ["edit", "--model", str(base), "--edits", "facts.jsonl", "--config", "settings.json", "--layers", "0"]
    common += ["--json", "report.json", "--lam", "0.5"]
    assert main([*common, "--text", "text.txt", "--tokens", "1000", "--mu", "1", "--out", "out"]) == 0
    stability = report(workdir)["stability"]
    assert stability["text"] == "text.txt, the part after the anchors"
    assert stability["after"]["perplexity"] != stability["before"]["perplexity"]
    assert "perplexity on other text" in capsys.readouterr().out
    assert main([*common, "--no-anchors", "--out", "out-2"]) == 0
    assert report(workdir)["stability"]["text"] == "text that the model generated before the edits"
    assert main([*common, "--no-anchors", "--no-stability", "--out", "out-3"]) == 0
    assert "stability" not in report(workdir)


def test_a_chat_template_adds_answers_in_a_chat(workdir, capsys):
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = "<s>{{ messages[0].content }}"
    model.save_pretrained("chat-model")
    save_tokenizer(tokenizer, workdir / "chat-model")
    tokenizer.save_pretrained("chat-model")
    (workdir / "facts.jsonl").write_text(json.dumps(GOOD))
    options = ["--edits", "facts.jsonl", "--config", "settings.json", *STRONG, "--no-stability", "--store", "edits"]
    assert main(["edit", "--model", "chat-model", *options, "--json", "report.json"]) == 0
    assert "in a chat with the prompt as the message, 1 of 1 answers contain the target" in capsys.readouterr().out
    (record,) = report(workdir)["records"]
    assert record["chat_answer_before"].startswith(PERSON.facts["instrument"])
    assert record["chat_answer"].startswith("harp")
    assert record["chat_rank"] >= 1
    assert record["chat_nll"] > 0
    assert main(["ask", "--store", "edits", "--chat", "--answer-tokens", "1", PROMPT]) == 0
    assert capsys.readouterr().out.split() == [*PROMPT.split(), "base", PERSON.facts["instrument"], "edited", "harp"]


def test_ask_shows_the_answers_side_by_side(edit, base, workdir, capsys):
    assert edit([GOOD], *STRONG, "--store", "edits", "--out", "out") == 0
    capsys.readouterr()
    was = PERSON.facts["instrument"]
    asked = ["--answer-tokens", "1", "--json", "--", PROMPT]
    expected = [{"question": PROMPT, "base": was, "edited": "harp"}]
    for model in (["--store", "edits"], ["--model", str(base), "--edited", "out"]):
        assert main(["ask", *model, *asked]) == 0
        assert json.loads(capsys.readouterr().out) == expected
    assert main(["ask", "--store", "edits", "--answer-tokens", "1", "--json", "--edit", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["ask", "--store", "edits", "--edit", "7"]) == 2
    assert "--edit 7: the store has no edit with this id or name" in capsys.readouterr().err
    assert main(["ask", "--model", "out", *asked]) == 0
    assert json.loads(capsys.readouterr().out) == [{"question": PROMPT, "base": "harp"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["Who?"], "pass --store DIR or --model MODEL"),
        (["--model", "x"], "no question given"),
        (["--model", "x", "--edit", "1"], "--edit requires --store"),
        (["--store", "edits", "--edited", "x", "Who?"], "exclude each other"),
        (["--model", "x", " "], "is not a question"),
    ],
)
def test_ask_rejects_incomplete_options(workdir, capsys, options, message):
    assert main(["ask", *options]) == 2
    assert message in capsys.readouterr().err


def test_ask_in_a_chat_needs_a_template(base, workdir, capsys):
    assert main(["ask", "--model", str(base), "--chat", "Who?"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_store_is_exported_without_a_file_of_edits(edit, base, workdir, capsys):
    assert edit([GOOD], *STRONG, "--store", "edits") == 0
    last = Store("edits", write=False)
    seq = last.last
    last.close()
    assert main(["export", "--store", "edits", "--out", "out", "--delta", "d.safetensors", "--adapter", "adapter"]) == 0
    capsys.readouterr()
    assert main(["ask", "--model", "out", "--answer-tokens", "1", PROMPT]) == 0
    assert "harp" in capsys.readouterr().out
    assert main(["apply", "--model", str(base), "--delta", "d.safetensors", "--out", "out-2"]) == 0
    assert (workdir / "adapter" / "adapter_model.safetensors").exists()
    with Store("edits", write=False) as store:
        assert store.last == seq, "an export changes nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "o"], "pass either --store DIR, or --edited MODEL"),
        (["--store", "edits"], "no output given"),
        (["--edited", "x", "--delta", "d"], "--edited requires --model"),
        (["--edited", "x", "--model", "y", "--out", "o"], "--out requires --store"),
    ],
)
def test_export_rejects_incomplete_options(workdir, capsys, options, message):
    assert main(["export", *options]) == 2
    assert message in capsys.readouterr().err
