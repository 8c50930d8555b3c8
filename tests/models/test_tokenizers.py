"""Lookup tokens and continuations are correct for every type of tokenizer."""

import io

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.joins import strip_trailing
from rlsedit_fast.models.offsets import locate, token_ids
from rlsedit_fast.models.tokens import encode, encode_plain, target_ids

TEXT = [
    "The capital of France is Paris",
    "The mother of Zoë Müller lives in Zürich",
    "New York is a city",
    "東京都は日本の首都です",
    "東京都 東京都 東京都",
] * 5
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level():
    """Like GPT-2: spaces belong to the following word, no special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def llama_fast():
    """Like Llama: a leading space, and byte tokens for unknown characters."""
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *names]))
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.model.unk_token = "<unk>"
    tokenizer.model.byte_fallback = True
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def train_sentencepiece(kind, path, *, byte_fallback=True):
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=written,
        vocab_size=340 if byte_fallback else 90,
        model_type=kind,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())
    return str(path)


def slow(kind, folder, *, byte_fallback=True):
    """A slow sentencepiece tokenizer without offsets in transformers 4 and 5."""
    from transformers import BertGenerationTokenizer

    model = train_sentencepiece(kind, folder / f"{kind}.model", byte_fallback=byte_fallback)
    return BertGenerationTokenizer(vocab_file=model)


def slow_bos_eos(folder):
    tokenizer = slow("bpe", folder)
    tokenizer.build_inputs_with_special_tokens = lambda ids, pair=None: [1, *ids, 2]
    return tokenizer


def llama(folder):
    """Llama with EOS: a slow tokenizer in transformers 4, a fast one in version 5."""
    from transformers import LlamaTokenizer

    train_sentencepiece("bpe", folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True, add_eos_token=True, legacy=True)


def byte_tokens():
    """One token per byte and an EOS, without offsets."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


MAKERS = {
    "byte_level": lambda folder: byte_level(),
    "llama_fast": lambda folder: llama_fast(),
    "llama": llama,
    "slow_bpe": lambda folder: slow("bpe", folder),
    "slow_unigram": lambda folder: slow("unigram", folder),
    "slow_bos_eos": slow_bos_eos,
    "bytes": lambda folder: byte_tokens(),
}
SUBJECTS = ["France", "Zoë Müller", "New York", "東京", "Émile 😀", 'the "{}" sign', "Q7", "d'Arc {x}"]


