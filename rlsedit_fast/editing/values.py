"""The value search: the hidden state at the lookup token that makes the model say the target.

All requests of a batch are searched at once, each with its own change, clamp and stop; those that share a subject,
and so nearly a key, share one change (MEMIT-Merge, Dong et al. 2025). The blocks up to the edited layer are run once,
and so are the tokens before the one that is changed; every step resumes there, the head is run where the loss looks,
the KL prompts are run when the descent wants them, and requests that are done leave the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.editing.config import DEFAULT_RATE, EditConfig
from rlsedit_fast.editing.descent import AdamDescent, ConstrainedDescent, Descent, NormalizedDescent, Slope
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.stopping import Stop
from rlsedit_fast.models.passes import hidden_of, with_hidden
from rlsedit_fast.models.prefixes import Prefixed
from rlsedit_fast.models.sites import Seen, Site

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Values:
    """What the search found.

    Attributes:
        delta: wanted change of the state at the site, `[n, d]`, float32; equal for requests of one group.
        start: that state as it was, at the bare prompt's lookup token, `[n, d]`, float32.
        nll: mean NLL of each target under it, the worst context's, `[n]`, nats.
        rank: of each target's tokens under it, the worst one's of all contexts, `[n]`; 1 is first.
        converged: whether each reached the stopping rule together with its group, `[n]`, bool.
        steps: optimiser steps that each took, `[n]`.
    """

    delta: Tensor
    start: Tensor
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
    """Rows that the search looks at, run once up to the site; tokens count from behind the prefix."""

    batch: Prefixed
    below: Any  # the output of the last block that is not run again, as it came; hidden state [rows, s, d]
    owner: Tensor  # [rows] the request that a row belongs to
    lookup: Tensor  # [rows] the token that is changed
    asked: Tensor  # what the loss compares with: see `_fit` and `_Kept`

    def taken(self, rows: Tensor) -> _Rows:
        """The rows of the given indices only, no wider than these need."""
        batch = self.batch.taken(rows.to(self.batch.ids.device))
        below = self.below
        if below is not None:
            hidden = hidden_of(below)
            below = with_hidden(below, hidden[rows.to(hidden.device), : batch.ids.shape[1]])
        chosen = {name: getattr(self, name)[rows.to(self.owner.device)] for name in ("owner", "lookup", "asked")}
        return replace(self, batch=batch, below=below, **chosen)

    def of(self, wanted: Tensor) -> _Rows:
        """The rows of the requests that are wanted, bool `[requests]`."""
        return self.taken(wanted[self.owner].nonzero()[:, 0])


@dataclass(frozen=True)
class _Fit:
    """How near a batch's targets are, per request `[n]`; one without rows has 0, 0 and rank 1.

    Attributes:
        nll: mean NLL of the target's tokens, averaged over contexts.
        worst: the worst context's.
        rank: of the target's tokens in all contexts, the worst one's.
        said: the token ranked first behind the bare prompt, of requests that have rows.
    """

    nll: Tensor
    worst: Tensor
    rank: Tensor
    said: Tensor


class _Kept:
    """The KL prompts of a batch. What they are to go on saying is asked when they are first looked at.

    Args:
        forward: runs what lies above the site.
        rows: the prompts.
        group: of each request, those of a group share a change.
    """

    def __init__(self, forward: Callable[..., Tensor], rows: _Rows, group: Tensor) -> None:
        self._forward, self._rows, self._group = forward, rows, group
        self._known = False

    def of(self, wanted: Tensor) -> None:
        """Lets go of the prompts of other requests than these, bool `[requests]`."""
        self._rows = self._rows.of(wanted)

    def divergence(self, delta: Tensor, said: Tensor) -> Tensor | None:
        """KL(before || after) behind the prompts, averaged over each request's `[requests]`; None if there are none.

        Args:
            delta: the change of each request `[requests, d]`.
            said: the token that the unedited model ranks first behind each request's bare prompt, `[requests]`. A KL
                prompt with the same answer would hold what is to change, and is left out.
        """
        if not self._known:
            self._ask(torch.zeros_like(delta), said.tolist())
        rows = self._rows
        if not len(rows.owner):
            return None
        after = self._scores(delta)
        return _mean_by(rows.owner, (rows.asked.exp() * (rows.asked - after)).sum(-1), len(delta))

    @torch.no_grad()
    def _ask(self, nothing: Tensor, said: list[int]) -> None:
        self._known = True
        if not len(self._rows.owner):
            return
        before = self._scores(nothing)
        asked = set(zip(self._group.tolist(), said, strict=True))
        answers = zip(self._group[self._rows.owner].tolist(), before.argmax(-1).tolist(), strict=True)
        holds = torch.tensor([at for at, answer in enumerate(answers) if answer not in asked], dtype=torch.long)
        self._rows = replace(self._rows, asked=before).taken(holds)

    def _scores(self, delta: Tensor) -> Tensor:
        rows = self._rows
        every = torch.arange(len(rows.owner), device=delta.device)
        end = rows.batch.lengths.to(delta.device) - 1
        logits = self._forward(rows.batch, rows.below, rows.lookup, delta[rows.owner], every, end)
        return logits.to(delta.device, torch.float32).log_softmax(-1)


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
    facts, held, start = _gather(site, requests)
    group = torch.zeros(len(requests), dtype=torch.long)
    for g, members in enumerate(groups):
        group[list(members)] = g
    group = group.to(start.device)
    norm = _mean_by(group, start.norm(dim=1), len(groups))
    delta = torch.zeros(len(groups), start.shape[1], device=start.device, requires_grad=True)
    stop = Stop(config, len(requests), start.device)
    descent = _descent(config, delta, norm, stop.nll)
    found = torch.zeros_like(start)
    nll = torch.full((len(requests),), torch.inf, device=start.device)
    steps, rank = torch.zeros_like(group), torch.zeros_like(group)
    active = torch.ones_like(norm, dtype=torch.bool)  # of groups
    with site.resumed() as forward:
        kept = _Kept(forward, held, group)
        said = group
        for step in range(config.search_steps + 1):
            fit = _fit(forward, facts, delta[group], len(requests))
            said = said if step else fit.said
            # Where nothing is changed the KL term and its gradient are 0.
            kl = kept.divergence(delta[group], said) if step and stop.reads_kl else None
            searched = active[group]
            with torch.no_grad():
                found = torch.where(searched[:, None], delta[group], found)
                nll = torch.where(searched, fit.worst, nll)
                rank = torch.where(searched, fit.rank, rank)
                steps[searched] = step
                decay = config.weight_decay * delta.norm(dim=1) / norm.square()
                total = fit.nll + decay[group] + (0.0 if kl is None else config.kl_factor * kl)
                wanting = (searched & ~stop.met(fit.rank, fit.worst, total)).float()
                # A group stops together.
                done = active & (torch.zeros_like(norm).index_add_(0, group, wanting) == 0)
                active = active & ~done
            if step == config.search_steps or not bool(active.any()):
                break
            searched = active[group]
            (towards,) = torch.autograd.grad(fit.nll[searched].sum(), delta)
            if bool(done.any()):
                facts = facts.of(searched)
                kept.of(searched)
            if step and kl is None and descent.looks_at_kl(step):
                kl = kept.divergence(delta[group], said)
            away = None
            if kl is not None:
                (away,) = torch.autograd.grad(config.kl_factor * kl[searched].sum(), delta)
            with torch.no_grad():
                length = delta.norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
                missed = torch.zeros_like(norm).index_add_(0, group, -torch.expm1(-fit.nll))
                worst = torch.zeros_like(norm).scatter_reduce(0, group, fit.worst, "amax")
                shortening = (config.weight_decay / (length * norm.square()))[:, None] * delta
                descent.step(delta, Slope(towards, away, shortening, worst, missed))
                allowed = config.clamp * norm / delta.norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
                delta.mul_(allowed.clamp_max(1)[:, None])
    return Values(found, start, nll, rank, stop.reached(~active[group], rank), steps)


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


def _descent(config: EditConfig, delta: Tensor, norm: Tensor, nll: float) -> Descent:
    rate = config.search_rate or DEFAULT_RATE[config.search_descent]
    if config.search_descent == "adam":
        return AdamDescent(rate, delta)
    return (
        NormalizedDescent(rate, norm) if config.search_descent == "normalized" else ConstrainedDescent(rate, norm, nll)
    )


def _gather(site: Site, requests: Sequence[Request]) -> tuple[_Rows, _Rows, Tensor]:
    """A batch's rows with targets, its KL prompts, and the state `[n, d]`, float32, at each bare prompt's lookup token.

    Rows with targets are in the requests' order, a bare prompt before its other contexts.
    """
    facts = [(i, row) for i, request in enumerate(requests) for row in request.contexts]
    kept = [(i, row) for i, request in enumerate(requests) for row in request.kl]
    # A target's last token is asked for and never read.
    texts = [replace(row, ids=row.ids[:-1]) for _, row in facts] + [row for _, row in kept]
    batch = site.batch(texts)
    parts = []
    for listed, of in ((facts, range(len(facts))), (kept, range(len(facts), len(texts)))):
        part = batch.taken(torch.tensor(of, dtype=torch.long, device=batch.ids.device))
        seen = site.look(part) if len(of) else Seen(None, torch.zeros(0, device=batch.ids.device))
        device = seen.state.device
        before = part.before.tolist()
        lookup = torch.tensor([row.lookup - cut for (_, row), cut in zip(listed, before, strict=True)])
        owner = torch.tensor([owner for owner, _ in listed], dtype=torch.long)
        asked = torch.full(part.ids.shape, -1)
        for at, ((_, row), cut) in enumerate(zip(listed, before, strict=True)):
            if row.target:
                asked[at, row.prompt_length - 1 - cut : len(row.ids) - 1 - cut] = torch.tensor(row.target)
        parts.append((_Rows(part, seen.below, owner.to(device), lookup.to(device), asked.to(device)), seen.state))
    (fact_rows, states), (kept_rows, _) = parts
    bare = torch.tensor([at for at, (i, _) in enumerate(facts) if not at or facts[at - 1][0] != i])
    bare = bare.to(states.device)
    return fact_rows, kept_rows, states[bare, fact_rows.lookup[bare]].float()


def _fit(forward: Callable[..., Tensor], facts: _Rows, delta: Tensor, count: int) -> _Fit:
    """Runs what lies above the site on the rows with targets.

    Args:
        forward: does so.
        facts: `asked` holds ids of target tokens at the positions that predict them, else -1, `[rows, s or more]`.
        delta: the change of each request `[count, d]`.
        count: of requests.
    """
    row, at = (facts.asked >= 0).nonzero(as_tuple=True)
    logits = forward(facts.batch, facts.below, facts.lookup, delta[facts.owner], row, at)
    scores = logits.to(delta.device, torch.float32).log_softmax(-1)
    wanted = facts.asked[row, at]
    token_nll = -scores.gather(1, wanted[:, None])[:, 0]
    row_nll = _mean_by(row, token_nll, len(facts.owner))
    with torch.no_grad():
        worst = row_nll.new_zeros(count).scatter_reduce(0, facts.owner, row_nll, "amax")
        # Greedy decoding takes the first of equals.
        ahead = (scores > -token_nll[:, None]) | ((scores == -token_nll[:, None]) & _before(wanted, scores.shape[1]))
        rank = torch.ones(count, dtype=torch.long, device=delta.device)
        rank = rank.scatter_reduce(0, facts.owner[row], ahead.sum(-1) + 1, "amax")
        first = torch.searchsorted(facts.owner[row], torch.arange(count, device=row.device)).clamp_max(len(row) - 1)
        said = scores[first].argmax(-1)
    return _Fit(_mean_by(facts.owner, row_nll, count), worst, rank, said)


def _before(token: Tensor, vocabulary: int) -> Tensor:
    """Which tokens have a smaller id than `token [m]`: `[m, vocabulary]`."""
    return torch.arange(vocabulary, device=token.device) < token[:, None]


def _mean_by(group: Tensor, values: Tensor, count: int) -> Tensor:
    """Mean of `values [m]` over each of `count` groups `[count]`; 0 for a group without members."""
    total = torch.zeros(count, device=values.device).index_add(0, group, values)
    return total / torch.bincount(group, minlength=count).clamp_min(1)
