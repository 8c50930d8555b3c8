"""Evaluation in a chat."""

from dataclasses import replace

import pytest

from rlsedit_fast.data import Edit
from rlsedit_fast.evaluation import (
    Question,
    chat_neighbors,
    contains_answer,
    evaluate_chat,
    questions_about,
    relation_questions,
    stream,
    subject_of,
)
from rlsedit_fast.evaluation.cases import Case
from rlsedit_fast.evaluation.chat import ANSWER_TOKENS
from rlsedit_fast.evaluation.demo import CONFIG
from rlsedit_fast.evaluation.grounds import GroundSpec, make_cases, make_ground
from rlsedit_fast.evaluation.plan import Plan
from rlsedit_fast.evaluation.runs import value
from rlsedit_fast.world import load_demo_model

PERSON = "Toze Lado Rekuno"


def test_there_are_questions_for_all_relations():
    every = relation_questions()
    assert len([one for one in every if one.relation]) == 34
    prompts = [prompt for one in every for prompt in one.prompts]
    assert len(prompts) == len(set(prompts))
    for one in every:
        assert len(set(one.questions)) == 3
        assert all(text.count("{}") == 1 and text.endswith("?") for text in one.questions)
        assert all(prompt.count("{}") == 1 for prompt in one.prompts)


def test_questions_are_found_by_relation_prompt_or_the_prompt_itself():
    assert questions_about("The capital of {} is", "Peru")[0] == "What is the capital of Peru?"
    assert questions_about("unknown {}", "Peru", "P36")[0] == "What is the capital of Peru?"
    assert questions_about("What does {} make?", "UniFirst") == ("What does UniFirst make?",)
    assert questions_about("unknown {}", "Peru") == ()
    assert subject_of("The mother tongue of Ada Bell is") == ("The mother tongue of {} is", "Ada Bell")
    assert subject_of("no known prompt") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("It is Lyon.", True), ("LYON", True), ("Lyonnais", False), ("aLyon", False), ("New\nLyon, yes", True)],
)
def test_answers_count_as_whole_words(text, found):
    assert contains_answer(text, " Lyon ") is found


def test_a_chat_is_measured_by_start_question_and_neighbors():
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
    stated = Case(
        Edit("{} plays the", PERSON, "clarinet"),
        Question(f"{PERSON} plays the", "clarinet"),
        (),
        (Question("Kuno Lado Toze plays the", "harp"),),
        (),
        (),
        asked=(f"{PERSON} plays the",),
    )
    other = Case(Edit("{} plays the", PERSON, "harp"), stated.question, (), (), (), ())
    before = chat_neighbors(model, tokenizer, [stated, other])
    outcome = evaluate_chat(model, tokenizer, [stated, other], before)
    assert (outcome.start.count, outcome.start.of) == (1, 2)
    assert (outcome.neighbors.count, outcome.neighbors.of) == (1, 1)
    ((question, target, answer),) = outcome.answers
    assert (question, target) == (f"{PERSON} plays the", "clarinet")
    assert outcome.question.count == contains_answer(answer, "clarinet")
    assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) <= ANSWER_TOKENS
    changed = evaluate_chat(model, tokenizer, [stated], {prompt: -1 for prompt in before})
    assert changed.neighbors.count == 0


def test_a_run_reports_the_chat_beside_raw_text(tmp_path):
    def load():
        model, tokenizer = load_demo_model()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
        return model, tokenizer

    ground = make_ground(GroundSpec())
    plan = Plan(label="rls", stream="plain", edits=5, seed=1, config=CONFIG, checkpoints=(), probed=100, free=3)
    cases, _ = make_cases(GroundSpec(), "plain", 5, 1)
    cases = [replace(case, asked=(case.question.prompt,)) for case in cases]
    found = stream.run(replace(ground, load=load), plan, cases, tmp_path / "run.json")
    assert value(found, "chat_start", "strict") > 0.5
    assert 0 <= value(found, "chat_question", "free") <= 1
    assert 0 <= value(found, "chat_neighbors", "strict") <= 1
    plain = stream.run(ground, plan, cases, tmp_path / "plain.json")
    assert value(plain, "chat_start", "strict") is None