@pytest.fixture(scope="module", params=MAKERS)
def any_tokenizer(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


def spell(tokenizer, ids):
    """Decodes ids without special tokens and without the leading space that some tokenizers add."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids), skip_special_tokens=True)
    if not any("▁" in piece or piece.startswith("<0x") for piece in pieces):
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    spelled = b"".join(
        bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()
        for piece in pieces
    )
    return spelled.decode(errors="ignore").removeprefix(" ")


def specials(tokenizer, ids):
    return [i for i, id_ in enumerate(ids) if id_ in tokenizer.all_special_ids]


@pytest.mark.parametrize("prompt", ["{} lives in", "The mother of {} is", "We all know {}", "“{}”, they say"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_lookup_is_the_last_token_of_the_subject(any_tokenizer, prompt, subject):
    row = encode(any_tokenizer, prompt, subject, prefix="Zoë says: 😀", target="Paris")
    expected = "Zoë says: 😀 " + prompt.split("{}")[0] + subject
    assert not spell(any_tokenizer, row.ids[: row.lookup]).startswith(expected), "the lookup token is not too late"
    assert spell(any_tokenizer, row.ids[: row.lookup + 1]).startswith(expected), "the lookup token is not too early"


def test_leading_spaces_do_not_shift_offsets(any_tokenizer):
    row = encode(any_tokenizer, "   {} is", "Zoë Müller")
    assert spell(any_tokenizer, row.ids[: row.lookup]).strip() != "Zoë Müller"
    assert spell(any_tokenizer, row.ids[: row.lookup + 1]).strip() == "Zoë Müller"


def test_first_token_is_not_a_leading_space(any_tokenizer):
    for subject in ("Paris", "Q7"):  # one token, several tokens
        row = encode(any_tokenizer, "{} is", subject, fact_token="subject_first")
        assert spell(any_tokenizer, row.ids[: row.lookup]) == ""
        assert spell(any_tokenizer, row.ids[: row.lookup + 1])


def test_all_tokens_of_a_split_character_cover_it(any_tokenizer):
    ids, inside = locate(any_tokenizer, "a 😀 b", 2, 3)
    assert ids[: inside[0]] in [token_ids(any_tokenizer, before) for before in ("a", "a ")]
    assert spell(any_tokenizer, ids[: inside[-1] + 1]) == "a 😀"


@pytest.mark.parametrize(
    ("span", "expected"), [((0, 3), "The"), ((4, 11), "The capital"), ((22, 23), "The capital of France i")]
)
def test_span_names_the_lookup(any_tokenizer, span, expected):
    row = encode(any_tokenizer, "The capital of {} is", "France", prefix="Well.", span=span, fact_token="last")
    assert not spell(any_tokenizer, row.ids[: row.lookup]).startswith("Well. " + expected)
    assert spell(any_tokenizer, row.ids[: row.lookup + 1]).startswith("Well. " + expected)


def test_target_continues_the_prompt_after_one_space(any_tokenizer):
    row = encode(any_tokenizer, "The capital of {} is", "France", target="Paris")
    assert spell(any_tokenizer, row.ids) == "The capital of France is Paris"
    assert row.ids == token_ids(any_tokenizer, "The capital of France is Paris")
    assert row.ids == encode_plain(any_tokenizer, "The capital of France is", "Paris").ids
    assert row.target == target_ids(any_tokenizer, "The capital of France is", "Paris")


def test_special_tokens_only_before_the_prompt(any_tokenizer):
    row = encode(any_tokenizer, "The capital of {} is", "France", target="Paris")
    before = specials(any_tokenizer, token_ids(any_tokenizer, "France"))
    assert specials(any_tokenizer, row.ids) == before
    assert before == ([0] if any_tokenizer.bos_token_id == token_ids(any_tokenizer, "a")[0] else [])


def test_empty_text_keeps_leading_special_tokens(any_tokenizer):
    before = specials(any_tokenizer, token_ids(any_tokenizer, "France"))
    assert len(token_ids(any_tokenizer, "")) == len(before)


def test_special_tokens_in_a_text_are_kept(any_tokenizer):
    eos = any_tokenizer.eos_token
    if eos is None or any_tokenizer.convert_tokens_to_ids(eos) in (None, any_tokenizer.unk_token_id):
        pytest.skip("no EOS")
    assert token_ids(any_tokenizer, f"France{eos}")[-1] == any_tokenizer.eos_token_id


def test_spaces_between_prompt_and_target_are_ignored(any_tokenizer):
    expected = encode(any_tokenizer, "The capital of {} is", "France", target="Paris")
    for prompt, target in (
        ("The capital of {} is ", "Paris"),
        ("The capital of {} is", " Paris "),
        ("The capital of {} is \t", " Paris"),
    ):
        assert encode(any_tokenizer, prompt, "France", target=target) == expected
        plain = encode_plain(any_tokenizer, prompt.format("France"), target)
        assert (plain.ids, plain.prompt_length) == (expected.ids, expected.prompt_length)


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("Question?\n", "Paris", "Question?\nParis"),
        ("Question?\n ", "Paris", "Question?\nParis"),
        ("日本の首都は", "東京", "日本の首都は東京"),
        ("日本の首都は", "Paris", "日本の首都はParis"),
        ("It is called", "東京", "It is called東京"),
        ("ここは東", "京都", "ここは東京都"),
        ("프랑스의 수도는", "파리", "프랑스의 수도는 파리"),
        ("Say 😀", "Paris", "Say 😀 Paris"),
        ("(", "Paris", "(Paris"),
        ("( ", "Paris", "( Paris"),
        ("Question?\n    ", "Paris", "Question?\n    Paris"),
    ],
)
def test_separator_depends_on_the_script(any_tokenizer, prompt, target, text):
    row = encode_plain(any_tokenizer, prompt, target)
    assert row.ids[: row.prompt_length] == token_ids(any_tokenizer, strip_trailing(prompt))
    assert spell(any_tokenizer, row.ids) == text


def test_target_that_merges_with_the_prompt_is_tokenized_separately():
    tokenizer = llama_fast()
    whole, single = token_ids(tokenizer, "東京都"), token_ids(tokenizer, "東")
    assert whole[: len(single)] != single, "the tokenizer merges these characters"
    assert spell(tokenizer, target_ids(tokenizer, "東", "京都")) == "京都"
    assert "▁" not in "".join(tokenizer.convert_ids_to_tokens(target_ids(tokenizer, "東", "京都")))


def test_target_that_always_merges_is_tokenized_without_special_tokens():
    """A separate text would start with a BOS."""
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "東": 3, "京都": 4, "a": 5}, unk_token="<unk>")
    )
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert token_ids(tokenizer, "東京都") == [0, 2], "the tokenizer merges these characters"
    assert target_ids(tokenizer, "東", "京都") == [4]


@pytest.mark.parametrize("make", [byte_level, llama_fast])
def test_padding_and_truncation_of_the_tokenizer_are_ignored(make):
    plain, padding = make(), make()
    expected = encode(plain, "The capital of {} is", "France", target="Paris")
    padding.padding_side = padding.truncation_side = "left"
    padding.backend_tokenizer.enable_truncation(4, direction="left")
    padding.backend_tokenizer.enable_padding(direction="left", length=40)
    assert encode(padding, "The capital of {} is", "France", target="Paris") == expected


def test_lossy_slow_tokenizer_raises_only_if_needed(tmp_path):
    lossy = slow("bpe", tmp_path, byte_fallback=False)
    assert spell(lossy, token_ids(lossy, "€")) != "€"
    row = encode(lossy, "{} is €", "France", target="Paris")
    assert spell(lossy, row.ids[: row.lookup + 1]) == "France"
    with pytest.raises(RequestError, match=r"no character offsets.*differs at character 8"):
        encode(lossy, "capital € of {}", "France")


def test_demo_tokenizer(tokenizer):
    row = encode(tokenizer, "The home of {} is in ", "Toze Lado Rekuno", target=" Port Alder")
    words = "<s> The home of Toze Lado Rekuno is in Port Alder".split()
    assert row.ids == tokenizer.convert_tokens_to_ids(words)
    assert (row.lookup, row.prompt_length) == (6, 9)
    assert (
        target_ids(tokenizer, "Bada speaks", "Port Alder")
        == tokenizer("Port Alder", add_special_tokens=False)["input_ids"]
    )


def test_target_or_prompt_without_tokens_raises(any_tokenizer, tokenizer):
    assert target_ids(any_tokenizer, "France is", " ") == []
    if not token_ids(any_tokenizer, ""):
        with pytest.raises(RequestError, match="no token for the prompt"):
            encode_plain(any_tokenizer, " ", "Paris")
    assert encode_plain(tokenizer, "", "Paris").prompt_length == 1
