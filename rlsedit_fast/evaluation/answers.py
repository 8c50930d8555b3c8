"""What a model says of itself: greedy answers, in as few tokens as the targets have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlsedit_fast.models.generation import end_tokens, greedy
from rlsedit_fast.models.tokens import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]]) -> list[str]:
    """Continues the prompt of each (prompt, target) greedily, by as many tokens as the target has, or up to the end of
    the text if the model ends it before; blanks around an answer are left out.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        asked: in any number.
    """
    rows = [encode_plain(tokenizer, prompt, target) for prompt, target in asked]
    prompts = [row.ids[: row.prompt_length] for row in rows]
    said = greedy(model, prompts, [len(row.target) for row in rows], ends=end_tokens(model, tokenizer))
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in said]
