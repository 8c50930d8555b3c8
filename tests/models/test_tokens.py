"""Subjects are found where they stand, and targets are tokenised as continuations."""

import pytest
import torch

from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.tokens import encode, encode_plain, fill, pad, target_ids


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE tokenizer as GPT-2's: spaces belong to the word behind them, no special tokens are added."""
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
def test_byte_level_subjects_end_where_their_text_ends(byte_level, subject):
    row = encode(byte_level, "The mother of {} is", subject)
    assert byte_level.decode(row.ids[: row.lookup + 1]) == "The mother of " + subject


def test_byte_level_target_carries_its_space(byte_level):
    assert byte_level.decode(target_ids(byte_level, "Paris")) == " Paris"
    assert target_ids(byte_level, " Paris ") == target_ids(byte_level, "Paris")


def test_subject_without_a_mark_must_stand_once():
    assert fill("France is big", "France") == ("France is big", 0)
    for prompt in ("The home is", "France and France", "{} and {}"):
        with pytest.raises(RequestError, match="exactly once"):
            fill(prompt, "France")


@pytest.mark.parametrize("subject", ["", "  "])
def test_empty_subject_is_refused(subject):
    with pytest.raises(RequestError, match="is empty"):
        fill("{} is", subject)


def test_tokenizer_without_offsets_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(RequestError, match="use_fast"):
        encode(Slow(), "{} is", "France")


def test_padding_is_on_the_right_and_masked(tokenizer):
    rows = [encode_plain(tokenizer, "Bada speaks"), encode_plain(tokenizer, "Bada", "Port Alder")]
    ids, mask = pad([*rows, encode_plain(tokenizer, "Bada")], torch.device("cpu"))
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert ids[1].tolist() == rows[1].ids
