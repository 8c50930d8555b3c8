"""Keys: the inputs of the edited projections, at the lookup tokens of requests or over running text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsedit_fast import ops
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.passes import read_keys
from rlsedit_fast.models.projections import Decoder, Projection
from rlsedit_fast.models.tokens import Row, encode_plain, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS_AT_ONCE = 64  # bounds the memory of one pass over anchor texts


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


def anchor_moments(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    projections: Sequence[Projection],
    texts: Iterable[str],
    *,
    longest: int | None,
) -> tuple[list[Tensor], int]:
    """The mean of `k k^T` over all tokens of `texts`, of every projection, in one pass that stops at the deepest.

    Args:
        decoder: the model, in evaluation mode.
        tokenizer: the model's.
        projections: the layers wanted.
        texts: running text; one longer than the model takes is read in pieces, a blank one has nothing to read.
        longest: most tokens that the model takes; None where it sets no limit.

    Returns:
        `([E[k k^T] [d_k, d_k] per projection, float32], number of tokens)`.

    Raises:
        InputError: no text, or keys that are not finite.
    """
    rows = [
        Row(ids[at : at + (longest or len(ids))], -1, 0)
        for text in texts
        if text.strip()
        for ids in (encode_plain(tokenizer, text).ids,)
        for at in range(0, len(ids), longest or len(ids))
    ]
    if not rows:
        raise InputError("anchor texts: none were given, or all are blank; give texts of the kind to be kept")
    rows.sort(key=lambda row: len(row.ids))  # rows of like length share a pass, so little of it is padding
    moments = [
        torch.zeros(p.weight.shape[1], p.weight.shape[1], device=p.weight.device, dtype=torch.float32)
        for p in projections
    ]
    tokens = 0
    for at in range(0, len(rows), _TEXTS_AT_ONCE):
        ids, mask = pad(rows[at : at + _TEXTS_AT_ONCE], decoder.device)
        found, _ = read_keys(decoder, projections, ids, mask)
        seen = mask.bool()
        tokens += int(seen.sum())
        for projection, moment in zip(projections, moments, strict=True):
            ops.moment_(moment, found[projection.layer][seen.to(moment.device)])
    for projection, moment in zip(projections, moments, strict=True):
        moment.div_(tokens)
        if not bool(moment.isfinite().all()):
            raise InputError(f"{projection.name}: the anchor texts give keys that are not finite; check the weights")
    return moments, tokens
