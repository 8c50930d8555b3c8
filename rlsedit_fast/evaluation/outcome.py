"""What became of a user's own edits: whether they are said, also in other words, and whether neighbours were spared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsedit_fast.editing import Edit
from rlsedit_fast.evaluation.scoring import score
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


def next_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]) -> dict[str, int]:
    """The token ranked first after every neighbourhood prompt of the edits; to be taken before the first edit."""
    prompts = list(dict.fromkeys(prompt for edit in edits for prompt in edit.neighborhood))
    # Whatever is asked for, the first prediction is what follows the prompt.
    scores = score(model, tokenizer, [(prompt, "a") for prompt in prompts])
    return {prompt: said.predicted[0] for prompt, said in zip(prompts, scores, strict=True)}


def outcome(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    before: dict[str, int],
    *,
    now: dict[str, int] | None = None,
) -> Outcome:
    """Asks a model about edits.

    Args:
        model: as it is now.
        tokenizer: its tokenizer.
        edits: at least one.
        before: `next_tokens` of the unedited model, for these edits at least.
        now: `next_tokens` of the model as it is; by default it is asked.
    """
    asked = score(model, tokenizer, [(fill(edit.prompt, edit.subject)[0], edit.target) for edit in edits])
    other = score(model, tokenizer, [(prompt, edit.target) for edit in edits for prompt in edit.paraphrases])
    now = next_tokens(model, tokenizer, edits) if now is None else now
    return Outcome(
        Share(sum(said.exact for said in asked), len(asked)),
        Share(sum(said.exact for said in other), len(other)),
        Share(sum(before[prompt] == token for prompt, token in now.items()), len(now)),
        sum(said.nll for said in asked) / len(asked),
    )
