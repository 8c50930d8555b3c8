"""Overlaps: edits whose keys earlier edits already use. They repeat or contradict these, whatever the texts say."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.ledger import Ledger
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.errors import UpdateError, listed
from rlsedit_fast.rls import BlockState, RLSState, used_share

if TYPE_CHECKING:
    from rlsedit_fast.editing.layers import EditedLayers

logger = logging.getLogger(__name__)

_SHOWN = 5  # edits that a message lists


@dataclass(frozen=True)
class Overlap:
    """How much of the key of an edit the active edits already use, before the edit is made.

    Attributes:
        used: used share of the key at the bare prompt in the first edited layer, see `rls.used_share`; the edits before
            it in the same list count as made.
        flagged: whether it exceeds `EditConfig.overlap_share`, and no active edit of the same subject is known.
        nearest: id of the active edit with the most similar key, if it is flagged and rows are stored.

    Example:
        >>> from rlsedit_fast import Edit, EditConfig, Editor
        >>> from rlsedit_fast.world import load_demo_model
        >>> config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
        >>> editor = Editor(*load_demo_model(), config=config)
        >>> _ = editor.edit([Edit("{} speaks", "Toze Lado Rekuno", "Kubeish")])
        >>> (found,) = editor.overlaps([Edit("{}'s language is", "Toze Lado Rekuno", "Nafiish")])
        >>> found.used > 0.9, found.flagged  # another edit of a known subject shares its value
        (True, False)
    """

    used: float
    flagged: bool = False
    nearest: int | None = None


def find_overlaps(
    context: ModelContext, layers: EditedLayers | None, ledger: Ledger, requests: Sequence[Request]
) -> list[Overlap] | None:
    """Returns the overlap of each request; None if the rule does not know it. Runs the model up to the first layer."""
    if layers is None:
        return [Overlap(0.0)] * len(requests)
    state, config = layers.states[0], context.config
    if not isinstance(state, RLSState | BlockState):
        return None
    bare = [replace(request, contexts=request.contexts[:1]) for request in requests]
    (read,), _ = request_keys(context.decoder, context.projections[:1], bare)
    keys = read[:, 0].to(state.device)
    share = config.contexts.bare_weight if config.effective_rows == "contexts" and len(requests[0].contexts) > 1 else 1
    weights = torch.tensor([float(request.edit.weight) * share for request in requests], device=state.device)
    used = used_share(state, keys, weights).tolist()
    known = _of_known_subjects(config, ledger, requests)
    flagged = [at for at, one in enumerate(used) if one > config.overlap_share and at not in known]
    nearest = _nearest(state, ledger, keys[flagged]) if flagged else []
    found = dict(zip(flagged, nearest, strict=True))
    return [Overlap(one, at in found, found.get(at)) for at, one in enumerate(used)]


def check_overlaps(config: EditConfig, requests: Sequence[Request], overlaps: Sequence[Overlap] | None) -> list[int]:
    """Applies the setting `overlap` to a batch that is not written yet.

    Returns:
        The positions of requests to skip.

    Raises:
        UpdateError: a request is flagged and the setting is `raise`.
    """
    flagged = [at for at, one in enumerate(overlaps or ()) if one.flagged]
    if not flagged or config.overlap == "keep":
        return []
    assert overlaps is not None
    named = [
        f"{requests[at].prompt_key!r} -> {requests[at].edit.target!r} (used share {overlaps[at].used:.2f}"
        + (f", most similar to edit {overlaps[at].nearest})" if overlaps[at].nearest is not None else ")")
        for at in flagged
    ]
    what = f"{len(flagged)} of {len(requests)} edits repeat or contradict active edits with nearly the same key"
    if config.overlap == "raise":
        raise UpdateError(
            f"{what}, so their batch was not written: {', '.join(listed(named, _SHOWN))}",
            hint="undo or replace the earlier edits, leave these out, or set overlap='warn' or 'skip'",
        )
    outcome = "they are skipped" if config.overlap == "skip" else "they are applied nevertheless (overlap='warn')"
    logger.warning("%s; %s: %s", what, outcome, ", ".join(listed(named, _SHOWN)))
    return flagged if config.overlap == "skip" else []


def _of_known_subjects(config: EditConfig, ledger: Ledger, requests: Sequence[Request]) -> set[int]:
    """Returns the requests of the subject or prompt of an active edit, or of an earlier request, with `joint`."""
    if config.same_subject != "joint":
        return set()
    seen, known = set[str](), set[int]()
    for at, request in enumerate(requests):
        texts = {text for text in (request.subject_key, request.prompt_key) if text is not None}
        if texts & seen or ledger.ids_by_subject([request]) or ledger.ids_by_prompt([request]):
            known.add(at)
        seen |= texts
    return known


def _nearest(state: RLSState | BlockState, ledger: Ledger, keys: Tensor) -> list[int | None]:
    """Returns the id of the active edit whose key has the largest correlation `k C0 k'` with each key."""
    ids = ledger.active
    if not ids or not ledger.has_rows:
        return [None] * len(keys)
    earlier = torch.cat([rows.keys[0][:1] for rows in ledger.rows(ids)]).to(keys)
    products = state.prior_gram(keys, earlier)
    lengths = state.prior_variance(earlier).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return [ids[at] for at in (products / lengths).argmax(1).tolist()]
