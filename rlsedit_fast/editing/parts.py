"""As many requests at once as there is memory for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rlsedit_fast.editing.losses import Kept, Rows, fit_of, gather
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.models.sites import Site

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PASSING = 1.5
"""What a look takes at its peak, relative to what it keeps for going back and what it starts from: the head's scores
and the gradients on the way are there only for a moment. An estimate.
"""


def in_parts(
    site: Site, groups: Sequence[Sequence[int]], at_once: int, run: Callable[[list[int], list[list[int]]], T]
) -> tuple[list[T], list[int], int]:
    """Runs something on parts of a batch, which are halved whenever a device's memory runs out.

    Args:
        site: whose device's memory it is.
        groups: indices of the requests of a batch; one is never divided.
        at_once: most requests to begin with, at least 1.
        run: is given the indices of a part, and its groups by place in it.

    Returns:
        What `run` gave for each part, the indices in the order in which they went, and how many requests at once there
        was memory for.

    Raises:
        torch.OutOfMemoryError: there is not enough for a single group.
    """
    found: list[T] = []
    order: list[int] = []
    rest = [list(group) for group in groups]
    while rest:
        part, count = [rest[0]], len(rest[0])
        for group in rest[1:]:
            if count + len(group) > at_once:
                break
            part.append(group)
            count += len(group)
        indices = [i for group in part for i in group]
        places = {i: at for at, i in enumerate(indices)}
        try:
            found.append(run(indices, [[places[i] for i in group] for group in part]))
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            at_once = max(1, count // 2)
            logger.info("memory ran out at %d requests; searching %d at once from now on", count, at_once)
        else:
            rest = rest[len(part) :]
            order += indices
            continue
        _release(site)
    return found, order, at_once


def fitting(site: Site, requests: Sequence[Request], budget: int) -> int:
    """How many requests like the longest of these can be searched at once in `budget` bytes; at least 1.

    Found by looking once at that one alone, and counting what is kept for going back.
    """
    longest = max(requests, key=lambda request: sum(len(row.ids) for row in (*request.contexts, *request.kl)))
    facts, held, states = gather(site, [longest])
    start = states[:, 0]
    delta = torch.zeros_like(start, requires_grad=True)
    model = site.decoder.model
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with site.resumed() as forward:
        kept = Kept(forward, held, torch.zeros(1, dtype=torch.long, device=start.device))
        said = torch.full_like(start[:, 0], -1).long()  # so that no prompt is left out
        kept.divergence(delta.detach(), said)
        fit = _kept_bytes(lambda: fit_of(forward, facts, delta, 1).nll, weights)
        away = _kept_bytes(lambda: kept.divergence(delta, said), weights)
    each = max(fit, away) + _row_bytes(facts) + _row_bytes(held)
    return max(1, int(budget / (_PASSING * each)))


def _kept_bytes(look: Callable[[], Tensor | None], weights: set[int]) -> int:
    """Bytes of what a forward keeps for going back, the model's own tensors left out."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = look()  # held until the sizes are added up, and with it what was kept
        total = sum(sizes.values())
    del result
    return total


def _row_bytes(rows: Rows) -> int:
    """Bytes of the states that every look starts from, and of the prefixes' keys and values."""
    cache = rows.batch.cache
    held = [] if cache is None else [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    below = rows.below[0] if isinstance(rows.below, tuple) else rows.below
    if below is not None:
        held.append(below)
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _release(site: Site) -> None:
    """Gives back to the device what was freed: in pieces it may be of no use to a smaller part."""
    if site.decoder.device.type == "cuda":
        torch.cuda.empty_cache()
