"""What every edited layer has, whatever rule writes it: its exact weight, its start, its prior and its name."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsedit_fast.rls.master import Master
from rlsedit_fast.rls.prior import Prior


class Layer:
    """A layer's weight, kept exactly. Who derives from it sets what is declared here, and writes the weight."""

    _master: Master
    _original: Tensor
    _prior: Prior
    _name: str
    _edits: int
    _version: int

    @property
    def weight(self) -> Tensor:
        """The current `W [d_v, d_k]`, exact: live, in one storage for the layer's whole life, or put together from the
        halves of a bfloat16 weight that is kept in place. Read it, do not write it.
        """
        return self._master.read()

    @property
    def original(self) -> Tensor:
        """`W0 [d_v, d_k]`, in the narrower of its own dtype and the layer's. Read it, do not write it."""
        return self._original

    @property
    def prior(self) -> Prior:
        """What holds the weight."""
        return self._prior

    @property
    def name(self) -> str:
        """The layer's name, as the errors give it."""
        return self._name

    @property
    def edits(self) -> int:
        """How many rows of edits the layer holds."""
        return self._edits

    @property
    def version(self) -> int:
        """Changes with every step; equal versions mean equal states."""
        return self._version

    @torch.no_grad()
    def outputs(self, keys: Tensor) -> Tensor:
        """`K W^T [n, d_v]` of the current weight, for keys in the layer's dtype, on its device."""
        return self._master.times(keys)

    @torch.no_grad()
    def deviation(self) -> float:
        """`||W - W0||_F`."""
        return float(torch.linalg.vector_norm(self.weight - self._original, dtype=torch.float64))
