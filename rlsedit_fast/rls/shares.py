"""How several layers divide one residual among them."""

from __future__ import annotations

from collections.abc import Sequence

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
