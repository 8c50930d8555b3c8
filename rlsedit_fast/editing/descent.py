"""The ways in which the value search goes downhill, each request (or group that shares a change) by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 0.9
"""Share of the running gradient energy that a normalised step keeps: about the last ten steps count."""

AIM = 0.85
"""A constrained step aims at this share of the NLL that is wanted, so that it does not stop just short of it."""

FIRST_LOOK = 3
"""The step, counted from 0, at which a constrained search first looks at the KL term; then at every other one."""

_LEAST_STEP = 0.05  # of the longest one: what keeps a constrained search going where the odds say that it is there
_SLIDE = 0.5  # longest step along the constraint, relative to the longest one towards it
_LEAST_NLL = 1e-6  # below it the odds of a target are beyond float32


@dataclass(frozen=True)
class Slope:
    """How a batch's losses change with its deltas, and where they are.

    Attributes:
        fit: gradient of the NLL summed over a group's requests, `[n, d]`.
        kl: gradient of `kl_factor` times the KL term, likewise; None where there is none or it was not looked at.
        decay: gradient of the penalty on the change's length, `[n, d]`.
        worst: the highest NLL of a group's requests and contexts, nats, `[n]`.
        missed: `1 - exp(-NLL)` summed over a group's requests, `[n]`.
    """

    fit: Tensor
    kl: Tensor | None
    decay: Tensor
    worst: Tensor
    missed: Tensor

    @property
    def total(self) -> Tensor:
        """Of the published loss."""
        return self.fit + self.decay if self.kl is None else self.fit + self.kl + self.decay


class NormalizedDescent:
    """Gradient descent with a step of the same length in every request, relative to the hidden state it changes.

    `delta -= rate * ||h|| * g / sqrt(E[||g||^2])`, the mean running over the last steps. Adam with one second moment
    a request instead of one a coordinate, and without momentum: the direction stays the gradient's, so the change
    that is found is shorter, and fewer steps find it (`bench/search.py`).

    Args:
        rate: length of the first step, relative to the hidden state's norm.
        norm: `||h|| [n]`.
    """

    def __init__(self, rate: float, norm: Tensor) -> None:
        self._length = rate * norm
        self._energy = torch.zeros_like(norm)
        self._steps = 0

    def looks_at_kl(self, _step: int) -> bool:
        """At every step."""
        return True

    def step(self, delta: Tensor, slope: Slope) -> None:
        """Moves `delta` in place; a request whose gradient is zero stays where it is."""
        self._steps += 1
        self._energy.lerp_(slope.total.square().sum(1), 1 - MEMORY)
        size = _positive((self._energy / (1 - MEMORY**self._steps)).sqrt())
        delta.sub_((self._length / size)[:, None] * slope.total)


class AdamDescent:
    """Adam (Kingma & Ba 2015) as the field uses it, for comparison with published settings.

    Args:
        rate: Adam's learning rate, in the hidden state's own units.
        delta: `[n, d]`, the tensor that every step will be given.
    """

    def __init__(self, rate: float, delta: Tensor) -> None:
        self._optimizer = torch.optim.Adam([delta], lr=rate)

    def looks_at_kl(self, _step: int) -> bool:
        """At every step."""
        return True

    def step(self, delta: Tensor, slope: Slope) -> None:
        """Moves `delta` in place."""
        delta.grad = slope.total
        self._optimizer.step()


class ConstrainedDescent:
    """Goes to where the target is likely enough, and as low in the KL term as it can on the way there.

    Two moves a step. Along the gradient of the target's log-odds `m = -log(exp(NLL) - 1)`, which unlike that of the
    NLL does not fade as the target becomes likely, Newton's step for `m = m*`:

        delta += min((m* - m) / ||dm/d delta||, rate * ||h||) * u,        u = (dm/d delta) / ||dm/d delta||

    and along the level set of m down the KL term, whose gradient is t, by the step of Barzilai and Borwein (1988):

        delta -= min((s.y) / (y.y) * ||p||, rate * ||h|| / 2) * p / ||p||,      p = t - (t.u) u

    with s and y the changes of delta and t since t was last looked at, which is every other step from the fourth on: at
    delta = 0 the KL term is at its minimum, and what matters is how high it is where the target is reached. Where the
    published loss weighs target against KL, here the target is wanted in full and the KL term gets all that is left,
    so `kl_factor` matters only by being 0 or not, and `weight_decay` not at all.
    About half the steps of the descents on the sum that keep as much (`bench/results/search.json`).

    Args:
        rate: longest step towards the target, relative to the hidden state's norm.
        norm: `||h|| [n]`.
        nll: the NLL that is wanted, nats.
    """

    def __init__(self, rate: float, norm: Tensor, nll: float) -> None:
        self._longest = rate * norm
        self._goal = _odds(norm.new_tensor(AIM * nll))
        self._at: Tensor | None = None
        self._kl: Tensor | None = None

    def looks_at_kl(self, step: int) -> bool:
        """At every other step from `FIRST_LOOK` on."""
        return step >= FIRST_LOOK and (step - FIRST_LOOK) % 2 == 0

    def step(self, delta: Tensor, slope: Slope) -> None:
        """Moves `delta` in place."""
        steepness = _positive(slope.fit.norm(dim=1))
        towards = -slope.fit / steepness[:, None]
        newton = (self._goal - _odds(slope.worst)) * slope.missed / steepness
        length = torch.minimum(torch.maximum(newton, _LEAST_STEP * self._longest), self._longest)
        move = length[:, None] * towards
        if slope.kl is not None:
            move -= self._slide(delta, slope.kl, towards)
        delta += move

    def _slide(self, delta: Tensor, kl: Tensor, towards: Tensor) -> Tensor:
        """The move down the KL term along the constraint, to be subtracted."""
        moved = delta.clone() if self._at is None else delta - self._at
        bent = kl.clone() if self._kl is None else kl - self._kl
        self._at, self._kl = delta.clone(), kl.clone()
        along = kl - (kl * towards).sum(1, keepdim=True) * towards
        size = _positive(along.norm(dim=1))
        trusted = ((moved * bent).sum(1) / _positive(bent.square().sum(1))).clamp_min(0)
        return (torch.minimum(trusted * size, _SLIDE * self._longest) / size)[:, None] * along


Descent = NormalizedDescent | AdamDescent | ConstrainedDescent
"""Each has `looks_at_kl(step)`, whether the KL term is wanted at a step, from 0 on, and `step(delta, slope)`, which
moves `delta [n, d]` in place.
"""


def _odds(nll: Tensor) -> Tensor:
    return -torch.log(torch.expm1(nll.clamp_min(_LEAST_NLL)))


def _positive(size: Tensor) -> Tensor:
    """What can be divided by."""
    return size.clamp_min(torch.finfo(size.dtype).tiny)
