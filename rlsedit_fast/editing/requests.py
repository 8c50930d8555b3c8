"""Requests: edits that were validated and tokenized for a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from rlsedit_fast.data.edits import Edit, check_list, invalid_weight, normalized, prompt_key
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.errors import RequestError, listed
from rlsedit_fast.models.facts import encode_fact, encode_in_chat
from rlsedit_fast.models.joins import Join
from rlsedit_fast.models.tokens import Row, encode, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SPECIAL_TOKENS = 8  # maximum number of tokens that a tokenizer adds to a text


@dataclass(frozen=True)
class Request:
    """An edit as token ids.

    Attributes:
        edit: the edit.
        contexts: prompt and target with each context prefix, the bare prompt first, and in each form in a chat.
        kl: the KL prompts, without targets.
        prompt_key: normalized filled prompt; equal for edits with the same prompt.
        subject_key: normalized subject; equal for edits that share a value. None if the edited token does not belong to
            the subject, so that edits of one subject have different keys.
        chat: number of the last contexts that are in a chat.
    """

    edit: Edit
    contexts: tuple[Row, ...]
    kl: tuple[Row, ...]
    prompt_key: str
    subject_key: str | None
    chat: int = 0


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    edits: Iterable[Edit | Mapping[str, Any]],
    config: EditConfig,
    *,
    longest: int | None,
) -> list[Request]:
    """Validates and tokenizes all edits.

    Args:
        tokenizer: tokenizer of the model.
        edits: at least one edit, as `Edit` or as a dict with its fields.
        config: settings of the editor.
        longest: maximum number of tokens of the model; None if there is no limit.

    Raises:
        RequestError: an edit is invalid (all are listed, counted from 1), there are no edits, or `edits` is not a list.
    """
    requests, invalid = _attempt(tokenizer, edits, config, longest)
    if not (count := len(requests) + len(invalid)):
        raise RequestError("no edits were given; pass at least one")
    if invalid:
        if count == 1:
            raise RequestError(f"the edit is invalid; nothing was modified: {invalid[0]}")
        lines = listed(f"edit {index + 1}: {reason}" for index, reason in invalid.items())
        verb = "is" if len(invalid) == 1 else "are"
        raise RequestError(
            f"{len(invalid)} of {count} edits {verb} invalid; nothing was modified:\n" + "\n".join(lines)
        )
    return requests


def find_invalid(
    tokenizer: PreTrainedTokenizerBase,
    edits: Iterable[Edit | Mapping[str, Any]],
    config: EditConfig,
    *,
    longest: int | None,
) -> dict[int, str]:
    """Returns the reason for each invalid edit, by index. The arguments are those of `prepare`.

    Raises:
        RequestError: `edits` is not a list.
    """
    return _attempt(tokenizer, edits, config, longest)[1]


def _attempt(
    tokenizer: PreTrainedTokenizerBase,
    edits: Iterable[Edit | Mapping[str, Any]],
    config: EditConfig,
    longest: int | None,
) -> tuple[list[Request], dict[int, str]]:
    check_list(edits)
    requests: list[Request] = []
    invalid: dict[int, str] = {}
    trimmed = without = 0
    for index, given in enumerate(edits):
        try:
            edit = Edit.from_dict(given) if isinstance(given, Mapping) else given
            requests.append(_prepare_one(tokenizer, edit, config, longest))
            trimmed += requests[-1].edit is not edit
            without += not requests[-1].edit.subject and edit.span is None
        except RequestError as error:
            invalid[index] = str(error)
    if trimmed:
        logger.info("white space around the prompt, subject or target of %d edits is ignored", trimmed)
    if without:
        logger.info("%d edits have no subject; they are edited at the last token of their prompt", without)
    return requests, invalid


def _prepare_one(tokenizer: PreTrainedTokenizerBase, edit: object, config: EditConfig, longest: int | None) -> Request:
    if not isinstance(edit, Edit):
        raise RequestError(f"expected an Edit or a dict with its fields, got {type(edit).__name__}")
    for field in ("prompt", "subject", "target"):
        if not isinstance(getattr(edit, field), str):
            raise RequestError(f"{field}={getattr(edit, field)!r}: expected a string")
        _check_characters(field, getattr(edit, field))
    if edit.name is not None and not isinstance(edit.name, str):
        raise RequestError(f"name={edit.name!r}: expected a string, or None")
    if edit.join not in get_args(Join):
        raise RequestError(f"join={edit.join!r:.40}: expected {', '.join(get_args(Join))}")
    if not edit.prompt.strip() and edit.messages is None:
        raise RequestError(f"prompt {edit.prompt!r} is empty; pass the text that the target continues")
    if not edit.target.strip():
        raise RequestError(f"target {edit.target!r} is empty; pass the text that the model should state")
    edit = edit.trimmed()
    if reason := invalid_weight(edit.weight):
        raise RequestError(f"weight: {reason}")
    _check_evaluated(tokenizer, edit, longest)
    contexts = tuple(
        encode_fact(tokenizer, edit, prefix=prefix, fact_token=config.fact_token, span=edit.span)
        for prefix in config.contexts.prefixes
    )
    forms = config.contexts.chat or ()
    try:
        contexts += tuple(
            encode_in_chat(tokenizer, edit, form, fact_token=config.fact_token, span=edit.span) for form in forms
        )
    except RequestError as error:
        raise RequestError(
            f"in a chat: {error}; correct it, or set contexts.chat to () to edit without a chat"
        ) from error
    kl = tuple(
        encode(tokenizer, prompt, edit.subject, fact_token=config.fact_token)
        for prompt in config.search.effective_kl_prompts
        if edit.subject
    )
    width = max(len(row.ids) for row in (*contexts, *kl))
    if longest is not None and width > longest:
        raise RequestError(
            f"{width} tokens with its context, and the model supports {longest}; shorten the prompt or the prefixes, "
            "or set contexts.chat to ()"
        )
    return Request(edit, contexts, kl, prompt_key(edit), subject_key(edit, config), len(forms))


def _check_characters(field: str, text: str) -> None:
    if _SURROGATE.search(text):
        raise RequestError(f"{field}={text!r:.80} contains half a character (a lone surrogate); correct the text")


def _check_evaluated(tokenizer: PreTrainedTokenizerBase, edit: Edit, longest: int | None) -> None:
    """Checks the texts that are only used by the evaluation, with the target after them."""
    for field in ("paraphrases", "neighborhood"):
        texts = getattr(edit, field)
        if not isinstance(texts, list | tuple):
            raise RequestError(f"{field}={texts!r:.80}: expected a tuple of strings; put one text in a tuple")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise RequestError(f"{field}: {text!r:.80}: expected strings that are not blank")
            _check_characters(field, text)
    for field, texts in (("paraphrases", edit.filled_paraphrases), ("neighborhood", edit.neighborhood)):
        for text in texts:
            # A token has at least one byte, so most texts are short enough without being tokenized.
            if longest is None or len(text.encode()) + len(edit.target.encode()) <= longest - _SPECIAL_TOKENS:
                continue
            if (tokens := len(encode_plain(tokenizer, text, edit.target).ids)) > longest:
                raise RequestError(
                    f"{field}: {text[:60]!r}: {tokens} tokens with the target, and the model supports {longest}"
                )


def subject_key(edit: Edit, config: EditConfig) -> str | None:
    """Returns the normalized subject if the edit shares its value with other edits of the subject, otherwise None."""
    return normalized(edit.subject) if edit.subject and config.fact_token != "last" and edit.span is None else None
