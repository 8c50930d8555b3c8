"""The metrics of CounterFact, teacher-forced, and beside each its strict forms; of zsRE by tokens, of MQuAKE by chain.

Teacher-forced, as ROME defines them (Meng et al. 2022, arXiv 2202.05262, sec. 3.3, and its released evaluation, which
takes the mean over an answer's tokens): an edited prompt or a paraphrase succeeds where NLL(new) < NLL(old), a prompt
of the neighbourhood where NLL(old) < NLL(new); a tie succeeds nowhere. The score is the harmonic mean of the three (the
same section; MEMIT, arXiv 2210.07229, sec. 5.2). Strict: every token of the answer is ranked first, which MEMIT's
release reports beside them as accuracy; its accuracy on the neighbourhood is `said` here, whether the old answer is
ranked first, where `strict` asks whether the prediction is unchanged. Shares are over all prompts; the releases take
them over each case first. By tokens: the share of an answer's tokens that are ranked first, which is zsRE's measure
(MEND, arXiv 2110.11309); of what is to stay, the share of places where the prediction is what it was before any edit
(locality, as EasyEdit has it, arXiv 2308.07269).

By chain: a multi-hop case counts once, and it is right if any wording of its question is answered right, by the new
answer or one of its aliases (MQuAKE, Zhong et al. 2023, arXiv 2305.14795, and its release, whose README and evaluation
say so). The questions are asked as they stand; the paper puts worked examples before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rlsedit_fast.evaluation.cases import Case, MultiHop, Question
from rlsedit_fast.evaluation.scoring import Progress, Score, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Metric:
    """Shares of prompts, with how many there were; None where there were none.

    Attributes:
        forced: by comparing the NLL of two answers.
        strict: by what is ranked first at every token of the answer: the new answer where it was edited in; where
            something is to stay, the prediction before any edit.
        prompts: how many prompts they are shares of.
        said: every token of the answer that is right there is ranked first: the new one where it was edited in, else
            the old one, whether or not the model knew it.
        tokens: the mean share of places at which the prediction is right (of the new answer), or unchanged.
    """

    forced: float | None
    strict: float | None
    prompts: int
    said: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Report:
    """What became of a stream of edits.

    Attributes:
        efficacy: on the edited prompts, the new answer is likelier than the old; strict: it is ranked first.
        generalization: the same on the paraphrases.
        neighbors: on neighbours' prompts, the old answer is still the likelier; strict: the prediction is unchanged.
        namesakes: the same for people who share two of the subject's names.
        same_subject: other facts of the subject are still likelier than the new answer; strict: unchanged.
        rebuilt: the same as `neighbors` on neighbourhoods that were rebuilt from a data set's records.
        multihop: of chains of facts, not of prompts: on any wording of its question the new answer is likelier than the
            old; strict: on any wording the new answer or one of its aliases is ranked first.
    """

    efficacy: Metric
    generalization: Metric
    neighbors: Metric
    namesakes: Metric
    same_subject: Metric
    rebuilt: Metric
    multihop: Metric

    @property
    def score(self) -> float | None:
        """Harmonic mean of efficacy, generalization and specificity, teacher-forced; None where one is missing."""
        return harmonic_mean([metric.forced for metric in (self.efficacy, self.generalization, self.neighbors)])

    @property
    def strict_score(self) -> float | None:
        """The same of the strict forms."""
        return harmonic_mean([metric.strict for metric in (self.efficacy, self.generalization, self.neighbors)])


@dataclass(frozen=True)
class Verdict:
    """One prompt of one case, or one chain of facts; see `Report`; `tokens` is a chain's best wording's."""

    forced: bool
    strict: bool
    said: bool
    tokens: float


Judged = dict[str, tuple[Verdict, ...]]
"""What became of one case, by the name of the metric in `Report`."""

Before = dict[Question, Score]
"""Each question about what is to stay, with its score before any edit."""

Known = dict[tuple[str, str], Score]
"""Scores of a model in one state, by prompt and answer."""

_EDITED = {"efficacy": "asked", "generalization": "paraphrases"}
_KEPT = ("neighbors", "namesakes", "same_subject", "rebuilt")


def harmonic_mean(shares: Sequence[float | None]) -> float | None:
    """0 if one of them is 0; None if one is missing."""
    known = [share for share in shares if share is not None]
    if len(known) < len(shares) or not known:
        return None
    return 0.0 if min(known) <= 0 else len(known) / sum(1 / share for share in known)


def score_before(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    *,
    known: Before | None = None,
    progress: Progress | None = None,
) -> Before:
    """Scores, before the first edit, everything that edits are to leave alone.

    Args:
        model: the unedited model.
        tokenizer: its tokenizer.
        cases: in any number.
        known: scores of this model that are known already; the others are added to it.
        progress: called after each batch with the questions done so far.
    """
    known = {} if known is None else known
    questions = dict.fromkeys(q for case in cases for group in _KEPT for q in getattr(case, group))
    new = [question for question in questions if question not in known]
    found = score(model, tokenizer, [(q.prompt, q.answer) for q in new], progress=progress)
    known.update(zip(new, found, strict=True))
    return known


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    before: Before,
    *,
    known: Known | None = None,
    progress: Progress | None = None,
) -> list[Judged]:
    """Every prompt of every case on an edited model, in the order of the cases.

    Args:
        model: the edited model.
        tokenizer: its tokenizer.
        cases: in any number.
        before: the scores of the unedited model.
        known: scores of the model as it is now that are known already; the others are added to it.
        progress: called after each batch with the prompts done so far, each answer counted.
    """
    known = {} if known is None else known
    flat = [(case, q) for case in cases for group in (*_EDITED.values(), *_KEPT) for q in _questions(case, group)]
    chains = [chain for case in cases for chain in case.multihop]
    asked = [(q.prompt, answer) for case, q in flat for answer in (case.edit.target, q.answer)]
    asked += [(prompt, answer) for c in chains for prompt in c.prompts for answer in (c.answer, *c.right)]
    new = [pair for pair in dict.fromkeys(asked) if pair not in known]
    known.update(zip(new, score(model, tokenizer, new, progress=progress), strict=True))

    def edited(case: Case, q: Question) -> Verdict:
        new, old = known[q.prompt, case.edit.target], known[q.prompt, q.answer]
        return Verdict(new.nll < old.nll, new.exact, new.exact, new.right)

    def kept(case: Case, q: Question) -> Verdict:
        new, old, was = known[q.prompt, case.edit.target], known[q.prompt, q.answer], before[q]
        same = [now == then for now, then in zip(old.predicted, was.predicted, strict=True)]
        return Verdict(old.nll < new.nll, all(same), old.exact, sum(same) / len(same))

    def followed(chain: MultiHop) -> Verdict:
        forced = any(known[prompt, chain.new_answer].nll < known[prompt, chain.answer].nll for prompt in chain.prompts)
        said = [known[prompt, answer] for prompt in chain.prompts for answer in chain.right]
        exact = any(one.exact for one in said)
        return Verdict(forced, exact, exact, max(one.right for one in said))

    return [
        {name: tuple(edited(case, q) for q in _questions(case, group)) for name, group in _EDITED.items()}
        | {name: tuple(kept(case, q) for q in _questions(case, name)) for name in _KEPT}
        | {"multihop": tuple(followed(chain) for chain in case.multihop)}
        for case in cases
    ]


def summarize(judged: Sequence[Judged]) -> Report:
    """The shares over some cases."""
    return Report(**{field.name: _metric([v for one in judged for v in one[field.name]]) for field in fields(Report)})


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], before: Before
) -> Report:
    """All metrics of `cases` on an edited model."""
    return summarize(judge(model, tokenizer, cases, before))


def efficacy_strict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case]) -> float:
    """Share of `cases` whose edited prompt is answered with the new target, every token ranked first."""
    scores = score(model, tokenizer, [(case.asked.prompt, case.edit.target) for case in cases])
    return sum(s.exact for s in scores) / len(scores)


def _questions(case: Case, group: str) -> tuple[Question, ...]:
    found = getattr(case, group)
    return (found,) if isinstance(found, Question) else found


def _metric(verdicts: Sequence[Verdict]) -> Metric:
    if not verdicts:
        return Metric(None, None, 0)

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(verdicts)

    return Metric(
        mean(v.forced for v in verdicts),
        mean(v.strict for v in verdicts),
        len(verdicts),
        mean(v.said for v in verdicts),
        mean(v.tokens for v in verdicts),
    )
