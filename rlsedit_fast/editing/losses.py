"""What the value search looks at: rows with targets, KL prompts, and how far a change of the hidden state takes them.

The blocks up to the site are run once, and so are the tokens before the one that is changed; every look resumes there,
and the head is run where the loss looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.editing.requests import Request
from rlsedit_fast.models.passes import hidden_of, with_hidden
from rlsedit_fast.models.prefixes import Prefixed
from rlsedit_fast.models.sites import Site, SiteState

Forward = Callable[..., Tensor]
"""What `Site.resumed` yields."""


@dataclass(frozen=True)
class Rows:
    """Rows that the search looks at, run once up to the site; tokens count from behind the prefix."""

    batch: Prefixed
    below: Any  # the output of the last block that is not run again, as it came; hidden state [rows, s, d]
    owner: Tensor  # [rows] the request that a row belongs to
    lookup: Tensor  # [rows] the token that is changed
    asked: Tensor  # what the loss compares with: see `fit_of` and `Kept`

    def taken(self, rows: Tensor) -> Rows:
        """The rows of the given indices only, no wider than these need."""
        batch = self.batch.taken(rows.to(self.batch.ids.device))
        below = self.below
        if below is not None:
            hidden = hidden_of(below)
            below = with_hidden(below, hidden[rows.to(hidden.device), : batch.ids.shape[1]])
        chosen = {name: getattr(self, name)[rows.to(self.owner.device)] for name in ("owner", "lookup", "asked")}
        return replace(self, batch=batch, below=below, **chosen)

    def of(self, wanted: Tensor) -> Rows:
        """The rows of the requests that are wanted, bool `[requests]`."""
        return self.taken(wanted[self.owner].nonzero()[:, 0])


@dataclass(frozen=True)
class Fit:
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


class Kept:
    """The KL prompts of a batch. What they are to go on saying is asked when they are first looked at.

    Args:
        forward: runs what lies above the site.
        rows: the prompts.
        group: of each request, those of a group share a change.
    """

    def __init__(self, forward: Forward, rows: Rows, group: Tensor) -> None:
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
        return mean_by(rows.owner, (rows.asked.exp() * (rows.asked - after)).sum(-1), len(delta))

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


def gather(site: Site, requests: Sequence[Request]) -> tuple[Rows, Rows, Tensor]:
    """A batch's rows with targets, its KL prompts, and the states `[n, contexts, d]`, float32, at the lookup tokens.

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
        seen = site.capture(part) if len(of) else SiteState(None, torch.zeros(0, device=batch.ids.device))
        device = seen.state.device
        before = part.before.tolist()
        lookup = torch.tensor([row.lookup - cut for (_, row), cut in zip(listed, before, strict=True)])
        owner = torch.tensor([owner for owner, _ in listed], dtype=torch.long)
        asked = torch.full(part.ids.shape, -1)
        for at, ((_, row), cut) in enumerate(zip(listed, before, strict=True)):
            if row.target:
                asked[at, row.prompt_length - 1 - cut : len(row.ids) - 1 - cut] = torch.tensor(row.target)
        parts.append((Rows(part, seen.below, owner.to(device), lookup.to(device), asked.to(device)), seen.state))
    (fact_rows, states), (kept_rows, _) = parts
    every = torch.arange(len(facts), device=states.device)
    return fact_rows, kept_rows, states[every, fact_rows.lookup].float().unflatten(0, (len(requests), -1))


def fit_of(forward: Forward, facts: Rows, delta: Tensor, count: int) -> Fit:
    """Runs what lies above the site on the rows with targets.

    Args:
        forward: does so.
        facts: `asked` holds ids of target tokens at the positions that predict them, else -1, `[rows, s or more]`.
        delta: the change of each request `[count, d]`.
        count: of requests.
    """
    row, at = (facts.asked >= 0).nonzero(as_tuple=True)
    logits = forward(facts.batch, facts.below, facts.lookup, delta[facts.owner], row, at)
    return fit_from(logits.to(delta.device), row, facts.asked[row, at], facts.owner, count)


def fit_from(logits: Tensor, row: Tensor, wanted: Tensor, owner: Tensor, count: int) -> Fit:
    """How well logits predict target tokens.

    Args:
        logits: `[m, vocabulary]`, at the tokens that predict target tokens; those of a row are adjacent.
        row: the row of each, `[m]`.
        wanted: the target token of each, `[m]`.
        owner: the request of each row, `[rows]`.
        count: of requests.
    """
    scores = logits.float().log_softmax(-1)
    token_nll = -scores.gather(1, wanted[:, None])[:, 0]
    row_nll = mean_by(row, token_nll, len(owner))
    with torch.no_grad():
        worst = row_nll.new_zeros(count).scatter_reduce(0, owner, row_nll, "amax")
        # Greedy decoding takes the first of equals.
        ahead = (scores > -token_nll[:, None]) | ((scores == -token_nll[:, None]) & _before(wanted, scores.shape[1]))
        rank = torch.ones(count, dtype=torch.long, device=scores.device)
        rank = rank.scatter_reduce(0, owner[row], ahead.sum(-1) + 1, "amax")
        first = torch.searchsorted(owner[row], torch.arange(count, device=row.device)).clamp_max(len(row) - 1)
        said = scores[first].argmax(-1)
    return Fit(mean_by(owner, row_nll, count), worst, rank, said)


def _before(token: Tensor, vocabulary: int) -> Tensor:
    """Which tokens have a smaller id than `token [m]`: `[m, vocabulary]`."""
    return torch.arange(vocabulary, device=token.device) < token[:, None]


def group_of(groups: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The group of each request, `[requests]`, from the requests of each group."""
    group = torch.zeros(sum(map(len, groups)), dtype=torch.long)
    for g, members in enumerate(groups):
        group[list(members)] = g
    return group.to(device)


def mean_by(group: Tensor, values: Tensor, count: int) -> Tensor:
    """Mean of `values [m]` over each of `count` groups `[count]`; 0 for a group without members."""
    total = torch.zeros(count, device=values.device).index_add(0, group, values)
    return total / torch.bincount(group, minlength=count).clamp_min(1)
