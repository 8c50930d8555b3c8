"""How priors are stored: numbers in the metadata of a store, and the moments of the anchors as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlsedit_fast.models.linear import Projection
from rlsedit_fast.rls import BlockMoment, BlockPrior, Prior


def about_prior(prior: Prior | BlockPrior) -> dict[str, Any]:
    """Returns the numbers of a prior, JSON-serializable."""
    about: dict[str, Any] = {"lam": prior.lam, "mu": prior.mu}
    if isinstance(prior, BlockPrior) and prior.moment is not None:
        about |= {"tokens": prior.moment.tokens, "energy": prior.moment.energy}
    return about


def decode_prior(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], at: int, projection: Projection
) -> Prior | BlockPrior:
    """Returns a stored prior.

    Args:
        about: result of `about_prior`.
        tensors: the tensors of the start of the store.
        at: index of the layer among the edited ones.
        projection: the projection.
    """
    if projection.layout is None:
        return Prior(**about, anchor_moment=tensors.get(f"moment.{at}"))
    prefix, moment = f"moment.{at}.", None
    if f"{prefix}routed" in tensors:
        parts = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
        moment = BlockMoment.of_tensors(parts, tokens=about["tokens"], energy=about["energy"])
    return BlockPrior(layout=projection.layout, lam=about["lam"], mu=about["mu"], moment=moment)


def moment_tensors(prior: Prior | BlockPrior, at: int) -> dict[str, Tensor]:
    """Returns the moments of a prior by name, for `decode_prior` of the layer at the same index."""
    if isinstance(prior, BlockPrior):
        return {f"moment.{at}.{name}": t for name, t in (prior.moment.tensors() if prior.moment else {}).items()}
    return {} if prior.anchor_moment is None else {f"moment.{at}": prior.anchor_moment}
