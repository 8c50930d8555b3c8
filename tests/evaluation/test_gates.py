"""Gates: validation of their file, measurement against the unedited model, and checks between batches."""

from __future__ import annotations

import json

import pytest
import torch

from rlsedit_fast import Edit, EditConfig, Editor, GateError, Gates, InputError
from rlsedit_fast.models import generate_answers
from rlsedit_fast.world import RELATIONS, World, load_demo_model

PEOPLE = World.generate().people[:8]
CONFIG = EditConfig(layers=[0], prior={"lam": 0.05}, contexts={"prefixes": [""]}, batch_size=2, refine=0)
PROMPT = RELATIONS[0].phrasings[0]


def asked(person):
    return PROMPT.replace("{}", person.name)


def target(person):
    return next(value for value in RELATIONS[0].values if value != person.facts[RELATIONS[0].name])


def same(person):
    """Two tokens: what follows the answer may change with any edit."""
    return {"prompt": asked(person), "tokens": 2}


def edits(first, last):
    return [Edit(PROMPT, person.name, target(person)) for person in PEOPLE[first:last]]


def make(store=None, config=CONFIG):
    model, tokenizer = load_demo_model()
    return Editor(model, tokenizer, config=config, store=store)


def weight(editor):
    return editor.model.get_parameter("model.layers.0.mlp.down_proj.weight").detach().clone()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unchangd:\n  - a\n", "line 1: unknown key 'unchangd'; did you mean 'unchanged'?"),
        (
            "answers:\n  - prompt: a\n    contains: b\n  - prompt: c\n    contians: d\n",
            "line 5: unknown key 'answers[1].contians'; did you mean 'contains'?",
        ),
        ("limits:\n  kl: 0.1\n  perplexity_ratoi: 2\n", "line 3: unknown key 'limits.perplexity_ratoi'"),
        ("answers:\n  - prompt: a\n    contains: no\n", "line 3: answers[0].contains: expected a list, got False"),
        ("answers:\n  - prompt: 1984\n    contains: b\n", "line 2: answers[0].prompt: expected text; put it in quotes"),
        ("answers:\n  - contains: b\n", "line 2: answers[0].prompt is missing"),
        ("answers:\n  - prompt: a\n", "line 2: expected at least one of `contains`, `starts_with` and `excludes`"),
        ("unchanged: ['  ']\n", "line 1: unchanged[0].prompt: expected text that is not blank"),
        ("unchanged:\n  - chat: true\n", "line 2: expected either `prompt` or `file`"),
        ("unchanged:\n  - file: missing.txt\n", "line 2: "),
        ("limits:\n  kl: .nan\ntext: t.txt\n", "line 2: limits.kl: expected a finite number"),
        ("limits:\n  kl: 0.1\n", "line 2: limits.kl requires `text: FILE`"),
        ("retention: 1.5\n", "retention.at_least: expected a number of at most 1"),
        ("retention: true\n", "retention: expected a mapping of keys to values"),
        ("every: 0\nretention: 1\n", "line 1: every: expected a number of at least 1"),
        ("on_violation: warn\nretention: 1\n", "line 1: on_violation: expected 'stop' or 'undo'"),
        ("every: 2\n", "contains no gate"),
        ("limits:\n  changed: 0.1\nretention: 1\n", "line 2: limits.changed requires `unchanged`"),
        ("retention: 1\nretention: 0.5\n", "line 2: the key 'retention' is given twice, first in line 1"),
        ("unchanged: [a\n", "not valid YAML"),
        ("unchanged: &a [*a]\n", "an alias contains itself"),
        ("- a\n", "expected keys such as"),
        ("", "got an empty file"),
        ("1: 2\n", "the keys must be strings"),
    ],
)
def test_invalid_gate_file_names_line_and_key(tmp_path, text, expected):
    (tmp_path / "t.txt").write_text("Some text.\n")
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        Gates.load(tmp_path / "gates.yaml")
    assert expected in str(error.value)
    assert "gates.yaml" in str(error.value)


def test_json_gate_file_with_tabs_and_emoji(tmp_path):
    (tmp_path / "prompts.txt").write_text("One\n\nTwo\nOne\n")
    values = {"unchanged": ["\U0001f600 is", {"file": "prompts.txt"}], "limits": {"changed": 0.5}}
    (tmp_path / "gates.json").write_text(json.dumps(values, indent="\t"))
    settings = Gates.load(tmp_path / "gates.json").settings
    assert settings.unchanged[0].prompt == "\U0001f600 is"
    assert [one.prompt for one in settings.unchanged[1].questions()] == ["One", "Two"]
    (tmp_path / "gates.json").write_text('{\n"unchanged": ["a"],\n"limitz": {}\n}')
    with pytest.raises(InputError, match="line 3: unknown key 'limitz'; did you mean 'limits'"):
        Gates.load(tmp_path / "gates.json")
    (tmp_path / "gates.json").write_text("{'unchanged': 1}")
    with pytest.raises(InputError, match="not valid JSON"):
        Gates.load(tmp_path / "gates.json")


