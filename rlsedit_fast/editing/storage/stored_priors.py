"""How priors are stored: numbers in the metadata of a store, and the moments of the anchors as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlsedit_fast.models.linear import Projection
from rlsedit_fast.rls import BlockMoment, BlockPrior, Prior
from rlsedit_fast.statistics.key_statistics import Moment


def about_prior(prior: Prior | BlockPrior) -> dict[str, Any]:
    """Returns the numbers of a prior, JSON-serializable."""
    about: dict[str, Any] = {"lam": prior.lam, "mu": prior.mu}
    return about | about_moment(prior.moment) if isinstance(prior, BlockPrior) else about


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
    moment = decode_moment(about, tensors, f"moment.{at}", mixture=projection.layout is not None)
    if projection.layout is None:
        assert not isinstance(moment, BlockMoment)
        return Prior(**about, anchor_moment=moment)
    assert not isinstance(moment, Tensor)
    return BlockPrior(layout=projection.layout, lam=about["lam"], mu=about["mu"], moment=moment)


def prior_tensors(prior: Prior | BlockPrior, at: int) -> dict[str, Tensor]:
    """Returns the moments of a prior by name, for `decode_prior` of the layer at the same index."""
    moment = prior.moment if isinstance(prior, BlockPrior) else prior.anchor_moment
    return moment_tensors(moment, f"moment.{at}")


def about_moment(moment: Moment | None) -> dict[str, Any]:
    """Returns the numbers of a moment, JSON-serializable."""
    return {"tokens": moment.tokens, "energy": moment.energy} if isinstance(moment, BlockMoment) else {}


def moment_tensors(moment: Moment | None, name: str) -> dict[str, Tensor]:
    """Returns the tensors of a moment, whose names begin with `name`."""
    if isinstance(moment, BlockMoment):
        return {f"{name}.{part}": tensor for part, tensor in moment.tensors().items()}
    return {} if moment is None else {name: moment}


def decode_moment(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, *, mixture: bool
) -> Moment | None:
    """Returns a stored moment, or None if there is none.

    Args:
        about: result of `about_moment`.
        tensors: tensors that contain those of `moment_tensors`.
        name: see `moment_tensors`.
        mixture: whether it is that of a mixture of experts.
    """
    if not mixture:
        return tensors.get(name)
    prefix = f"{name}."
    parts = {key.removeprefix(prefix): part for key, part in tensors.items() if key.startswith(prefix)}
    return BlockMoment.of_tensors(parts, tokens=about["tokens"], energy=about["energy"]) if parts else None
