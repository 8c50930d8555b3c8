"""Held-out tokens of the anchor text, on which the change of the outputs of the edited layers is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.baselines import LayerState
from rlsedit_fast.editing.storage.stored_priors import about_moment, decode_moment, moment_tensors
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.rls import BlockMoment, BlockPrior
from rlsedit_fast.rls.prior import chunks
from rlsedit_fast.statistics.key_statistics import Moment


def output_energy(weight: Tensor, moment: Tensor) -> float:
    """Returns `tr(W M W^T)`, the mean of `||W k||^2` over the keys of a moment; products are in float32.

    Args:
        weight: `W [d_v, d_k]`, any floating dtype.
        moment: `M = E[k k^T] [d_k, d_k]`, on any device; read in parts.
    """
    weight, energy, start = weight.float(), 0.0, 0
    for part in chunks(moment, weight.device):
        rows = part.float()
        energy += float(((rows @ weight.T).T * weight[:, start : start + len(rows)]).double().sum())
        start += len(rows)
    return max(energy, 0.0)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Second moments of the keys of held-out tokens, `d_k^2` numbers per layer in host memory.

    Attributes:
        tokens: number of tokens.
        moments: per layer `E[k k^T]`.
        norms: per layer the root mean square of the norms of the original outputs, `sqrt(tr(W0 M W0^T))`.
    """

    tokens: int
    moments: list[Moment]
    norms: list[float]

    @classmethod
    def of(
        cls,
        tokens: int,
        moments: Sequence[Moment],
        originals: Sequence[Sequence[Tensor]],
        projections: Sequence[Projection],
    ) -> HeldOut:
        """Returns the held-out tokens with the norms of the blocks of the original weights of each layer."""
        energies = [
            moment.energy
            if isinstance(moment, BlockMoment)
            else projection.columns.measure(partial(output_energy, moment=moment), blocks[0])
            for moment, blocks, projection in zip(moments, originals, projections, strict=True)
        ]
        return cls(tokens, list(moments), [math.sqrt(energy) for energy in energies])

    @torch.no_grad()
    def changes(self, states: Sequence[LayerState]) -> list[float]:
        """Returns per layer `||K (W - W0)^T||_F / ||K W0^T||_F` over the held-out keys.

        For a mixture of experts it is an upper bound, since the products of different experts are not known.
        """
        return [
            math.sqrt(_changed(state, moment)) / norm if norm else 0.0
            for state, moment, norm in zip(states, self.moments, self.norms, strict=True)
        ]

    def about(self) -> dict[str, Any]:
        """Returns the numbers, JSON-serializable, for a store."""
        return {"tokens": self.tokens, "norms": self.norms, "moments": [about_moment(one) for one in self.moments]}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the moments by name, for a store."""
        return {
            name: tensor
            for at, moment in enumerate(self.moments)
            for name, tensor in moment_tensors(moment, f"held-out.{at}").items()
        }

    @classmethod
    def decode(
        cls, about: Mapping[str, Any], tensors: Mapping[str, Tensor], projections: Sequence[Projection]
    ) -> HeldOut:
        """Returns the held-out tokens of a store from the results of `about` and `tensors`."""
        moments = [
            decode_moment(about["moments"][at], tensors, f"held-out.{at}", mixture=projection.layout is not None)
            for at, projection in enumerate(projections)
        ]
        return cls(about["tokens"], [moment for moment in moments if moment is not None], about["norms"])


def _changed(state: LayerState, moment: Moment) -> float:
    pairs = state.weights()
    if not isinstance(moment, BlockMoment):
        assert pairs[0] is not None
        original, now = pairs[0]
        return state.columns.measure(partial(output_energy, moment=moment), now.float() - original.float())
    assert isinstance(state.prior, BlockPrior)
    return state.prior.kappa * sum(
        output_energy(pair[1].float() - pair[0].float(), moment.block(block))
        for block, pair in enumerate(pairs)
        if pair is not None
    )
