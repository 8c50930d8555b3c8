"""Texts to tokens: where the subject stands, where the target stands, and rows padded into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlsedit_fast.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FactToken = Literal["subject_last", "subject_first", "last"]


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

    A prompt without `{}` must contain the subject exactly once.

    Raises:
        RequestError: an empty subject, several `{}`, or no single place for the subject.
    """
    if not subject.strip():
        raise RequestError(
            f"prompt {prompt!r}: the subject {subject!r} is empty; give the words that the fact is about"
        )
    holes = prompt.count("{}")
    if holes == 1:
        start = prompt.index("{}")
        return prompt[:start] + subject + prompt[start + 2 :], start
    if holes == 0 and prompt.count(subject) == 1:
        return prompt, prompt.index(subject)
    raise RequestError(
        f"prompt {prompt!r} with subject {subject!r}: expected one '{{}}' (found {holes}), or none and the subject "
        f"exactly once (found {prompt.count(subject)}); mark the subject's place with '{{}}'"
    )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    *,
    target: str = "",
    prefix: str = "",
    fact_token: FactToken = "subject_last",
) -> Row:
    """Tokenises `prefix + prompt(subject) + target` and finds the lookup token by character offsets.

    Raises:
        RequestError: see `fill`; or a tokenizer without offsets, a subject without tokens, a target without tokens.
    """
    text, start = fill(prompt, subject)
    if prefix:
        text, start = f"{prefix} {text}", start + len(prefix) + 1
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError(
            f"{type(tokenizer).__name__} gives no character offsets, by which the subject is found; load the "
            "tokenizer with use_fast=True"
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    stop = start + len(subject)
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < stop and b > start and b > a]
    if not inside:
        raise RequestError(f"the tokenizer gives no token for subject {subject!r} in {text!r}; choose another subject")
    lookup = {"subject_last": inside[-1], "subject_first": inside[0], "last": len(ids) - 1}[fact_token]
    return Row(ids + target_ids(tokenizer, target), lookup, len(ids))


def target_ids(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Ids of a target as it continues a prompt: after one space, without special tokens. Empty for an empty target.

    Raises:
        RequestError: a target that is not empty and has no tokens.
    """
    if not target:
        return []
    ids = list(tokenizer(" " + target.strip(), add_special_tokens=False)["input_ids"])
    if not ids:
        raise RequestError(f"the tokenizer gives no token for target {target!r}; choose another target")
    return ids


def encode_plain(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str = "") -> Row:
    """Tokenises a text and its continuation where no subject is looked for."""
    ids = list(tokenizer(prompt)["input_ids"])
    return Row(ids + target_ids(tokenizer, target), -1, len(ids))


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
