"""Texts to tokens: where the subject stands, where the target stands, and rows padded into a batch."""

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

_NEWLINES = "\r\n"
_NEUTRAL = "a"  # what a tokenizer never joins with what follows behind a space, or in another script


@dataclass(frozen=True)
class Row:
    """One tokenised text.

    Attributes:
        ids: token ids, special tokens included.
        lookup: index of the token at which the model is edited; -1 where no subject was asked for.
        prompt_length: number of tokens before the target.
    """

    ids: list[int]
    lookup: int
    prompt_length: int

    @property
    def target(self) -> list[int]:
        """Ids of the target's tokens."""
        return self.ids[self.prompt_length :]


def fill(prompt: str, subject: str) -> tuple[str, int]:
    """The prompt with its subject in place of `{}`, and the character at which the subject starts.

    In a prompt without `{}` it is the subject's last occurrence, which has been read together with all before it: as a
    whole word if there is one, else within a word, else as a whole word in other letter case. Blanks around the
    subject do not belong to it.

    Raises:
        RequestError: an empty subject, several `{}`, or no place for the subject.
    """
    if not (name := subject.strip()):
        raise RequestError(
            f"prompt {prompt!r}: the subject {subject!r} is empty; give the words that the fact is about"
        )
    holes = prompt.count("{}")
    if holes == 1:
        start = prompt.index("{}")
        return prompt[:start] + name + prompt[start + 2 :], start
    if holes == 0 and (place := _last_occurrence(prompt, name)) is not None:
        return prompt, place
    raise RequestError(
        f"prompt {prompt!r} with subject {subject!r}: expected '{{}}' exactly once (found {holes} times), or the "
        "subject itself; mark the subject's place with '{}'"
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
    """Whether no word goes on across either end of `text[start:stop]`."""
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
    """Tokenises `prefix + prompt(subject) + target` and finds the lookup token by character offsets.

    Args:
        tokenizer: the model's.
        prompt: see `fill`; blanks at its end are left out.
        subject: likewise.
        target: see `target_ids`.
        prefix: a text put before the prompt, with a space between them.
        fact_token: which token is the lookup.
        span: characters `[start, stop)` of the prompt with its subject filled in; the last token that covers any of
            them is the lookup, whatever `fact_token` says.

    Raises:
        RequestError: see `fill`, `locate` and `target_ids`; or a span that is no two whole numbers, is empty or not
            within the prompt.
    """
    filled, start = fill(prompt, subject)
    stop = start + len(subject.strip())
    text = _without_blanks(filled)
    if span is not None:
        if not _is_pair(span) or not 0 <= span[0] < span[1] <= len(text):
            raise RequestError(
                f"span {span!r} of {text!r}: expected two whole numbers, [start, stop) with 0 <= start < stop <= "
                f"{len(text)}, characters of the prompt with its subject filled in"
            )
        start, stop = span
    before = f"{prefix} " if prefix else ""
    ids, inside = locate(tokenizer, before + text, start + len(before), stop + len(before))
    lookup = {"subject_last": inside[-1], "subject_first": inside[0], "last": len(ids) - 1}[
        fact_token if span is None else "subject_last"
    ]
    return Row(ids + _continuation(tokenizer, before + text, ids, target), lookup, len(ids))


def _is_pair(span: object) -> bool:
    if not isinstance(span, tuple | list) or len(span) != 2:
        return False
    return all(isinstance(at, int) and not isinstance(at, bool) for at in span)


def target_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> list[int]:
    """Ids of a target as it continues a prompt, without special tokens behind it. Empty for an empty target.

    Blanks at the prompt's end and around the target do not count. Between the two stands one space; none where there
    is no prompt or it ends in a newline, or where either side of the boundary is a letter or mark of a script written
    without spaces (`unicodedata.east_asian_width` W or F, except Hangul, which is written with them).

    The target is tokenised together with the prompt. Where that changes the prompt's own tokens, it is tokenised
    behind a neutral letter, and alone where that fails too: alone, a sentencepiece tokenizer may add a space.

    Raises:
        RequestError: a target that is not empty and has no tokens.
    """
    text = _without_blanks(prompt)
    return _continuation(tokenizer, text, token_ids(tokenizer, text), target)


def encode_plain(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str = "") -> Row:
    """Tokenises a text, less blanks at its end, and its continuation where no subject is looked for."""
    text = _without_blanks(prompt)
    ids = token_ids(tokenizer, text)
    return Row(ids + _continuation(tokenizer, text, ids, target), -1, len(ids))


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], target: str) -> list[int]:
    """See `target_ids`; `text` has no blanks at its end, and `ids` are its tokens."""
    answer = target.strip()
    if not answer:
        return []
    if not ids:
        raise RequestError(f"the tokenizer gives no token for the prompt {text!r}; give one that the target continues")
    answer = _separator(text, answer) + answer
    for before, known in ((text, ids), (_NEUTRAL, token_ids(tokenizer, _NEUTRAL))):
        whole = token_ids(tokenizer, before + answer)
        if whole[: len(known)] == known:
            found = whole[len(known) :]
            break
    else:
        found = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not found:
        raise RequestError(f"the tokenizer gives no token for target {target!r}; choose another target")
    return found


def _separator(text: str, answer: str) -> str:
    if not text or text[-1] in _NEWLINES or any(_is_unspaced(character) for character in (text[-1], answer[0])):
        return ""
    return " "


def _is_unspaced(character: str) -> bool:
    wide = unicodedata.east_asian_width(character) in "WF"
    # Emoji are wide too.
    return wide and unicodedata.category(character)[0] in "LMNP" and "HANGUL" not in unicodedata.name(character, "")


def _without_blanks(text: str) -> str:
    while text and text[-1].isspace() and text[-1] not in _NEWLINES:
        text = text[:-1]
    return text


def pad(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[rows, longest]`, padded on the right, where a causal model never looks.

    The padding id is 0: it is masked and read by nobody, so a tokenizer without a padding token will do.
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    return ids.to(device), mask.to(device)


_LEAST_FULL = 0.75  # a row shorter than this share of its batch's longest goes into another one
_WORTH_A_PASS = 512  # fewer tokens cost less as padding than as a pass of their own


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of like length together, longest first, so that little of a batch is padding; indices into `lengths`."""
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        group = groups[-1]
        if group and lengths[i] < _LEAST_FULL * lengths[group[0]] and len(group) * lengths[group[0]] >= _WORTH_A_PASS:
            groups.append(group := [])
        group.append(i)
    return groups
