"""How a target continues a prompt: with a space between them, without one, or character by character as given."""

from __future__ import annotations

import unicodedata
from typing import Literal

Join = Literal["auto", "space", "exact"]
"""How prompt and target are joined, see `join_texts`.

Example:
    >>> from typing import get_args
    >>> from rlsedit_fast.models import Join
    >>> get_args(Join)
    ('auto', 'space', 'exact')
"""

_NEWLINES = "\r\n"
_PAIRED = "\"'`*_~|"  # opening and closing delimiters are the same character
_BEFORE_OPENING = ":=,;"  # a paired delimiter directly after one of these is an opening one
_HYPHENS = "-\u2010\u2011\u2013\u2014"
_ATTACHED = "/\\@#"


def join_texts(prompt: str, target: str, join: Join = "auto") -> tuple[str, str]:
    r"""Returns the text before a target, and the text of the target that follows it directly.

    With `exact` both are returned unchanged. With `space` white space at the end of the prompt and around the target is
    replaced by one space between them. With `auto`:

    - A target that starts with white space other than a single space, such as a line break with an indent, is unchanged
      and follows the prompt directly.
    - Otherwise white space around the target is removed, and so are spaces at the end of the prompt, but not an indent
      of more than one character after a line break.
    - The target then follows after one space, or directly if the prompt is empty; ends with a line break and possibly
      an indent; ends with an opening bracket or quote, a currency sign, a slash, `@`, `#`, or a hyphen after a letter
      or digit, without a space after it; or if either side of the boundary is a letter or mark of a script written
      without spaces (`unicodedata.east_asian_width` W or F, except Hangul).

    Args:
        prompt: text before the target.
        target: the target; if it is blank and `join` is not `exact`, the text of the target is empty.
        join: how they are joined.

    Returns:
        The two texts; their concatenation is the text that the model reads.

    Example:
        >>> from rlsedit_fast.models import join_texts
        >>> join_texts("The capital of Peru is ", " Lima")
        ('The capital of Peru is', ' Lima')
        >>> join_texts('{"capital": "', 'Lima"}')
        ('{"capital": "', 'Lima"}')
        >>> join_texts("def f(a, b):", "\n    return a - b")
        ('def f(a, b):', '\n    return a - b')
        >>> join_texts("un", "likely", "exact")
        ('un', 'likely')
    """
    if join == "exact":
        return prompt, target
    text = strip_trailing(prompt)
    answer = target.strip()
    if not answer:
        return text, ""
    if join == "space":
        return text, f" {answer}"
    if keeps_white_space(target):
        return text, target
    spaced = len(text) < len(prompt)
    return text, _separator(text, answer, spaced=spaced) + answer


def keeps_white_space(target: str) -> bool:
    """Returns whether `auto` keeps the white space of a target: it starts with some that is not a single space."""
    blank = target[: len(target) - len(target.lstrip())]
    return bool(target.strip()) and blank not in ("", " ")


def strip_trailing(text: str) -> str:
    """Removes white space from the end of a text, but neither line breaks nor an indent after the last of them."""
    end = len(text.rstrip())
    broken = max(text.rfind(character, end) for character in _NEWLINES) + 1
    return text if len(text) > broken + 1 and broken else text[: broken or end]


def trimmed_prompt(prompt: str) -> str:
    """Returns a prompt without white space around it, as far as it has no meaning for `auto`."""
    text = strip_trailing(prompt).lstrip()
    # A space after a text that asks for none, such as "Price: $ ", is meant.
    return f"{text} " if len(strip_trailing(prompt)) < len(prompt) and _asks_for_none(text) else text


def _separator(text: str, answer: str, *, spaced: bool) -> str:
    if not text or text[-1].isspace() or any(_is_unspaced(character) for character in (text[-1], answer[0])):
        return ""
    return "" if _asks_for_none(text) and not spaced else " "


def _asks_for_none(text: str) -> bool:
    """Returns whether a text that does not end with white space ends such that no space is written after it."""
    if not text:
        return False
    last, before = text[-1], text[-2:-1]
    if last in _PAIRED:
        before = text.rstrip(last)[-1:]
        return not before or before.isspace() or before in _BEFORE_OPENING or _opens(before)
    if last in _HYPHENS:
        return before.isalnum()
    return last in _ATTACHED or _opens(last)


def _opens(character: str) -> bool:
    """Returns whether a character is an opening bracket or quotation mark, or a currency sign."""
    return unicodedata.category(character) in ("Ps", "Pi", "Sc")


def _is_unspaced(character: str) -> bool:
    wide = unicodedata.east_asian_width(character) in "WF"
    # Emoji are wide too.
    return wide and unicodedata.category(character)[0] in "LMNP" and "HANGUL" not in unicodedata.name(character, "")
