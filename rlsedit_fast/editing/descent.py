"""The two ways in which the value search goes downhill, each request by itself."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

MEMORY = 0.9
"""Share of the running gradient energy that a step keeps: about the last ten steps count."""


class Descent(Protocol):
    """Changes the deltas of a batch by one step."""

    def step(self, delta: Tensor, gradient: Tensor) -> None:
        """Moves `delta [n, d]` in place, given the gradient of each request's loss `[n, d]`."""


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

    def step(self, delta: Tensor, gradient: Tensor) -> None:
        """See `Descent.step`; a request whose gradient is zero stays where it is."""
        self._steps += 1
        self._energy.lerp_(gradient.square().sum(1), 1 - MEMORY)
        size = (self._energy / (1 - MEMORY**self._steps)).sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)
        delta.sub_((self._length / size)[:, None] * gradient)


class AdamDescent:
    """Adam (Kingma & Ba 2015) as the field uses it, for comparison with published settings.

    Args:
        rate: Adam's learning rate, in the hidden state's own units.
        delta: `[n, d]`, the tensor that every step will be given.
    """

    def __init__(self, rate: float, delta: Tensor) -> None:
        self._optimizer = torch.optim.Adam([delta], lr=rate)

    def step(self, delta: Tensor, gradient: Tensor) -> None:
        """See `Descent.step`."""
        delta.grad = gradient
        self._optimizer.step()
