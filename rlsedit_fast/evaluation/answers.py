"""Greedy answers of a model to prompts, with as many tokens as the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlsedit_fast.models.generation import end_tokens, greedy
from rlsedit_fast.models.tokens import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[tuple[str, str]]
) -> list[str]:
    """Continues prompts greedily.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        questions: pairs (prompt, target).

    Returns:
        The continuation of each prompt without surrounding whitespace. It has as many tokens as the target, or fewer
        if the model ends the text.

    Example:
        >>> from rlsedit_fast.evaluation import generate_answers
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> generate_answers(model, tokenizer, [("Toze Lado Rekuno plays the", "harp")])
        ['clarinet']
    """
    rows = [encode_plain(tokenizer, prompt, target) for prompt, target in questions]
    prompts = [row.ids[: row.prompt_length] for row in rows]
    generated = greedy(model, prompts, [len(row.target) for row in rows], ends=end_tokens(model, tokenizer))
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in generated]
