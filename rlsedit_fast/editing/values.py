"""The value search: the hidden state at the lookup token that makes the model say the target.

All requests of a batch are searched at once, each with its own change, clamp and stop; those that share a subject,
and so nearly a key, share one change (MEMIT-Merge, Dong et al. 2025). The blocks up to the edited layer are run once,
and so are the tokens before the one that is changed; every step resumes there, the head is run where the loss looks,
and requests that are done leave the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.editing.config import DEFAULT_RATE, EditConfig
from rlsedit_fast.editing.descent import AdamDescent, Descent, NormalizedDescent
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.models.passes import hidden_of, with_hidden
from rlsedit_fast.models.prefixes import Prefixed
from rlsedit_fast.models.sites import Site
from rlsedit_fast.models.tokens import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Values:
    """What the search found.

    Attributes:
        delta: wanted change of the state at the site, `[n, d]`, float32; equal for requests of one group.
        nll: mean NLL of each target under it, the worst context's, `[n]`, nats.
        rank: of each target's tokens under it, the worst one's of all contexts, `[n]`; 1 is first.
        converged: whether each reached the stopping rule together with its group, `[n]`, bool.
        steps: optimiser steps that each took, `[n]`.
    """

    delta: Tensor
    nll: Tensor
    rank: Tensor
    converged: Tensor
    steps: Tensor

    def taken(self, requests: Sequence[int]) -> Values:
        """Those of some requests, in the order given."""
        return Values(**{field.name: getattr(self, field.name)[list(requests)] for field in fields(self)})

    @staticmethod
    def joined(parts: Sequence[Values]) -> Values:
        """Those of several searches, one after the other."""
        return Values(
            **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Values)}
        )


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch that the search looks at, run once up to the site; tokens count from behind the prefix."""

    batch: Prefixed
    below: Any  # the output of the last block that is not run again, as it came; hidden state [rows, s, d]
    owner: Tensor  # [rows] the request that a row belongs to
    lookup: Tensor  # [rows] the token that is changed
    target: Tensor  # [rows, s] ids of target tokens at the positions that predict them, else -1
    kl_row: Tensor  # [rows] row of `before` that a KL row is compared with, else -1
    kl_at: Tensor  # [rows] the position at which it is compared
    before: Tensor  # [kl rows, vocabulary] log-probabilities before the edit

    def taken(self, rows: Tensor) -> _Rows:
        """The rows of the given indices only."""
        below = self.below
        if below is not None:
            hidden = hidden_of(below)
            below = with_hidden(below, hidden[rows.to(hidden.device)])
        chosen = {
            name: getattr(self, name)[rows.to(getattr(self, name).device)]
            for name in ("owner", "lookup", "target", "kl_row", "kl_at")
        }
        return replace(self, batch=self.batch.taken(rows.to(self.batch.ids.device)), below=below, **chosen)


