"""The values of a batch as the settings have them: within memory, one for a subject, and told where they fell short."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.gradient import gradient_values
from rlsedit_fast.editing.parts import fitting
from rlsedit_fast.editing.progress import Progress
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.values import Values, search_within_memory
from rlsedit_fast.errors import ResourceError, UpdateError, listed
from rlsedit_fast.models.sites import Site


class Finder:
    """Finds values at a site.

    Args:
        site: where the hidden states are changed.
        config: how.
    """

    def __init__(self, site: Site, config: EditConfig) -> None:
        self._site, self._config = site, config
        self._at_once = config.search_at_once
        self._norm: float | None = None  # of values searched on the unedited model, where others are scaled to it

    def groups(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of requests that share a value."""
        groups: dict[object, list[int]] = {}
        for i, request in enumerate(requests):
            shared = self._config.same_subject == "joint" and request.about is not None
            groups.setdefault(request.about if shared else i, []).append(i)
        return list(groups.values())

    def reached(
        self, requests: Sequence[Request], new: int, found: Values | None, progress: Progress
    ) -> tuple[Values, set[int]]:
        """The values of a batch, and which of its first `new` requests are to be left out since they fell short.

        Args:
            requests: the batch.
            new: how many of them are not told yet.
            found: their values, if these are known.
            progress: whose scale of gradient values is gone on with.

        Raises:
            UpdateError: numbers that are not finite, or an edit that fell short where that is to be an error.
            ResourceError: there is too little memory for a single subject.
        """
        values = self.find(requests, progress) if found is None else found
        short = {at for at in range(new) if not values.converged[at]}
        if self._config.unconverged == "keep" or not short:
            return values, set()
        if self._config.unconverged == "raise":
            named = [
                f"{requests[at].edit.subject!r} -> {requests[at].edit.target!r} (rank {int(values.rank[at])}, NLL "
                f"{float(values.nll[at]):.2f})"
                for at in sorted(short)
            ]
            raise UpdateError(
                f"{len(short)} of {new} edits did not reach their target in {self._config.search_steps} steps, so "
                f"their batch is not made: {', '.join(listed(named, 5))}. Raise "
                "search_steps or clamp, or let unconverged='keep' or 'skip' them"
            )
        return self._without_the_worst(requests, new, values, progress)

    def _without_the_worst(
        self, requests: Sequence[Request], new: int, values: Values, progress: Progress
    ) -> tuple[Values, set[int]]:
        """Leaves out as few as can be: of those that share a value the worst first; the others are searched anew."""
        left_out: set[int] = set()
        while True:
            worst, again = set[int](), list[int]()
            for group in self.groups(requests):
                rest = [at for at in group if at not in left_out]
                if short := [at for at in rest if at < new and not values.converged[at]]:
                    worst.add(max(short, key=lambda at: float(values.nll[at])))
                    again += [at for at in rest if at not in worst]
            if not worst:
                return values, left_out
            left_out |= worst
            if again:
                others = [at for at in range(len(requests)) if at not in again]
                anew = self.find([requests[at] for at in again], progress)
                values = Values.joined([values.taken(others), anew], [*others, *again])

    def find(self, requests: Sequence[Request], progress: Progress) -> Values:
        """The values of some requests, whether or not they reached their targets.

        Raises:
            UpdateError: numbers that are not finite.
            ResourceError: there is too little memory for a single subject.
        """
        at_once = self._at_once or len(requests)
        try:
            if self._config.search_memory is not None:
                at_once = min(at_once, fitting(self._site, requests, self._config.search_memory))
            if self._config.values == "gradient":
                values, fitted, progress.scale = gradient_values(
                    self._site, requests, self._config, self.groups(requests), at_once, progress.scale
                )
            else:
                values, fitted = search_within_memory(
                    self._site, requests, self._config, self.groups(requests), at_once
                )
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                "memory ran out while the value of a single subject was searched; nothing was changed. Take fewer "
                f"context_prefixes and kl_prompts, or shorter prompts. ({error})"
            ) from error
        if fitted < at_once:
            self._at_once = fitted
        if not bool(values.nll.isfinite().all()):
            raise UpdateError("the value search met numbers that are not finite; check the model's weights and dtype")
        if not self._config.norm_anchor:
            return values
        # The first values of an editor are searched on the unedited model.
        self._norm = self._norm or float(values.goal[:, 0].norm(dim=1).mean())
        return values.scaled_to(self._norm)
