"""Tokenizes prompts: finds the subject and the target, and pads rows into a batch."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.offsets import locate, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FactToken = Literal["subject_last", "subject_first", "last"]
"""Token at which a prompt is edited: last or first token of the subject, or last token of the prompt.

Example:
    >>> from typing import get_args
    >>> from rlsedit_fast.models import FactToken
    >>> get_args(FactToken)
    ('subject_last', 'subject_first', 'last')
"""

_NEWLINES = "\r\n"
_NEUTRAL = "a"  # a tokenizer never merges it with a following space or another script


@dataclass(frozen=True)
class Row:
    """One tokenized text.

    Attributes:
        ids: token ids, special tokens included.
        lookup: index of the token at which the model is edited; -1 without a subject.
        prompt_length: number of tokens before the target.

    Example:
        >>> from rlsedit_fast.models import Row
        >>> Row(ids=[1, 20, 21, 30], lookup=1, prompt_length=3).target
        [30]
    """

    ids: list[int]
    lookup: int
    prompt_length: int

    @property
    def target(self) -> list[int]:
        """Token ids of the target."""
        return self.ids[self.prompt_length :]


def fill(prompt: str, subject: str) -> tuple[str, int]:
    """Fills the subject into a prompt.

    `{}` in the prompt is replaced by the subject. In a prompt without `{}` the last occurrence of the subject is used:
    as a whole word if possible, else within a word, else as a whole word with different case. Whitespace around the
    subject is ignored.

    Args:
        prompt: the prompt.
        subject: the subject.

    Returns:
        The filled prompt, and the index of the first character of the subject.

    Raises:
        RequestError: the subject is empty or not found, or the prompt has several `{}`.

    Example:
        >>> from rlsedit_fast.models import fill
        >>> fill("The capital of {} is", "Peru")
        ('The capital of Peru is', 15)
    """
    if not (name := subject.strip()):
        raise RequestError(
            f"prompt {prompt!r}: the subject is empty; name the words of the prompt that the fact is about"
        )
    holes = prompt.count("{}")
    if holes == 1:
        start = prompt.index("{}")
        return prompt[:start] + name + prompt[start + 2 :], start
    if holes == 0 and (place := _last_occurrence(prompt, name)) is not None:
        return prompt, place
    if holes:
        times = "twice" if holes == 2 else f"{holes} times"
        raise RequestError(
            f"the prompt {prompt!r} contains {{}} {times}; keep it where the model is edited and write the subject "
            f"{name!r} at the other place{'s' * (holes > 2)}"
        )
    raise RequestError(
        f"the prompt {prompt!r} contains neither {{}} nor the subject {name!r}; write {{}} in place of the subject"
    )


def _last_occurrence(text: str, name: str) -> int | None:
    alike = [at for at in range(len(text) - len(name) + 1) if text[at : at + len(name)].casefold() == name.casefold()]
    exact = [at for at in alike if text.startswith(name, at)]
    words = [at for at in alike if _is_whole(text, at, at + len(name))]
    for places in ([at for at in exact if at in words], exact, words):
        if places:
            return places[-1]
    return None


def _is_whole(text: str, start: int, stop: int) -> bool:
    """Returns whether `text[start:stop]` starts and ends at word boundaries."""
    return not any(_in_word(text[at - 1 : at]) and _in_word(text[at : at + 1]) for at in (start, stop))


def _in_word(character: str) -> bool:
    return character != "" and (character == "_" or unicodedata.category(character)[0] in "LMN")


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    *,
    target: str = "",
    prefix: str = "",
    fact_token: FactToken = "subject_last",
    span: tuple[int, int] | None = None,
) -> Row:
    """Tokenizes `prefix + prompt(subject) + target` and finds the lookup token by character offsets.

    Args:
        tokenizer: tokenizer of the model.
        prompt: see `fill`; trailing spaces are removed.
        subject: see `fill`.
        target: see `target_ids`.
        prefix: text before the prompt, separated by a space.
        fact_token: which token is the lookup token.
        span: characters `[start, stop)` of the filled prompt; the last token that overlaps them is the lookup token,
            and `fact_token` is ignored.

    Returns:
        The tokenized row.

    Raises:
        RequestError: see `fill`, `offsets.locate` and `target_ids`; or the span is not a pair of integers, is empty or
            is outside the prompt.

    Example:
        >>> from rlsedit_fast.models import encode
        >>> from rlsedit_fast.world import load_demo_model
        >>> _, tokenizer = load_demo_model()
        >>> row = encode(tokenizer, "{} plays the", "Toze Lado Rekuno", target="harp")
        >>> tokenizer.convert_ids_to_tokens(row.ids)
        ['<s>', 'Toze', 'Lado', 'Rekuno', 'plays', 'the', 'harp']
        >>> row.lookup, row.prompt_length, tokenizer.decode(row.target)
        (3, 6, 'harp')
    """
    filled, start = fill(prompt, subject)
    stop = start + len(subject.strip())
    text = strip_trailing(filled)
    if span is not None:
        if not is_pair(span) or not 0 <= span[0] < span[1] <= len(text):
            raise RequestError(
                f"span {span!r} of {text!r}: expected two integers [start, stop) with 0 <= start < stop <= "
                f"{len(text)}, characters of the prompt with its subject"
            )
        start, stop = span
    before = f"{prefix} " if prefix else ""
    ids, inside = locate(tokenizer, before + text, start + len(before), stop + len(before))
    lookup = {"subject_last": inside[-1], "subject_first": inside[0], "last": len(ids) - 1}[
        fact_token if span is None else "subject_last"
    ]
    return Row(ids + _continuation(tokenizer, before + text, ids, target), lookup, len(ids))


def is_pair(span: object) -> bool:
    """Returns whether a span is a pair of integers."""
    if not isinstance(span, tuple | list) or len(span) != 2:
        return False
    return all(isinstance(at, int) and not isinstance(at, bool) for at in span)


def target_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> list[int]:
    """Returns the token ids of a target that continues a prompt, without special tokens after it.

    Spaces at the end of the prompt and around the target are ignored. Prompt and target are joined by one space, or by
    none if the prompt is empty or ends with a newline, or if either side of the boundary is a letter or mark of a
    script written without spaces (`unicodedata.east_asian_width` W or F, except Hangul).

    The target is tokenized together with the prompt. If that changes the tokens of the prompt, it is tokenized after a
    neutral letter, or else alone, where a sentencepiece tokenizer can add a space.

    Args:
        tokenizer: tokenizer of the model.
        prompt: text before the target.
        target: the target.

    Returns:
        Token ids; an empty list for an empty target.

    Raises:
        RequestError: a non-empty target has no tokens.

    Example:
        >>> from rlsedit_fast.models import target_ids
        >>> from rlsedit_fast.world import load_demo_model
        >>> _, tokenizer = load_demo_model()
        >>> tokenizer.convert_ids_to_tokens(target_ids(tokenizer, "Toze Lado Rekuno lives in", "Port Alder"))
        ['Port', 'Alder']
    """
    return encode_plain(tokenizer, prompt, target).target


def encode_plain(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str = "") -> Row:
    """Tokenizes a prompt without a subject, and a target that continues it.

    Args:
        tokenizer: tokenizer of the model.
        prompt: text before the target; trailing spaces are removed.
        target: see `target_ids`.

    Returns:
        The tokenized row; its lookup token is -1.

    Raises:
        RequestError: a non-empty target has no tokens.

    Example:
        >>> from rlsedit_fast.models import encode_plain
        >>> from rlsedit_fast.world import load_demo_model
        >>> _, tokenizer = load_demo_model()
        >>> row = encode_plain(tokenizer, "The job of", "Toze")
        >>> len(row.ids), row.prompt_length, row.lookup
        (5, 4, -1)
    """
    text = strip_trailing(prompt)
    ids = token_ids(tokenizer, text)
    return Row(ids + _continuation(tokenizer, text, ids, target), -1, len(ids))


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], target: str) -> list[int]:
    """See `target_ids`; `text` has no trailing spaces, and `ids` are its token ids."""
    answer = target.strip()
    if not answer:
        return []
    if not ids:
        raise RequestError(f"the tokenizer has no token for the prompt {text!r}; use another prompt")
    answer = _separator(text, answer) + answer
    found = _after(tokenizer, text, ids, answer)
    if found is None:
        found = _after(tokenizer, _NEUTRAL, token_ids(tokenizer, _NEUTRAL), answer)
    if found is None:
        found = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not found:
        raise RequestError(f"the tokenizer has no token for target {target!r}; use another target")
    return found


def _after(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], answer: str) -> list[int] | None:
    """Returns the token ids of an answer after a text with token ids `ids`; None if these change."""
    whole = token_ids(tokenizer, text + answer)
    return whole[len(ids) :] if whole[: len(ids)] == ids else None


def _separator(text: str, answer: str) -> str:
    if not text or text[-1] in _NEWLINES or any(_is_unspaced(character) for character in (text[-1], answer[0])):
        return ""
    return " "


def _is_unspaced(character: str) -> bool:
    wide = unicodedata.east_asian_width(character) in "WF"
    # Emoji are wide too.
    return wide and unicodedata.category(character)[0] in "LMNP" and "HANGUL" not in unicodedata.name(character, "")


def strip_trailing(text: str) -> str:
    """Removes white space from the end of a text, up to a line break."""
    while text and text[-1].isspace() and text[-1] not in _NEWLINES:
        text = text[:-1]
    return text


def pad(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads rows on the right.

    The padding id is 0. It is masked, so the tokenizer needs no padding token.

    Args:
        rows: at least one row.
        device: device of the result.

    Returns:
        Token ids and attention mask, both `[rows, longest]`, int64.

    Example:
        >>> import torch
        >>> from rlsedit_fast.models import Row, pad
        >>> ids, mask = pad([Row([5, 6, 7], -1, 3), Row([8], -1, 1)], torch.device("cpu"))
        >>> ids.tolist(), mask.tolist()
        ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    return ids.to(device), mask.to(device)


_MIN_FILL = 0.75  # a row shorter than this fraction of the longest row starts a new batch
_MIN_TOKENS = 512  # smaller batches cost less as padding than as a separate pass


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Groups rows of similar length, longest first, to limit padding.

    Args:
        lengths: number of tokens of each row.

    Returns:
        Groups of indices into `lengths`.
    """
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        group = groups[-1]
        if group and lengths[i] < _MIN_FILL * lengths[group[0]] and len(group) * lengths[group[0]] >= _MIN_TOKENS:
            groups.append(group := [])
        group.append(i)
    return groups
