"""Keys: the inputs of the edited projections, at the lookup tokens of requests or over running text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsedit_fast.editing.requests import Request
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.passes import read_keys
from rlsedit_fast.models.projections import Decoder, Projection
from rlsedit_fast.models.tokens import encode_plain, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS_AT_ONCE = 64  # bounds the memory of one pass over texts


def request_keys(
    decoder: Decoder, projections: Sequence[Projection], requests: Sequence[Request], *, block: int | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Each request's keys, averaged over its contexts, in one pass for all layers.

    Args:
        decoder: the model, in evaluation mode.
        projections: the layers wanted.
        requests: at least one.
        block: a block whose output at the bare prompt's lookup token is wanted too.

    Returns:
        `([K [n, d_k] per projection], hidden [n, d] or None)`, float32.
    """
    listed = [(owner, row) for owner, request in enumerate(requests) for row in request.contexts]
    contexts = len(requests[0].contexts)
    ids, mask = pad([row for _, row in listed], decoder.device)
    lookup = torch.tensor([row.lookup for _, row in listed], device=ids.device)
    found, hidden = read_keys(decoder, projections, ids, mask, block=block)

    def at_lookup(states: Tensor) -> Tensor:
        rows = states[torch.arange(len(listed), device=states.device), lookup.to(states.device)].float()
        return rows.unflatten(0, (len(requests), contexts))

    keys = [at_lookup(found[projection.layer]).mean(1) for projection in projections]
    return keys, None if hidden is None else at_lookup(hidden)[:, 0]


def text_keys(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    projections: Sequence[Projection],
    texts: Sequence[str],
    *,
    longest: int | None,
) -> list[Tensor]:
    """The keys of every token of some short texts.

    Args:
        decoder: the model, in evaluation mode.
        tokenizer: the model's.
        projections: the layers wanted.
        texts: at least one, each with a token and no longer than the model takes.
        longest: most tokens that the model takes; None where it sets no limit.

    Returns:
        `K [tokens, d_k]` per projection, float32.

    Raises:
        InputError: no text, or one that is empty or too long.
    """
    rows = [encode_plain(tokenizer, text) for text in texts]
    wrong = [text for text, row in zip(texts, rows, strict=True) if not text.strip() or not row.ids]
    long = [text for text, row in zip(texts, rows, strict=True) if longest is not None and len(row.ids) > longest]
    if not rows or wrong or long:
        raise InputError(
            f"{len(rows)} texts, of which {len(wrong)} are empty and {len(long)} longer than the {longest} tokens that "
            f"the model takes{f', such as {long[0][:60]!r}' if long else ''}: expected at least one, each between"
        )
    found: list[list[Tensor]] = [[] for _ in projections]
    for at in range(0, len(rows), _TEXTS_AT_ONCE):
        ids, mask = pad(rows[at : at + _TEXTS_AT_ONCE], decoder.device)
        keys, _ = read_keys(decoder, projections, ids, mask)
        for kept, projection in zip(found, projections, strict=True):
            here = keys[projection.layer]
            kept.append(here[mask.bool().to(here.device)].float())
    return [torch.cat(kept) for kept in found]
