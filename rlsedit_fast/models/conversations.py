"""Conversations as text: rendered by the chat template of a tokenizer, with the place of the subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsedit_fast.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""One message of a conversation: `{"role": "user", "content": "..."}`.

Example:
    >>> from rlsedit_fast.models import Message
    >>> message: Message = {"role": "user", "content": "What is the capital of Peru?"}
"""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of messages.

Example:
    >>> from rlsedit_fast.models import ROLES
    >>> "assistant" in ROLES
    True
"""

_MARK = "\u2983edited\u2984"  # stands for a message whose place in the rendered text is looked for


@dataclass(frozen=True)
class Conversation:
    r"""A rendered conversation.

    Attributes:
        text: the conversation up to the answer, as the chat template renders it, special tokens included.
        answer: text of the last answer, which follows directly.
        asked: index in `text` at which the content of the last message of the user starts; less by the white space at
            its start if the template removes that.

    Example:
        >>> from rlsedit_fast.models import Conversation
        >>> Conversation("user: Hello\n", "Hi", asked=6).answer
        'Hi'
    """

    text: str
    answer: str
    asked: int


def last_user(messages: Sequence[Message]) -> int:
    """Returns the index of the last message of the user.

    Args:
        messages: a valid conversation, see `invalid_messages`.
    """
    return max(at for at, message in enumerate(messages) if message["role"] == "user")


def invalid_messages(messages: object) -> str | None:
    """Returns what is wrong with a conversation, or None if it is a list of messages that ends with an answer.

    Args:
        messages: any value.

    Example:
        >>> from rlsedit_fast.models import invalid_messages
        >>> invalid_messages([{"role": "user", "content": "Hello"}])
        "the last message has the role 'user'; expected 'assistant', whose content is the target"
    """
    if not isinstance(messages, list | tuple) or not messages:
        return f"expected a list of messages with role and content, got {messages!r:.60}"
    for at, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            given = f"the fields {', '.join(map(str, message))}" if isinstance(message, Mapping) else f"{message!r:.60}"
            return f"message {at}: expected the fields role and content, got {given}"
        if message["role"] not in ROLES:
            return f"message {at}: unknown role {message['role']!r:.40}; expected one of {', '.join(ROLES)}"
        if not isinstance(message["content"], str):
            return f"message {at}: the content {message['content']!r:.60} is not a string; pass its text"
        if not message["content"].strip():
            return f"message {at} ({message['role']}): the content is empty; omit the message or write its text"
    if (role := messages[-1]["role"]) != "assistant":
        return f"the last message has the role {role!r}; expected 'assistant', whose content is the target"
    if all(message["role"] != "user" for message in messages):
        return "there is no message of the user; expected one before the answer"
    return None


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Conversation:
    r"""Renders a conversation with the chat template of the tokenizer.

    The answer is joined as the template joins it. If the template changes earlier messages once there is an answer, the
    answer follows the prompt for the generation unchanged.

    Args:
        tokenizer: tokenizer of the model.
        messages: a valid conversation, see `invalid_messages`.

    Raises:
        RequestError: the tokenizer has no chat template, or the template does not accept the conversation.

    Example:
        >>> from rlsedit_fast.models import render
        >>> from rlsedit_fast.world import load_demo_model
        >>> _, tokenizer = load_demo_model()
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        ...     "{% if add_generation_prompt %}assistant: {% endif %}"
        ... )
        >>> found = render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}])
        >>> found.text, found.answer
        ('user: Hi\nassistant: ', 'Yes')
    """
    *before, last = [dict(message) for message in messages]
    asked = last_user(before)
    text = _rendered(tokenizer, before)
    marked = [message | {"content": _MARK} if at == asked else message for at, message in enumerate(before)]
    place = _rendered(tokenizer, marked).find(_MARK)
    content = before[asked]["content"]
    blank = len(content) - len(content.lstrip())
    if not text.startswith(content.strip(), place):  # white space is kept before it, or the template changes it
        place = text.rfind(content.strip())
    if place < 0:
        raise RequestError("the chat template changes the last message of the user; use a tokenizer with another one")
    return Conversation(text, _joined(tokenizer, text, [*before, last]), place - blank)


def filled_messages(messages: Sequence[Message], prompt: str) -> tuple[Message, ...]:
    """Returns messages with a prompt as the last message of the user."""
    at = last_user(messages)
    return (*messages[:at], dict(messages[at]) | {"content": prompt}, *messages[at + 1 :])


def _joined(tokenizer: PreTrainedTokenizerBase, text: str, messages: list[dict[str, str]]) -> str:
    """Returns the text of the answer after `text`, with the white space that the template puts before it."""
    content = messages[-1]["content"]
    try:
        whole = _rendered(tokenizer, messages, generate=False)
    except RequestError:
        return content
    if not whole.startswith(text):
        return content
    rest = whole[len(text) :]
    blank = rest[: len(rest) - len(rest.lstrip())]
    return blank + content.lstrip() if rest.lstrip().startswith(content.strip()) else content


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, generate: bool = True) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "messages: the tokenizer has no chat template; use an instruct model, or pass prompt and target"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    except Exception as error:  # templates are programs and raise errors of any type
        raise RequestError(f"messages: the chat template does not accept them: {error}") from error
