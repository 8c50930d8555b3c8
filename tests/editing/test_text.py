"""Edits with exact joins, without a subject, with long targets, and of conversations."""

import pytest

from rlsedit_fast import Edit, EditConfig, Editor, RequestError
from rlsedit_fast.evaluation.scoring import score_rows
from rlsedit_fast.models import chat_row, encode_fact, greedy
from rlsedit_fast.world import load_demo_model

CONFIG = EditConfig(layers=[0], prior={"lam": 0.1})
TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
QUESTION = {"role": "user", "content": "{} plays the"}
PERSON = "Toze Lado Rekuno"


def conversation(target="harp"):
    return Edit(messages=[QUESTION, {"role": "assistant", "content": target}], subject=PERSON)


@pytest.fixture
def chat_editor():
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = TEMPLATE
    return Editor(model, tokenizer, config=CONFIG)


def said(editor, row):
    (ids,) = greedy(editor.model, [row.ids[: row.prompt_length]], [len(row.target)])
    return editor.tokenizer.decode(ids)


def test_a_fact_without_a_subject_is_edited_at_the_last_token(caplog):
    editor = Editor(*load_demo_model(), config=CONFIG)
    with caplog.at_level("INFO", "rlsedit_fast"):
        (record,) = editor.edit([Edit("Toze Lado Rekuno plays the", None, "harp")])
    assert "no subject; they are edited at the last token" in caplog.text
    assert (record.success, record.subject) == (True, "")
    (request,) = editor.context.prepare([Edit("Toze Lado Rekuno plays the", target="harp")])
    assert request.contexts[0].lookup == request.contexts[0].prompt_length - 1
    assert (request.subject_key, request.kl) == (None, ())
    with_subject, without = Edit("{} speaks", PERSON, "Kubeish"), Edit("The job of Kuno Toze is", "", "baker")
    assert [one.success for one in editor.edit([with_subject, without])] == [True, True]
    editor.undo([1, 2, 3])
    assert not any(layer.weight for layer in editor.deviation())


def test_a_hole_requires_a_subject():
    editor = Editor(*load_demo_model(), config=CONFIG)
    with pytest.raises(RequestError, match="the subject is empty"):
        editor.edit([Edit("{} plays the", "", "harp")])


def test_edits_of_a_conversation_hold_in_it_and_can_be_replaced_and_undone(chat_editor):
    (record,) = chat_editor.edit([conversation()])
    assert record.success
    assert (record.prompt, record.target, record.answer) == ("{} plays the", "harp", "harp")
    assert record.messages == conversation().messages
    replaced = chat_editor.replace(record.id, "baker")
    assert replaced.success
    assert replaced.messages[-1]["content"] == "baker"
    (again,) = chat_editor.edit([conversation("harp")])
    assert [one.state for one in chat_editor.history()] == ["replaced", "replaced", "active"], "the same conversation"
    chat_editor.undo(again.id)
    assert not any(layer.weight for layer in chat_editor.deviation())


def test_a_store_keeps_conversations_and_joins(tmp_path):
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = TEMPLATE
    given = [
        conversation(),
        Edit("{} speaks", PERSON, "Kubeish", join="exact"),
        Edit("Kuno Toze lives in", None, "Kubeish"),
    ]
    with Editor(model, tokenizer, config=CONFIG, store=tmp_path / "edits") as editor:
        before = editor.edit(given)
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = TEMPLATE
    with Editor(model, tokenizer, store=tmp_path / "edits") as editor:
        assert editor.history() == before
        assert [(one.messages, one.join, one.subject) for one in editor.history()] == [
            (given[0].messages, "auto", PERSON),
            (None, "exact", PERSON),
            (None, "auto", ""),
        ]
        editor.undo(1)
        editor.consolidate()


def test_chat_contexts_are_used_if_there_is_a_chat_template(chat_editor):
    assert chat_editor.config.contexts.chat == ("answer", "direct")
    edit = Edit("{} plays the", PERSON, "harp")
    (request,) = chat_editor.context.prepare([edit])
    assert len(request.contexts) == chat_editor.config.contexts.count == 5
    chat_editor.edit([edit])
    assert said(chat_editor, chat_row(chat_editor.tokenizer, f"{PERSON} plays the", "harp")) == "harp"


def test_without_a_chat_template_nothing_changes():
    editor = Editor(*load_demo_model(), config=CONFIG)
    off = Editor(*load_demo_model(), config=CONFIG.replace(contexts={"chat": ()}))
    assert editor.config.contexts.chat == ()
    for one in (editor, off):
        one.edit([Edit("{} plays the", PERSON, "harp")])
    assert editor.changes()[0].current.equal(off.changes()[0].current)


def test_mean_keys_and_other_rules_have_no_chat_contexts():
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = TEMPLATE
    for config in (CONFIG.replace(contexts={"rows": "mean"}), CONFIG.for_rule("memit")):
        assert Editor(model, tokenizer, config=config).config.contexts.chat == ()


def test_chat_contexts_require_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        Editor(*load_demo_model(), config=CONFIG.replace(contexts={"chat": ["answer"]}))


def test_a_store_without_the_setting_has_no_chat_contexts(tmp_path):
    settings = CONFIG.to_dict()
    del settings["contexts"]["chat"]
    assert EditConfig.from_store(settings).contexts.chat == ()
    assert EditConfig.from_store(CONFIG.to_dict()).contexts.chat is None


def test_long_targets_are_searched_and_measured():
    editor = Editor(*load_demo_model(), config=CONFIG.replace(contexts={"prefixes": [""]}, search={"clamp": 4.0}))
    target = " ".join(["harp"] * 200)
    edit = Edit("{} says", PERSON, target)
    (request,) = editor.context.prepare([edit])
    assert len(request.contexts[0].target) == 200
    (before,) = score_rows(editor.model, [encode_fact(editor.tokenizer, edit)])
    (record,) = editor.edit([edit])
    (after,) = score_rows(editor.model, [encode_fact(editor.tokenizer, edit)])
    assert record.nll == pytest.approx(after.nll, rel=1e-4), "the record has the mean over all tokens"
    assert after.nll < 0.9 * before.nll


def test_a_target_that_is_too_long_for_the_model_is_refused():
    editor = Editor(*load_demo_model(), config=CONFIG)
    longest = editor.model.config.max_position_embeddings
    with pytest.raises(RequestError, match=f"the model supports {longest}"):
        editor.edit([Edit("{} says", PERSON, " ".join(["harp"] * longest))])
