"""When a request leaves the value search, by each of the rules that a user can choose."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsedit_fast.editing.config import EditConfig

_FIRST = 0.35
"""Nats, a probability of 0.7: where a token is ranked first whatever the others are, with something to spare."""


class Stop:
    """The rule of `config.search_stop`, and how far each request has come by it.

    Args:
        config: settings of the search.
        requests: how many.
        device: of what is searched.
    """

    def __init__(self, config: EditConfig, requests: int, device: torch.device) -> None:
        self._config = config
        self._first = torch.zeros(requests, dtype=torch.long, device=device)  # looks in a row at which it ranked first

    @property
    def reads_kl(self) -> bool:
        """Whether the rule needs the KL term at every step."""
        return self._config.search_stop == "loss"

    @property
    def nll(self) -> float:
        """The NLL, in nats, at which a request can be expected to stop."""
        config = self._config
        bound = {"nll": config.search_stop_nll, "rank": _FIRST, "loss": config.search_stop_loss}[config.search_stop]
        return min(bound, _FIRST)

    def met(self, rank: Tensor, worst: Tensor, loss: Tensor) -> Tensor:
        """Whether each request has met the rule at this look, bool `[n]`.

        Args:
            rank: of its target's tokens, the worst one's over all contexts, `[n]`.
            worst: the worst context's NLL, `[n]`.
            loss: the published total, `[n]`.
        """
        self._first = torch.where(rank == 1, self._first + 1, 0)
        if self._config.search_stop == "nll":
            return (rank == 1) & (worst <= self._config.search_stop_nll)
        if self._config.search_stop == "rank":
            return self._first >= self._config.search_stop_steps
        return loss < self._config.search_stop_loss

    def reached(self, met: Tensor, rank: Tensor) -> Tensor:
        """Whether each request can be told as converged at the end of its search, bool `[n]`.

        The clamp may keep the published total above its bound for ever, so there a target ranked first will do.
        """
        return met | (rank == 1) if self._config.search_stop == "loss" else met
