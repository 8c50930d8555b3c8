"""Metrics of edited models by their published definitions: CounterFact, zsRE and MQuAKE.

All metrics are fractions of prompts. Published releases average over the prompts of each case, then over the cases.

- `forced` (ROME, Meng et al. 2022, arXiv 2202.05262, sec. 3.3, with mean NLL per token as in its release): an edited
  prompt or a paraphrase succeeds if NLL(new) < NLL(old), a neighborhood prompt if NLL(old) < NLL(new). Ties fail. The
  score is the harmonic mean of the three (same section; MEMIT, arXiv 2210.07229, sec. 5.2).
- `strict`: every token of the new answer is ranked first, which the release of MEMIT reports as accuracy; for facts
  that must not change, the predicted tokens are the same as before the edits.
- `exact`: every token of the correct answer is ranked first. For facts that must not change this is the old answer, as
  in the accuracy of MEMIT's release on the neighborhood. Result files call this form `said`.
- `tokens`: the fraction of the new answer's tokens that are ranked first, as for zsRE (MEND, arXiv 2110.11309); for
  facts that must not change, the fraction of positions with an unchanged prediction (locality of EasyEdit, arXiv
  2308.07269).

A multi-hop question counts once. It is correct if any of its wordings is answered with the new answer or one of its
aliases (MQuAKE, Zhong et al. 2023, arXiv 2305.14795, and its release). The paper adds examples before the questions;
here they are used as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from rlsedit_fast.evaluation.cases import Case, MultiHop, Question
from rlsedit_fast.evaluation.scoring import Progress, Score, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Metric:
    """Fractions of prompts, each None if there are no prompts. The module docstring defines the forms.

    Attributes:
        forced: comparison of the NLL of two answers.
        strict: the new answer is ranked first at every token; for facts that must not change, an unchanged prediction.
        prompts: number of prompts.
        exact: the correct answer is ranked first at every token.
        tokens: mean fraction of tokens that are correct or unchanged.

    Example:
        >>> from rlsedit_fast.evaluation import Metric
        >>> Metric(forced=1.0, strict=0.9, prompts=10).to_json()
        {'forced': 1.0, 'strict': 0.9, 'prompts': 10, 'said': None, 'tokens': None}
    """

    forced: float | None
    strict: float | None
    prompts: int
    exact: float | None = None
    tokens: float | None = None

    def to_json(self) -> dict[str, float | int | None]:
        """Returns the fields as in result files, where `exact` is called `said`."""
        return {RECORDED_NAMES.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Report:
    """Metrics of an edited model on the cases of a stream.

    Attributes:
        efficacy: edited prompts.
        generalization: paraphrases.
        neighbors: the same question about other subjects; the answer must not change.
        namesakes: the same question about people who share two of the subject's names; must not change.
        same_subject: other facts of the subject; must not change.
        rebuilt: neighborhood rebuilt from the records of a data set; must not change.
        multihop: multi-hop questions, counted by question and not by prompt.

    Example:
        >>> from rlsedit_fast.evaluation import Metric, Report
        >>> whole, half = Metric(1.0, 1.0, 4), Metric(0.5, 0.5, 4)
        >>> report = Report(whole, half, half, whole, whole, whole, whole)
        >>> report.score  # harmonic mean of 1, 0.5 and 0.5
        0.6
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
        """Harmonic mean of efficacy, generalization and neighbors, `forced`; None if one is missing."""
        return harmonic_mean([metric.forced for metric in (self.efficacy, self.generalization, self.neighbors)])

    @property
    def strict_score(self) -> float | None:
        """Harmonic mean of efficacy, generalization and neighbors, `strict`; None if one is missing."""
        return harmonic_mean([metric.strict for metric in (self.efficacy, self.generalization, self.neighbors)])

    def to_json(self) -> dict[str, dict[str, float | int | None]]:
        """Returns the metrics by name, see `Metric.to_json`."""
        return {field.name: getattr(self, field.name).to_json() for field in fields(self)}


@dataclass(frozen=True)
class Verdict:
    """Result of one prompt or one multi-hop question. The module docstring defines the forms.

    Attributes:
        forced: whether the correct answer has the lower NLL.
        strict: whether the new answer is ranked first, or the prediction is unchanged.
        exact: whether the correct answer is ranked first.
        tokens: fraction of tokens that are correct or unchanged; for a multi-hop question, of its best wording.
    """

    forced: bool
    strict: bool
    exact: bool
    tokens: float


Judged = dict[str, tuple[Verdict, ...]]
"""Results of one case by metric, see `Report`."""

Before = dict[Question, Score]
"""Scores of the unedited model for questions whose answers must not change."""

Known = dict[tuple[str, str], Score]
"""Scores of a model in one state by (prompt, answer)."""

RECORDED_NAMES = {"exact": "said"}
"""Names in result files of fields of `Metric` that differ."""