def _check_equal_and_fail(model, expected):
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    raise KeyError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unedited_shows_the_original_model_and_restores_the_edited_one(make_model, tokenizer, dtype):
    for name in ("llama", "gpt2"):
        model = make_model(name, dtype)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        config = CONFIG.replace(layers=(0, 1), search={"steps": 2}, prior={"lam": 0.1}, unconverged="keep")
        editor = Editor(model, tokenizer, config=config)
        editor.edit(edits(0, 2))
        after = {key: value.clone() for key, value in model.state_dict().items()}
        assert any(not torch.equal(before[key], after[key]) for key in before)
        with pytest.raises(KeyError), editor.unedited():
            _check_equal_and_fail(model, before)
        assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
        editor.edit(edits(2, 4))  # the weights count as not modified by other code


def test_undo_takes_the_batch_back_exactly_also_in_the_store(tmp_path):
    gates = Gates(unchanged=[same(PEOPLE[3])], on_violation="undo")
    seen = []
    with make(tmp_path / "store") as editor:
        bound = gates.bind(editor)
        editor.edit(edits(0, 2), gates=bound, on_batch=lambda records: seen.append([r.id for r in records]))
        kept, history = weight(editor), editor.history()
        with pytest.raises(GateError) as error:
            editor.edit(edits(2, 6), gates=bound, on_batch=lambda records: seen.append([r.id for r in records]))
        assert torch.equal(weight(editor), kept)
        assert editor.history() == history
        assert [one.final for one in bound.reports] == [True, False]
    assert seen == [[1, 2]]
    (violated,) = error.value.report.violated
    assert (violated.gate, violated.prompt, violated.now) == ("unchanged", asked(PEOPLE[3]), violated.now)
    assert violated.before.startswith(PEOPLE[3].facts[RELATIONS[0].name])
    assert violated.now.startswith(target(PEOPLE[3]))
    assert "The first 0 of 4 edits are applied." in str(error.value)
    with make(tmp_path / "store") as editor:
        assert torch.equal(weight(editor), kept)
        assert editor.history() == history
        editor.edit(edits(6, 8), gates=gates)  # the store goes on
        assert [record.id for record in editor.history()] == [1, 2, 3, 4]


def test_undo_with_every_takes_back_the_batches_since_the_last_check(tmp_path):
    gates = Gates(unchanged=[same(PEOPLE[7])], on_violation="undo", every=2)
    seen = []
    with make(tmp_path / "store") as editor:
        with pytest.raises(GateError, match="The first 4 of 8 edits are applied"):
            editor.edit(edits(0, 8), gates=gates, on_batch=lambda records: seen.extend(r.id for r in records))
        assert [record.id for record in editor.history()] == [1, 2, 3, 4] == seen
        kept = weight(editor)
    with make(tmp_path / "store") as editor:
        assert torch.equal(weight(editor), kept)


def test_first_batch_that_is_taken_back_leaves_a_new_editor_unchanged(tmp_path):
    gates = Gates(unchanged=[same(PEOPLE[0])], on_violation="undo")
    with make(tmp_path / "store") as editor:
        before = weight(editor)
        with pytest.raises(GateError):
            editor.edit(edits(0, 2), gates=gates)
        assert torch.equal(weight(editor), before)
        assert editor.history() == []
        assert editor.priors == []


def test_stop_keeps_the_batch_and_applies_no_further_one():
    editor = make()
    with pytest.raises(GateError, match="The first 4 of 6 edits are applied") as error:
        editor.edit(edits(0, 6), gates=Gates(unchanged=[same(PEOPLE[2])]))
    assert [record.state for record in editor.history()] == ["active"] * 4
    assert error.value.report.edits == 4


def test_baseline_over_a_resumed_store_is_that_of_the_unedited_model(tmp_path):
    with make(tmp_path / "store") as editor:
        editor.edit(edits(0, 2))
    with make(tmp_path / "store") as editor:
        kept = weight(editor)
        report = Gates(unchanged=[same(PEOPLE[0]), same(PEOPLE[5])]).check(editor)
        assert torch.equal(weight(editor), kept)
    first, second = report.results
    assert (first.outcome, second.outcome) == ("violated", "passed")
    assert first.before.startswith(PEOPLE[0].facts[RELATIONS[0].name])
    assert first.now.startswith(target(PEOPLE[0]))


def test_expected_answers_that_edits_are_to_give_are_checked_at_the_end_and_known_ones_always():
    answers = [
        {"prompt": asked(PEOPLE[3]), "starts_with": target(PEOPLE[3]).upper()},
        {"prompt": asked(PEOPLE[7]), "contains": [PEOPLE[7].facts[RELATIONS[0].name]]},
    ]
    editor = make()
    bound = Gates(answers=answers).bind(editor)
    editor.edit(edits(0, 4), gates=bound)
    assert [[one.prompt for one in report.results] for report in bound.reports] == [
        [asked(PEOPLE[7])],
        [asked(PEOPLE[3]), asked(PEOPLE[7])],
    ]
    with pytest.raises(GateError, match="expected: contains"):
        editor.edit(edits(7, 8), gates=bound)
    always = Gates(answers=[answers[0] | {"when": "always"}])
    with pytest.raises(GateError, match="The first 2 of 4"):
        make().edit(edits(0, 4), gates=always)
    excluded = Gates(answers=[{"prompt": asked(PEOPLE[0]), "excludes": target(PEOPLE[0])}])
    with pytest.raises(GateError, match="does not contain"):
        make().edit(edits(0, 2), gates=excluded)


