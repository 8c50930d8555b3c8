"""What a write rule is: keys, the change wanted of their outputs, and what a layer remembers, into a change of weight.

Batch-first, as everywhere: a weight is `W [d_v, d_k]`, a layer computes `K @ W.T`, and the papers, which write the
transpose, are quoted in this form. With `E = V - K W^T [n, d_v]`, the innovation, a rule gives `D [d_v, d_k]` and the
weight becomes `W + D`. What a rule weighs edits against comes from the prior of the layer, the one that the recursive
rule has: `S0 = lam^2 I + mu^2 E[k k^T]`. With lam = 0 that is the published `C0`, and `mu^2` the "moment weight".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, PriorError, UpdateError
from rlsedit_fast.rls import Prior


@dataclass(frozen=True, eq=False)
class Batch:
    """What a rule is given, in float64.

    Attributes:
        keys: `K [n, d_k]`.
        innovation: `E [n, d_v]`, what the outputs are to change by.
        weights: `w [n]`, how firmly each edit is held; 1 is the ordinary weight.
    """

    keys: Tensor
    innovation: Tensor
    weights: Tensor


class Rule(ABC):
    """A write rule with its settings; whatever a layer accumulates under it lies in the layer's memory, not here."""

    name: ClassVar[str]
    accumulates_keys: ClassVar[bool] = False
    """Whether keys of earlier batches weigh on later ones, so that keys alone can be protected."""

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """How many float64 numbers a layer remembers, at most: what `start` and `change` return."""
        return d_k * d_k

    @abstractmethod
    def start(self, original: Tensor, prior: Prior, name: str) -> Any:
        """What a layer remembers before its first batch.

        Args:
            original: `W0 [d_v, d_k]`, float64.
            prior: of the layer.
            name: of the layer, for the errors.

        Raises:
            PriorError: the rule cannot work under this prior.
        """

    @abstractmethod
    def change(self, batch: Batch, weight: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """The change of the weight, and what the layer remembers from then on; nothing given is written to.

        Args:
            batch: at least one edit.
            weight: `W [d_v, d_k]`, as it is now, float64.
            memory: from `start`, or from the batch before.

        Returns:
            `(D [d_v, d_k], memory)`.

        Raises:
            InputError: the rule cannot do what is asked, such as weighing edits.
            UpdateError: the batch cannot be solved.
        """


def factored(prior: Prior, d_k: int, device: torch.device, name: str) -> Tensor:
    """The Cholesky factor of `S0 [d_k, d_k]`, float64.

    Raises:
        PriorError: it is not positive definite.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(prior.precision(d_k, device))
    if int(failed):
        raise PriorError(
            f"{name}: lam^2 I + mu^2 E[k k^T] with lam={prior.lam:g}, mu={prior.mu:g} is not positive definite: the "
            "anchors do not hold every direction. Raise lam above 0, or pass more anchors."
        )
    return lower


def ridge_step(projected: Tensor, batch: Batch) -> Tensor:
    """`D = E^T (diag(1/w) + F K^T)^-1 F` for `F = K S^-1`: the same as `E^T w K (S + K^T w K)^-1`.

    Raises:
        UpdateError: the n x n matrix is not positive definite.
    """
    gram = projected @ batch.keys.T
    gram = 0.5 * (gram + gram.T)
    gram.diagonal().add_(1 / batch.weights)
    return _solved(gram, batch.innovation, "this batch").T @ projected


def _solved(gram: Tensor, right: Tensor, what: str) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(gram)
    # Rounding gives a pivot of about n eps of its diagonal entry where exact arithmetic gives 0.
    floor = len(gram) * torch.finfo(gram.dtype).eps
    if int(failed) or bool((lower.diagonal().square() <= floor * gram.diagonal()).any()):
        raise UpdateError(
            f"{what} cannot be solved: its keys depend on one another. Nothing was changed; take edits of different "
            "subjects, or a rule (or a setting) that does not hold edits exactly"
        )
    found: Tensor = torch.cholesky_solve(right, lower)
    return found


def exact_step(projected: Tensor, batch: Batch, damping: float, rule: str) -> Tensor:
    """`D = E^T (F K^T + damping I)^-1 F`: the least change, by the measure of S, that leaves nothing over.

    Raises:
        InputError: the batch has weights, which mean nothing where every edit is held exactly.
        UpdateError: the keys depend on one another.
    """
    refuse_weights(batch, rule)
    gram = projected @ batch.keys.T
    gram = 0.5 * (gram + gram.T)
    gram.diagonal().add_(damping)
    return _solved(gram, batch.innovation, f"the batch under {rule}").T @ projected


def refuse_weights(batch: Batch, rule: str) -> None:
    """Raises InputError if an edit has a weight other than 1."""
    if bool((batch.weights != 1).any()):
        raise InputError(f"rule={rule!r} has no place for weights of edits; give every edit weight 1, or take 'rls'")
