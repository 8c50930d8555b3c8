"""The metrics of CounterFact (Meng et al. 2022), teacher-forced, and beside each its strict form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsedit_fast.evaluation.cases import Case, Question
from rlsedit_fast.evaluation.scoring import Score, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Metric:
    """A share of prompts, with how many there were; None where there were none.

    Attributes:
        forced: by comparing the NLL of two answers.
        strict: by what is ranked first at every token of the answer.
        prompts: how many prompts it is the share of.
    """

    forced: float | None
    strict: float | None
    prompts: int


@dataclass(frozen=True)
class Report:
    """What became of a stream of edits.

    Attributes:
        efficacy: on the edited prompts, the new answer is likelier than the old; strict: it is ranked first.
        generalization: the same on the paraphrases.
        neighbors: on neighbours' prompts, the old answer is still the likelier; strict: the prediction is unchanged.
        namesakes: the same for people who share two of the subject's names.
        same_subject: other facts of the subject are still likelier than the new answer; strict: unchanged.
    """

    efficacy: Metric
    generalization: Metric
    neighbors: Metric
    namesakes: Metric
    same_subject: Metric


Before = dict[Question, Score]
"""Each question about what is to stay, with its score before any edit."""


def score_before(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case]) -> Before:
    """Scores, before the first edit, everything that edits are to leave alone."""
    questions = list(dict.fromkeys(q for case in cases for q in (*case.neighbors, *case.namesakes, *case.same_subject)))
    return dict(zip(questions, score(model, tokenizer, [(q.prompt, q.answer) for q in questions]), strict=True))


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], before: Before
) -> Report:
    """All metrics of `cases` on an edited model."""
    groups = {name: [(c, q) for c in cases for q in _questions(c, name)] for name in _GROUPS}
    flat = [(case, question) for members in groups.values() for case, question in members]
    pairs = [(q.prompt, answer) for case, q in flat for answer in (case.edit.target, q.answer)]
    unique = list(dict.fromkeys(pairs))
    known = dict(zip(unique, score(model, tokenizer, unique), strict=True))

    def told(members: Iterable[tuple[Case, Question]]) -> Metric:
        seen = [(known[q.prompt, c.edit.target], known[q.prompt, q.answer]) for c, q in members]
        return _metric([new.nll < old.nll for new, old in seen], [new.exact for new, _ in seen])

    def kept(members: Iterable[tuple[Case, Question]]) -> Metric:
        seen = [(known[q.prompt, c.edit.target], known[q.prompt, q.answer], before[q]) for c, q in members]
        return _metric(
            [old.nll < new.nll for new, old, _ in seen], [old.predicted == was.predicted for _, old, was in seen]
        )

    return Report(
        efficacy=told(groups["asked"]),
        generalization=told(groups["paraphrases"]),
        neighbors=kept(groups["neighbors"]),
        namesakes=kept(groups["namesakes"]),
        same_subject=kept(groups["same_subject"]),
    )


def efficacy_strict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case]) -> float:
    """Share of `cases` whose edited prompt is answered with the new target, every token ranked first."""
    scores = score(model, tokenizer, [(case.asked.prompt, case.edit.target) for case in cases])
    return sum(s.exact for s in scores) / len(scores)


_GROUPS = ("asked", "paraphrases", "neighbors", "namesakes", "same_subject")


def _questions(case: Case, group: str) -> tuple[Question, ...]:
    found = getattr(case, group)
    return (found,) if isinstance(found, Question) else found


def _metric(forced: Sequence[bool], strict: Sequence[bool]) -> Metric:
    if not forced:
        return Metric(None, None, 0)
    return Metric(sum(forced) / len(forced), sum(strict) / len(strict), len(forced))