_EDITED = {"efficacy": "question", "generalization": "paraphrases"}
_KEPT = ("neighbors", "namesakes", "same_subject", "rebuilt")


def harmonic_mean(shares: Sequence[float | None]) -> float | None:
    """Computes the harmonic mean.

    Args:
        shares: fractions, at least 0.

    Returns:
        The mean; 0 if a fraction is 0, None if one is None or there are none.

    Example:
        >>> from rlsedit_fast.evaluation import harmonic_mean
        >>> harmonic_mean([1.0, 0.5, 0.5]), harmonic_mean([1.0, None])
        (0.6, None)
    """
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
    """Scores the questions whose answers must not change, before the first edit.

    Args:
        model: the unedited model.
        tokenizer: tokenizer of the model.
        cases: the cases.
        known: known scores of this model; missing ones are added to it.
        progress: called after each batch with the number of finished questions and the number of questions.

    Returns:
        The scores, for `evaluate` and `judge`.

    Example:
        >>> from rlsedit_fast.evaluation import score_before, world_cases
        >>> from rlsedit_fast.world import World, load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> cases = world_cases(World.generate(), 2, seed=0)
        >>> before = score_before(model, tokenizer, cases)
        >>> cases[0].neighbors[0] in before, cases[0].question in before
        (True, False)
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
    """Evaluates every prompt of every case on an edited model.

    Args:
        model: the edited model.
        tokenizer: tokenizer of the model.
        cases: the cases.
        before: scores of the unedited model, see `score_before`.
        known: known scores of the model in its present state; missing ones are added to it.
        progress: called after each batch with the number of finished (prompt, answer) pairs and their number.

    Returns:
        The results of each case, in order.
    """
    known = {} if known is None else known
    flat = [(case, q) for case in cases for group in (*_EDITED.values(), *_KEPT) for q in _questions(case, group)]
    chains = [chain for case in cases for chain in case.multihop]
    pairs = [(q.prompt, answer) for case, q in flat for answer in (case.edit.target, q.answer)]
    pairs += [(prompt, answer) for c in chains for prompt in c.prompts for answer in (c.answer, *c.correct_answers)]
    new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
    known.update(zip(new, score(model, tokenizer, new, progress=progress), strict=True))

    def edited(case: Case, q: Question) -> Verdict:
        new, old = known[q.prompt, case.edit.target], known[q.prompt, q.answer]
        return Verdict(new.nll < old.nll, new.exact, new.exact, new.token_accuracy)

    def kept(case: Case, q: Question) -> Verdict:
        new, old = known[q.prompt, case.edit.target], known[q.prompt, q.answer]
        same = [now == then for now, then in zip(old.predicted, before[q].predicted, strict=True)]
        return Verdict(old.nll < new.nll, all(same), old.exact, sum(same) / len(same))

    def followed(chain: MultiHop) -> Verdict:
        forced = any(known[prompt, chain.new_answer].nll < known[prompt, chain.answer].nll for prompt in chain.prompts)
        scores = [known[prompt, answer] for prompt in chain.prompts for answer in chain.correct_answers]
        exact = any(one.exact for one in scores)
        return Verdict(forced, exact, exact, max(one.token_accuracy for one in scores))

    return [
        {name: tuple(edited(case, q) for q in _questions(case, group)) for name, group in _EDITED.items()}
        | {name: tuple(kept(case, q) for q in _questions(case, name)) for name in _KEPT}
        | {"multihop": tuple(followed(chain) for chain in case.multihop)}
        for case in cases
    ]


def summarize(judged: Sequence[Judged]) -> Report:
    """Averages the results of cases.

    Args:
        judged: results of `judge`.

    Returns:
        The metrics.
    """
    return Report(**{field.name: _metric([v for one in judged for v in one[field.name]]) for field in fields(Report)})


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], before: Before
) -> Report:
    """Computes all metrics on an edited model.

    Args:
        model: the edited model.
        tokenizer: tokenizer of the model.
        cases: the cases.
        before: scores of the unedited model, see `score_before`.

    Returns:
        The metrics.

    Example:
        >>> from rlsedit_fast.evaluation import evaluate, score_before, world_cases
        >>> from rlsedit_fast.world import World, load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> cases = world_cases(World.generate(), 2, seed=0)
        >>> report = evaluate(model, tokenizer, cases, score_before(model, tokenizer, cases))
        >>> report.efficacy.strict, report.neighbors.strict  # the model is not edited
        (0.0, 1.0)
    """
    return summarize(judge(model, tokenizer, cases, before))


def efficacy_strict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case]) -> float:
    """Computes the strict efficacy alone.

    Args:
        model: the edited model.
        tokenizer: tokenizer of the model.
        cases: at least one case.

    Returns:
        The fraction of cases for which every token of the target is ranked first after the edited prompt.
    """
    scores = score(model, tokenizer, [(case.question.prompt, case.edit.target) for case in cases])
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
        mean(v.exact for v in verdicts),
        mean(v.tokens for v in verdicts),
    )
