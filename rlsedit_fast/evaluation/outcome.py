"""What became of a user's own edits: whether they are said, also in other words, and whether neighbours were spared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsedit_fast.data import Edit
from rlsedit_fast.evaluation.scoring import Score, score
from rlsedit_fast.models.tokens import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Share:
    """How many of some prompts did as they should; `of` may be 0, where a file has none of the kind."""

    count: int
    of: int


@dataclass(frozen=True)
class Outcome:
    """Strict, by what is ranked first at every token, teacher-forced.

    Attributes:
        efficacy: edited prompts that the target follows.
        generalization: paraphrases that it follows.
        specificity: neighbourhood prompts whose next token is the one before any edit.
        nll: mean over the edits of the target's NLL per token on the edited prompt, nats.
    """

    efficacy: Share
    generalization: Share
    specificity: Share
    nll: float


@dataclass(frozen=True)
class Said:
    """What a model says to all that some edits ask.

    Attributes:
        scores: by prompt, subject included, and target: of the edited prompts and of their paraphrases.
        following: the token ranked first after every neighbourhood prompt.
    """

    scores: Mapping[tuple[str, str], Score]
    following: Mapping[str, int]


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]) -> Said:
    """Asks a model about edits, at least one."""
    pairs = list(dict.fromkeys(pair for edit in edits for pair in (_edited(edit), *_others(edit))))
    prompts = list(dict.fromkeys(prompt for edit in edits for prompt in edit.neighborhood))
    # Whatever is asked for, the first prediction is what follows the prompt.
    found = score(model, tokenizer, [*pairs, *((prompt, "a") for prompt in prompts)])
    following = {prompt: said.predicted[0] for prompt, said in zip(prompts, found[len(pairs) :], strict=True)}
    return Said(dict(zip(pairs, found, strict=False)), following)


def outcome(edits: Sequence[Edit], said: Said, before: Said) -> Outcome:
    """What a model that says this has of some edits.

    Args:
        edits: at least one.
        said: to these edits at least.
        before: what the unedited model said to them.
    """
    asked = [said.scores[_edited(edit)] for edit in edits]
    other = [said.scores[pair] for edit in edits for pair in _others(edit)]
    prompts = {prompt for edit in edits for prompt in edit.neighborhood}
    return Outcome(
        Share(sum(one.exact for one in asked), len(asked)),
        Share(sum(one.exact for one in other), len(other)),
        Share(sum(before.following[prompt] == said.following[prompt] for prompt in prompts), len(prompts)),
        sum(one.nll for one in asked) / len(asked),
    )


def stated(edit: Edit, said: Said) -> bool:
    """Whether a model that says this states an edit: every token of its target is ranked first."""
    return said.scores[_edited(edit)].exact


def _edited(edit: Edit) -> tuple[str, str]:
    return fill(edit.prompt, edit.subject)[0], edit.target


def _others(edit: Edit) -> list[tuple[str, str]]:
    return [(prompt, edit.target) for prompt in edit.paraphrases]
