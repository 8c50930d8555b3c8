"""What the model does after a write: how much of a change arrived, and how the target ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsedit_fast.editing.losses import fit_from
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.models.passes import hidden_of
from rlsedit_fast.models.prefixes import Prefixed, reading
from rlsedit_fast.models.sites import Site
from rlsedit_fast.models.tokens import alike
from rlsedit_fast.rls import realized_fraction

_ROWS_AT_ONCE = 128  # bounds the memory of one pass


@dataclass(frozen=True)
class Measured:
    """A batch as the model has it now, at the bare prompts.

    Attributes:
        realized: `1 - ||state - goal|| / ||wanted change||`, `[n]`; 1 where no change was wanted.
        nll: mean NLL of each target's tokens, nats, `[n]`.
        rank: of each target's tokens, the worst one's, `[n]`; 1 is first.
    """

    realized: Tensor
    nll: Tensor
    rank: Tensor


@torch.no_grad()
def measure(site: Site, requests: Sequence[Request], goal: Tensor, wanted: Tensor) -> Measured:
    """Runs the bare prompts with their targets once through the whole model.

    Args:
        site: the edited state.
        requests: at least one.
        goal: state that was wanted at each bare prompt's lookup token, `[n, d]`; of width 1 where it is not asked.
        wanted: norm of each wanted change, `[n]`.
    """
    rows = [replace(row, ids=row.ids[:-1]) for row in (request.contexts[0] for request in requests)]
    targets = [request.contexts[0].target for request in requests]
    order, found = list[int](), list[tuple[Tensor, Tensor, Tensor]]()
    groups = alike([len(row.ids) for row in rows])
    for part in (group[at : at + _ROWS_AT_ONCE] for group in groups for at in range(0, len(group), _ROWS_AT_ONCE)):
        batch = Prefixed.of(site.decoder, [rows[i] for i in part], [0] * len(part))
        row = torch.tensor([at for at, i in enumerate(part) for _ in targets[i]])
        at = torch.tensor([rows[i].prompt_length - 1 + token for i in part for token in range(len(targets[i]))])
        wanted_ids = torch.tensor([token for i in part for token in targets[i]])
        with _states_of(site) as seen, reading(site.decoder, row, at) as read:
            logits = read(site.decoder.model(**batch.arguments()))
        states = seen[0].reshape(*batch.ids.shape, -1)  # OPT's blocks flatten rows and tokens
        lookup = torch.tensor([rows[i].lookup for i in part], device=states.device)
        state = states[torch.arange(len(part), device=states.device), lookup]
        device = logits.device
        fit = fit_from(logits, row.to(device), wanted_ids.to(device), torch.arange(len(part), device=device), len(part))
        order += part
        found.append((state.float().cpu(), fit.nll.cpu(), fit.rank.cpu()))
    back = torch.tensor(order).argsort()
    states, nll, rank = (torch.cat(column)[back] for column in zip(*found, strict=True))
    return Measured(realized_fraction(goal.cpu() - states, wanted.cpu()), nll, rank)


@contextmanager
def _states_of(site: Site) -> Iterator[list[Tensor]]:
    """Within it the list receives the site's output of every forward."""
    seen: list[Tensor] = []
    handle = site.module.register_forward_hook(lambda _module, _inputs, output: seen.append(hidden_of(output)))
    try:
        yield seen
    finally:
        handle.remove()
