"""Answers of a model to prompts: greedy continuations, and answers in a chat."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlsedit_fast.models.facts import Fact, encode_fact, is_question
from rlsedit_fast.models.generation import end_tokens, greedy
from rlsedit_fast.models.joins import Join, join_texts
from rlsedit_fast.models.tokens import Row, encode_plain, fill, target_ids

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


def answer_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[str]:
    """Continues the prompts or conversations of facts greedily, by as many tokens as their targets have.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        facts: the facts.

    Returns:
        The continuations without surrounding whitespace.

    Example:
        >>> from rlsedit_fast import Edit
        >>> from rlsedit_fast.models.answers import answer_facts
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> answer_facts(model, tokenizer, [Edit("{} plays the", "Toze Lado Rekuno", "harp")])
        ['clarinet']
    """
    rows = [encode_fact(tokenizer, fact) for fact in facts]
    counts = [len(row.target) for row in rows]
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


def chat_row(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, join: Join = "auto") -> Row:
    """Tokenizes a prompt as a user message, and the target in the answer to it.

    The target is at the start of the answer if the prompt is a question; otherwise the answer repeats the prompt and
    continues it with the target.

    Args:
        tokenizer: tokenizer for which `supports_chat` is True.
        prompt: the prompt.
        target: the target.
        join: how the answer joins prompt and target, see `join_texts`.

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
    if is_question(prompt):
        answer = list(tokenizer(target.strip(), add_special_tokens=False)["input_ids"])
    else:
        text, _ = join_texts(prompt.lstrip(), target, join)
        before += list(tokenizer(text, add_special_tokens=False)["input_ids"])
        answer = target_ids(tokenizer, prompt.lstrip(), target, join)
    return Row(before + answer, 0, len(before))


def chat_fact(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> Row:
    """Returns `chat_row` of a fact; for a conversation, the conversation itself.

    Args:
        tokenizer: tokenizer for which `supports_chat` is True.
        fact: the fact.
    """
    if fact.messages is not None:
        return encode_fact(tokenizer, fact)
    return chat_row(tokenizer, fill(fact.prompt, fact.subject)[0], fact.target, fact.join)


def chat_answer_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], *, tokens: int = CHAT_TOKENS
) -> list[str]:
    """Answers the prompts of facts as `chat_answers` does, and conversations as they are.

    Args:
        model: causal language model.
        tokenizer: tokenizer for which `supports_chat` is True.
        facts: the facts.
        tokens: maximum number of tokens of each answer.
    """
    rows = [
        _chat_ids(tokenizer, fill(fact.prompt, fact.subject)[0])
        if fact.messages is None
        else (row := encode_fact(tokenizer, fact)).ids[: row.prompt_length]
        for fact in facts
    ]
    return _continued(model, tokenizer, rows, [tokens] * len(rows))


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
