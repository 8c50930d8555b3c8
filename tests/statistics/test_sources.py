"""Sources stream texts from any position, and their name depends on their content."""

import json
from itertools import islice

import pytest

from rlsedit_fast.errors import InputError
from rlsedit_fast.statistics.sources import GivenTexts, SelfGenerated, TextFile

WORDS = ("Lado", "speaks", "Kubeish", ".", "Veta", "plays", "the", "organ")


def texts_of(source, tokenizer, start=0):
    return [(place, tokenizer.decode(ids[1:])) for place, ids in source.read(tokenizer, start)]


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return TextFile(path)


def test_plain_text_is_read_by_paragraphs(tokenizer, tmp_path):
    source = write(tmp_path / "a.txt", "\ufeffLado speaks\nKubeish .\n \n\nVeta plays\n\nthe\norgan")
    texts = [text for _, text in texts_of(source, tokenizer)]
    assert texts == ["Lado speaks Kubeish .", "Veta plays", "the organ"]


def test_text_without_blank_lines_still_streams(tokenizer, tmp_path):
    one_line = write(tmp_path / "line.txt", "Lado speaks " * 3000)
    lines = write(tmp_path / "lines.txt", "Lado speaks \n" * 3000)
    for source in (one_line, lines):
        texts = [text for _, text in texts_of(source, tokenizer)]
        assert len(texts) >= 4
        assert all(len(text) < 2 * 8192 for text in texts)
    assert sum(text.count("speaks") for text in texts) == 3000


def test_json_lines_give_their_text_field(tokenizer, tmp_path):
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(("Lado speaks", " ", "Veta\nplays"))]
    source = write(tmp_path / "a.jsonl", "\n\n".join(lines))
    assert [text for _, text in texts_of(source, tokenizer)] == ["Lado speaks", "Veta plays"]


@pytest.mark.parametrize("line", ['{"content": "x"}', '{"text": 3}', "[1]", "plain", '{"text": "x"'])
def test_json_lines_without_text_raise_with_the_line_number(tokenizer, tmp_path, line):
    source = write(tmp_path / "a.jsonl", '{"text": "Lado"}\n' + line)
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: .*'text'"):
        list(source.read(tokenizer, 0))


def test_unreadable_files_raise(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"none\.txt' cannot be read"):
        TextFile(tmp_path / "none.txt")
    with pytest.raises(InputError, match="cannot be read"):
        TextFile(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Zoë".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt' is not UTF-8"):
        list(TextFile(tmp_path / "latin.txt").read(tokenizer, 0))


def test_the_name_of_a_file_source_depends_on_its_content_not_its_folder(tmp_path):
    one = write(tmp_path / "one" / "a.txt", "Lado speaks")
    same = write(tmp_path / "two" / "a.txt", "Lado speaks")
    other = write(tmp_path / "three" / "a.txt", "Lado speaks .")
    assert one.name == same.name != other.name
    assert one.name.startswith("a.txt, sha256 ")


@pytest.mark.parametrize("kind", ["given", "txt", "jsonl", "self"])
def test_reading_resumes_from_any_position(make_model, tokenizer, tmp_path, kind):
    texts = [" ".join(WORDS[: 1 + i % 7]) for i in range(150)]
    texts[3] = texts[80] = " "
    if kind == "self":
        source = SelfGenerated(make_model("llama"), seed=3, length=9, batch=40)
    elif kind == "given":
        source = GivenTexts(texts)
    elif kind == "txt":
        source = write(tmp_path / "a.txt", "\n\n".join(texts))
    else:
        source = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    whole = list(islice(source.read(tokenizer, 0), 140))
    assert len({place for place, _ in whole}) == 140
    for at in (0, 1, 63, 64, 79, 81, 138):
        rest = list(islice(source.read(tokenizer, whole[at][0]), 139 - at))
        assert rest == whole[at + 1 :]


def test_self_generated_texts_have_their_seed_in_the_name(make_model, tokenizer):
    model = make_model("gpt2")
    sources = [SelfGenerated(model, seed=seed, length=6, batch=5) for seed in (0, 0, 1)]
    first, again, other = ([ids for _, ids in islice(source.read(tokenizer, 0), 12)] for source in sources)
    assert first == again != other
    assert sources[0].name == sources[1].name != sources[2].name
    assert first[:5] != first[5:10], "each batch has its own seed"
    assert all(2 <= len(ids) <= 6 for ids in first)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_self_generated_texts_are_at_most_as_long_as_the_model_supports(make_model, tokenizer, name):
    source = SelfGenerated(make_model(name), batch=3)
    lengths = [len(ids) for _, ids in islice(source.read(tokenizer, 0), 3)]
    assert max(lengths) == 64
    assert "64 tokens" in source.name


@pytest.mark.parametrize("wrong", [{"length": 1}, {"batch": 0}])
def test_invalid_lengths_and_batches_raise(make_model, wrong):
    with pytest.raises(InputError, match="expected at least 2 and at least 1"):
        SelfGenerated(make_model("llama"), **wrong)
