"""Values without a search: one step down the gradient, as long as the user says, scaled by the gradients so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsedit_fast.editing.config import GRADIENT_RATE, EditConfig
from rlsedit_fast.editing.losses import Rows, fit_of, gather, group_of, mean_by
from rlsedit_fast.editing.parts import in_parts
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.stopping import Stop
from rlsedit_fast.editing.values import Values
from rlsedit_fast.models.sites import Site


@dataclass(frozen=True)
class GradientScale:
    """How large the gradients of an editor's edits have been, coordinate by coordinate.

    Attributes:
        squares: sum of the squared gradients of unit length, `[d]`, float32; None before the first.
    """

    squares: Tensor | None = None

    def with_more(self, gradients: Tensor) -> GradientScale:
        """After some more edits, `[n, d]` of unit length."""
        more = gradients.square().sum(0)
        return GradientScale(more if self.squares is None else self.squares + more)

    def scaled(self, gradients: Tensor) -> Tensor:
        """Gradients `[n, d]` over the root of their mean square in each coordinate, up to a factor of all."""
        assert self.squares is not None
        root = self.squares.sqrt()
        # A coordinate that has hardly been met must not outweigh all others.
        return gradients / (root + root.mean())


def gradient_values(
    site: Site,
    requests: Sequence[Request],
    config: EditConfig,
    groups: Sequence[Sequence[int]],
    at_once: int,
    scale: GradientScale,
) -> tuple[Values, int, GradientScale]:
    """Each request's value from one forward and one backward pass, and a forward that sees how far it came.

    The change is `rate * ||h||` long and points down the gradient of the target's NLL, every coordinate over the root
    mean square that it had in the edits so far: the running normalisation of UltraEdit (Gu et al. 2025, arXiv
    2505.14679), whose means are not taken off, since a single edit's would leave nothing. No KL term, no steps.

    Args:
        site: as in `search_values`.
        requests: at least one.
        config: `search_rate` is the length, `clamp` the most that it can be.
        groups: indices of requests that share a change, each request in one.
        at_once: most requests to begin with, at least 1.
        scale: of the editor's edits so far.

    Returns:
        The values, how many requests at once there was memory for, and the scale with these.

    Raises:
        torch.OutOfMemoryError: there is not enough for a single group.
    """

    def look(part: list[int], local: list[list[int]]) -> tuple[Rows, Tensor, Tensor, Tensor]:
        facts, _, start = gather(site, [requests[i] for i in part])
        group = group_of(local, start.device)
        delta = torch.zeros(len(local), start.shape[-1], device=start.device, requires_grad=True)
        with site.resumed() as forward:
            fit = fit_of(forward, facts, delta[group], len(part))
            (gradient,) = torch.autograd.grad(fit.nll.sum(), delta)
        return facts, start, group, gradient

    looks, order, at_once = in_parts(site, groups, at_once, look)
    towards = _unit(-torch.cat([gradient for *_, gradient in looks]))
    scale = scale.with_more(towards)
    rest = _unit(scale.scaled(towards))
    rate = min(config.search_rate or GRADIENT_RATE, config.clamp)
    found = []
    for facts, start, group, gradient in looks:
        here, rest = rest.split([len(gradient), len(rest) - len(gradient)])
        norm = mean_by(group, start[:, 0].norm(dim=1), len(here))
        delta = (rate * norm[:, None] * here)[group]
        with site.resumed() as forward, torch.no_grad():
            fit = fit_of(forward, facts, delta, len(start))
        found.append((delta, start, fit.worst, fit.rank))
    delta, start, worst, rank = (torch.cat(parts) for parts in zip(*found, strict=True))
    stop = Stop(replace(config, search_stop_steps=1), len(rank), rank.device)  # there is one look
    met = stop.met(rank, worst, worst + config.weight_decay * delta.norm(dim=1) / start[:, 0].norm(dim=1).square())
    values = Values(delta, start, worst, rank, stop.reached(met, rank), torch.ones_like(rank))
    return Values.joined([values], order), at_once, scale


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; one of nothing but zeros stays."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
