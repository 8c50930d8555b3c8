"""What the value search evaluates: target NLL and rank, and KL on prompts; and the same measured after a write.

The decoder layers up to the edited hidden state run once, and so do the tokens before the edited one. Each evaluation
resumes there, and the head is only applied where the loss reads logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.editing.requests import Request
from rlsedit_fast.models.passes import hidden_of, taken_rows
from rlsedit_fast.models.prefixes import Prefixed, reading, shared_prefixes
from rlsedit_fast.models.sites import Site, SiteState
from rlsedit_fast.models.tokens import Row, alike
from rlsedit_fast.rls import realized_fraction

Forward = Callable[..., Tensor]
"""The forward pass that `Site.resumed` yields."""

_ROWS_AT_ONCE = 128  # bounds the memory of one measuring pass


@dataclass(frozen=True)
class PromptRows:
    """Token rows, run once up to the edited hidden state. Token positions count from the end of the shared prefix.

    Attributes:
        batch: the token ids.
        below: output of the last decoder layer that is not run again, unmodified; hidden state `[rows, s, d]`.
        owner: index of the request of each row, `[rows]`.
        lookup: position of the edited token, `[rows]`.
        wanted: for rows with targets, ids of target tokens at the positions that predict them, otherwise -1,
            `[rows, s or more]`; for KL prompts, log probabilities before the edit, `[rows, vocabulary]`.
    """

    batch: Prefixed
    below: Any
    owner: Tensor
    lookup: Tensor
    wanted: Tensor

    def taken(self, rows: Tensor) -> PromptRows:
        """Returns the rows with the given indices, no wider than necessary."""
        batch = self.batch.taken(rows.to(self.batch.ids.device))
        below = self.below
        if below is not None:
            below = taken_rows(below, rows, batch.ids.shape[1])
        chosen = {name: getattr(self, name)[rows.to(self.owner.device)] for name in ("owner", "lookup", "wanted")}
        return replace(self, batch=batch, below=below, **chosen)

    def of(self, selected: Tensor) -> PromptRows:
        """Returns the rows of the selected requests, bool `[requests]`."""
        return self.taken(selected[self.owner].nonzero()[:, 0])


@dataclass(frozen=True)
class Fit:
    """How well the targets are predicted, per request `[n]`; a request without rows has NLL 0 and rank 1.

    Attributes:
        nll: mean NLL of the target tokens, averaged over contexts, nats.
        worst: mean NLL of the target tokens in the worst context, nats.
        rank: rank of the worst target token over all contexts; 1 is first.
        top: the token ranked first after the bare prompt, for requests with rows.
    """

    nll: Tensor
    worst: Tensor
    rank: Tensor
    top: Tensor


class KLPrompts:
    """The KL prompts of a batch; their distribution before the edit is computed at the first evaluation.

    Args:
        forward: runs the layers above the edited hidden state.
        rows: the prompts.
        group: group of each request; requests of a group share a change.
    """

    def __init__(self, forward: Forward, rows: PromptRows, group: Tensor) -> None:
        self._forward, self._rows, self._group = forward, rows, group
        self._prepared = False

    def keep(self, selected: Tensor) -> None:
        """Drops the prompts of all requests that are not selected, bool `[requests]`."""
        self._rows = self._rows.of(selected)

    def divergence(self, delta: Tensor, top: Tensor) -> Tensor | None:
        """Returns KL(before || after) at the end of the prompts, averaged per request `[requests]`; None without any.

        Args:
            delta: change of each request `[requests, d]`.
            top: token that the unedited model ranks first after each bare prompt, `[requests]`. A KL prompt with the
                same first token would preserve what is edited and is dropped.
        """
        if not self._prepared:
            self._prepare(torch.zeros_like(delta), top.tolist())
        rows = self._rows
        if not len(rows.owner):
            return None
        after = self._log_probabilities(delta)
        return mean_by(rows.owner, (rows.wanted.exp() * (rows.wanted - after)).sum(-1), len(delta))

    @torch.no_grad()
    def _prepare(self, zero: Tensor, top: list[int]) -> None:
        self._prepared = True
        if not len(self._rows.owner):
            return
        before = self._log_probabilities(zero)
        edited = set(zip(self._group.tolist(), top, strict=True))
        answers = zip(self._group[self._rows.owner].tolist(), before.argmax(-1).tolist(), strict=True)
        kept = torch.tensor([at for at, answer in enumerate(answers) if answer not in edited], dtype=torch.long)
        self._rows = replace(self._rows, wanted=before).taken(kept)

    def _log_probabilities(self, delta: Tensor) -> Tensor:
        rows = self._rows
        every = torch.arange(len(rows.owner), device=delta.device)
        end = rows.batch.lengths.to(delta.device) - 1
        logits = self._forward(rows.batch, rows.below, rows.lookup, delta[rows.owner], every, end)
        return logits.to(delta.device, torch.float32).log_softmax(-1)


def gather(site: Site, requests: Sequence[Request]) -> tuple[tuple[PromptRows, ...], PromptRows, Tensor]:
    """Returns the rows with targets, the KL prompts, and the hidden states at the edited tokens.

    Args:
        site: the edited hidden state.
        requests: the batch; all have the same number of contexts.

    Returns:
        Parts of the rows with targets, in the order of the requests: the first without chat, the bare prompt of a
        request first, and one for each form in a chat, since these rows are longer; the KL prompts; and states
        `[n, contexts, d]`, float32.
    """
    chat = requests[0].chat
    plain = len(requests[0].contexts) - chat
    contexts = [(i, row) for i, request in enumerate(requests) for row in request.contexts[:plain]]
    prompts = [(i, row) for i, request in enumerate(requests) for row in request.kl]
    targets, kl = _captured(site, [contexts, prompts])
    parts = [targets]
    for at in range(plain, plain + chat):
        parts += _captured(site, [[(i, request.contexts[at]) for i, request in enumerate(requests)]])
    found = []
    for rows, states in parts:
        every = torch.arange(len(rows.owner), device=states.device)
        found.append(states[every, rows.lookup].float().unflatten(0, (len(requests), -1)))
    return tuple(rows for rows, _ in parts), kl[0], torch.cat(found, dim=1)


def _captured(site: Site, lists: Sequence[Sequence[tuple[int, Row]]]) -> list[tuple[PromptRows, Tensor]]:
    """Runs lists of (request, row) up to the site in one batch; returns the rows and hidden states of each list."""
    # The last target token is predicted but never read.
    texts = [replace(row, ids=row.ids[:-1]) if row.target else row for listed in lists for _, row in listed]
    batch = site.batch(texts)
    parts, first = [], 0
    for listed in lists:
        of = range(first, first + len(listed))
        first += len(listed)
        part = batch.taken(torch.tensor(of, dtype=torch.long, device=batch.ids.device))
        seen = site.capture(part) if len(of) else SiteState(None, torch.zeros(0, device=batch.ids.device))
        device = seen.state.device
        before = part.before.tolist()
        lookup = torch.tensor([row.lookup - cut for (_, row), cut in zip(listed, before, strict=True)])
        owner = torch.tensor([owner for owner, _ in listed], dtype=torch.long)
        wanted = torch.full(part.ids.shape, -1)
        for at, ((_, row), cut) in enumerate(zip(listed, before, strict=True)):
            if row.target:
                wanted[at, row.prompt_length - 1 - cut : len(row.ids) - 1 - cut] = torch.tensor(row.target)
        rows = PromptRows(part, seen.below, owner.to(device), lookup.to(device), wanted.to(device))
        parts.append((rows, seen.state))
    return parts


def evaluate_fit(forward: Forward, parts: Sequence[PromptRows], delta: Tensor, count: int) -> Fit:
    """Runs the layers above the edited hidden state on the rows with targets.

    Args:
        forward: runs these layers.
        parts: rows with targets, see `gather`.
        delta: change of each request `[count, d]`.
        count: number of requests.
    """
    found, rows, wanted, first = [], [], [], 0
    for part in parts:
        row, at = (part.wanted >= 0).nonzero(as_tuple=True)
        found.append(forward(part.batch, part.below, part.lookup, delta[part.owner], row, at).to(delta.device))
        rows.append(row + first)
        wanted.append(part.wanted[row, at])
        first += len(part.owner)
    owner = torch.cat([part.owner for part in parts])
    return fit_of_logits(torch.cat(found), torch.cat(rows), torch.cat(wanted), owner, count)


def fit_of_logits(logits: Tensor, row: Tensor, wanted: Tensor, owner: Tensor, count: int) -> Fit:
    """Returns how well logits predict target tokens.

    Args:
        logits: `[m, vocabulary]`, at the positions that predict target tokens; those of a row are adjacent.
        row: row of each position, `[m]`.
        wanted: target token of each position, `[m]`.
        owner: request of each row, `[rows]`.
        count: number of requests.
    """
    scores = logits.float().log_softmax(-1)
    token_nll = -scores.gather(1, wanted[:, None])[:, 0]
    row_nll = mean_by(row, token_nll, len(owner))
    with torch.no_grad():
        worst = row_nll.new_zeros(count).scatter_reduce(0, owner, row_nll, "amax")
        # Greedy decoding takes the first of equal scores.
        ahead = (scores > -token_nll[:, None]) | ((scores == -token_nll[:, None]) & _before(wanted, scores.shape[1]))
        rank = torch.ones(count, dtype=torch.long, device=scores.device)
        rank = rank.scatter_reduce(0, owner[row], ahead.sum(-1) + 1, "amax")
        own = owner[row]
        first = (own[:, None] == torch.arange(count, device=row.device)).int().argmax(0)
        top = scores[first].argmax(-1)
    return Fit(mean_by(owner, row_nll, count), worst, rank, top)


def _before(token: Tensor, vocabulary: int) -> Tensor:
    """Returns which tokens have a smaller id than `token [m]`: `[m, vocabulary]`."""
    return torch.arange(vocabulary, device=token.device) < token[:, None]


def group_index(groups: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Returns the group of each request, `[requests]`, from the requests of each group."""
    group = torch.zeros(sum(map(len, groups)), dtype=torch.long)
    for g, members in enumerate(groups):
        group[list(members)] = g
    return group.to(device)


