"""The value search: finds the hidden state at the edited token with which the model states the target.

All requests of a batch are searched at once, each with its own change, clamp and stopping rule. Requests with the same
subject have nearly the same key and share one change (MEMIT-Merge, Dong et al. 2025). The decoder layers up to the
edited one run once, and so do the tokens before the edited one; every step resumes there. The KL prompts run when the
optimizer needs them, and requests that meet the stopping rule leave the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlsedit_fast.activity import Steps
from rlsedit_fast.editing.config import EditConfig, ValueSearchConfig
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.search.objective import KLPrompts, PromptRows, evaluate_fit, gather, group_index, mean_by
from rlsedit_fast.editing.search.optimizers import Gradients, StoppingRule, make_optimizer
from rlsedit_fast.errors import ResourceError, UpdateError, listed
from rlsedit_fast.models.sites import Site

logger = logging.getLogger(__name__)

SHORT_TARGET, MOST_TIMES = 4, 4
"""A constrained search takes more than `steps` steps for targets of more tokens than that, in proportion, up to
`MOST_TIMES` as many: 41 for targets of 8 tokens of SmolLM2-135M (`bench/long_targets.py`).
"""

_PEAK = 1.5
"""Peak memory of an evaluation relative to what it keeps for the backward pass and starts from; an estimate. Logits of
the head and gradients exist only temporarily.
"""


@dataclass(frozen=True)
class Values:
    """Result of the search for `n` requests.

    Attributes:
        delta: target change of the hidden state, `[n, d]`, float32; equal for requests of one group.
        start: hidden state before the change in each context, `[n, contexts, d]`, float32; the bare prompt is first.
        nll: mean NLL of each target in the worst context with the change, nats, `[n]`.
        rank: rank of the worst target token over all contexts with the change, `[n]`; 1 is first.
        converged: whether each request and its group met the stopping rule, bool `[n]`.
        steps: number of steps of each request, `[n]`.
    """

    delta: Tensor
    start: Tensor
    nll: Tensor
    rank: Tensor
    converged: Tensor
    steps: Tensor

    @property
    def goal(self) -> Tensor:
        """The target states, `[n, contexts, d]`."""
        return self.start + self.delta[:, None]

    def taken(self, requests: Sequence[int]) -> Values:
        """Returns the values of some requests, in the given order."""
        return Values(**{field.name: getattr(self, field.name)[list(requests)] for field in fields(self)})

    def to(self, device: torch.device) -> Values:
        """Returns the values on a device."""
        return Values(**{field.name: getattr(self, field.name).detach().to(device) for field in fields(self)})

    def scaled_to(self, norm: float) -> Values:
        """Returns the values with each target state of the bare prompt scaled to a norm (Liu et al. 2026).

        `nll`, `rank` and `converged` are those before the scaling.
        """
        goal = self.goal[:, 0]
        length = goal.norm(dim=1, keepdim=True).clamp_min(torch.finfo(goal.dtype).tiny)
        return replace(self, delta=goal * (norm / length) - self.start[:, 0])

    @staticmethod
    def joined(parts: Sequence[Values], places: Sequence[int]) -> Values:
        """Returns the values of several searches, sorted by `places`, the positions of all parts one after another."""
        whole = Values(
            **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Values)}
        )
        return whole.taken(torch.tensor(places).argsort().tolist())


def search_values(
    site: Site, requests: Sequence[Request], config: ValueSearchConfig, groups: Sequence[Sequence[int]] | None = None
) -> Values:
    """Searches the value of each request (Meng et al. 2023, MEMIT, eq. 16 and the terms of the released code).

    The loss of a request is the NLL of its target, averaged over tokens, then contexts; plus `kl_factor` times
    KL(before || after) at the end of its KL prompts, averaged over them. The loss of a group is the sum over its
    requests plus `weight_decay * ||delta|| / ||h||^2`.

    Args:
        site: the hidden state that is changed, the output of the last edited layer. The model is in evaluation mode and
            its parameters do not require gradients.
        requests: at least one.
        config: settings of the search.
        groups: indices of requests that share a change, each request in one group; by default each has its own.
    """
    groups = groups or [[i] for i in range(len(requests))]
    loss, processes = config.loss, site.decoder.processes.together
    rows, kl_rows, start = gather(site, requests)
    bare = start[:, 0]
    group = group_index(groups, start.device)
    norm = mean_by(group, bare.norm(dim=1), len(groups))
    energy = norm.square().clamp_min(torch.finfo(norm.dtype).tiny)
    delta = torch.zeros(len(groups), start.shape[-1], device=start.device, requires_grad=True)
    rule = StoppingRule(config, len(requests), start.device)
    optimizer = make_optimizer(config, delta, norm, rule.nll)
    found = torch.zeros_like(bare)
    nll = torch.full((len(requests),), torch.inf, device=start.device)
    steps, rank = torch.zeros_like(group), torch.zeros_like(group)
    active = torch.ones_like(norm, dtype=torch.bool)  # of groups
    missed_rule = torch.zeros_like(active)
    with site.resumed() as forward:
        kl_prompts = KLPrompts(forward, kl_rows, group)
        top = group
        limit = _step_limits(requests, config, group, len(groups))
        most = int(limit.max())
        progress = Steps("value search", most + 1)
        for step in range(most + 1):
            progress.report(f"{int(active.sum())} of {len(groups)} values left")
            fit = evaluate_fit(forward, rows, delta[group], len(requests))
            top = top if step else fit.top
            # At delta = 0 the KL term and its gradient are 0.
            kl = kl_prompts.divergence(delta[group], top) if step and rule.needs_kl else None
            searched = active[group]
            with torch.no_grad():
                found = torch.where(searched[:, None], delta[group], found)
                nll = torch.where(searched, fit.worst, nll)
                rank = torch.where(searched, fit.rank, rank)
                steps[searched] = step
                decay = loss.weight_decay * delta.norm(dim=1) / energy
                total = fit.nll + decay[group] + (0.0 if kl is None else loss.kl_factor * kl)
                unmet = (searched & ~rule.met(fit.rank, fit.worst, total)).float()
                # The requests of a group stop together.
                done = active & (torch.zeros_like(norm).index_add_(0, group, unmet) == 0)
                processes.same_tensors(done)
                ended = done | (active & (limit <= step))  # converged, or without steps left
                missed_rule |= ended & ~done
                active = active & ~ended
            if not bool(active.any()):
                break
            searched = active[group]
            (nll_gradient,) = torch.autograd.grad(fit.nll[searched].sum(), delta)
            if bool(ended.any()):
                rows = tuple(part.of(searched) for part in rows)
                kl_prompts.keep(searched)
            if step and kl is None and optimizer.needs_kl(step):
                kl = kl_prompts.divergence(delta[group], top)
            kl_gradient = None
            if kl is not None:
                (kl_gradient,) = torch.autograd.grad(loss.kl_factor * kl[searched].sum(), delta)
            with torch.no_grad():
                length = delta.norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
                missed = torch.zeros_like(norm).index_add_(0, group, -torch.expm1(-fit.nll))
                worst = torch.zeros_like(norm).scatter_reduce(0, group, fit.worst, "amax")
                # Two divisions: the product of the smallest length and a small norm underflows in float32.
                decay_gradient = (delta / length[:, None]) * (loss.weight_decay / energy)[:, None]
                optimizer.step(delta, Gradients(nll_gradient, kl_gradient, decay_gradient, worst, missed))
                allowed = config.clamp * norm / delta.norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
                delta.mul_(allowed.clamp_max(1)[:, None])
                processes.same_tensors(delta)
    processes.same_tensors(found, start, nll, rank)
    return Values(found, start, nll, rank, rule.converged(~missed_rule[group], rank), steps)


def _step_limits(requests: Sequence[Request], config: ValueSearchConfig, group: Tensor, groups: int) -> Tensor:
    """Returns the maximum number of steps of each group: more for long targets, see `ValueSearchConfig.steps`."""
    tokens = torch.tensor([len(request.contexts[0].target) for request in requests], device=group.device)
    longest = torch.zeros(groups, dtype=torch.long, device=group.device).scatter_reduce(0, group, tokens, "amax")
    if config.optimizer != "constrained":
        return torch.full_like(longest, config.steps)
    return (config.steps * (longest / SHORT_TARGET).clamp(1, MOST_TIMES)).long()


def search_within_memory(
    site: Site,
    requests: Sequence[Request],
    config: ValueSearchConfig,
    groups: Sequence[Sequence[int]],
    at_once: int,
) -> tuple[Values, int]:
    """Runs `search_values` on parts of a batch, which are halved whenever device memory runs out; same result.

    Args:
        site: see `search_values`.
        requests: see `search_values`.
        config: see `search_values`.
        groups: see `search_values`; a group is never divided.
        at_once: number of requests per part at first, at least 1.

    Returns:
        The values of all requests, and the number of requests per part that fit into memory.

    Raises:
        torch.OutOfMemoryError: a single group does not fit.
    """
    found: list[Values] = []
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
        local = [[places[i] for i in group] for group in part]
        try:
            found.append(search_values(site, [requests[i] for i in indices], config, local))
        except torch.OutOfMemoryError:
            # Of several processes the others may have had enough memory.
            if len(part) == 1 or site.decoder.processes.together.count > 1:
                raise
            at_once = max(1, count // 2)
            logger.info("out of memory with %d requests; searching %d at once from now on", count, at_once)
        else:
            rest = rest[len(part) :]
            order += indices
            continue
        if site.decoder.device.type == "cuda":
            torch.cuda.empty_cache()  # fragments may be too small for a smaller part
    return Values.joined(found, order), at_once


def requests_within(site: Site, requests: Sequence[Request], memory: int) -> int:
    """Returns how many requests like the longest one can be searched at once in `memory` bytes; at least 1.

    Evaluates the longest request once and counts the bytes that are kept for the backward pass.
    """
    longest = max(requests, key=lambda request: sum(len(row.ids) for row in (*request.contexts, *request.kl)))
    rows, kl_rows, states = gather(site, [longest])
    start = states[:, 0]
    delta = torch.zeros_like(start, requires_grad=True)
    model = site.decoder.model
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with site.resumed() as forward:
        kl_prompts = KLPrompts(forward, kl_rows, torch.zeros(1, dtype=torch.long, device=start.device))
        top = torch.full_like(start[:, 0], -1).long()  # matches no token, so that all prompts are kept
        kl_prompts.divergence(delta.detach(), top)
        fit = _kept_bytes(lambda: evaluate_fit(forward, rows, delta, 1).nll, weights)
        divergence = _kept_bytes(lambda: kl_prompts.divergence(delta, top), weights)
    each = max(fit, divergence) + sum(map(_row_bytes, (*rows, kl_rows)))
    return max(1, int(memory / (_PEAK * each)))


class ValueFinder:
    """Finds the values of batches according to the settings: within memory, one value per subject.

    Processes that hold copies of the model search a part of each batch.

    Args:
        site: the hidden state that is changed.
        config: settings of the editor.
    """

    def __init__(self, site: Site, config: EditConfig) -> None:
        self._site, self._config = site, config
        self._at_once = config.search.at_once
        self._norm: float | None = None  # of the first values, found in the unedited model; see `norm_anchor`

    def groups(self, requests: Sequence[Request]) -> list[list[int]]:
        """Returns the indices of requests that share a value."""
        groups: dict[object, list[int]] = {}
        for i, request in enumerate(requests):
            shared = self._config.same_subject == "joint" and request.subject_key is not None
            groups.setdefault(request.subject_key if shared else i, []).append(i)
        return list(groups.values())

    def find(self, requests: Sequence[Request]) -> Values:
        """Searches the values of requests; they may not have converged.

        Raises:
            UpdateError: values are not finite.
            ResourceError: a single subject does not fit into memory.
        """
        processes, groups = self._site.decoder.processes, self.groups(requests)
        if processes.replicas:
            mine = groups[processes.rank :: processes.count]
            parts = [part for part in processes.all(lambda: self._part(requests, mine)) if part is not None]
            places = [
                at for rank in range(processes.count) for group in groups[rank :: processes.count] for at in group
            ]
            values = Values.joined(parts, places).to(self._site.decoder.device)
        else:
            values = self._search(requests, groups)
        if not bool(values.nll.isfinite().all()):
            raise UpdateError("the value search encountered NaN/Inf; check the weights and the dtype of the model")
        if not self._config.norm_anchor:
            return values
        self._norm = self._norm or float(values.goal[:, 0].norm(dim=1).mean())
        return values.scaled_to(self._norm)

    def _search(self, requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> Values:
        search = self._config.search
        at_once = self._at_once or len(requests)
        try:
            if search.memory is not None:
                at_once = min(at_once, requests_within(self._site, requests, search.memory))
            values, fitted = search_within_memory(self._site, requests, search, groups, at_once)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of memory while searching the value of a single subject; nothing was modified. ({error})",
                hint="use fewer contexts.prefixes and search.kl_prompts, or shorter prompts",
            ) from error
        if fitted < at_once:
            self._at_once = fitted
        return values

    def _part(self, requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> Values | None:
        """Returns the values of some groups, one after another, in host memory; None without groups."""
        chosen = [at for group in groups for at in group]
        if not chosen:
            return None
        places = {at: place for place, at in enumerate(chosen)}
        local = [[places[at] for at in group] for group in groups]
        return self._search([requests[at] for at in chosen], local).to(torch.device("cpu"))

    def drop_unconverged(self, requests: Sequence[Request], new: int, values: Values) -> tuple[Values, set[int]]:
        """Applies the setting `unconverged` to a batch.

        With `skip`, of the unconverged requests that share a value the worst one is dropped first, and the others are
        searched again.

        Args:
            requests: the batch.
            new: number of new requests, which are the first ones; others are active edits and never dropped.
            values: values of the batch.

        Returns:
            The values, and the positions of requests to skip.

        Raises:
            UpdateError: a new request did not converge and the setting is `raise`.
        """
        short = [at for at in range(new) if not values.converged[at]]
        if self._config.unconverged == "keep" or not short:
            return values, set()
        if self._config.unconverged == "raise":
            named = [
                f"{requests[at].edit.subject!r} -> {requests[at].edit.target!r} (rank {int(values.rank[at])}, NLL "
                f"{float(values.nll[at]):.2f})"
                for at in short
            ]
            raise UpdateError(
                f"the value search of {len(short)} of {new} edits did not converge in {self._config.search.steps} "
                f"steps, so their batch was not written: {', '.join(listed(named, 5))}",
                hint="increase search.steps or search.clamp, or set unconverged='keep' or 'skip'",
            )
        skipped: set[int] = set()
        while True:
            worst, again = set[int](), list[int]()
            for group in self.groups(requests):
                rest = [at for at in group if at not in skipped]
                if short := [at for at in rest if at < new and not values.converged[at]]:
                    worst.add(max(short, key=lambda at: float(values.nll[at])))
                    again += [at for at in rest if at not in worst]
            if not worst:
                return values, skipped
            skipped |= worst
            if again:
                others = [at for at in range(len(requests)) if at not in again]
                found = self.find([requests[at] for at in again])
                values = Values.joined([values.taken(others), found], [*others, *again])

    def leave_out(
        self, requests: Sequence[Request], places: Sequence[int], values: Values | None
    ) -> tuple[dict[int, Values], Values | None]:
        """Returns the values of requests that are skipped before their batch is searched, and those of the others."""
        if not places:
            return {}, values
        some = self.find([requests[at] for at in places]) if values is None else values.taken(places)
        rest = [at for at in range(len(requests)) if at not in places]
        skipped = {at: some.taken([i]) for i, at in enumerate(places)}
        return skipped, None if values is None or not rest else values.taken(rest)

    def find_rest(
        self, requests: Sequence[Request], new: int, values: Values | None, skipped: Mapping[int, Values]
    ) -> tuple[Values, set[int]]:
        """Returns the values of a batch, and the positions of all requests to skip.

        Args:
            requests: the batch.
            new: number of new requests, which are the first ones.
            values: values of the batch, if they are known.
            skipped: values of requests to skip, by position.
        """
        rest = [at for at in range(len(requests)) if at not in skipped]
        parts, short = list(skipped.values()), set(skipped)
        if rest:
            some = [requests[at] for at in rest]
            found = self.find(some) if values is None else values
            found, dropped = self.drop_unconverged(some, new - len(skipped), found)
            parts.append(found)
            short.update(rest[at] for at in dropped)
        return Values.joined(parts, [*skipped, *rest]), short


def _kept_bytes(evaluate: Callable[[], Tensor | None], weights: set[int]) -> int:
    """Returns the bytes that a forward pass keeps for the backward pass, without the tensors of the model."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = evaluate()  # keeps the saved tensors alive until the sizes are added up
        total = sum(sizes.values())
    del result
    return total


def _row_bytes(rows: PromptRows) -> int:
    """Returns the bytes of the states that every evaluation starts from, and of the key-value cache of prefixes."""
    cache = rows.batch.cache
    held = [] if cache is None else [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    below = rows.below[0] if isinstance(rows.below, tuple) else rows.below
    if below is not None:
        held.append(below)
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
