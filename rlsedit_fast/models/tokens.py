"""Tokenizes prompts: finds the subject and the target, and pads rows into a batch."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlsedit_fast.errors import RequestError
from rlsedit_fast.models.joins import Join, join_texts
from rlsedit_fast.models.offsets import locate, special_texts, starts_with_special, token_ids

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

_NEUTRAL = "a", "\n", '"', "("
"""Texts that a tokenizer does not merge with what follows: a space, another script, or a letter."""


@dataclass(frozen=True)
class Row:
    """One tokenized text.

    Attributes:
        ids: token ids, special tokens included.
        lookup: index of the token at which the model is edited; -1 if there is none.
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

    `{}` in the prompt is replaced by the subject; other braces have no meaning. In a prompt without `{}` the last
    occurrence of the subject is used: as a whole word if possible, else within a word, else as a whole word with
    different case. Whitespace around the subject is ignored.

    Args:
        prompt: the prompt.
        subject: the subject; blank for a fact without a subject.

    Returns:
        The filled prompt, and the index of the first character of the subject; -1 without a subject.

    Raises:
        RequestError: the subject is not found, the prompt has several `{}`, or it has `{}` and no subject is given.

    Example:
        >>> from rlsedit_fast.models import fill
        >>> fill("The capital of {} is", "Peru")
        ('The capital of Peru is', 15)
    """
    holes = prompt.count("{}")
    if not (name := subject.strip()):
        if not holes:
            return prompt, -1
        raise RequestError(
            f"prompt {prompt!r}: the subject is empty; name the words that {{}} stands for, or write the prompt "
            "without {} to edit it at its last token"
        )
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
    join: Join = "auto",
) -> Row:
    """Tokenizes `prefix + prompt(subject) + target` and finds the lookup token by character offsets.

    Args:
        tokenizer: tokenizer of the model.
        prompt: see `fill`; spaces at its end are removed as by `join_texts`.
        subject: see `fill`.
        target: see `target_ids`.
        prefix: text before the prompt, separated by a space. In a prompt that starts with a special token it is placed
            at the start of the line, or of the text between special tokens, that contains the subject, and omitted
            without a subject.
        fact_token: which token is the lookup token. Without a subject it is the last token of the prompt.
        span: characters `[start, stop)` of the filled prompt; the last token that overlaps them is the lookup token,
            and `fact_token` is ignored.
        join: see `join_texts`.

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
    text, answer = join_texts(filled, target, join)
    stop = start + len(subject.strip())
    if span is not None:
        start, stop = check_span(span, text)
    at = _place_of_prefix(tokenizer, text, start)
    before = f"{prefix} " if prefix and at >= 0 else ""
    text = f"{text[: max(at, 0)]}{before}{text[max(at, 0) :]}"
    if start < 0:
        ids = token_ids(tokenizer, text)
        lookup = len(ids) - 1
    else:
        ids, inside = locate(tokenizer, text, start + len(before), stop + len(before))
        lookup = {"subject_last": inside[-1], "subject_first": inside[0], "last": len(ids) - 1}[
            fact_token if span is None else "subject_last"
        ]
    return Row(ids + continuation(tokenizer, text, ids, answer), lookup, len(ids))


def _place_of_prefix(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> int:
    """Returns where a prefix is placed in a prompt whose subject starts at `start`; -1 for nowhere."""
    if not starts_with_special(tokenizer, text):
        return 0
    if start < 0:
        return -1
    ends = [text.rfind(token, 0, start) + len(token) for token in special_texts(tokenizer) if token in text[:start]]
    return max([text.rfind("\n", 0, start) + 1, *ends])


def check_span(span: object, text: str) -> tuple[int, int]:
    """Returns a span of a prompt with its subject.

    Raises:
        RequestError: it is not a pair of integers, is empty or is outside the prompt.
    """
    if isinstance(span, tuple | list) and is_pair(span) and 0 <= span[0] < span[1] <= len(text):
        return span[0], span[1]
    raise RequestError(
        f"span {span!r} of {text!r}: expected two integers [start, stop) with 0 <= start < stop <= {len(text)}, "
        "characters of the prompt with its subject"
    )


def is_pair(span: object) -> bool:
    """Returns whether a span is a pair of integers."""
    if not isinstance(span, tuple | list) or len(span) != 2:
        return False
    return all(isinstance(at, int) and not isinstance(at, bool) for at in span)


def target_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, join: Join = "auto") -> list[int]:
    """Returns the token ids of a target that continues a prompt, without special tokens after it.

    Prompt and target are joined by a space or directly, see `join_texts`.

    The target is tokenized together with the prompt. If that changes the tokens of the prompt, it is tokenized after a
    neutral character, or else alone, where a sentencepiece tokenizer can add a space.

    Args:
        tokenizer: tokenizer of the model.
        prompt: text before the target.
        target: the target.
        join: see `join_texts`.

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
    return encode_plain(tokenizer, prompt, target, join).target


def encode_plain(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str = "", join: Join = "auto") -> Row:
    """Tokenizes a prompt without a subject, and a target that continues it.

    Args:
        tokenizer: tokenizer of the model.
        prompt: text before the target; spaces at its end are removed as by `join_texts`.
        target: see `target_ids`.
        join: see `join_texts`.

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
    text, answer = join_texts(prompt, target, join)
    ids = token_ids(tokenizer, text)
    return Row(ids + continuation(tokenizer, text, ids, answer), -1, len(ids))


def continuation(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], answer: str, *, special: bool = True
) -> list[int]:
    """Returns the token ids of an answer that directly follows a text, see `target_ids`.

    Args:
        tokenizer: tokenizer of the model.
        text: the text.
        ids: its token ids.
        answer: the answer, with the white space before it.
        special: whether `ids` has special tokens that the tokenizer added.

    Raises:
        RequestError: see `target_ids`.
    """
    if not answer:
        return []
    if not ids:
        raise RequestError(f"the tokenizer has no token for the prompt {text!r}; use another prompt")
    found = _after(tokenizer, text, ids, answer, special)
    for neutral in _NEUTRAL:
        if not found:
            found = _after(tokenizer, neutral, token_ids(tokenizer, neutral), answer, special=True)
    if not found:
        found = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not found:
        raise RequestError(f"the tokenizer has no token for target {answer.strip()!r}; use another target")
    return found


def _after(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], answer: str, special: bool
) -> list[int] | None:
    """Returns the token ids of an answer after a text with token ids `ids`; None if these change."""
    whole = token_ids(tokenizer, text + answer, special=special)
    return whole[len(ids) :] if whole[: len(ids)] == ids else None


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
