"""How several layers share one residual, and how much the last of them must ask for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlsedit_fast.errors import UpdateError
from rlsedit_fast.rls.results import Panel


def memit_share(residual: Tensor, index: int, count: int) -> Tensor:
    """MEMIT's share of the residual still left for layer `index` of `count` (from 1): `R / (count - index + 1)`."""
    return residual / (count - index + 1)


def realized_fraction(left: Tensor, wanted: Tensor) -> Tensor:
    """The share of each wanted change that arrived, `1 - ||left_i|| / wanted_i [n]`; 1 where none was wanted.

    It is at least 0: other edits may move the state of a small change by many times its length.

    Args:
        left: what is missing of each, `[n, d]`.
        wanted: norm of each wanted change, `[n]`.
    """
    some = wanted > 0
    return torch.where(some, 1 - left.norm(dim=1) / torch.where(some, wanted, 1.0), 1.0).clamp_min(0.0)


MOST_PASSES = 3
"""Times that what would be left over is asked for as well."""


@torch.no_grad()
def amplify_innovation(panel: Panel, innovation: Tensor, wanted: Tensor, judged: Tensor, share: float) -> Tensor:
    """An innovation of `update_projected` large enough that `share` of the wanted change arrives.

    A step with innovation E leaves `P E` over, `P = diag(1/w) Sig^-1`, which grows as a layer fills with edits. Asking
    for what would be left over as well, `E + P E`, leaves `P^2 E`. Such terms are added, the last one in part, until
    the mean over the judged rows of `1 - ||left_i|| / wanted_i` is `share`, at most `MOST_PASSES` of them.

    Args:
        panel: of the batch.
        innovation: `E [n, d_v]`, the change that must arrive.
        wanted: norm of the change wanted of each judged row, `[m]`, of which E may be a part.
        judged: indices of the judged rows, `[m]`.
        share: between 0 and 1.

    Returns:
        `[n, d_v]`, in the dtype and on the device of `innovation`; E itself where `share` of it arrives anyway.

    Raises:
        UpdateError: the batch could not be factored.
    """
    gram, noise = panel.gram.double(), panel.noise.double()
    lower, info = torch.linalg.cholesky_ex(torch.diag(noise) + gram)
    if failed := int(info):
        raise UpdateError(
            f"the batch of {len(noise)} rows could not be factored: pivot {failed} is not positive. No state was "
            "modified; C may have drifted"
        )
    return _raised(
        innovation, wanted, judged, share, lambda asked: noise[:, None] * torch.cholesky_solve(asked, lower), panel
    )


@torch.no_grad()
def amplify_values(panel: Panel, keys: Tensor, change: Tensor, wanted: Tensor, judged: Tensor, share: float) -> Tensor:
    """A change of the values of rows that a state holds, large enough that `share` of a change of outputs arrives.

    With `RLSState.replace` the outputs at keys K' move by `K' C K^T w` times the change of the values; what is left
    over is `P = I - K' C K^T w` of what was asked. Otherwise as `amplify_innovation`, with the same arguments.

    Args:
        panel: of the rows, in the present state.
        keys: `K' [n, d_k]`, where the outputs are to change: the rows' keys as the model has them now.
        change: `[n, d_v]`, the change that must arrive.
        wanted: see `amplify_innovation`.
        judged: see there.
        share: see there.
    """
    gram, weights = keys.double() @ panel.projected.double().T, 1 / panel.noise.double()
    return _raised(change, wanted, judged, share, lambda asked: asked - gram @ (weights[:, None] * asked), panel)


def _raised(
    change: Tensor, wanted: Tensor, judged: Tensor, share: float, left_of: Callable[[Tensor], Tensor], panel: Panel
) -> Tensor:
    """Asks for what `left_of` says would be left over as well, until `share` arrives."""
    device = panel.gram.device
    norms, judged = wanted.to(device, torch.float64), judged.to(device)

    def arrived(left: Tensor) -> float:
        return float(realized_fraction(left[judged], norms).mean())

    asked = change.to(device, torch.float64)
    left = left_of(asked)
    for _ in range(MOST_PASSES):
        if arrived(left) >= share:
            break
        further = left_of(left)
        part = 1.0
        if arrived(further) > share:
            low, high = 0.0, 1.0
            for _ in range(20):
                part = 0.5 * (low + high)
                low, high = (low, part) if arrived(left + part * (further - left)) > share else (part, high)
        asked, left = asked + part * left, left + part * (further - left)
    return asked.to(change)
