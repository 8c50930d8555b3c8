"""Answers of a model to prompts: greedy continuations, and answers in a chat."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlsedit_fast.models.generation import end_tokens, greedy
from rlsedit_fast.models.tokens import Row, encode_plain, target_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHAT_TOKENS = 24
"""Default maximum number of tokens of an answer in a chat."""


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
    *,
    tokens: int | None = None,
) -> list[str]:
    """Continues prompts greedily.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        questions: pairs (prompt, target); the target is only used for its number of tokens.
        tokens: maximum number of tokens of each answer; by default as many as the target has.

    Returns:
        The continuation of each prompt without surrounding whitespace. It is shorter if the model ends the text.

    Example:
        >>> from rlsedit_fast.models import generate_answers
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> generate_answers(model, tokenizer, [("Toze Lado Rekuno plays the", "harp")])
        ['clarinet']
    """
    rows = [encode_plain(tokenizer, prompt, target) for prompt, target in questions]
    counts = [len(row.target) if tokens is None else tokens for row in rows]
    return _continued(model, tokenizer, [row.ids[: row.prompt_length] for row in rows], counts)


def supports_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the tokenizer has a chat template that accepts a single user message.

    Example:
        >>> from rlsedit_fast.models import supports_chat
        >>> from rlsedit_fast.world import load_demo_model
        >>> _, tokenizer = load_demo_model()
        >>> supports_chat(tokenizer)
        False
    """
    if not getattr(tokenizer, "chat_template", None):
        return False
    try:
        return bool(_chat_ids(tokenizer, "Hello"))
    except Exception as error:  # templates are programs and raise errors of any type
        logger.warning("the chat template of the tokenizer cannot be used: %s", error)
        return False


def chat_row(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> Row:
    """Tokenizes a prompt as a user message, and the target in the answer to it.

    The target is at the start of the answer if the prompt is a question; otherwise the answer repeats the prompt and
    continues it with the target.

    Args:
        tokenizer: tokenizer for which `supports_chat` is True.
        prompt: the prompt.
        target: the target.

    Returns:
        The tokenized row; its lookup token is the first one.

    Example:
        >>> from rlsedit_fast.models import chat_row
        >>> from rlsedit_fast.world import load_demo_model
        >>> _, tokenizer = load_demo_model()
        >>> tokenizer.chat_template = "{{ messages[0].content }} ."
        >>> row = chat_row(tokenizer, "Toze Lado Rekuno plays the", "harp")
        >>> tokenizer.decode(row.ids), tokenizer.decode(row.target)
        ('Toze Lado Rekuno plays the . Toze Lado Rekuno plays the harp', 'harp')
    """
    before = _chat_ids(tokenizer, prompt)
    text = prompt.strip()
    if text.endswith(("?", "\uff1f")):
        answer = list(tokenizer(target.strip(), add_special_tokens=False)["input_ids"])
    else:
        before += list(tokenizer(text, add_special_tokens=False)["input_ids"])
        answer = target_ids(tokenizer, text, target)
    return Row(before + answer, 0, len(before))


def chat_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tokens: int = CHAT_TOKENS,
) -> list[str]:
    """Answers prompts greedily in a chat with a single user message.

    Args:
        model: causal language model.
        tokenizer: tokenizer for which `supports_chat` is True.
        prompts: user messages.
        tokens: maximum number of tokens of each answer.

    Returns:
        The answers without surrounding whitespace.

    Example:
        >>> from rlsedit_fast.models import chat_answers
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> tokenizer.chat_template = "{{ messages[0].content }}"
        >>> chat_answers(model, tokenizer, ["Toze Lado Rekuno plays the"], tokens=1)
        ['clarinet']
    """
    return _continued(model, tokenizer, [_chat_ids(tokenizer, prompt) for prompt in prompts], [tokens] * len(prompts))


def _chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[str]:
    generated = greedy(model, rows, counts, ends=end_tokens(model, tokenizer))
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in generated]
