"""Conversations and prompts that were rendered by a chat template."""

import pytest

from rlsedit_fast import Edit
from rlsedit_fast.errors import RequestError
from rlsedit_fast.models import encode, encode_fact, encode_in_chat, encode_plain, invalid_messages, render
from rlsedit_fast.world import load_demo_model

USER = {"role": "user", "content": "Toze Lado Rekuno plays the"}
ANSWER = {"role": "assistant", "content": "harp"}
TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def tokenizer():
    _, tokenizer = load_demo_model()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def own_ids(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def test_a_rendered_prompt_gets_no_second_bos(tokenizer):
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    expected = own_ids(tokenizer, [USER])
    assert expected[0] == tokenizer.bos_token_id == tokenizer("a")["input_ids"][0]
    assert encode_plain(tokenizer, text, "harp").ids[: len(expected)] == expected
    row = encode(tokenizer, text, "Lado Rekuno", target="harp")
    assert row.ids[: row.prompt_length] == expected
    assert tokenizer.decode([row.ids[row.lookup]]) == "Rekuno"


def test_a_prefix_is_placed_within_the_message_of_a_rendered_prompt(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "\n{{ m.content }}")
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    row = encode(tokenizer, text, "Lado Rekuno", target="harp", prefix="Garnet")
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert "Garnet Toze Lado Rekuno plays" in tokenizer.decode(row.ids)
    assert tokenizer.decode([row.ids[row.lookup]]) == "Rekuno"


def test_a_conversation_has_the_ids_of_the_template(tokenizer):
    messages = [USER, ANSWER, {"role": "user", "content": "Toze Lado Rekuno speaks"}, {**ANSWER, "content": "Kubeish"}]
    row = encode_fact(tokenizer, Edit(messages=messages, subject="Toze Lado Rekuno"))
    assert row.ids[: row.prompt_length] == own_ids(tokenizer, messages[:-1])
    assert tokenizer.decode(row.target) == "Kubeish"
    place = [at for at, token in enumerate(row.ids) if tokenizer.decode([token]) == "Rekuno"]
    assert row.lookup == place[-1], "the subject in the last message of the user"


def test_a_subject_may_be_a_hole_of_the_last_message(tokenizer):
    filled = Edit(messages=[USER, ANSWER], subject="Toze Lado Rekuno")
    hole = Edit(messages=[{**USER, "content": "{} plays the"}, ANSWER], subject="Toze Lado Rekuno")
    assert encode_fact(tokenizer, hole) == encode_fact(tokenizer, filled)


def test_a_conversation_without_a_subject_is_edited_at_the_end_of_the_message(tokenizer):
    row = encode_fact(tokenizer, Edit(messages=[USER, ANSWER]))
    assert tokenizer.decode([row.ids[row.lookup]]) == "the"


def test_the_answer_follows_as_in_the_template(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content }}"
        "{% endfor %}"
    )
    found = render(tokenizer, [USER, ANSWER])
    assert (found.text, found.answer) == ("[INST] Toze Lado Rekuno plays the [/INST]", " harp")


def test_a_template_that_strips_messages_keeps_the_place_of_the_subject(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content | trim")
    row = encode_fact(
        tokenizer, Edit(messages=[{**USER, "content": "  Lado Rekuno plays the "}, ANSWER], subject="Lado")
    )
    assert tokenizer.decode([row.ids[row.lookup]]) == "Lado"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "expected a list of messages"),
        ("Hello", "expected a list of messages"),
        ([USER], "the last message has the role 'user'"),
        ([ANSWER], "no message of the user"),
        ([USER, {**ANSWER, "role": "bot"}], "message 2: unknown role 'bot'"),
        ([USER, {**ANSWER, "content": " "}], "message 2 (assistant): the content is empty"),
        ([USER, {**ANSWER, "content": None}], "message 2: the content None is not a string"),
        ([USER, {"role": "assistant"}], "message 2: expected the fields role and content, got the fields role"),
        ([USER, "harp"], "message 2: expected the fields role and content, got 'harp'"),
    ],
)
def test_invalid_conversations_are_named(messages, reason):
    assert reason in invalid_messages(messages)
    with pytest.raises(RequestError, match="messages: "):
        Edit(messages=messages)


def test_a_conversation_requires_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        encode_fact(tokenizer, Edit(messages=[USER, ANSWER]))
    tokenizer.chat_template = "{{ raise_exception('only one message') }}"
    with pytest.raises(RequestError, match="only one message"):
        encode_fact(tokenizer, Edit(messages=[USER, ANSWER]))


@pytest.mark.parametrize(
    ("form", "text", "lookup"),
    [
        ("answer", "<s> user {p} </s> assistant {p} harp", -1),
        ("message", "<s> user {p} </s> assistant {p} harp", 0),
        ("direct", "<s> user {p} </s> assistant harp", 0),
    ],
)
def test_forms_in_a_chat(tokenizer, form, text, lookup):
    row = encode_in_chat(tokenizer, Edit("{} plays the", "Toze Lado Rekuno", "harp"), form)
    expected = text.replace("{p}", USER["content"]).replace("user", "<unk>").replace("assistant", "<unk>")
    assert tokenizer.decode(row.ids) == expected
    assert tokenizer.decode(row.target) == "harp"
    places = [at for at, token in enumerate(row.ids) if tokenizer.decode([token]) == "Rekuno"]
    assert row.lookup == places[lookup]


def test_a_question_is_answered_directly(tokenizer):
    edit = Edit("What does {} play ?", "Toze Lado Rekuno", "harp")
    assert encode_in_chat(tokenizer, edit, "answer") == encode_in_chat(tokenizer, edit, "direct")


def test_a_conversation_in_a_chat_stays_as_it_is_after_a_short_text(tokenizer):
    edit = Edit(messages=[USER, ANSWER], subject="Lado Rekuno")
    rows = [encode_in_chat(tokenizer, edit, form) for form in ("answer", "message", "direct")]
    assert len({tuple(row.ids) for row in rows}) > 1
    for row in rows:
        assert tokenizer.decode(row.target) == "harp"
        assert tokenizer.decode([row.ids[row.lookup]]) == "Rekuno"
        assert row.ids.count(tokenizer.bos_token_id) == 1
