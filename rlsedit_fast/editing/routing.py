"""How many tokens of a text reach other experts after edits, in the mixtures of experts above the edited layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.layers import EditedLayers
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.experts import ExpertProjection, read_routing
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import find_mixtures
from rlsedit_fast.models.tokens import encode_plain
from rlsedit_fast.statistics.sources import each_text

TOKENS = 2048
"""Default maximum number of tokens."""


def routing_change(
    context: ModelContext, layers: EditedLayers | None, texts: Iterable[str], tokens: int = TOKENS
) -> dict[int, float]:
    """Returns the fraction of tokens whose set of experts differs from that in the unedited model.

    The edited layers themselves route as before, unless a layer below them is edited too.

    Args:
        context: the model.
        layers: the edited layers; None before the first edit.
        texts: at least one text.
        tokens: maximum number of tokens to read.

    Returns:
        The fraction for each mixture of experts at or above the first edited layer; empty for a model without.

    Raises:
        InputError: there are no texts, or a text is not a string.
    """
    mixtures = [one for one in find_mixtures(context.decoder) if one.layer >= context.layers[0]]
    rows, left, longest = list[list[int]](), tokens, max_tokens(context.model.config) or tokens
    for text in each_text(texts):
        ids = encode_plain(context.tokenizer, text).ids[: min(longest, left)]
        if ids:
            rows.append(ids)
            left -= len(ids)
        if not left:
            break
    if not rows:
        raise InputError("no texts were given, or all are blank; pass at least one")
    if not mixtures or layers is None:
        return {one.layer: 0.0 for one in mixtures}
    after = _read(context, mixtures, rows)
    with layers.unedited():
        before = _read(context, mixtures, rows)
    changed = [
        sum(float((a != b).any(1).sum()) for a, b in zip(now, then, strict=True))
        for now, then in zip(after, before, strict=True)
    ]
    total = sum(map(len, rows))
    return {one.layer: count / total for one, count in zip(mixtures, changed, strict=True)}


def _read(
    context: ModelContext, mixtures: Sequence[ExpertProjection], rows: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """Returns per mixture the experts of the tokens of each row."""
    found: list[list[Tensor]] = [[] for _ in mixtures]
    with quiet(context.model):
        for ids in rows:
            given = torch.tensor([list(ids)], device=context.decoder.device)
            run = partial(context.model, input_ids=given, attention_mask=torch.ones_like(given), use_cache=False)
            for kept, experts in zip(found, read_routing(mixtures, run), strict=True):
                kept.append(experts.cpu())
    return found
