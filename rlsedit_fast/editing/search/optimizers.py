"""Optimizers and stopping rules of the value search; each request, or group that shares a change, is independent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast.editing.config import ValueSearchConfig

MEMORY = 0.9
"""Decay of the running gradient energy of normalized steps; about the last ten steps count."""

AIM = 0.85
"""A constrained step aims at this fraction of the wanted NLL, so that it does not end just short of it."""

FIRST_KL_STEP = 3
"""Step, from 0, at which the constrained optimizer first evaluates the KL term; then at every second step."""

_LEAST_STEP = 0.05  # relative to the longest step; keeps a search going if its log-odds suggest that it is done
_SLIDE = 0.5  # longest step along the constraint, relative to the longest step towards it
_LEAST_NLL = 1e-6  # below it the odds of a target are beyond float32

_LIKELY = 0.35
"""Nats, a probability of 0.7: the token is ranked first regardless of the others, with a margin."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of a batch's losses with respect to its deltas, and the losses.

    Attributes:
        nll: gradient of the NLL, summed over the requests of a group, `[n, d]`.
        kl: gradient of `kl_factor` times the KL term, likewise; None if there is none or it was not evaluated.
        decay: gradient of the penalty on the norm of the change, `[n, d]`.
        worst: highest NLL over the requests and contexts of a group, nats, `[n]`.
        missed: `1 - exp(-NLL)`, summed over the requests of a group, `[n]`.
    """

    nll: Tensor
    kl: Tensor | None
    decay: Tensor
    worst: Tensor
    missed: Tensor

    @property
    def total(self) -> Tensor:
        """Gradient of the published loss."""
        return self.nll + self.decay if self.kl is None else self.nll + self.kl + self.decay


class NormalizedOptimizer:
    """Gradient descent with steps of equal length in every request, relative to its hidden state.

    `delta -= rate * ||h|| * g / sqrt(E[||g||^2])`, with a running mean over the last steps. It equals Adam with one
    second moment per request instead of one per coordinate, and without momentum: the step keeps the direction of the
    gradient, so the change is shorter and fewer steps are needed (`bench/search.py`).

    Args:
        rate: length of the first step, relative to the norm of the hidden state.
        norm: `||h|| [n]`.
    """

    def __init__(self, rate: float, norm: Tensor) -> None:
        self._length = rate * norm
        self._energy = torch.zeros_like(norm)
        self._steps = 0

    def needs_kl(self, _step: int) -> bool:
        """Returns True: the KL term is needed at every step."""
        return True

    def step(self, delta: Tensor, gradients: Gradients) -> None:
        """Updates `delta [n, d]` in place; a request with a zero gradient does not move."""
        self._steps += 1
        self._energy.lerp_(gradients.total.square().sum(1), 1 - MEMORY)
        size = _positive((self._energy / (1 - MEMORY**self._steps)).sqrt())
        delta.sub_((self._length / size)[:, None] * gradients.total)


class AdamOptimizer:
    """Adam (Kingma & Ba 2015), as in the published settings.

    Args:
        rate: learning rate, in units of the hidden state.
        delta: `[n, d]`, the tensor that every step updates.
    """

    def __init__(self, rate: float, delta: Tensor) -> None:
        self._optimizer = torch.optim.Adam([delta], lr=rate)

    def needs_kl(self, _step: int) -> bool:
        """Returns True: the KL term is needed at every step."""
        return True

    def step(self, delta: Tensor, gradients: Gradients) -> None:
        """Updates `delta [n, d]` in place."""
        delta.grad = gradients.total
        self._optimizer.step()


class ConstrainedOptimizer:
    """Moves to where the target is likely enough and, on the way, as low in the KL term as possible.

    Each step has two moves. Along the gradient of the log-odds of the target, `m = -log(exp(NLL) - 1)`, which unlike
    the gradient of the NLL does not vanish as the target becomes likely, Newton's step for `m = m*`:

        delta += min((m* - m) / ||dm/d delta||, rate * ||h||) * u,        u = (dm/d delta) / ||dm/d delta||

    and along the level set of m down the KL term, whose gradient is t, the step of Barzilai and Borwein (1988):

        delta -= min((s.y) / (y.y) * ||p||, rate * ||h|| / 2) * p / ||p||,      p = t - (t.u) u

    with s and y the changes of delta and t since the last evaluation of t, at every second step from the fourth on: at
    delta = 0 the KL term is minimal, and what matters is its value where the target is reached. The published loss
    trades the target against the KL term; here the target must be reached and the KL term gets the remaining freedom.
    It needs about half the steps of the optimizers of the sum that preserve as much (`bench/results/search.json`).

    Args:
        rate: longest step towards the target, relative to the norm of the hidden state.
        norm: `||h|| [n]`.
        nll: wanted NLL, nats.
    """

    def __init__(self, rate: float, norm: Tensor, nll: float) -> None:
        self._longest = rate * norm
        self._goal = _odds(norm.new_tensor(AIM * nll))
        self._at: Tensor | None = None
        self._kl: Tensor | None = None

    def needs_kl(self, step: int) -> bool:
        """Returns whether the KL term is needed: at every second step from `FIRST_KL_STEP` on."""
        return step >= FIRST_KL_STEP and (step - FIRST_KL_STEP) % 2 == 0

    def step(self, delta: Tensor, gradients: Gradients) -> None:
        """Updates `delta [n, d]` in place."""
        steepness = _positive(gradients.nll.norm(dim=1))
        towards = -gradients.nll / steepness[:, None]
        newton = (self._goal - _odds(gradients.worst)) * gradients.missed / steepness
        length = torch.minimum(torch.maximum(newton, _LEAST_STEP * self._longest), self._longest)
        move = length[:, None] * towards
        if gradients.kl is not None:
            move -= self._slide(delta, gradients.kl, towards)
        delta += move

    def _slide(self, delta: Tensor, kl: Tensor, towards: Tensor) -> Tensor:
        """Returns the move down the KL term along the constraint, to be subtracted."""
        moved = delta.clone() if self._at is None else delta - self._at
        bent = kl.clone() if self._kl is None else kl - self._kl
        self._at, self._kl = delta.clone(), kl.clone()
        along = kl - (kl * towards).sum(1, keepdim=True) * towards
        size = _positive(along.norm(dim=1))
        trusted = ((moved * bent).sum(1) / _positive(bent.square().sum(1))).clamp_min(0)
        return (torch.minimum(trusted * size, _SLIDE * self._longest) / size)[:, None] * along


Optimizer = NormalizedOptimizer | AdamOptimizer | ConstrainedOptimizer


def make_optimizer(config: ValueSearchConfig, delta: Tensor, norm: Tensor, nll: float) -> Optimizer:
    """Returns the optimizer of the settings for changes `delta [n, d]` of states with norms `norm [n]`."""
    rate = config.effective_learning_rate
    if config.optimizer == "adam":
        return AdamOptimizer(rate, delta)
    if config.optimizer == "normalized":
        return NormalizedOptimizer(rate, norm)
    return ConstrainedOptimizer(rate, norm, nll)


class StoppingRule:
    """The rule `search.stop`, and the progress of each request towards it.

    Args:
        config: settings of the search.
        requests: number of requests.
        device: device of the search.
    """

    def __init__(self, config: ValueSearchConfig, requests: int, device: torch.device) -> None:
        self._config = config
        self._first = torch.zeros(requests, dtype=torch.long, device=device)  # evaluations in a row with rank 1

    @property
    def needs_kl(self) -> bool:
        """Whether the rule needs the KL term at every step."""
        return self._config.stop == "loss"

    @property
    def nll(self) -> float:
        """NLL at which a request can be expected to stop, nats."""
        config = self._config
        bound = {"nll": config.stop_nll, "rank": _LIKELY, "loss": config.stop_loss}[config.stop]
        return min(bound, _LIKELY)

    def met(self, rank: Tensor, worst: Tensor, loss: Tensor) -> Tensor:
        """Returns whether each request meets the rule at this evaluation, bool `[n]`.

        Args:
            rank: rank of the worst target token over all contexts, `[n]`.
            worst: NLL in the worst context, nats, `[n]`.
            loss: the published loss, `[n]`.
        """
        self._first = torch.where(rank == 1, self._first + 1, 0)
        if self._config.stop == "nll":
            return (rank == 1) & (worst <= self._config.stop_nll)
        if self._config.stop == "rank":
            return self._first >= self._config.stop_evaluations
        return loss < self._config.stop_loss

    def converged(self, met: Tensor, rank: Tensor) -> Tensor:
        """Returns whether each request counts as converged at the end of its search, bool `[n]`.

        The clamp may keep the published loss above its bound, so with `loss` a target ranked first is sufficient.
        """
        return met | (rank == 1) if self._config.stop == "loss" else met


def _odds(nll: Tensor) -> Tensor:
    return -torch.log(torch.expm1(nll.clamp_min(_LEAST_NLL)))


def _positive(size: Tensor) -> Tensor:
    """Returns sizes that are safe to divide by."""
    return size.clamp_min(torch.finfo(size.dtype).tiny)
