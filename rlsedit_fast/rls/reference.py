"""Float64 reference of the solver: the objective, and its minimizer from the normal equations. Simple and slow."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsedit_fast.rls.prior import Prior


def solve_all(
    weight: Tensor, prior: Prior, keys: Tensor, values: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Solves for all edits at once.

    Args:
        weight: `W0 [d_v, d_k]`, any floating dtype.
        prior: prior of the layer.
        keys: `K [n, d_k]`; n may be 0.
        values: `V [n, d_v]`.
        weights: `w [n]`; 1 by default.

    Returns:
        `(W, C, J)` in float64: the minimizer `[d_v, d_k]`, the inverse `[d_k, d_k]` of `S = S0 + K^T w K`, and the
        objective at the minimizer.
    """
    original, k, v = weight.double(), keys.double(), values.double()
    w = torch.ones(len(k), dtype=torch.float64) if weights is None else weights.double()
    moment, cross = _anchor_sums(original, prior)
    identity = torch.eye(original.shape[1], dtype=torch.float64)

    precision = prior.lam**2 * identity + prior.mu**2 * moment + (k * w[:, None]).T @ k
    right = prior.lam**2 * original + prior.mu**2 * cross + (v * w[:, None]).T @ k
    solution = torch.linalg.solve(precision, right.T).T
    inverse = torch.linalg.solve(precision, identity)
    return solution, inverse, evaluate_objective(solution, weight, prior, keys, values, weights)


def evaluate_objective(
    at: Tensor, weight: Tensor, prior: Prior, keys: Tensor, values: Tensor, weights: Tensor | None = None
) -> float:
    """Returns `J(W)` in float64 at `W = at [d_v, d_k]`; see `solve_all` for the other arguments."""
    solution, original, k, v = at.double(), weight.double(), keys.double(), values.double()
    w = torch.ones(len(k), dtype=torch.float64) if weights is None else weights.double()

    edits = (w[:, None] * (k @ solution.T - v) ** 2).sum()
    penalty = ((solution - original) ** 2).sum()
    return float(edits + prior.lam**2 * penalty + prior.mu**2 * _anchor_misfit(solution, original, prior))


def _anchor_sums(original: Tensor, prior: Prior) -> tuple[Tensor, Tensor]:
    """Returns `K0^T K0` and `V0^T K0` of the anchors; zeros without anchors."""
    if prior.anchor_keys is not None:
        k0 = prior.anchor_keys.double()
        v0 = k0 @ original.T if prior.anchor_values is None else prior.anchor_values.double()
        return k0.T @ k0, v0.T @ k0
    if prior.anchor_moment is not None:
        moment = prior.anchor_moment.double()
        return moment, original @ moment if prior.anchor_cross is None else prior.anchor_cross.double()
    d_k = original.shape[1]
    return torch.zeros(d_k, d_k, dtype=torch.float64), torch.zeros_like(original)


def _anchor_misfit(solution: Tensor, original: Tensor, prior: Prior) -> Tensor:
    """`||K0 W^T - V0||_F^2`, from the rows where they are known."""
    delta = solution - original
    if prior.anchor_keys is not None:
        k0 = prior.anchor_keys.double()
        v0 = k0 @ original.T if prior.anchor_values is None else prior.anchor_values.double()
        return ((k0 @ solution.T - v0) ** 2).sum()
    if prior.anchor_moment is not None:
        moment = prior.anchor_moment.double()
        if prior.anchor_cross is None or prior.anchor_energy is None:
            return ((delta @ moment) * delta).sum()
        cross = prior.anchor_cross.double()
        return ((solution @ moment) * solution).sum() - 2 * (cross * solution).sum() + prior.anchor_energy
    return torch.zeros((), dtype=torch.float64)
