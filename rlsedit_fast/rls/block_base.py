"""What the states of a mixture of experts have in common: weights, properties, and checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, UpdateError
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.block_covariance import Covariances
from rlsedit_fast.rls.block_prior import BlockPrior
from rlsedit_fast.rls.block_weights import BlockWeights
from rlsedit_fast.rls.columns import WHOLE, Columns
from rlsedit_fast.rls.layer import dtype_of
from rlsedit_fast.rls.results import Terms


class _Panel(Protocol):
    @property
    def keys(self) -> Tensor:
        """Rows of keys."""

    @property
    def version(self) -> int:
        """Version of the state."""


class BlockBase:
    """Base class of `BlockState` and `SeparateState`, which describes the arguments."""

    _version: int

    @torch.no_grad()
    def __init__(self, weights: Sequence[Tensor], prior: BlockPrior, *, dtype: torch.dtype | None, name: str) -> None:
        layout = prior.layout
        for weight in weights:
            checks.matrix("weight", weight, rows=weights[0].shape[0])
        widths = [weight.shape[1] for weight in weights]
        if widths != [layout.block_width(block) for block in range(layout.blocks)]:
            raise InputError(f"the blocks of {name} have widths {widths}; expected those of {layout}")
        self._prior, self._name, self._layout = prior, name, layout
        self._dtype = dtype or dtype_of(weights[0])
        self._weights = BlockWeights(weights, self._dtype)
        self._covariances = Covariances(prior, self.device, self._dtype, name)

    @property
    def prior(self) -> BlockPrior:
        """The prior of the layer."""
        return self._prior

    @property
    def name(self) -> str:
        """The name of the layer in error messages."""
        return self._name

    @property
    def version(self) -> int:
        """A number that changes with every step; equal versions mean equal states."""
        return self._version

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys, values and exact weights."""
        return self._dtype

    @property
    def key_width(self) -> int:
        """The width of a row of keys."""
        return self._layout.key_width

    @property
    def columns(self) -> Columns:
        """All columns: a mixture of experts is in one process."""
        return WHOLE

    @property
    def value_width(self) -> int:
        """The width of a value, `d_v`."""
        return self._weights.rows

    def originals(self) -> list[Tensor]:
        """Returns the original weight of each block; for a block that was never written a view of the model."""
        return self._weights.originals()

    def weights(self) -> list[tuple[Tensor, Tensor] | None]:
        """Returns the original and the current weight of each block; None for a block that was never written."""
        return self._weights.pairs()

    @torch.no_grad()
    @full_float32()
    def outputs(self, keys: Tensor) -> Tensor:
        """Returns `K W^T [n, d_v]` of the current weight, for rows of keys in the dtype of the state."""
        return self._weights.times(self._layout, keys)

    @torch.no_grad()
    def deviation(self) -> float:
        """Returns `||W - W0||_F`."""
        changed = [pair for pair in self.weights() if pair is not None]
        return math.sqrt(sum(float((now.double() - old.double()).square().sum()) for old, now in changed))

    @torch.no_grad()
    @full_float32()
    def prior_variance(self, keys: Tensor) -> Tensor:
        """Returns `k C0 k^T [n]`, float64, for rows of keys and the inverse `C0` of the prior's precision."""
        keys, _, _ = self._batch(keys, None)
        projected, _ = self._covariances.project(keys)
        return (self._layout.features(keys).double() * projected.double()).sum(1)

    @torch.no_grad()
    @full_float32()
    def prior_gram(self, keys: Tensor, others: Tensor) -> Tensor:
        """Returns `K C0 K'^T [n, m]`, float64, for rows of keys K and K'."""
        keys, others = (self._batch(one, None)[0] for one in (keys, others))
        return self._covariances.gram(keys, others, self._covariances.project(others)[0])

    def _terms(self, prior: float, edits: float | None) -> Terms:
        """Returns the terms for the value of the prior at the current weight.

        The rest of the prior beside the penalties on the blocks is at least `mu^2 ||K0 D^T||^2`.
        """
        ridges, penalty, energy = self._prior.ridges().tolist(), 0.0, 0.0
        for block, pair in enumerate(self.weights()):
            if pair is not None:
                moved = float((pair[1].double() - pair[0].double()).square().sum())
                energy, penalty = energy + moved, penalty + ridges[block] * moved
        anchored = math.sqrt(max(prior - penalty, 0.0)) / self._prior.mu if self._prior.mu else None
        return Terms(weight=math.sqrt(energy), anchors=anchored, edits=edits)

    def settle(self) -> None:
        """Does nothing: no work is deferred."""

    def _checked_innovation(self, panel: _Panel, innovation: Tensor) -> Tensor:
        """Checks the arguments of `update_projected` and returns the innovation in the dtype of the state."""
        if panel.version != self._version:
            raise InputError(
                f"the panel is not from the current state of {self._name} (version {panel.version}, current version "
                f"{self._version}); call project again."
            )
        checks.matrix("innovation", innovation, rows=len(panel.keys), columns=self.value_width)
        checks.same_device("innovation", innovation, self.device)
        innovation = innovation.detach().to(self._dtype)
        checks.finite(innovation=innovation)
        return innovation

    def _check_snapshot(self, known: bool) -> None:
        """Raises InputError for a snapshot that cannot be restored."""
        if not known:
            raise InputError(
                f"the snapshot cannot be restored on {self._name}: it is from another state, or an earlier snapshot "
                "was restored after it was taken. Take a new snapshot."
            )

    def _not_factored(self, count: int, pivot: int) -> UpdateError:
        return UpdateError(
            f"the batch of {count} rows for {self._name} could not be factored: pivot {pivot} is not positive or "
            "overflows. No state was modified. Scale the keys down, or use float64."
        )

    def _overflow(self, count: int) -> UpdateError:
        return UpdateError(
            f"the result of {count} rows for {self._name} overflows {self._dtype}. No state was modified. Scale the "
            "keys and values down, or use float64."
        )

    def _batch(
        self, keys: Tensor, weights: Tensor | None, *, least: int = 1, **others: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Checks the arguments of a batch and casts them to the dtype of the state."""
        checks.matrix("keys", keys, columns=self.key_width)
        count = len(keys)
        if count < least:
            raise InputError("keys has no rows; pass at least one edit.")
        tensors = {"keys": keys, **others}
        for argument, value in others.items():
            checks.matrix(argument, value, rows=count, columns=self.value_width)
        if weights is not None:
            checks.vector("weights", weights, size=count)
            tensors["weights"] = weights
        for argument, value in tensors.items():
            checks.same_device(argument, value, self.device)
        cast = {argument: value.detach().to(self._dtype).contiguous() for argument, value in tensors.items()}
        if count:
            checks.finite(**cast)
            self._layout.check(cast["keys"])
        if weights is None:
            cast["weights"] = torch.ones(count, dtype=self._dtype, device=self.device)
        else:
            checks.positive_weights(cast["weights"])
        return cast.pop("keys"), cast.pop("weights"), [cast[argument] for argument in others]
