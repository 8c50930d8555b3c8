"""The operations in plain PyTorch: the `reference` backend, and in float64 the truth that tests compare with.

Shapes: d_k keys' width, d_v values' width, n edits in a batch, r pending rows. All take any floating dtype
and compute in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsedit_fast.ops.split import SPLIT_CHUNK, join, split


def panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor) -> Tensor:
    """`F = K C` for the deferred `C = C_base - U_p^T D U_p`.

    Args:
        base: `C_base [d_k, d_k]`, symmetric, stored whole.
        keys: `K [n, d_k]`.
        pending: `U_p [r, d_k]`; r may be 0.
        signs: the diagonal of `D`, `[r]`: +1 for an edit's row, -1 for a removal's.

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
    """Factors `Sig = diag(noise) + sign * F K^T = L L^T` and whitens with it.

    Args:
        projected: `F [n, d_k]` from `panel`.
        keys: `K [n, d_k]`.
        innovation: `E [n, d_v]`.
        noise: `1/w [n]`.
        sign: +1 for an edit, -1 for a removal.

    Returns:
        `(U, A, L, info)`: `U = L^-1 F [n, d_k]`, `A = L^-1 E [n, d_v]`, `L [n, n]`, and an int32 scalar that
        is 0 when the factorisation succeeded, else the one-based index of the pivot that was not positive
        (U, A and L are then meaningless).
    """
    gram = projected @ keys.T
    sigma = torch.diag(noise) + (0.5 * sign) * (gram + gram.T)
    lower, info = torch.linalg.cholesky_ex(sigma)
    whitened = torch.linalg.solve_triangular(lower, torch.cat((projected, innovation), 1), upper=False)
    d_k = projected.shape[1]
    return whitened[:, :d_k].contiguous(), whitened[:, d_k:].contiguous(), lower.contiguous(), info


def downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """`C_base <- C_base - U_p^T D U_p` in place; symmetric up to rounding if it was so before.

    Args:
        base: `[d_k, d_k]`, symmetric, stored whole.
        pending: `U_p [r, d_k]`.
        signs: `[r]`.
    """
    base.addmm_((pending * signs[:, None]).T, pending, alpha=-1)


def correct_(weight: Tensor, whitened: Tensor, rows: Tensor, sign: int) -> None:
    """`W <- W + sign * A^T U` in place.

    Args:
        weight: `W [d_v, d_k]`.
        whitened: `A [n, d_v]`.
        rows: `U [n, d_k]`.
        sign: +1 for an edit, -1 for a removal.
    """
    weight.addmm_(whitened.T, rows, alpha=sign)


def correct_split_(high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int) -> None:
    """`W <- W + sign * A^T U` in place, in float32, on a weight that is kept in two halves (`ops.split`).

    Args:
        high: `[d_v, d_k]`, bfloat16: the weight as the model computes with it.
        low: `[d_v, d_k]`, int16: what `high` lacks.
        whitened: `A [n, d_v]`, float32.
        rows: `U [n, d_k]`, float32.
        sign: +1 for an edit, -1 for a removal.
    """
    step = max(1, SPLIT_CHUNK // high.shape[1])
    for start in range(0, high.shape[0], step):
        part = slice(start, start + step)
        weight = join(high[part], low[part]).addmm_(whitened[:, part].T, rows, alpha=sign)
        for half, new in zip((high, low), split(weight), strict=True):
            half[part] = new


def moment_(moment: Tensor, rows: Tensor) -> None:
    """`M <- M + X^T X` in place, accumulated in M's dtype.

    Args:
        moment: `[d, d]`.
        rows: `X [t, d]`, of any floating dtype.
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
    """PyTorch runs everywhere."""
    return None


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """PyTorch takes every floating dtype and device."""
    return None
