"""The value search: the hidden state at the lookup token that makes the model say the target.

All requests of a batch are searched at once, each with its own change, clamp and stop; those that share a subject,
and so nearly a key, share one change (MEMIT-Merge, Dong et al. 2025). The blocks up to the edited layer are run once,
and so are the tokens before the one that is changed; every step resumes there, the head is run where the loss looks,
the KL prompts are run when the descent wants them, and requests that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlsedit_fast.editing.config import DEFAULT_RATE, EditConfig
from rlsedit_fast.editing.descent import AdamDescent, ConstrainedDescent, Descent, NormalizedDescent, Slope
from rlsedit_fast.editing.losses import Kept, fit_of, gather, group_of, mean_by
from rlsedit_fast.editing.parts import in_parts
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.stopping import Stop
from rlsedit_fast.models.sites import Site


@dataclass(frozen=True)
class Values:
    """What the search found.

    Attributes:
        delta: wanted change of the state at the site, `[n, d]`, float32; equal for requests of one group.
        start: that state before the change, in each context, `[n, contexts, d]`, float32; the bare prompt's is first.
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

    @property
    def goal(self) -> Tensor:
        """The wanted states, `[n, contexts, d]`."""
        return self.start + self.delta[:, None]

    def taken(self, requests: Sequence[int]) -> Values:
        """Those of some requests, in the order given."""
        return Values(**{field.name: getattr(self, field.name)[list(requests)] for field in fields(self)})

    def scaled_to(self, norm: float) -> Values:
        """Those with the bare prompt's wanted state scaled to one norm (Liu et al. 2026, arXiv 2602.02543).

        What they say of the search (`nll`, `rank`, `converged`) is from before the scaling.
        """
        wanted = self.goal[:, 0]
        length = wanted.norm(dim=1, keepdim=True).clamp_min(torch.finfo(wanted.dtype).tiny)
        return replace(self, delta=wanted * (norm / length) - self.start[:, 0])

    @staticmethod
    def joined(parts: Sequence[Values], places: Sequence[int]) -> Values:
        """Those of several searches in one, each at its place: `places` are those of all, one part after the other."""
        whole = Values(
            **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Values)}
        )
        return whole.taken(torch.tensor(places).argsort().tolist())


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
    facts, held, start = gather(site, requests)
    bare = start[:, 0]
    group = group_of(groups, start.device)
    norm = mean_by(group, bare.norm(dim=1), len(groups))
    energy = norm.square().clamp_min(torch.finfo(norm.dtype).tiny)
    delta = torch.zeros(len(groups), start.shape[-1], device=start.device, requires_grad=True)
    stop = Stop(config, len(requests), start.device)
    descent = _descent(config, delta, norm, stop.nll)
    found = torch.zeros_like(bare)
    nll = torch.full((len(requests),), torch.inf, device=start.device)
    steps, rank = torch.zeros_like(group), torch.zeros_like(group)
    active = torch.ones_like(norm, dtype=torch.bool)  # of groups
    with site.resumed() as forward:
        kept = Kept(forward, held, group)
        said = group
        for step in range(config.search_steps + 1):
            fit = fit_of(forward, facts, delta[group], len(requests))
            said = said if step else fit.said
            # Where nothing is changed the KL term and its gradient are 0.
            kl = kept.divergence(delta[group], said) if step and stop.reads_kl else None
            searched = active[group]
            with torch.no_grad():
                found = torch.where(searched[:, None], delta[group], found)
                nll = torch.where(searched, fit.worst, nll)
                rank = torch.where(searched, fit.rank, rank)
                steps[searched] = step
                decay = config.weight_decay * delta.norm(dim=1) / energy
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
                # Divided one after the other: the least length times a small norm is no number in float32.
                shortening = (delta / length[:, None]) * (config.weight_decay / energy)[:, None]
                descent.step(delta, Slope(towards, away, shortening, worst, missed))
                allowed = config.clamp * norm / delta.norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
                delta.mul_(allowed.clamp_max(1)[:, None])
    return Values(found, start, nll, rank, stop.reached(~active[group], rank), steps)


def search_within_memory(
    site: Site, requests: Sequence[Request], config: EditConfig, groups: Sequence[Sequence[int]], at_once: int
) -> tuple[Values, int]:
    """`search_values` on parts of a batch, see `in_parts`; what is found is the same.

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
    found, order, at_once = in_parts(
        site, groups, at_once, lambda part, local: search_values(site, [requests[i] for i in part], config, local)
    )
    return Values.joined(found, order), at_once


def _descent(config: EditConfig, delta: Tensor, norm: Tensor, nll: float) -> Descent:
    rate = config.search_rate or DEFAULT_RATE[config.search_descent]
    if config.search_descent == "adam":
        return AdamDescent(rate, delta)
    if config.search_descent == "normalized":
        return NormalizedDescent(rate, norm)
    return ConstrainedDescent(rate, norm, nll)
