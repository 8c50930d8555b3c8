"""Tokenizes facts: a prompt and its target, or a conversation and its last answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.conversations import Message, filled_messages, render
from rlsedit_fast.models.joins import Join, join_texts
from rlsedit_fast.models.offsets import locate, starts_with_special
from rlsedit_fast.models.tokens import FactToken, Row, check_span, continuation, encode, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ChatForm = Literal["answer", "message", "direct"]
"""Forms of a prompt in a chat, see `encode_in_chat`.

Example:
    >>> from typing import get_args
    >>> from rlsedit_fast.models import ChatForm
    >>> get_args(ChatForm)
    ('answer', 'message', 'direct')
"""

_OPENINGS: dict[ChatForm, str] = {"answer": "Hello!", "message": "One question.", "direct": "Please answer."}
"""Texts before a message that is given in the form of a chat already, so that each form gives another context."""


class Fact(Protocol):
    """An edit, or its record.

    Example:
        >>> from rlsedit_fast import Edit
        >>> from rlsedit_fast.models import Fact
        >>> fact: Fact = Edit("The capital of {} is", "Peru", "Quito")
    """

    @property
    def prompt(self) -> str:
        """The prompt; of a conversation, the last message of the user."""
        ...

    @property
    def subject(self) -> str:
        """The subject; empty if there is none."""
        ...

    @property
    def target(self) -> str:
        """The target."""
        ...

    @property
    def join(self) -> Join:
        """How prompt and target are joined."""
        ...

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """The conversation, if it is one."""
        ...


def fact_key(fact: Fact) -> tuple[str, str]:
    """Returns what identifies a fact among those that a model is asked: its filled prompt or conversation, and target.

    Raises:
        RequestError: see `fill`.
    """
    prompt = fill(fact.prompt, fact.subject)[0]
    if fact.messages is None:
        return prompt, fact.target
    *before, _ = filled_messages(fact.messages, prompt)
    return "\n".join(f"{message['role']}: {message['content']}" for message in before), fact.target


def encode_fact(
    tokenizer: PreTrainedTokenizerBase,
    fact: Fact,
    *,
    prefix: str = "",
    fact_token: FactToken = "subject_last",
    span: tuple[int, int] | None = None,
) -> Row:
    """Tokenizes a fact with its target and finds the lookup token.

    Args:
        tokenizer: tokenizer of the model.
        fact: the fact.
        prefix: text before the prompt, see `encode`; in a conversation, before the last message of the user.
        fact_token: see `encode`. In a conversation, the prompt is the last message of the user.
        span: see `encode`.

    Returns:
        The tokenized row.

    Raises:
        RequestError: see `encode` and `conversations.render`.

    Example:
        >>> from rlsedit_fast import Edit
        >>> from rlsedit_fast.models import encode_fact
        >>> from rlsedit_fast.world import load_demo_model
        >>> _, tokenizer = load_demo_model()
        >>> row = encode_fact(tokenizer, Edit("{} plays the", "Toze Lado Rekuno", "harp"))
        >>> tokenizer.decode(row.ids[: row.prompt_length]), tokenizer.decode(row.target)
        ('<s> Toze Lado Rekuno plays the', 'harp')
    """
    if fact.messages is None:
        return encode(
            tokenizer,
            fact.prompt,
            fact.subject,
            target=fact.target,
            prefix=prefix,
            fact_token=fact_token,
            span=span,
            join=fact.join,
        )
    prompt, start = fill(fact.prompt, fact.subject)
    conversation = render(tokenizer, filled_messages(fact.messages, prompt))
    start, stop = _edited_characters(fact, prompt, start, fact_token, span)
    before = f"{prefix} " if prefix else ""
    at = conversation.asked + len(prompt) - len(prompt.lstrip())
    text = conversation.text[:at] + before + conversation.text[at:]
    shift = conversation.asked + len(before)
    ids, inside = locate(tokenizer, text, start + shift, stop + shift, special=False)
    first = fact_token == "subject_first" and span is None
    answer = continuation(tokenizer, text, ids, conversation.answer, special=False)
    if not answer:
        raise RequestError("messages: the answer has no tokens; use another answer")
    return Row(ids + answer, inside[0] if first else inside[-1], len(ids))


def encode_in_chat(
    tokenizer: PreTrainedTokenizerBase,
    fact: Fact,
    form: ChatForm,
    *,
    fact_token: FactToken = "subject_last",
    span: tuple[int, int] | None = None,
) -> Row:
    """Tokenizes a fact as it occurs in a chat, with its target, and finds the lookup token.

    The prompt is the message of the user. With `direct`, or if it is a question, the answer is the target, and the
    lookup token is that of the message. Otherwise the answer repeats the prompt and continues it with the target; the
    lookup token is that of the answer with `answer`, and that of the message with `message`. A conversation, or a
    prompt that is one, is taken as it is, with a short text before the message.

    Args:
        tokenizer: tokenizer with a chat template.
        fact: the fact.
        form: form of the prompt in the chat.
        fact_token: see `encode`.
        span: see `encode`.

    Returns:
        The tokenized row.

    Raises:
        RequestError: see `encode` and `conversations.render`.

    Example:
        >>> from rlsedit_fast import Edit
        >>> from rlsedit_fast.models import encode_in_chat
        >>> from rlsedit_fast.world import load_demo_model
        >>> _, tokenizer = load_demo_model()
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
        >>> edit = Edit("{} plays the", "Toze Lado Rekuno", "harp")
        >>> row = encode_in_chat(tokenizer, edit, "answer")
        >>> tokenizer.decode(row.ids), row.lookup
        ('Toze Lado Rekuno plays the . Toze Lado Rekuno plays the harp', 8)
    """
    filled, start = fill(fact.prompt, fact.subject)
    if fact.messages is not None or starts_with_special(tokenizer, filled):
        return encode_fact(tokenizer, fact, prefix=_OPENINGS[form], fact_token=fact_token, span=span)
    text, answer = join_texts(filled, fact.target, fact.join)
    direct = form == "direct" or is_question(text)
    content = answer.strip() if direct else text + answer
    conversation = render(tokenizer, [{"role": "user", "content": text}, {"role": "assistant", "content": content}])
    start, stop = _edited_characters(fact, text, start, fact_token, span)
    cut = len(conversation.answer) - len(content if direct else answer)
    whole = conversation.text + conversation.answer[:cut]
    shift = conversation.asked if direct or form == "message" else len(whole) - len(text)
    ids, inside = locate(tokenizer, whole, start + shift, stop + shift, special=False)
    first = fact_token == "subject_first" and span is None
    target = continuation(tokenizer, whole, ids, conversation.answer[cut:], special=False)
    return Row(ids + target, inside[0] if first else inside[-1], len(ids))


def _edited_characters(
    fact: Fact, prompt: str, start: int, fact_token: FactToken, span: tuple[int, int] | None
) -> tuple[int, int]:
    """Returns the characters of a filled prompt whose token is edited; its subject starts at `start`, -1 for none."""
    if span is not None:
        return check_span(span, prompt)
    if start < 0 or fact_token == "last":
        stop = len(prompt.rstrip())
        return stop - 1, stop
    return start, start + len(fact.subject.strip())


def is_question(prompt: str) -> bool:
    """Returns whether a prompt ends with a question mark."""
    return prompt.rstrip().endswith(("?", "\uff1f"))
