"""How much of the direction of a key earlier edits already use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.errors import UpdateError


@torch.no_grad()
def used_share(state: Any, keys: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the used share `u = 1 - (k C k^T) / (k C0 k^T)` of each key before it is applied.

    `k C k^T` is the variance of the outputs in the direction of the key that the applied edits leave, and `k C0 k^T`
    the one that the prior alone leaves: a new direction has 0, the key of an edit that was applied almost 1. The rows
    of the batch count as applied one after the other.

    Args:
        state: an `RLSState`, `BlockState` or `SeparateState`.
        keys: rows of keys `[n, d_k]`, any floating dtype.
        weights: `w [n]`, with which they would be applied; 1 by default.

    Returns:
        `[n]`, float64, between 0 and 1.

    Raises:
        InputError: an argument is invalid.
        UpdateError: the batch could not be factored.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState, used_share
        >>> state = RLSState(torch.zeros(1, 2), Prior(lam=1.0))
        >>> _ = state.update(torch.tensor([[3.0, 0.0]]), torch.ones(1, 1))
        >>> [round(share, 6) for share in used_share(state, torch.tensor([[3.0, 0.0], [0.0, 1.0]])).tolist()]
        [0.9, 0.0]
    """
    panel = state.project(keys, weights)
    noise = panel.noise.double()
    lower, info = torch.linalg.cholesky_ex(torch.diag(noise) + panel.gram.double())
    if int(info):
        raise UpdateError(f"the keys could not be projected by {state.name}: pivot {int(info)} is not positive.")
    left = (lower.diagonal().square() - noise).clamp_min(0.0)
    before = state.prior_variance(panel.keys)
    return torch.where(before > 0, 1 - left / before, 0.0).clamp(0.0, 1.0)
