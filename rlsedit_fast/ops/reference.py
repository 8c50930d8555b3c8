"""Reference implementation of the operations in plain PyTorch.

This is the `reference` backend; tests compare the other backends with it in float64. Sizes: d_k is the width of keys,
d_v the width of values, n the number of edits in a batch, r the number of pending rows. Operations accept any floating
dtype and compute in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsedit_fast.ops.sizes import SizeClass
from rlsedit_fast.ops.split import SPLIT_CHUNK, join, split


def panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor) -> Tensor:
    """Computes `F = K C` for the deferred `C = C_base - U_p^T D U_p`.

    Args:
        base: `C_base [d_k, d_k]`, symmetric; both triangles are stored.
        keys: `K [n, d_k]`.
        pending: `U_p [r, d_k]`; r may be 0.
        signs: diagonal of `D`, `[r]`: +1 for the row of an update, -1 for the row of a removal.

    Returns:
        `F [n, d_k]`.
    """
    projected = keys @ base
    if pending.shape[0]:
        projected.addmm_((keys @ pending.T) * signs, pending, alpha=-1)
    return projected


def factor(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors `Sig = diag(noise) + sign * F K^T = L L^T` and whitens `F` and `E` with `L`.

    Args:
        projected: `F [n, d_k]` from `panel`.
        keys: `K [n, d_k]`.
        innovation: `E [n, d_v]`.
        noise: `1/w [n]`.
        sign: +1 for an update, -1 for a removal.

    Returns:
        `(U, A, L, info)`: `U = L^-1 F [n, d_k]`, `A = L^-1 E [n, d_v]`, `L [n, n]`, and an int32 scalar that is 0 if
        the factorization succeeded, else the one-based index of the pivot that is not positive (U, A and L are then
        undefined).
    """
    gram = projected @ keys.T
    sigma = torch.diag(noise) + (0.5 * sign) * (gram + gram.T)
    lower, info = torch.linalg.cholesky_ex(sigma)
    whitened = torch.linalg.solve_triangular(lower, torch.cat((projected, innovation), 1), upper=False)
    d_k = projected.shape[1]
    return whitened[:, :d_k].contiguous(), whitened[:, d_k:].contiguous(), lower, info


def downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """Computes `C_base <- C_base - U_p^T D U_p` in place; a symmetric matrix stays symmetric up to rounding.

    Args:
        base: `[d_k, d_k]`, symmetric; both triangles are stored.
        pending: `U_p [r, d_k]`.
        signs: `[r]`, each +1 or -1.
    """
    base.addmm_((pending * signs[:, None]).T, pending, alpha=-1)


def correct_(weight: Tensor, whitened: Tensor, rows: Tensor, sign: int) -> None:
    """Computes `W <- W + sign * A^T U` in place.

    Args:
        weight: `W [d_v, d_k]`.
        whitened: `A [n, d_v]`.
        rows: `U [n, d_k]`.
        sign: +1 for an update, -1 for a removal.
    """
    weight.addmm_(whitened.T, rows, alpha=sign)


def correct_split_(high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int) -> None:
    """Computes `W <- W + sign * A^T U` in place, in float32, on a split weight (see `ops.split`).

    Args:
        high: `[d_v, d_k]`, bfloat16: the weight that the model uses.
        low: `[d_v, d_k]`, int16: the remainder.
        whitened: `A [n, d_v]`, float32.
        rows: `U [n, d_k]`, float32.
        sign: +1 for an update, -1 for a removal.
    """
    step = max(1, SPLIT_CHUNK // high.shape[1])
    for start in range(0, high.shape[0], step):
        part = slice(start, start + step)
        weight = join(high[part], low[part]).addmm_(whitened[:, part].T, rows, alpha=sign)
        for half, new in zip((high, low), split(weight), strict=True):
            half[part] = new


def moment_(moment: Tensor, rows: Tensor) -> None:
    """Computes `M <- M + X^T X` in place, accumulated in the dtype of M.

    Args:
        moment: `M [d, d]`.
        rows: `X [t, d]`, any floating dtype.
    """
    rows = rows.to(moment.dtype)
    moment.addmm_(rows.T, rows)


OPS = {
    "panel": panel,
    "factor": factor,
    "downdate_": downdate_,
    "correct_": correct_,
    "correct_split_": correct_split_,
    "moment_": moment_,
}
BATCHED = frozenset[str]()


def unavailable_reason() -> str | None:
    """Returns None: this backend always runs."""
    return None


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Returns None: every floating dtype and device is supported."""
    return None


def preferred(size: SizeClass) -> bool:
    """Returns True: it is the default where no other backend is."""
    return True
