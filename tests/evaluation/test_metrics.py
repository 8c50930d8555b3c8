"""Scores and metrics of predetermined distributions."""

import math

import pytest

from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import Case, Question, world_cases
from rlsedit_fast.evaluation.metrics import efficacy_strict, evaluate, score_before
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.world import RELATIONS, World

from .conftest import TableModel


def test_every_token_of_an_answer_counts(tokenizer):
    distributions = {
        "Lado lives in": {"Port": 0.8, "Old": 0.2},
        "Lado lives in Port": {"Alder": 0.5, "Garnet": 0.5 - 1e-3},
    }
    model = TableModel(tokenizer, distributions)
    alder, garnet, old = score(
        model, tokenizer, [("Lado lives in", answer) for answer in ("Port Alder", "Port Garnet", "Old")]
    )
    assert alder.exact
    assert not garnet.exact, "its second token is not ranked first"
    assert not old.exact
    assert alder.nll == pytest.approx(-(math.log(0.8) + math.log(0.5)) / 2, abs=1e-2)
    assert garnet.predicted == alder.predicted


def test_scores_are_in_the_order_of_the_questions(tokenizer):
    distributions = {"Lado speaks": {"Kubeish": 1.0}, "At home , Lado talks in": {"Nafiish": 1.0}}
    questions = [("At home , Lado talks in", "Nafiish"), ("Lado speaks", "Kubeish"), ("Lado speaks", "Nafiish")]
    assert [s.exact for s in score(TableModel(tokenizer, distributions), tokenizer, questions)] == [True, True, False]


CASE = Case(
    edit=Edit("{} plays the", "Lado", "organ"),
    question=Question("Lado plays the", "violin"),
    paraphrases=(
        Question("Friends love to hear Lado play the", "violin"),
        Question("Lado learned to play the", "violin"),
    ),
    neighbors=(Question("Veta plays the", "violin"), Question("Toze plays the", "violin")),
    namesakes=(),
    same_subject=(Question("Lado speaks", "Kubeish"),),
)
BEFORE = {
    "Veta plays the": {"violin": 0.9},
    "Toze plays the": {"violin": 0.9},
    "Lado speaks": {"Kubeish": 0.9},
}
AFTER = {
    "Lado plays the": {"organ": 0.6, "violin": 0.4},
    "Friends love to hear Lado play the": {
        "organ": 0.3,
        "violin": 0.2,
        "lute": 0.5,
    },  # more likely than the old answer, not first
    "Lado learned to play the": {"organ": 0.2, "violin": 0.7},
    "Veta plays the": {"violin": 0.4, "organ": 0.1, "lute": 0.5},  # more likely than the new answer, but changed
    "Toze plays the": {"violin": 0.9},
    "Lado speaks": {"Kubeish": 0.9},
}


def test_metrics_of_a_case_with_known_distributions(tokenizer):
    before = score_before(TableModel(tokenizer, BEFORE), tokenizer, [CASE])
    report = evaluate(TableModel(tokenizer, AFTER), tokenizer, [CASE], before)
    assert (report.efficacy.forced, report.efficacy.strict, report.efficacy.prompts) == (1.0, 1.0, 1)
    assert (report.generalization.forced, report.generalization.strict, report.generalization.prompts) == (0.5, 0.0, 2)
    assert (report.neighbors.forced, report.neighbors.strict, report.neighbors.prompts) == (1.0, 0.5, 2)
    assert (report.same_subject.forced, report.same_subject.strict) == (1.0, 1.0)
    assert (report.namesakes.forced, report.namesakes.strict, report.namesakes.prompts) == (None, None, 0)
    assert efficacy_strict(TableModel(tokenizer, AFTER), tokenizer, [CASE]) == 1.0


def test_ties_do_not_count_as_success(tokenizer):
    tied = {**AFTER, "Lado plays the": {"organ": 0.5, "violin": 0.5}, "Toze plays the": {"violin": 0.5, "organ": 0.5}}
    before = score_before(TableModel(tokenizer, BEFORE), tokenizer, [CASE])
    report = evaluate(TableModel(tokenizer, tied), tokenizer, [CASE], before)
    assert report.efficacy.forced == 0.0
    assert report.neighbors.forced == 0.5


def test_evaluation_prompts_of_cases_are_not_edited():
    world = World.generate()
    cases = world_cases(world, 300, seed=1)
    facts = {person.name: person.facts for person in world.people}
    edited = {case.edit.subject for case in cases}
    assert len(edited) == 300
    for case in cases:
        relation = next(r for r in RELATIONS if case.edit.prompt in r.phrasings)
        assert case.edit.prompt == relation.phrasings[0]
        old = facts[case.edit.subject][relation.name]
        assert case.question.answer == old != case.edit.target
        assert len(case.paraphrases) >= 4
        assert case.question.prompt not in {q.prompt for q in case.paraphrases}
        for question in case.neighbors:
            assert question.answer == old
        for question in (*case.neighbors, *case.namesakes):
            assert not any(name in question.prompt for name in edited)
            assert question.answer != case.edit.target
        edited_prompts = {r.phrasings[0].format(case.edit.subject) for r in RELATIONS}
        assert len({q.prompt for q in case.same_subject} - edited_prompts) == 6
    assert world_cases(world, 300, seed=1) == cases
    assert world_cases(world, 300, seed=2) != cases


@pytest.mark.parametrize("count", [0, 2001])
def test_more_edits_than_people_raise(count):
    with pytest.raises(InputError, match="1 to 2000"):
        world_cases(World.generate(), count, seed=0)