def mean_by(group: Tensor, values: Tensor, count: int) -> Tensor:
    """Returns the mean of `values [m]` over each of `count` groups, `[count]`; 0 for a group without members."""
    total = torch.zeros(count, device=values.device).index_add(0, group, values)
    return total / torch.bincount(group, minlength=count).clamp_min(1)


@dataclass(frozen=True)
class Measured:
    """Edits measured in the model.

    Attributes:
        realized: `1 - ||state - goal|| / ||target change||`, `[n]`; 1 if no change was wanted, or no goal is given.
        nll: mean NLL of the target tokens, nats, `[n]`.
        rank: rank of the worst target token, `[n]`; 1 is first.
    """

    realized: Tensor
    nll: Tensor
    rank: Tensor


@torch.no_grad()
def measure(
    site: Site, rows: Sequence[Row], goal: Tensor | None = None, change: Tensor | None = None, *, contexts: int = 1
) -> Measured:
    """Runs prompts with their targets once through the whole model.

    Args:
        site: the edited hidden state.
        rows: at least one.
        goal: wanted state at the lookup token of each row, `[n, d]`; None if `realized` is not needed.
        change: norm of the target change of each row, `[n]`.
        contexts: number of contexts of each text, whose rows are adjacent; leading tokens that a context has in all
            texts run once.
    """
    targets = [row.target for row in rows]
    rows = [replace(row, ids=row.ids[:-1]) for row in rows]
    cuts = shared_prefixes([rows[at : at + contexts] for at in range(0, len(rows), contexts)])
    order, found = list[int](), list[tuple[Tensor, Tensor, Tensor]]()
    groups = alike([len(row.ids) - cut for row, cut in zip(rows, cuts, strict=True)])
    for part in (group[at : at + _ROWS_AT_ONCE] for group in groups for at in range(0, len(group), _ROWS_AT_ONCE)):
        batch = Prefixed.of(site.decoder, [rows[i] for i in part], [cuts[i] for i in part])
        row = torch.tensor([at for at, i in enumerate(part) for _ in targets[i]])
        ends = [rows[i].prompt_length - 1 - cut for i, cut in zip(part, batch.before.tolist(), strict=True)]
        at = torch.tensor([end + token for i, end in zip(part, ends, strict=True) for token in range(len(targets[i]))])
        wanted = torch.tensor([token for i in part for token in targets[i]])
        with _site_outputs(site) as outputs, reading(site.decoder, row, at) as read:
            logits = read(site.decoder.model(**batch.arguments()))
        states = outputs[0].reshape(*batch.ids.shape, -1)  # the decoder layers of OPT flatten rows and tokens
        lookup = torch.tensor([rows[i].lookup for i in part], device=states.device) - batch.before.to(states.device)
        state = states[torch.arange(len(part), device=states.device), lookup]
        device = logits.device
        fit = fit_of_logits(
            logits, row.to(device), wanted.to(device), torch.arange(len(part), device=device), len(part)
        )
        order += part
        found.append((state.float().cpu(), fit.nll.cpu(), fit.rank.cpu()))
    back = torch.tensor(order).argsort()
    states, nll, rank = (torch.cat(column)[back] for column in zip(*found, strict=True))
    if goal is None or change is None:
        return Measured(torch.ones(len(rows)), nll, rank)
    return Measured(realized_fraction(goal.cpu() - states, change.cpu()), nll, rank)


@contextmanager
def _site_outputs(site: Site) -> Iterator[list[Tensor]]:
    """Collects the output of the site in every forward pass inside the block."""
    outputs: list[Tensor] = []
    handle = site.module.register_forward_hook(lambda _module, _inputs, output: outputs.append(hidden_of(output)))
    try:
        yield outputs
    finally:
        handle.remove()
