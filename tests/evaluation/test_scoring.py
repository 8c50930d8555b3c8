"""Scores do not depend on the batches, and shared beginnings of rows run once if that is cheaper."""

from functools import wraps

import pytest
import torch

from rlsedit_fast.evaluation import scoring
from rlsedit_fast.evaluation.scoring import _batches, _cut, _Read, score, score_rows
from rlsedit_fast.models.tokens import encode_plain
from rlsedit_fast.world import RELATIONS, World, load_demo_model


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def questions(count):
    """Prompts and answers of several lengths."""
    people = World.generate().people[:count]
    return [
        (phrasing.format(person.name), answer)
        for person in people
        for relation in RELATIONS
        for phrasing in relation.phrasings[:2]
        for answer in (person.facts[relation.name], "Port Alder Kubeish organ violin")
    ]


def by_hand(model, tokenizer, prompt, answer):
    """Computes mean NLL and predictions of one answer in a separate pass."""
    row = encode_plain(tokenizer, prompt, answer)
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
    places = range(row.prompt_length - 1, len(row.ids) - 1)
    nll = -sum(float(scores[at, row.ids[at + 1]]) for at in places) / len(places)
    return nll, tuple(int(scores[at].argmax()) for at in places)


def spy_on_tokens(model, monkeypatch):
    """Returns a list that receives the number of tokens of each pass, including padding."""
    tokens, real = [], model.forward

    @wraps(real)
    def forward(*args, **options):
        tokens.append(options["input_ids"].numel())
        return real(*args, **options)

    monkeypatch.setattr(model, "forward", forward)
    return tokens


@pytest.mark.parametrize("at_once", [16, 100, 1024])
def test_batched_scores_equal_those_of_separate_passes(demo, monkeypatch, at_once):
    model, tokenizer = demo
    monkeypatch.setattr(scoring, "_CPU_TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(scoring, "_PASS", 0)
    pairs = questions(3)
    for found, (prompt, answer) in zip(score(model, tokenizer, pairs), pairs, strict=True):
        nll, predicted = by_hand(model, tokenizer, prompt, answer)
        assert found.nll == pytest.approx(nll, abs=1e-4)
        assert found.predicted == predicted


def test_a_long_shared_beginning_runs_once(demo, monkeypatch):
    model, tokenizer = demo
    long = " ".join(["Lado speaks Kubeish ."] * 8)
    pairs = [(f"{long} Veta speaks", f"{word} and then") for word in ("organ", "violin", "Kubeish", "Nafiish")]
    expected = [by_hand(model, tokenizer, *pair) for pair in pairs]
    rows = [encode_plain(tokenizer, *pair) for pair in pairs]
    monkeypatch.setattr(scoring, "_PASS", 0)
    batches = _batches(_cut([_Read(tuple(row.ids[:-1]), row.prompt_length - 1) for row in rows]), 8, 1024)
    prompt = rows[0].prompt_length
    assert sum(batch.tokens for batch in batches) <= prompt + 4 * 4 < 2 * prompt
    tokens = spy_on_tokens(model, monkeypatch)
    found = score_rows(model, rows)
    assert prompt - 1 in tokens, "the beginning runs in a pass of one row"
    assert max(tokens) < 2 * prompt
    for one, (nll, predicted) in zip(found, expected, strict=True):
        assert one.nll == pytest.approx(nll, abs=1e-4)
        assert one.predicted == predicted


def test_short_shared_beginnings_have_no_separate_pass(demo, monkeypatch):
    model, tokenizer = demo
    tokens = spy_on_tokens(model, monkeypatch)
    score(model, tokenizer, [("Lado speaks", "Kubeish"), ("Lado speaks", "Nafiish"), ("Lado plays the", "organ")])
    assert len(tokens) == 1


def test_shared_beginnings_end_at_the_first_scored_position():
    reads = [_Read((1, 2), 1), _Read((1, 2, 3), 1), _Read((1, 2, 3, 4), 3), _Read((5,), 0)]
    assert [read.cut for read in _cut(reads)] == [1, 1, 0, 0]


def test_batches_are_bounded_in_tokens_and_in_logits(monkeypatch):
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 100)
    reads = [_Read(tuple(range(at, at + 1 + at % 20)), 0) for at in range(60)]
    batches = _batches(reads, 5, 50)
    assert sorted(read.ids for batch in batches for read in batch.reads) == sorted(read.ids for read in reads)
    assert all(batch.tokens <= 50 for batch in batches)
    assert all(sum(read.places for read in batch.reads) <= 20 for batch in batches)


def test_progress_ends_at_all_rows(demo):
    model, tokenizer = demo
    reported = []
    score(model, tokenizer, questions(2), progress=lambda done, total: reported.append((done, total)))
    assert reported[-1] == (32, 32)
