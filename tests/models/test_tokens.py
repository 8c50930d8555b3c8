"""Finding subjects and tokenizing targets as continuations."""

import pytest
import torch

from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.tokens import encode, encode_plain, fill, pad, target_ids


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE tokenizer like GPT-2: spaces belong to the following word, no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["The capital of France is Paris", "The mother of Zoë Müller lives in Zürich", "New York is a city"]
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("prompt", ["{} lives in", "The home of {} is in", "You know {}"])
@pytest.mark.parametrize("prefix", ["", "Bada plays the flute ."])
def test_lookup_is_the_last_token_of_the_subject(tokenizer, prompt, prefix):
    name = "Toze Lado Rekuno"
    row = encode(tokenizer, prompt, name, prefix=prefix, target="Port Alder")
    assert tokenizer.convert_ids_to_tokens(row.ids)[row.lookup] == "Rekuno"
    assert tokenizer.convert_ids_to_tokens(row.target) == ["Port", "Alder"]
    assert row.ids[0] == tokenizer.bos_token_id
    first = encode(tokenizer, prompt, name, prefix=prefix, fact_token="subject_first")
    assert tokenizer.convert_ids_to_tokens(first.ids)[first.lookup] == "Toze"
    last = encode(tokenizer, prompt, name, prefix=prefix, target="Port Alder", fact_token="last")
    assert last.lookup == last.prompt_length - 1


@pytest.mark.parametrize("subject", ["France", "Zoë Müller", "New York", 'the "{}" sign'])
def test_byte_level_subject_end(byte_level, subject):
    row = encode(byte_level, "The mother of {} is", subject)
    assert byte_level.decode(row.ids[: row.lookup + 1]) == "The mother of " + subject


def test_byte_level_target_includes_its_space(byte_level):
    for target in ("Paris", " Paris "):
        assert byte_level.decode(target_ids(byte_level, "The capital of France is", target)) == " Paris"


def test_braces_take_precedence_over_the_subject():
    assert fill("France and {} and France", "France") == ("France and France and France", 11)


@pytest.mark.parametrize("prompt", ["The set {x} of {} is", "{0} or {name!r}: {} is", "}{ {}", "{{{}}} is"])
def test_outer_braces_are_text(prompt):
    before, after = prompt.split("{}")
    assert fill(prompt, "France") == (f"{before}France{after}", len(before))


@pytest.mark.parametrize(
    ("prompt", "subject", "start"),
    [
        ("France is big", "France", 0),
        ("France is big, is France", "France", 18),
        ("Ana said banana", "Ana", 0),
        ("Ana said Ananas", "Ana", 0),
        ("an Ana, the Ana_1", "Ana", 3),
        ("Zoe and Zoe\u0308 speak", "Zoe", 0),
        ("banana", "ana", 3),
        ("日本の首都", "日本", 0),
        ("the capital of france", "France", 15),
        ("france and frances", "France", 0),
        ("France lies in francE", "France", 0),
        ('"{0}" is {1} long', "{0}", 1),
        ("AC/DC and C++", "C++", 10),
    ],
)
def test_subject_without_braces_is_the_last_whole_word(prompt, subject, start):
    assert fill(prompt, subject) == (prompt, start)


@pytest.mark.parametrize("prompt", ["The home is", "{} and {}", "of the frances"])
def test_subject_not_found_raises(prompt):
    with pytest.raises(RequestError, match="contains .* twice" if "{}" in prompt else "neither {} nor the subject"):
        fill(prompt, "France")


def test_spaces_around_a_subject_are_ignored(byte_level):
    assert fill("The {} is", " France ") == ("The France is", 4)
    row = encode(byte_level, "The {} is", " France ")
    assert byte_level.decode(row.ids[: row.lookup + 1]) == "The France"


@pytest.mark.parametrize("span", [(4, 4), (5, 4), (-3, 2), (0, 14)])
def test_invalid_span_raises(byte_level, span):
    with pytest.raises(RequestError, match=r"0 <= start < stop <= 13"):
        encode(byte_level, "The {} is ", "France", span=span)


@pytest.mark.parametrize("subject", ["", "  "])
def test_empty_subject_raises(subject):
    with pytest.raises(RequestError, match="is empty"):
        fill("{} is", subject)


def test_padding_is_right_and_masked(tokenizer):
    rows = [encode_plain(tokenizer, "Bada speaks"), encode_plain(tokenizer, "Bada", "Port Alder")]
    ids, mask = pad([*rows, encode_plain(tokenizer, "Bada")], torch.device("cpu"))
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert ids[1].tolist() == rows[1].ids
