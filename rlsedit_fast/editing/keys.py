"""Keys: inputs of the edited projections, at the edited tokens of requests or at all tokens of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlsedit_fast.editing.requests import Request
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.passes import read_keys
from rlsedit_fast.models.prefixes import Prefixed, shared_prefixes
from rlsedit_fast.models.projections import Decoder, Projection
from rlsedit_fast.models.tokens import Row, alike, encode_plain, pad
from rlsedit_fast.statistics.sources import each_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS_AT_ONCE = 64  # bounds the memory of one pass over texts


def request_keys(
    decoder: Decoder,
    projections: Sequence[Projection],
    requests: Sequence[Request],
    *,
    output_of: nn.Module | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Reads the keys of requests at their edited tokens, in each context, for several layers in one pass.

    Rows end at the edited token, on which later tokens have no influence. Leading tokens that a context has in all
    requests run once, rows of similar length share a forward pass, and a pass ends at the deepest layer that is read.

    Args:
        decoder: the model, in evaluation mode.
        projections: the projections to read, ascending.
        requests: at least one; all have the same number of contexts, the bare prompt first.
        output_of: a decoder layer, or the deepest projection, whose output at the edited tokens is returned as well. No
            module may run between it and the deepest projection.

    Returns:
        `([K [n, contexts, d_k] per projection], output [n, contexts, d] or None)`, float32.
    """
    contexts = len(requests[0].contexts)
    every = [[_up_to_lookup(row) for row in request.contexts] for request in requests]
    rows = [row for one in every for row in one]
    deepest = max(i for i, block in enumerate(decoder.blocks) if block is output_of or i <= projections[-1].layer)
    batch = Prefixed.of(decoder, rows, shared_prefixes(every), deepest=deepest)
    before = batch.before.tolist()
    lookup = torch.tensor([row.lookup for row in rows], device=batch.ids.device) - batch.before
    order, keys, outputs = [], [], []
    for part in alike([len(row.ids) - cut for row, cut in zip(rows, before, strict=True)]):
        chosen = torch.tensor(part, device=batch.ids.device)
        found, output = read_keys(
            decoder, projections, batch.taken(chosen).arguments(), at=lookup[chosen], output_of=output_of
        )
        order += part
        keys.append([found[projection.layer].float() for projection in projections])
        outputs.append(output)
    back = torch.tensor(order).argsort()

    def by_request(parts: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(parts))
        return whole[back.to(whole.device)].unflatten(0, (len(requests), contexts))

    seen = [output.float() for output in outputs if output is not None]
    return [by_request(parts) for parts in zip(*keys, strict=True)], by_request(seen) if seen else None


def _up_to_lookup(row: Row) -> Row:
    return Row(row.ids[: row.lookup + 1], row.lookup, row.lookup + 1)


def text_keys(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    projections: Sequence[Projection],
    texts: Iterable[str],
    *,
    longest: int | None,
) -> list[Tensor]:
    """Reads the keys of every token of short texts.

    Args:
        decoder: the model, in evaluation mode.
        tokenizer: tokenizer of the model.
        projections: the projections to read.
        texts: at least one; none is blank or longer than `longest` tokens.
        longest: maximum number of tokens of the model; None if there is no limit.

    Returns:
        `K [tokens, d_k]` per projection, float32.

    Raises:
        InputError: there is no text, or a text is not a string, blank or too long.
    """
    texts = list(each_text(texts))
    rows = [encode_plain(tokenizer, text) for text in texts]
    if not rows:
        raise InputError("no texts were given; pass at least one")
    for place, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
        if not text.strip() or not row.ids:
            raise InputError(f"text {place} of {len(texts)} is blank; remove it")
        if longest is not None and len(row.ids) > longest:
            raise InputError(
                f"text {place} of {len(texts)}, {text[:60]!r}, has {len(row.ids)} tokens, and the model supports "
                f"{longest}; shorten or split it"
            )
    found: list[list[Tensor]] = [[] for _ in projections]
    for at in range(0, len(rows), _TEXTS_AT_ONCE):
        ids, mask = pad(rows[at : at + _TEXTS_AT_ONCE], decoder.device)
        keys, _ = read_keys(decoder, projections, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
        for kept, projection in zip(found, projections, strict=True):
            here = keys[projection.layer]
            kept.append(here[mask.bool().to(here.device)].float())
    return [torch.cat(kept) for kept in found]
