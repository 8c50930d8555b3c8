"""Edits drawn from text, in place of planned ones that are not known yet."""

from __future__ import annotations

import random
from collections.abc import Iterable

from rlsedit_fast.data.edits import Edit

_PROMPT_WORDS = 3  # after the subject
_NAME_WORDS = 3  # at most


def draw_edits(texts: Iterable[str], count: int, *, seed: int = 0) -> list[Edit]:
    """Returns edits whose subjects are names at random positions of texts; each subject occurs once.

    A name is one to three capitalized words; if the texts have too few, other words are subjects as well. The prompt is
    the subject and the three words that follow it, and the target is the word after them. The keys differ from those of
    the text, since the words before the subject are left out.

    Args:
        texts: the texts.
        count: number of edits.
        seed: random seed.

    Returns:
        The edits, in random order; fewer if the texts have fewer subjects.

    Example:
        >>> from rlsedit_fast.data.drawn import draw_edits
        >>> (edit,) = draw_edits(["in 1995 Miles Davis plays a loud trumpet solo"], 1)
        >>> edit.prompt, edit.subject, edit.target
        ('{} plays a loud', 'Miles Davis', 'trumpet')
    """
    names, words = dict[str, Edit](), dict[str, Edit]()
    for text in texts:
        parts, at = text.split(), 0
        while at + _PROMPT_WORDS + 1 < len(parts):
            length = next((n for n in range(_NAME_WORDS) if not _is_name(parts[at + n : at + n + 1])), _NAME_WORDS)
            subject = " ".join(parts[at : at + max(1, length)])
            rest = parts[at + max(1, length) : at + max(1, length) + _PROMPT_WORDS + 1]
            at += max(1, length)
            if len(rest) <= _PROMPT_WORDS or not any(letter.isalpha() for letter in subject):
                continue
            if "{" in "".join([subject, *rest]):
                continue
            edit = Edit(" ".join(["{}", *rest[:-1]]), subject, rest[-1])
            (names if length else words).setdefault(subject, edit)
    rng = random.Random(seed)
    chosen = list(names.values())
    rng.shuffle(chosen)
    if len(chosen) < count:
        others = [edit for subject, edit in words.items() if subject not in names]
        rng.shuffle(others)
        chosen += others
    return chosen[:count]


def _is_name(words: list[str]) -> bool:
    """Returns whether there is a word and it begins with a capital letter."""
    return bool(words) and words[0][0].isupper()
