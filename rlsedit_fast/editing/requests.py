"""Edits made ready for a model: checked one and all, then tokenised."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.conflicts import composed
from rlsedit_fast.editing.edits import Edit, weight_trouble
from rlsedit_fast.errors import RequestError, listed
from rlsedit_fast.models.tokens import Row, encode, encode_plain, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_HALF = re.compile(r"[\ud800-\udfff]")
_SPECIAL = 8
"""Tokens that a tokenizer may put round a text, at most."""


@dataclass(frozen=True)
class Request:
    """An edit's texts as tokens.

    Attributes:
        edit: as asked for.
        contexts: prompt and target behind each context prefix, the bare prompt first.
        kl: the prompts whose answers are to stay, without targets.
        asks: what it asks, the same for edits that ask the same.
        about: its subject, the same for edits whose values belong together; None where the lookup token is not the
            subject's, so that edits of one subject have keys of their own.
    """

    edit: Edit
    contexts: tuple[Row, ...]
    kl: tuple[Row, ...]
    asks: str
    about: str | None


def prepare(
    tokenizer: PreTrainedTokenizerBase, edits: Iterable[Edit], config: EditConfig, *, longest: int | None
) -> list[Request]:
    """Checks and tokenises all edits before anything is done with any of them.

    Args:
        tokenizer: the model's.
        edits: at least one.
        config: the editor's settings.
        longest: most tokens that the model takes; None where it sets no limit.

    Raises:
        RequestError: listing every edit that cannot be carried out, by its place in `edits`; or no edits were given,
            or one that is in no list.
    """
    requests, refused = _attempt(tokenizer, edits, config, longest)
    if not (count := len(requests) + len(refused)):
        raise RequestError("no edits were given; give at least one")
    if refused:
        lines = listed((f"edit {place}: {reason}" for place, reason in refused.items()))
        raise RequestError(f"{len(refused)} of {count} edits cannot be made, nothing was changed:\n" + "\n".join(lines))
    return requests


def troubles(
    tokenizer: PreTrainedTokenizerBase, edits: Iterable[Edit], config: EditConfig, *, longest: int | None
) -> dict[int, str]:
    """Which edits `prepare` would refuse, by their place in `edits`, and why. Same arguments.

    Raises:
        RequestError: an edit that is in no list.
    """
    return _attempt(tokenizer, edits, config, longest)[1]


def _attempt(
    tokenizer: PreTrainedTokenizerBase, edits: Iterable[Edit], config: EditConfig, longest: int | None
) -> tuple[list[Request], dict[int, str]]:
    if isinstance(edits, Edit | str) or not isinstance(edits, Iterable):
        raise RequestError(f"edits: expected a list of them, got {edits!r:.60}; put a single Edit in a list")
    requests: list[Request] = []
    refused: dict[int, str] = {}
    for place, edit in enumerate(edits):
        try:
            requests.append(_prepare_one(tokenizer, edit, config, longest))
        except RequestError as trouble:
            refused[place] = str(trouble)
    return requests, refused


def _prepare_one(tokenizer: PreTrainedTokenizerBase, edit: Edit, config: EditConfig, longest: int | None) -> Request:
    if not isinstance(edit, Edit):
        raise RequestError(f"expected an Edit, got {type(edit).__name__}")
    for field in ("prompt", "subject", "target"):
        if not isinstance(getattr(edit, field), str):
            raise RequestError(f"{field}={getattr(edit, field)!r}: expected a text")
        _check_whole(field, getattr(edit, field))
    if edit.name is not None and not isinstance(edit.name, str):
        raise RequestError(f"name={edit.name!r}: expected a text, or None")
    if not edit.target.strip():
        raise RequestError(f"target {edit.target!r} is empty; give what the model is to say")
    if trouble := weight_trouble(edit.weight):
        raise RequestError(trouble)
    for field in ("paraphrases", "neighborhood"):
        for text in getattr(edit, field):
            _check_asked(tokenizer, field, text, edit.target, longest)
    contexts = tuple(
        encode(
            tokenizer,
            edit.prompt,
            edit.subject,
            target=edit.target,
            prefix=prefix,
            fact_token=config.fact_token,
            span=edit.span,
        )
        for prefix in config.context_prefixes
    )
    prompts = config.kl_prompts if config.kl_factor else ()
    kl = tuple(encode(tokenizer, prompt, edit.subject, fact_token=config.fact_token) for prompt in prompts)
    widest = max(len(row.ids) for row in (*contexts, *kl))
    if longest is not None and widest > longest:
        raise RequestError(f"{widest} tokens with its context: the model takes {longest}; shorten the prompt")
    return Request(edit, contexts, kl, asked(edit), shared_subject(edit, config))


def _check_whole(field: str, text: str) -> None:
    if _HALF.search(text):
        raise RequestError(f"{field}={text!r:.80} holds half a character (a lone surrogate); mend it")


def _check_asked(
    tokenizer: PreTrainedTokenizerBase, field: str, text: object, target: str, longest: int | None
) -> None:
    """What is asked in the evaluation alone must be a text that the model can read, with the target behind it."""
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{field}: {text!r:.80}: expected texts that are not blank")
    _check_whole(field, text)
    # A token is a byte at least, so that most texts need not be tokenised to be found short enough.
    if longest is not None and len(text.encode()) + len(target.encode()) > longest - _SPECIAL:
        tokens = len(encode_plain(tokenizer, text, target).ids)
        if tokens > longest:
            raise RequestError(f"{field}: {text[:60]!r}: {tokens} tokens with the target: the model takes {longest}")


def asked(edit: Edit) -> str:
    """What an edit asks, the same for edits that ask the same; raises as `fill`."""
    return composed(fill(edit.prompt, edit.subject)[0])


def shared_subject(edit: Edit, config: EditConfig) -> str | None:
    """The subject whose change an edit shares with others; None where it has a key of its own."""
    return composed(edit.subject) if config.fact_token != "last" and edit.span is None else None
