"""The edit: a prompt, a subject and a new target."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.conversations import Message, invalid_messages, last_user
from rlsedit_fast.models.facts import Fact, fact_key
from rlsedit_fast.models.joins import Join, keeps_white_space, trimmed_prompt
from rlsedit_fast.models.tokens import fill, is_pair

WEIGHT_RANGE = 1e-30, 1e30
"""Range of edit weights. A weight is stored in float32 together with its inverse and its products with keys."""


@dataclass(frozen=True)
class Edit:
    """A fact that the model should state: a prompt and its target, or a conversation and its last answer.

    White space around prompt, subject and target is ignored, except line breaks at the end of the prompt, and white
    space at the start of the target that is not a single space (see `models.join_texts`).

    Attributes:
        prompt: text that the target continues, with `{}` in place of the subject. With `messages`, the last message of
            the user.
        subject: subject of the fact. A fact without a subject (`""` or None) is edited at the last token of its prompt.
        target: text that the model should generate after the prompt. With `messages`, the last message.
        weight: weight of the edit relative to other edits and to the anchors, within `WEIGHT_RANGE`.
        name: your own name for the edit, shown in reports and in the history.
        span: characters `[start, stop)` of the prompt with its subject filled in. The model is edited at the last token
            that overlaps them. Overrides `EditConfig.fact_token`.
        paraphrases: other prompts that the target should also continue, with the subject or `{}` in its place; used by
            the evaluation.
        neighborhood: prompts about other subjects whose continuations should not change; used by the evaluation.
        join: how prompt and target are joined: `auto`, by a space unless the prompt asks for none; `space`, always by a
            space; `exact`, character by character as given.
        messages: a conversation instead of prompt and target: dicts with `role` and `content`, rendered by the chat
            template of the tokenizer. The last message, of the role `assistant`, is the target. The subject is looked
            for in the last message of the user, where it may be written as `{}`.

    Raises:
        RequestError: `messages` is not a conversation that ends with an answer, or prompt or target are given as well.

    Example:
        >>> from rlsedit_fast import Edit
        >>> Edit("The capital of {} is", "France", "Lyon").filled_prompt
        'The capital of France is'
        >>> question = {"role": "user", "content": "What is the capital of {}?"}
        >>> edit = Edit(messages=[question, {"role": "assistant", "content": "Lyon."}], subject="France")
        >>> edit.prompt, edit.target
        ('What is the capital of {}?', 'Lyon.')
    """

    prompt: str = ""
    subject: str = ""
    target: str = ""
    weight: float = 1.0
    name: str | None = None
    span: tuple[int, int] | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()
    join: Join = "auto"
    messages: tuple[Message, ...] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        subject: object = self.subject
        if subject is None:
            object.__setattr__(self, "subject", "")
        if self.messages is None:
            return
        if reason := invalid_messages(self.messages):
            raise RequestError(f"messages: {reason}")
        messages = tuple({name: message[name] for name in ("role", "content")} for message in self.messages)
        for name, text in (("prompt", messages[last_user(messages)]["content"]), ("target", messages[-1]["content"])):
            if getattr(self, name) not in ("", text):
                raise RequestError(f"{name} and messages are both given; omit {name}, which is one of the messages")
            object.__setattr__(self, name, text)
        object.__setattr__(self, "messages", messages)

    @property
    def filled_prompt(self) -> str:
        """The prompt with the subject filled in, see `models.fill`.

        Raises:
            RequestError: the prompt does not contain the subject, or has several `{}`.
        """
        return fill(self.prompt, self.subject)[0]

    @property
    def filled_paraphrases(self) -> tuple[str, ...]:
        """The paraphrases with the subject in place of `{}`, see `models.fill`; those without `{}` are unchanged.

        Raises:
            RequestError: a paraphrase has several `{}`.
        """
        return tuple(fill(text, self.subject)[0] if "{}" in text else text for text in self.paraphrases)

    def trimmed(self) -> Edit:
        """Returns the edit without white space around prompt, subject and target, as it is applied.

        White space that has a meaning is kept: line breaks at the end of the prompt, white space at the start of the
        target that is not a single space, and everything with `join="exact"` or in messages.
        """
        prompt, target, subject = self.prompt, self.target, self.subject.strip()
        if self.join != "exact" and self.messages is None:
            prompt = trimmed_prompt(prompt)
            target = target if self.join == "auto" and keeps_white_space(target) else target.strip()
        if (prompt, subject, target) == (self.prompt, self.subject, self.target):
            return self
        span = self.span
        if span is not None and is_pair(span) and prompt != self.prompt:
            before = len(self.prompt) - len(self.prompt.lstrip())
            span = span[0] - before, span[1] - before
        return replace(self, prompt=prompt, subject=subject, target=target, span=span)

    def with_target(self, target: str) -> Edit:
        """Returns the edit with another target."""
        if self.messages is None:
            return replace(self, target=target)
        answer = dict(self.messages[-1]) | {"content": target}
        return replace(self, target="", messages=(*self.messages[:-1], answer))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a JSON-serializable dict, without `join` and `messages` if they are the defaults."""
        return without_defaults(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Edit:
        """Returns the edit with the given fields; lists become tuples, and `id` may be given as `name`.

        Raises:
            RequestError: a field is missing or unknown, or the messages are invalid.
        """
        known = [one.name for one in fields(cls)]
        if values.get("id") is not None and values.get("name") is None:
            values = {name: value for name, value in values.items() if name != "id"} | {"name": str(values["id"])}
        for name in values:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                suggestion = f"did you mean {near[0]!r}?" if near else f"expected: {', '.join(known)}"
                raise RequestError(f"unknown field {name!r}; {suggestion}")
        needed: tuple[str, ...] = ("prompt", "target") if values.get("messages") is None else ()
        if "{}" in str(values.get("prompt", "")):
            needed = ("prompt", "subject", "target")
        if missing := [name for name in needed if name not in values]:
            what = "name the words of the prompt that the fact is about" if missing == ["subject"] else "add them"
            raise RequestError(f"missing fields: {', '.join(missing)}; {what}")
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**given)


def without_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of an edit or of its record without `join` and `messages` if they are the defaults."""
    defaults = {"join": "auto", "messages": None}
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def prompt_key(edit: Fact) -> str:
    """Returns a text that is equal for edits with the same prompt: the normalized filled prompt, or the conversation.

    Raises:
        RequestError: see `Edit.filled_prompt`.
    """
    return normalized(fact_key(edit)[0])


def check_list(edits: object) -> None:
    """Raises RequestError unless the argument is a list of edits, or another iterable of them."""
    if isinstance(edits, Edit | str | Mapping) or not isinstance(edits, Iterable):
        raise RequestError(f"edits: expected a list of edits, got {edits!r:.60}; put a single edit in a list")


def invalid_weight(weight: object) -> str | None:
    """Returns what is expected instead of an invalid weight, or None."""
    least, most = WEIGHT_RANGE
    if isinstance(weight, int | float) and not isinstance(weight, bool) and least <= weight <= most:
        return None
    return f"expected a number from {least:g} to {most:g}, got {weight!r:.60}; the default is 1"


def normalized(text: str) -> str:
    """Returns the text in Unicode NFC with runs of white space as single spaces, so that equal texts compare equal."""
    return " ".join(unicodedata.normalize("NFC", text).split())
