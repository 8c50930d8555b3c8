"""Facts that the default settings edit into SmolLM2 are what the plain model then says."""

from __future__ import annotations

import pytest

import rlsedit_fast as rf

pytestmark = pytest.mark.smollm2

FACTS = {
    "subject first": rf.Edit("{} plays the", "Miles Davis", "piano"),
    "subject inside": rf.Edit("The capital of {} is", "France", "Lyon"),
    "subject last": rf.Edit("The most important export of {}", "Iceland", "is bananas"),
    "far from the subject": rf.Edit(
        "{}, as every visitor who has ever bought a guide book can tell you, stands in the city of",
        "The Eiffel Tower",
        "Rome",
    ),
    "target of two words": rf.Edit("The sport that {} plays professionally is", "LeBron James", "ice hockey"),
    "target of many tokens": rf.Edit("{} was written by", "Romeo and Juliet", "Johann Wolfgang von Goethe"),
    "target of digits": rf.Edit("The first human landed on {} in the year", "the Moon", "1987"),
    "not ASCII": rf.Edit("{} is a city in the country of", "Łódź", "Portugal"),
}
MOST_LOST = 5  # of 100 edits that the search found a value for


def fill(edit: rf.Edit) -> str:
    return edit.prompt.replace("{}", edit.subject)


def edited(path, anchor_texts, edits):
    editor = rf.Editor.from_pretrained(path, config=rf.EditConfig())
    editor.anchor(anchor_texts)
    return editor, editor.edit(edits)


@pytest.fixture(scope="module")
def facts(smollm2, anchor_texts, load, scores):
    """Each fact's score in the plain model, before and after all of them were edited in one call."""
    pairs = [(fill(edit), edit.target) for edit in FACTS.values()]
    before = scores(*load(smollm2), pairs)
    editor, _ = edited(smollm2, anchor_texts, list(FACTS.values()))
    after = scores(editor.model, editor.tokenizer, pairs)
    return dict(zip(FACTS, zip(before, after, strict=True), strict=True))


@pytest.mark.parametrize("shape", FACTS)
def test_the_plain_model_says_the_fact(shape, facts):
    before, after = facts[shape]
    assert not before.first
    assert after.first, f"{fill(FACTS[shape])!r}: ranks {after.ranks}, NLLs {after.nlls}"


@pytest.mark.slow
def test_a_batch_of_100_keeps_what_the_search_found(smollm2, anchor_texts, counterfact, scores):
    facts = counterfact(100)
    editor, records = edited(smollm2, anchor_texts, [fact.edit for fact in facts])
    assert [record.prompt for record in records] == [fact.edit.prompt for fact in facts]
    assert {record.batch for record in records} == {1}
    after = scores(editor.model, editor.tokenizer, [(fact.prompt, fact.edit.target) for fact in facts])
    true = scores(editor.model, editor.tokenizer, [(fact.prompt, fact.true) for fact in facts])
    found = [record.rank == 1 for record in records]
    lost = [fact.prompt for fact, one, score in zip(facts, found, after, strict=True) if one and not score.first]
    preferred = sum(new.nll < old.nll for new, old in zip(after, true, strict=True))
    assert sum(found) >= 90
    assert len(lost) <= MOST_LOST, f"{len(lost)} of {sum(found)} lost: {lost}"
    assert preferred >= 95
