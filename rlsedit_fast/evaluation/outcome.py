"""Evaluation of edits by their own prompts, paraphrases and neighborhood prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsedit_fast.activity import report_activity
from rlsedit_fast.data import Edit
from rlsedit_fast.evaluation.scoring import Score, score_rows
from rlsedit_fast.models.facts import encode_fact, fact_key
from rlsedit_fast.models.tokens import Row, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Share:
    """Number of successful prompts.

    Attributes:
        count: number of successful prompts.
        of: number of prompts; may be 0.

    Example:
        >>> from rlsedit_fast.evaluation import Share
        >>> Share(count=3, of=4)
        Share(count=3, of=4)
    """

    count: int
    of: int


@dataclass(frozen=True)
class Outcome:
    """Strict, teacher-forced metrics of edits.

    Attributes:
        efficacy: edited prompts after which every token of the target is ranked first.
        generalization: paraphrases after which every token of the target is ranked first.
        specificity: neighborhood prompts whose most likely next token is the same as before the edits.
        nll: mean over the edits of the NLL per token of the target after the edited prompt, in nats.

    Example:
        >>> from rlsedit_fast.evaluation import Outcome, Share
        >>> Outcome(Share(1, 1), Share(2, 3), Share(0, 0), nll=0.05).generalization.count
        2
    """

    efficacy: Share
    generalization: Share
    specificity: Share
    nll: float


@dataclass(frozen=True)
class CollectedAnswers:
    """Answers of a model to the prompts of edits.

    Attributes:
        scores: scores of the targets by (prompt with subject, target), for edited prompts and paraphrases; the prompt
            of a conversation is its text, see `models.facts.fact_key`.
        next_tokens: id of the most likely next token by neighborhood prompt.

    Example:
        >>> from rlsedit_fast.evaluation import CollectedAnswers
        >>> CollectedAnswers(scores={}, next_tokens={"The capital of Peru is": 17}).next_tokens
        {'The capital of Peru is': 17}
    """

    scores: Mapping[tuple[str, str], Score]
    next_tokens: Mapping[str, int]


def collect_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]
) -> CollectedAnswers:
    """Collects the answers of a model to the prompts, paraphrases and neighborhood prompts of edits.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        edits: at least one edit.

    Returns:
        The answers.

    Example:
        >>> from rlsedit_fast import Edit
        >>> from rlsedit_fast.evaluation import collect_answers
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> answers = collect_answers(model, tokenizer, [Edit("{} plays the", "Toze Lado Rekuno", "harp")])
        >>> answers.scores["Toze Lado Rekuno plays the", "harp"].exact
        False
    """
    pairs: dict[tuple[str, str], Row] = {}
    for edit in edits:
        pairs[fact_key(edit)] = encode_fact(tokenizer, edit)
        pairs |= {pair: encode_plain(tokenizer, *pair, edit.join) for pair in _others(edit) if pair not in pairs}
    prompts = list(dict.fromkeys(prompt for edit in edits for prompt in edit.neighborhood))
    # The first prediction does not depend on the answer that is scored.
    rows = [*pairs.values(), *(encode_plain(tokenizer, prompt, "a") for prompt in prompts)]
    found = score_rows(model, rows, progress=_report)
    next_tokens = {prompt: one.predicted[0] for prompt, one in zip(prompts, found[len(pairs) :], strict=True)}
    return CollectedAnswers(dict(zip(pairs, found, strict=False)), next_tokens)


def _report(done: int, of: int) -> None:
    report_activity(f"prompt {done} of {of}")


def compute_outcome(edits: Sequence[Edit], answers: CollectedAnswers, before: CollectedAnswers) -> Outcome:
    """Computes the metrics of edits.

    Args:
        edits: at least one edit.
        answers: answers of the edited model to at least these edits.
        before: answers of the unedited model to at least these edits.

    Returns:
        The metrics.

    Example:
        >>> from rlsedit_fast import Edit
        >>> from rlsedit_fast.evaluation import collect_answers, compute_outcome
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> edits = [Edit("{} plays the", "Toze Lado Rekuno", "harp")]
        >>> before = collect_answers(model, tokenizer, edits)
        >>> compute_outcome(edits, before, before).efficacy  # the model is not edited
        Share(count=0, of=1)
    """
    edited = [answers.scores[fact_key(edit)] for edit in edits]
    other = [answers.scores[pair] for edit in edits for pair in _others(edit)]
    prompts = {prompt for edit in edits for prompt in edit.neighborhood}
    return Outcome(
        Share(sum(one.exact for one in edited), len(edited)),
        Share(sum(one.exact for one in other), len(other)),
        Share(sum(before.next_tokens[prompt] == answers.next_tokens[prompt] for prompt in prompts), len(prompts)),
        sum(one.nll for one in edited) / len(edited),
    )


def stated(edit: Edit, answers: CollectedAnswers) -> bool:
    """Returns whether every token of an edit's target is ranked first after the edited prompt.

    Args:
        edit: the edit.
        answers: answers of a model to this edit.
    """
    return answers.scores[fact_key(edit)].exact


def _others(edit: Edit) -> list[tuple[str, str]]:
    return [(prompt, edit.target) for prompt in edit.filled_paraphrases]