def search_values(
    site: Site, requests: Sequence[Request], config: EditConfig, groups: Sequence[Sequence[int]] | None = None
) -> Values:
    """Finds each request's value by descent on the loss of MEMIT (Meng et al. 2023, eq. 16 and its released terms).

    The loss of a request is its target's NLL, averaged over tokens, then contexts; plus `kl_factor` times
    KL(before || after) at the end of its KL prompts, averaged over them. A group's loss is the sum of its requests'
    plus `weight_decay * ||delta|| / ||h||^2`.

    Args:
        site: where the change is made, in the last layer edited. The model is in evaluation mode, its parameters
            without gradients.
        requests: at least one.
        config: settings of the search.
        groups: indices of requests that share a change, each request in one; by default everyone has its own.
    """
    groups = groups or [[i] for i in range(len(requests))]
    rows, start = _gather(site, requests, groups)
    group = torch.zeros(len(requests), dtype=torch.long)
    for g, members in enumerate(groups):
        group[list(members)] = g
    group = group.to(start.device)
    norm = _mean_by(group, start.norm(dim=1), len(groups))
    delta = torch.zeros(len(groups), start.shape[1], device=start.device, requires_grad=True)
    descent = _descent(config, delta, norm)
    found = torch.zeros_like(start)
    nll = torch.full((len(requests),), torch.inf, device=start.device)
    steps, rank = torch.zeros_like(group), torch.zeros_like(group)
    active = torch.ones_like(norm, dtype=torch.bool)  # of groups
    with site.resumed() as forward:
        for step in range(config.search_steps + 1):
            fit, kl, worst, place = _losses(forward, rows, delta[group], len(requests))
            searched = active[group]
            with torch.no_grad():
                found = torch.where(searched[:, None], delta[group], found)
                nll = torch.where(searched, worst, nll)
                rank = torch.where(searched, place, rank)
                steps[searched] = step
                wanting = (searched & ~((place == 1) & (worst <= config.search_stop_nll))).float()
                done = active & (torch.zeros_like(norm).index_add_(0, group, wanting) == 0)
            if step == config.search_steps or bool((done == active).all()):
                active = active & ~done
                break
            decay = config.weight_decay * delta.norm(dim=1) / norm.square()
            loss = (fit + config.kl_factor * kl)[searched].sum() + decay[active].sum()
            (gradient,) = torch.autograd.grad(loss, delta)
            with torch.no_grad():
                descent.step(delta, gradient)
                allowed = config.clamp * norm / delta.norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
                delta.mul_(allowed.clamp_max(1)[:, None])
            if bool(done.any()):
                active = active & ~done
                rows = rows.taken(active[group][rows.owner].nonzero()[:, 0])
    return Values(found, nll, rank, ~active[group], steps)