def test_limits_are_measured_against_the_unedited_model(tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text("\n\n".join(f"{asked(person)} {person.facts[RELATIONS[0].name]} ." for person in PEOPLE[4:]))
    limits = {"perplexity": 1e6, "perplexity_ratio": 10, "kl": 5, "same_top": 0.1, "deviation": 1}
    limits["deviation_bound"] = 10
    editor = make()
    gates = Gates(text=str(text), limits=limits, retention={"at_least": 1, "sample": 3})
    bound = gates.bind(editor)
    first = bound.measure()
    assert [one.gate for one in first.results[1:4]] == ["perplexity_ratio", "kl", "same_top"]
    assert [one.value for one in first.results[1:4]] == pytest.approx([1, 0, 1], abs=1e-5)
    assert [one.gate for one in first.not_measured] == ["retention"]
    editor.edit(edits(0, 4), gates=bound)
    values = {one.gate: one for one in bound.reports[-1].results}
    assert values["kl"].value > 0
    assert values["perplexity"].before == pytest.approx(first.results[0].value)
    status = editor.status(sample=0)
    assert values["deviation"].value == pytest.approx(status.layers[0].weight, rel=1e-4)
    assert values["deviation_bound"].value == pytest.approx(status.layers[0].weight_bound)
    assert values["retention"].value == 1
    assert "a sample of 4" in values["retention"].note
    assert [one.outcome for one in bound.reports[1].results if one.gate == "retention"] == ["not measured"]
    assert "no earlier active edits" in bound.reports[1].not_measured[0].note
    for name, value in {"perplexity": 1.0, "kl": 0, "deviation": 1e-6, "deviation_bound": 1e-6}.items():
        needs = {"text": str(text)} if name in ("perplexity", "kl") else {}
        (found,) = Gates(**needs, limits={name: value}).check(editor).violated
        assert (found.gate, found.limit) == (name, value)


def test_retention_counts_edits_before_the_last_check_and_all_at_the_end():
    editor = make()
    editor.edit(edits(0, 2))
    editor.edit([Edit(RELATIONS[1].phrasings[0], "Nobody Known", "harp")])
    with editor.unedited():
        stale = [generate_answers(editor.model, editor.tokenizer, [(asked(PEOPLE[0]), target(PEOPLE[0]))])]
    assert stale != [[target(PEOPLE[0])]]
    bound = Gates(retention=1.0).bind(editor)
    bound.check(first=2, final=False)
    assert bound.reports[-1].results[0].note == "1 of 1 stated"
    with editor.unedited(), pytest.raises(GateError, match="not stated: edits 1, 2"):
        bound.check(first=3, final=True)


def test_share_of_changed_answers_may_be_limited():
    editor = make()
    editor.edit(edits(0, 2))
    prompts = [same(person) for person in PEOPLE[:8]]
    assert len(Gates(unchanged=prompts).check(editor).violated) == 2
    assert not Gates(unchanged=prompts, limits={"changed": 0.25}).check(editor).violated
    assert len(Gates(unchanged=prompts, limits={"changed": 0.24}).check(editor).violated) == 2


def test_gates_that_cannot_be_measured_are_refused_before_the_edits():
    editor = make()
    with pytest.raises(InputError, match="no chat template"):
        editor.edit(edits(0, 1), gates=Gates(unchanged=[{"prompt": "a", "chat": True}]))
    with pytest.raises(InputError, match="the model supports"):
        editor.edit(edits(0, 1), gates=Gates(unchanged=["the " * 5000]))
    with pytest.raises(InputError, match="expected Gates"):
        editor.edit(edits(0, 1), gates="gates.yaml")
    with pytest.raises(InputError, match="bound to another editor"):
        make().edit(edits(0, 1), gates=Gates(unchanged=["a"]).bind(editor))
    other = make(config=EditConfig(rule="ft", layers=[0]))
    with pytest.raises(InputError, match="has no bound"):
        other.edit(edits(0, 1), gates=Gates(limits={"deviation_bound": 1}))
    assert editor.history() == []


def test_chat_gates_ask_in_a_chat():
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = "{{ messages[0].content }}"
    editor = Editor(model, tokenizer, config=CONFIG)
    editor.edit(edits(0, 1))
    report = Gates(unchanged=[{"prompt": asked(PEOPLE[0]), "chat": True, "tokens": 2}]).check(editor)
    (found,) = report.violated
    assert found.chat
    assert "in a chat" in found.line


def test_error_in_a_window_takes_it_back_and_is_counted():
    editor = make()
    gates = Gates(retention=0.0, on_violation="undo", every=2)

    def fail(records):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        editor.edit(edits(0, 8), gates=gates, on_batch=fail)
    assert len(editor.history()) == 4  # on_batch is called once the window is applied
