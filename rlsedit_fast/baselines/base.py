"""Interface of update rules: they map keys, innovations and a layer's memory to a change of the weight.

Tensors are batch-first: a weight is `W [d_v, d_k]` and a layer computes `K @ W.T`. The papers write the transpose; they
are quoted in this form. With the innovation `E = V - K W^T [n, d_v]`, a rule returns `D [d_v, d_k]` and the weight
becomes `W + D`. Rules weigh edits against the prior of the layer, which they share with RLS:
`S0 = lam^2 I + mu^2 E[k k^T]`. For lam = 0 this is the published `C0`, with `mu^2` as the moment weight.
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
    """Input of a rule, in float64.

    Attributes:
        keys: `K [n, d_k]`.
        innovation: `E [n, d_v]`, the requested change of the outputs.
        weights: `w [n]`, weights of the edits; 1 is the default.

    Example:
        >>> import torch
        >>> from rlsedit_fast.baselines import Batch
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> Batch(keys=one, innovation=one, weights=one[0]).keys.shape
        torch.Size([1, 1])
    """

    keys: Tensor
    innovation: Tensor
    weights: Tensor


class Rule(ABC):
    """An update rule and its options. What a layer accumulates is stored in the layer's memory, not in the rule.

    Attributes:
        name: name of the rule.
        accumulates_keys: whether the keys of earlier batches constrain later ones, so that keys can be protected.

    Example:
        >>> from rlsedit_fast.baselines import BASELINES, Rule
        >>> all(issubclass(rule, Rule) for rule in BASELINES.values())
        True
    """

    name: ClassVar[str]
    accumulates_keys: ClassVar[bool] = False

    def memory_numel(self, d_v: int, d_k: int) -> int:
        """Returns the maximum number of float64 entries in the memory of a layer with a weight `[d_v, d_k]`."""
        return d_k * d_k

    @abstractmethod
    def init_memory(self, original: Tensor, prior: Prior, name: str) -> Any:
        """Returns the memory of a layer before its first batch.

        Args:
            original: `W0 [d_v, d_k]`, float64.
            prior: prior of the layer.
            name: name of the layer, for error messages.

        Raises:
            PriorError: the rule does not support this prior.
        """

    @abstractmethod
    def step(self, batch: Batch, weight: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Computes the change of the weight and the new memory. The arguments are not modified.

        Args:
            batch: at least one edit.
            weight: current `W [d_v, d_k]`, float64.
            memory: memory returned by `init_memory` or by the previous step.

        Returns:
            `(D [d_v, d_k], memory)`.

        Raises:
            InputError: the rule does not support the batch, for example its weights.
            UpdateError: the batch cannot be solved.
        """


def factor_prior(prior: Prior, d_k: int, device: torch.device, name: str) -> Tensor:
    """Returns the Cholesky factor of `S0 [d_k, d_k]`, float64.

    Raises:
        PriorError: `S0` is not positive definite.
    """
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(prior.precision(d_k, device))
    if int(failed):
        raise PriorError(
            f"{name}: lam^2 I + mu^2 E[k k^T] with lam={prior.lam:g}, mu={prior.mu:g} is not positive definite: the "
            "anchors do not span every direction. Increase lam above 0 or pass more anchors."
        )
    return lower


def ridge_step(projected: Tensor, batch: Batch) -> Tensor:
    """Returns `D = E^T (diag(1/w) + F K^T)^-1 F` for `F = K S^-1`, which equals `E^T w K (S + K^T w K)^-1`.

    Raises:
        UpdateError: the n x n matrix is not positive definite.
    """
    gram = projected @ batch.keys.T
    gram = 0.5 * (gram + gram.T)
    gram.diagonal().add_(1 / batch.weights)
    return _solve(gram, batch.innovation, "the batch").T @ projected


def _solve(gram: Tensor, right: Tensor, what: str) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(gram)
    # Where exact arithmetic gives a pivot of 0, rounding gives about n eps times its diagonal entry.
    floor = len(gram) * torch.finfo(gram.dtype).eps
    if int(failed) or bool((lower.diagonal().square() <= floor * gram.diagonal()).any()):
        raise UpdateError(
            f"{what} cannot be solved because its keys are linearly dependent. No weight was modified. Use edits of "
            "different subjects, or a rule (or option) that does not fit edits exactly."
        )
    solution: Tensor = torch.cholesky_solve(right, lower)
    return solution


def exact_step(projected: Tensor, batch: Batch, damping: float, rule: str) -> Tensor:
    """Returns `D = E^T (F K^T + damping I)^-1 F`, for damping 0 the smallest change (in the norm of S) that fits E.

    Raises:
        InputError: the batch has weights, which have no effect if every edit is fitted exactly.
        UpdateError: the keys are linearly dependent.
    """
    reject_weights(batch, rule)
    gram = projected @ batch.keys.T
    gram = 0.5 * (gram + gram.T)
    gram.diagonal().add_(damping)
    return _solve(gram, batch.innovation, f"the batch of rule {rule!r}").T @ projected


def reject_weights(batch: Batch, rule: str) -> None:
    """Raises InputError if an edit has a weight other than 1."""
    if bool((batch.weights != 1).any()):
        raise InputError(f"rule={rule!r} does not support edit weights; use weight 1 for every edit, or rule='rls'.")