def search_within_memory(
    site: Site, requests: Sequence[Request], config: EditConfig, groups: Sequence[Sequence[int]], at_once: int
) -> tuple[Values, int]:
    """`search_values` on parts of a batch, halved whenever a device's memory runs out; what is found is the same.

    Args:
        site: as there.
        requests: as there.
        config: as there.
        groups: as there; one is never divided.
        at_once: most requests to begin with, at least 1.

    Returns:
        The values of all, and how many requests at once there was memory for.

    Raises:
        torch.OutOfMemoryError: there is not enough for a single group.
    """
    order = [i for group in groups for i in group]
    found: list[Values] = []
    rest = [list(group) for group in groups]
    while rest:
        part, count = [rest[0]], len(rest[0])
        for group in rest[1:]:
            if count + len(group) > at_once:
                break
            part.append(group)
            count += len(group)
        places = {i: at for at, i in enumerate(i for group in part for i in group)}
        local = [[places[i] for i in group] for group in part]
        try:
            found.append(search_values(site, [requests[i] for i in places], config, local))
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            at_once = max(1, count // 2)
            logger.info("memory ran out at %d requests; searching %d at once from now on", count, at_once)
        else:
            rest = rest[len(part) :]
            continue
        _release(site)
    return Values.joined(found).taken(torch.tensor(order).argsort().tolist()), at_once


def _release(site: Site) -> None:
    """Gives back to the device what was freed: in pieces it may be of no use to a smaller part."""
    if site.decoder.device.type == "cuda":
        torch.cuda.empty_cache()


def _descent(config: EditConfig, delta: Tensor, norm: Tensor) -> Descent:
    rate = config.search_rate or DEFAULT_RATE[config.search_descent]
    return NormalizedDescent(rate, norm) if config.search_descent == "normalized" else AdamDescent(rate, delta)


def _gather(site: Site, requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> tuple[_Rows, Tensor]:
    """All rows of a batch, and the state `[n, d]`, float32, at each bare prompt's lookup token."""
    listed: list[tuple[int, Row, bool]] = []
    bare = []
    for i, request in enumerate(requests):
        bare.append(len(listed))
        listed += [(i, row, False) for row in request.contexts]
        listed += [(i, row, True) for row in request.kl]
    # A target's last token is asked for and never read.
    batch = site.batch([replace(row, ids=row.ids[:-1] if row.target else row.ids) for _, row, _ in listed])
    before = batch.before.tolist()
    last = [row.prompt_length - 1 - start for (_, row, _), start in zip(listed, before, strict=True)]
    at_end = torch.tensor(last)
    seen = site.look(batch, torch.arange(len(listed)), at_end)
    answers = seen.logits.argmax(-1).tolist()
    asked = [{answers[bare[member]] for member in members} for members in groups]
    group = {member: g for g, members in enumerate(groups) for member in members}
    # A KL prompt whose answer is one being edited away would hold what is to change.
    holds = [kl and answers[at] not in asked[group[owner]] for at, (owner, _, kl) in enumerate(listed)]
    target = torch.full(batch.ids.shape, -1)
    for at, (_, row, _) in enumerate(listed):
        target[at, last[at] : last[at] + len(row.target)] = torch.tensor(row.target)

    device = seen.state.device
    is_kl = torch.tensor(holds)
    lookup = torch.tensor([row.lookup - start for (_, row, _), start in zip(listed, before, strict=True)])
    rows = _Rows(
        batch,
        seen.below,
        torch.tensor([owner for owner, _, _ in listed], device=device),
        lookup.to(device),
        target.to(device),
        torch.where(is_kl, is_kl.cumsum(0) - 1, -1).to(device),
        at_end.to(device),
        seen.logits[is_kl.to(seen.logits.device)].to(device, torch.float32).log_softmax(-1),
    )
    start = seen.state[bare, lookup[bare].to(device)].float()
    return rows.taken((is_kl | (target >= 0).any(1)).nonzero()[:, 0]), start


def _losses(
    forward: Callable[..., Tensor], rows: _Rows, delta: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per request `[count]`: mean NLL, mean KL, the worst context's NLL, the worst rank of its targets' tokens.

    Requests without rows get 0, 0, 0 and 1.

    Args:
        forward: runs what lies above the site.
        rows: what is looked at.
        delta: the change of each request `[count, d]`.
        count: of requests.
    """
    row, at = (rows.target >= 0).nonzero(as_tuple=True)
    kl_rows = (rows.kl_row >= 0).nonzero()[:, 0]
    read = torch.cat([row, kl_rows]), torch.cat([at, rows.kl_at[kl_rows]])
    logits = forward(rows.batch, rows.below, rows.lookup, delta[rows.owner], *read)
    scores, after = logits.to(delta.device, torch.float32).log_softmax(-1).split([len(row), len(kl_rows)])

    wanted = rows.target[row, at]
    token_nll = -scores.gather(1, wanted[:, None])[:, 0]
    row_nll = _mean_by(row, token_nll, len(rows.owner))
    fact = (rows.target >= 0).any(1)
    worst = torch.zeros(count, device=delta.device).scatter_reduce(0, rows.owner[fact], row_nll[fact].detach(), "amax")
    with torch.no_grad():
        # Greedy decoding takes the first of equals.
        ahead = (scores > -token_nll[:, None]) | ((scores == -token_nll[:, None]) & _before(wanted, scores.shape[1]))
        place = torch.ones(count, dtype=torch.long, device=delta.device)
        place = place.scatter_reduce(0, rows.owner[row], ahead.sum(-1) + 1, "amax")

    before = rows.before[rows.kl_row[kl_rows]]
    divergence = (before.exp() * (before - after)).sum(-1)
    fit = _mean_by(rows.owner[fact], row_nll[fact], count)
    return fit, _mean_by(rows.owner[kl_rows], divergence, count), worst, place


def _before(token: Tensor, vocabulary: int) -> Tensor:
    """Which tokens have a smaller id than `token [m]`: `[m, vocabulary]`."""
    return torch.arange(vocabulary, device=token.device) < token[:, None]


def _mean_by(group: Tensor, values: Tensor, count: int) -> Tensor:
    """Mean of `values [m]` over each of `count` groups `[count]`; 0 for a group without members."""
    total = torch.zeros(count, device=values.device).index_add(0, group, values)
    return total / torch.bincount(group, minlength=count).clamp_min(1)
