"""The cache returns the best statistics of exactly the given model."""

import os

import torch

from rlsedit_fast.files import cache_folder
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.statistics import KeyStatistics, collect
from rlsedit_fast.statistics.cache import cache_path, find_cached
from rlsedit_fast.statistics.sources import GivenTexts

TEXTS = ["Lado speaks Kubeish .", "Veta plays the organ and the organ .", "Fado"]


def put(directory, identity, source, *, tokens, layers=(1, 2), held_out=0):
    moments = {layer: torch.full((3, 3), float(tokens)) for layer in layers}
    held = {layer: moment.clone() for layer, moment in moments.items()} if held_out else {}
    path = cache_path(identity, layers, source, tokens, directory=directory)
    KeyStatistics(moments, tokens, identity, source, held, held_out).save(path)
    return path


def test_the_environment_determines_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("RLSEDIT_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "rlsedit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "rlsedit"
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "r"))
    assert cache_folder() == tmp_path / "r"
    assert find_cached("ab" * 32, [1]) is None
    put(tmp_path / "r", "ab" * 32, "s", tokens=5)
    assert find_cached("ab" * 32, [1]).tokens == 5


def test_another_model_with_the_same_folder_name_is_a_cache_miss(make_model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    found = []
    for parent, name in (("one", "llama"), ("two", "qwen2")):
        make_model(name).save_pretrained(tmp_path / parent / "checkpoint")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / parent / "checkpoint")
        assert find_cached(fingerprint(model), (1, 2), directory=tmp_path) is None
        decoder, source = find_decoder(model), GivenTexts(TEXTS)
        statistics = collect(decoder, tokenizer, decoder.select((1, 2)), source, longest=64)
        statistics.save(cache_path(statistics.fingerprint, (1, 2), source.name, None, directory=tmp_path))
        found.append(find_cached(fingerprint(model), (1, 2), directory=tmp_path))
        assert all(torch.equal(found[-1].moments[layer], statistics.moments[layer]) for layer in (1, 2))
    assert not torch.equal(found[0].moments[1], found[1].moments[1])


def test_statistics_with_most_tokens_are_preferred_then_the_newest(tmp_path):
    identity = "ab" * 32
    put(tmp_path, identity, "few", tokens=10)
    old = put(tmp_path, identity, "old", tokens=30)
    new = put(tmp_path, identity, "new", tokens=30)
    os.utime(old, (1, 1))
    os.utime(new, (2, 2))
    put(tmp_path, "cd" * 32, "other", tokens=1000)
    assert find_cached(identity, [1, 2], directory=tmp_path).source == "new"
    os.utime(old, (3, 3))
    assert find_cached(identity, [1, 2], directory=tmp_path).source == "old"


def test_of_as_many_tokens_those_with_a_held_out_part_are_preferred(tmp_path):
    put(tmp_path, "ab" * 32, "parts", tokens=27, held_out=3)
    put(tmp_path, "ab" * 32, "newer", tokens=30)
    assert find_cached("ab" * 32, [1, 2], directory=tmp_path).source == "parts"
    put(tmp_path, "ab" * 32, "more", tokens=31)
    assert find_cached("ab" * 32, [1, 2], directory=tmp_path).source == "more"


def test_all_requested_layers_must_exist_and_only_they_are_read(tmp_path):
    identity = "ab" * 32
    put(tmp_path, identity, "narrow", tokens=50, layers=(2,))
    put(tmp_path, identity, "wide", tokens=10, layers=(1, 2, 3))
    found = find_cached(identity, [3, 2], directory=tmp_path)
    assert found.source == "wide"
    assert set(found.moments) == {2, 3}
    assert find_cached(identity, [2], directory=tmp_path).source == "narrow"
    assert find_cached(identity, [4], directory=tmp_path) is None


def test_damaged_and_misnamed_files_are_skipped_with_a_warning(tmp_path, caplog):
    identity = "ab" * 32
    put(tmp_path, identity, "good", tokens=10)
    flipped = put(tmp_path, identity, "flipped", tokens=50)
    content = flipped.read_bytes()
    flipped.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cut = put(tmp_path, identity, "cut", tokens=60)
    cut.write_bytes(cut.read_bytes()[:-1])
    put(tmp_path, "cd" * 32, "x", tokens=70).rename(tmp_path / f"{identity}-0.safetensors")
    assert find_cached(identity, [1, 2], directory=tmp_path).source == "good"
    for message in (
        f"{flipped.name}' is damaged",
        f"{cut.name}' is damaged",
        "a model with the fingerprint cdcdcdcdcdcd",
    ):
        assert message in caplog.text


def test_every_collection_has_its_own_path(tmp_path):
    arguments = [("ab", (1, 2), "a", 5), ("cd", (1, 2), "a", 5), ("ab", (1,), "a", 5), ("ab", (1, 2), "b", 5)]
    paths = {cache_path(*one, directory=tmp_path) for one in (*arguments, ("ab", (1, 2), "a", None))}
    assert len(paths) == 5
    assert cache_path("ab", (1, 2), "a", 5, held_out=0.0, directory=tmp_path) not in paths
    assert cache_path("ab", [2, 1], "a", 5, directory=tmp_path) in paths
