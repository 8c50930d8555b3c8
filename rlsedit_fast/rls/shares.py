"""Distributes a residual over several layers, and amplifies the request of the last layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlsedit_fast.errors import UpdateError
from rlsedit_fast.rls.block_panel import BlockPanel
from rlsedit_fast.rls.results import Panel

MAX_TERMS = 3
"""Maximum number of residual terms that are added to an amplified request."""


def memit_share(residual: Tensor, index: int, count: int) -> Tensor:
    """Returns MEMIT's share of the remaining residual for one layer: `R / (count - index + 1)`.

    Args:
        residual: remaining residual, any shape.
        index: one-based index of the layer.
        count: number of layers.

    Returns:
        A tensor of the shape of `residual`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import memit_share
        >>> memit_share(torch.tensor([6.0]), 2, 3)
        tensor([3.])
    """
    return residual / (count - index + 1)


def realized_fraction(residual: Tensor, norms: Tensor) -> Tensor:
    """Returns the realized fraction of each requested change, `1 - ||residual_i|| / norms_i`.

    The fraction is clipped at 0: other edits can move an output by many times the length of a small change.

    Args:
        residual: remaining residuals `[n, d]`.
        norms: norms of the requested changes `[n]`.

    Returns:
        `[n]`, 1 where no change was requested.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import realized_fraction
        >>> realized_fraction(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([10.0, 2.0]))
        tensor([0.5000, 1.0000])
    """
    some = norms > 0
    return torch.where(some, 1 - residual.norm(dim=1) / torch.where(some, norms, 1.0), 1.0).clamp_min(0.0)


@torch.no_grad()
def amplify_innovation(
    panel: Panel | BlockPanel, innovation: Tensor, norms: Tensor, rows: Tensor, share: float
) -> Tensor:
    """Amplifies an innovation for `RLSState.update_projected` so that `share` of the requested change is realized.

    A step with innovation E leaves the residual `P E` with `P = diag(1/w) Sig^-1`, which grows as more edits are
    applied. A step with `E + P E` leaves `P^2 E`, and so on. Such terms are added, the last one scaled, until the mean
    of `1 - ||residual_i|| / norms_i` over the given rows is `share`, but at most `MAX_TERMS` terms.

    Args:
        panel: panel of the batch.
        innovation: `E [n, d_v]`, the change that must be realized.
        norms: norms of the requested changes of the given rows, `[m]`; E may be a part of those changes.
        rows: indices of the rows over which the realized fraction is averaged, `[m]`.
        share: fraction to realize, between 0 and 1.

    Returns:
        `[n, d_v]`, in the dtype and on the device of `innovation`; E itself if it already realizes `share`.

    Raises:
        UpdateError: the batch could not be factored. No state was modified.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState, amplify_innovation
        >>> state = RLSState(torch.zeros(1, 2), Prior(lam=1.0))
        >>> panel = state.project(torch.tensor([[1.0, 0.0]]))
        >>> amplify_innovation(panel, torch.ones(1, 1), torch.ones(1), torch.tensor([0]), 0.75)
        tensor([[1.5000]])
    """
    gram, noise = panel.gram.double(), panel.noise.double()
    lower, info = torch.linalg.cholesky_ex(torch.diag(noise) + gram)
    if failed := int(info):
        raise UpdateError(
            f"the batch of {len(noise)} rows could not be factored: pivot {failed} is not positive. No state was "
            "modified. C may have drifted; see monitor() and refresh()."
        )
    return _amplify(
        innovation, norms, rows, share, lambda request: noise[:, None] * torch.cholesky_solve(request, lower), panel
    )


@torch.no_grad()
def amplify_values(
    panel: Panel | BlockPanel, keys: Tensor, change: Tensor, norms: Tensor, rows: Tensor, share: float
) -> Tensor:
    """Amplifies a change of values for `RLSState.replace` so that `share` of a change of the outputs is realized.

    A replacement moves the outputs at keys K' by `K' C K^T w` times the change of the values, so the residual is
    `P = I - K' C K^T w` times the request. See `amplify_innovation` for the method.

    Args:
        panel: panel of the applied rows in the current state.
        keys: `K' [n, d_k]`, the current keys at which the outputs must change.
        change: `[n, d_v]`, the change of the outputs that must be realized.
        norms: norms of the requested changes of the given rows, `[m]`.
        rows: indices of the rows over which the realized fraction is averaged, `[m]`.
        share: fraction to realize, between 0 and 1.

    Returns:
        The change of the values, `[n, d_v]`, in the dtype and on the device of `change`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState, amplify_values
        >>> state = RLSState(torch.zeros(1, 2), Prior(lam=1.0))
        >>> keys, values = torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)
        >>> _ = state.update(keys, values)
        >>> amplify_values(state.project(keys), keys, torch.ones(1, 1), torch.ones(1), torch.tensor([0]), 0.75)
        tensor([[1.5000]])
    """
    gram, weights = panel.cross(keys), 1 / panel.noise.double()
    return _amplify(change, norms, rows, share, lambda request: request - gram @ (weights[:, None] * request), panel)


def _amplify(
    change: Tensor,
    norms: Tensor,
    rows: Tensor,
    share: float,
    residual_of: Callable[[Tensor], Tensor],
    panel: Panel | BlockPanel,
) -> Tensor:
    """Adds the residuals that `residual_of` predicts to the request until `share` is realized."""
    device = panel.gram.device
    norms, rows = norms.to(device, torch.float64), rows.to(device)

    def realized(residual: Tensor) -> float:
        return float(realized_fraction(residual[rows], norms).mean())

    request = change.to(device, torch.float64)
    residual = residual_of(request)
    for _ in range(MAX_TERMS):
        if realized(residual) >= share:
            break
        following = residual_of(residual)
        scale = 1.0
        if realized(following) > share:
            low, high = 0.0, 1.0
            for _ in range(20):
                scale = 0.5 * (low + high)
                enough = realized(residual + scale * (following - residual)) > share
                low, high = (low, scale) if enough else (scale, high)
        request, residual = request + scale * residual, residual + scale * (following - residual)
    return request.to(change)
