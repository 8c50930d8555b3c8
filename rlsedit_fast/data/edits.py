"""The edit: a prompt, a subject and a new target."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.tokens import fill, is_pair, strip_trailing

WEIGHT_RANGE = 1e-30, 1e30
"""Range of edit weights. A weight is stored in float32 together with its inverse and its products with keys."""


@dataclass(frozen=True)
class Edit:
    """A fact that the model should state.

    White space around prompt, subject and target is ignored, except line breaks at the end of the prompt.

    Attributes:
        prompt: text that the target continues, with `{}` in place of the subject.
        subject: subject of the fact.
        target: text that the model should generate after the prompt.
        weight: weight of the edit relative to other edits and to the anchors, within `WEIGHT_RANGE`.
        name: your own name for the edit, shown in reports and in the history.
        span: characters `[start, stop)` of the prompt with its subject filled in. The model is edited at the last token
            that overlaps them. Overrides `EditConfig.fact_token`.
        paraphrases: other prompts that the target should also continue, with the subject or `{}` in its place; used by
            the evaluation.
        neighborhood: prompts about other subjects whose continuations should not change; used by the evaluation.

    Example:
        >>> from rlsedit_fast import Edit
        >>> Edit("The capital of {} is", "France", "Lyon").filled_prompt
        'The capital of France is'
    """

    prompt: str
    subject: str
    target: str
    weight: float = 1.0
    name: str | None = None
    span: tuple[int, int] | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()

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

        Line breaks at the end of the prompt are kept, since the target then begins a line.
        """
        prompt, subject, target = strip_trailing(self.prompt).lstrip(), self.subject.strip(), self.target.strip()
        if (prompt, subject, target) == (self.prompt, self.subject, self.target):
            return self
        span = self.span
        if span is not None and is_pair(span):
            before = len(self.prompt) - len(self.prompt.lstrip())
            span = span[0] - before, span[1] - before
        return replace(self, prompt=prompt, subject=subject, target=target, span=span)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a JSON-serializable dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Edit:
        """Returns the edit with the given fields; lists become tuples, and `id` may be given as `name`.

        Raises:
            RequestError: a field is missing or unknown.
        """
        known = [field.name for field in fields(cls)]
        if values.get("id") is not None and values.get("name") is None:
            values = {name: value for name, value in values.items() if name != "id"} | {"name": str(values["id"])}
        for name in values:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                suggestion = f"did you mean {near[0]!r}?" if near else f"expected: {', '.join(known)}"
                raise RequestError(f"unknown field {name!r}; {suggestion}")
        if missing := [name for name in known[:3] if name not in values]:
            what = "name the words of the prompt that the fact is about" if missing == ["subject"] else "add them"
            raise RequestError(f"missing fields: {', '.join(missing)}; {what}")
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**given)


def prompt_key(edit: Edit) -> str:
    """Returns the normalized filled prompt, which is equal for edits with the same prompt.

    Raises:
        RequestError: see `Edit.filled_prompt`.
    """
    return normalized(edit.filled_prompt)


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
