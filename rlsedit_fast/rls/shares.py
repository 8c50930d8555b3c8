"""How several layers share one residual, and how much the last of them must ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, UpdateError
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.results import Panel


def memit_share(residual: Tensor, index: int, count: int) -> Tensor:
    """MEMIT's share of the residual still left for layer `index` of `count` (from 1): `R / (count - index + 1)`."""
    return residual / (count - index + 1)


@torch.no_grad()
def joint_innovations(panels: Sequence[Panel], residual: Tensor) -> list[Tensor]:
    """The innovation of each layer that together minimise what is left of the residual and what the layers pay.

    With `X = (diag(1/w) + sum_l G_l)^-1 R` the steps `dW_l = X^T F_l` minimise
    `sum_i w_i ||(sum_l K_l dW_l^T - R)_i||^2 + sum_l tr(dW_l S_l dW_l^T)`; layer l makes that step when its innovation
    is `E_l = (diag(1/w) + G_l) X`. The `n x n` solve is in float64.

    Args:
        panels: one per layer, of the same n edits with the same weights, in any order.
        residual: `R [n, d_v]`, what the layers are to add up to.

    Returns:
        `E_l [n, d_v]` per panel, in the panel's dtype and on its device.

    Raises:
        InputError: no panels, panels of different edits or weights, or a wrong residual.
        UpdateError: the batch could not be factored.
    """
    if not panels:
        raise InputError("panels is empty; pass the panel of at least one layer.")
    device = panels[0].gram.device
    noise = panels[0].noise.to(device, torch.float64)
    checks.matrix("residual", residual, rows=noise.shape[0])
    checks.finite(residual=residual)
    for index, panel in enumerate(panels):
        if panel.noise.shape != noise.shape or not torch.equal(panel.noise.to(device, torch.float64), noise):
            raise InputError(f"panels[{index}] has other edits or weights than panels[0]; project the same ones.")
    grams = [panel.gram.to(device, torch.float64) for panel in panels]
    noisy = torch.diag(noise)
    lower, info = torch.linalg.cholesky_ex(noisy + sum(grams[1:], grams[0]))
    if failed := int(info):
        raise UpdateError(
            f"the batch of {noise.shape[0]} rows could not be factored: pivot {failed} is not positive. "
            "Nothing was changed; C may have drifted, or weights as these are beyond what its dtype can tell apart."
        )
    shared = torch.cholesky_solve(residual.to(device, torch.float64), lower)
    return [((noisy + gram) @ shared).to(panel.gram) for gram, panel in zip(grams, panels, strict=True)]


MOST_PASSES = 3
"""Times that what would be left over is asked for as well."""


@torch.no_grad()
def raised_innovation(panel: Panel, innovation: Tensor, wanted: Tensor, judged: Tensor, share: float) -> Tensor:
    """An innovation of `update_projected` large enough that `share` of the wanted change arrives.

    A step with innovation E leaves `P E` over, `P = diag(1/w) Sig^-1`, which grows as a layer fills with edits. Asking
    for what would be left over as well, `E + P E`, leaves `P^2 E`. Such terms are added, the last one in part, until
    the mean over the judged rows of `1 - ||left_i|| / wanted_i` is `share`, at most `MOST_PASSES` of them.

    Args:
        panel: of the batch.
        innovation: `E [n, d_v]`, what is to arrive.
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
def raised_values(panel: Panel, change: Tensor, wanted: Tensor, judged: Tensor, share: float) -> Tensor:
    """A change of the values of rows that a state holds, large enough that `share` of a change of outputs arrives.

    With `RLSState.replace` outputs move by `G w` times the change of the values, `G` from the present state; what is
    left over is `P = I - G w` of what was asked. Otherwise as `raised_innovation`; the same arguments.
    """
    gram, weights = panel.gram.double(), 1 / panel.noise.double()
    return _raised(change, wanted, judged, share, lambda asked: asked - gram @ (weights[:, None] * asked), panel)


def _raised(
    change: Tensor, wanted: Tensor, judged: Tensor, share: float, left_of: Callable[[Tensor], Tensor], panel: Panel
) -> Tensor:
    """Asks for what `left_of` says would be left over as well, until `share` arrives."""
    device = panel.gram.device
    norms = wanted.to(device, torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    judged = judged.to(device)

    def arrived(left: Tensor) -> float:
        return 1 - float((left[judged].norm(dim=1) / norms).mean())

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
