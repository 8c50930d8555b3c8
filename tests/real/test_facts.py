"""Real models state the targets of edits with the default settings."""

from __future__ import annotations

import pytest

import rlsedit_fast as rf

pytestmark = pytest.mark.smollm2  # tests that are also marked `real` run only in `make real`

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
MOST_LOST = 5  # of 100 edits whose value search converged
CONTEXTS = {"chat": (), "prefixes": ("", "The report says this.")}
PILOT = 20  # fewer than by default, since each trial of the calibration writes and reads the whole pilot


def fill(edit: rf.Edit) -> str:
    return edit.prompt.replace("{}", edit.subject)


def edited(path, anchor_texts, edits, pilot=None, **changes):
    editor = rf.Editor.from_pretrained(path, config=rf.EditConfig(**changes))
    editor.anchor(anchor_texts)
    if pilot is not None:
        editor.calibrate(edits[:pilot])
    return editor, editor.edit(edits)


@pytest.fixture(scope="module")
def batch(smollm2, anchor_texts, counterfact):
    """100 CounterFact facts, edited in one batch with the default settings, without refinement and with fewer contexts.

    The contexts in a chat and behind prefixes take most of the time of a search.
    """
    facts = counterfact(100)
    edits = [fact.edit for fact in facts]
    editor, records = edited(smollm2, anchor_texts, edits, PILOT, refine=0, contexts=CONTEXTS)
    return facts, editor, records


@pytest.fixture(scope="module")
def facts(smollm2, anchor_texts, load, scores):
    """Scores of each fact before and after all facts were edited in one call with the default settings."""
    pairs = [(fill(edit), edit.target) for edit in FACTS.values()]
    before = scores(*load(smollm2), pairs)
    editor, _ = edited(smollm2, anchor_texts, list(FACTS.values()))
    after = scores(editor.model, editor.tokenizer, pairs)
    return dict(zip(FACTS, zip(before, after, strict=True), strict=True))


@pytest.mark.slow
def test_a_batch_of_100_states_the_targets_whose_search_converged(batch, scores):
    facts, editor, records = batch
    assert [record.prompt for record in records] == [fact.edit.prompt for fact in facts]
    assert {record.batch for record in records} == {1}
    after = scores(editor.model, editor.tokenizer, [(fact.prompt, fact.edit.target) for fact in facts])
    true = scores(editor.model, editor.tokenizer, [(fact.prompt, fact.true) for fact in facts])
    found = [record.search_rank == 1 for record in records]
    lost = [fact.prompt for fact, one, score in zip(facts, found, after, strict=True) if one and not score.first]
    preferred = sum(new.nll < old.nll for new, old in zip(after, true, strict=True))
    assert sum(found) >= 90
    assert len(lost) <= MOST_LOST, f"{len(lost)} of {sum(found)} lost: {lost}"
    assert preferred >= 95


@pytest.mark.slow
def test_records_agree_with_independent_scores(batch, scores):
    facts, editor, records = batch
    after = scores(editor.model, editor.tokenizer, [(fact.prompt, fact.edit.target) for fact in facts])
    assert [record.success for record in records] == [score.first for score in after]
    for record, score in zip(records, after, strict=True):
        assert record.nll == pytest.approx(score.nll, abs=1e-3)


@pytest.mark.slow
def test_the_realized_share_is_the_adherence(batch):
    _, editor, records = batch
    realized = sum(record.realized for record in records) / len(records)
    assert realized == pytest.approx(editor.config.prior.adherence, abs=0.02)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("shape", FACTS)
def test_the_edited_model_states_the_fact(shape, facts):
    before, after = facts[shape]
    assert not before.first
    assert after.first, f"{fill(FACTS[shape])!r}: ranks {after.ranks}, NLLs {after.nlls}"


@pytest.mark.real
@pytest.mark.slow
def test_the_realized_share_in_one_layer_is_the_adherence(smollm2, anchor_texts, counterfact):
    edits = [fact.edit for fact in counterfact(12, 100)]
    _, records = edited(smollm2, anchor_texts, edits, layers=(5,), prior={"adherence": 0.95}, refine=0)
    assert sum(record.realized for record in records) / len(records) == pytest.approx(0.95, abs=0.02)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"layers": (4,)}])
def test_gemma_states_the_targets_of_its_edits(gemma, anchor_texts, counterfact, scores, changes):
    facts = counterfact(40)
    editor, records = edited(gemma, anchor_texts, [fact.edit for fact in facts], **changes)
    after = scores(editor.model, editor.tokenizer, [(fact.prompt, fact.edit.target) for fact in facts])
    assert sum(score.first for score in after) >= 38
    realized = sum(record.realized for record in records) / len(records)
    assert realized == pytest.approx(editor.config.prior.adherence, abs=0.02)
