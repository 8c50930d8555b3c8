"""Public operations: argument checks, then dispatch to a backend.

`reference` documents the arguments in full. Every operation also accepts a leading dimension of layers on all of its
tensors and then returns results with that dimension. The operations have no derivative and no `torch.library` schema:
the solver that calls them reads scalars back to the host at every step, so it is never part of a compiled graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.ops.dispatch import requested, run

_Shape = tuple[int | None, ...]


def panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor, *, backend: str | None = None) -> Tensor:
    """Computes `F = K C` for the deferred `C = C_base - U_p^T D U_p`; see `reference.panel`.

    Args:
        base: `C_base [d_k, d_k]`, symmetric.
        keys: `K [n, d_k]`.
        pending: `U_p [r, d_k]`; r may be 0.
        signs: diagonal of `D`, `[r]`, each +1 or -1.
        backend: backend name, several names separated by commas, or `auto`; None reads `RLSEDIT_BACKEND`.

    Returns:
        `F [n, d_k]`, in the dtype of `base`.

    Raises:
        InputError: A shape, dtype or device does not match, or the backend is unknown.
        BackendError: the requested backend cannot run this operation.

    Example:
        >>> import torch
        >>> from rlsedit_fast import ops
        >>> keys = torch.tensor([[1.0, 2.0]])
        >>> pending, signs = torch.tensor([[1.0, 0.0]]), torch.tensor([1.0])
        >>> ops.panel(2 * torch.eye(2), keys, pending, signs)  # C = diag(1, 2)
        tensor([[1., 4.]])
    """
    name = requested(backend)
    _, d = _size("panel", "base", base)
    r, _ = _size("panel", "pending", pending)
    shapes = {"base": (base, (d, d)), "keys": (keys, (None, d)), "pending": (pending, (r, d)), "signs": (signs, (r,))}
    layers = _check("panel", **shapes)
    projected: Tensor = run("panel", name, layers, (base, keys, pending, signs))
    return projected


def factor(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors `Sig = diag(noise) + sign * F K^T = L L^T` and whitens `F` and `E`; see `reference.factor`.

    Args:
        projected: `F [n, d_k]` from `panel`.
        keys: `K [n, d_k]`.
        innovation: `E [n, d_v]`.
        noise: `1/w [n]`.
        sign: +1 for an update, -1 for a removal.
        backend: as for `panel`.

    Returns:
        `(U [n, d_k], A [n, d_v], L [n, n], info)`; `info` is an int32 scalar, 0 on success.

    Raises:
        InputError: A shape, dtype, device or the sign does not match, or the backend is unknown.
        BackendError: the requested backend cannot run this operation.

    Example:
        >>> import torch
        >>> from rlsedit_fast import ops
        >>> keys = torch.tensor([[1.0, 1.0, 1.0]])  # F = K, since C = I
        >>> rows, whitened, lower, info = ops.factor(keys, keys, torch.tensor([[4.0]]), torch.ones(1), 1)
        >>> rows, whitened, lower, int(info)
        (tensor([[0.5000, 0.5000, 0.5000]]), tensor([[2.]]), tensor([[2.]]), 0)
    """
    name = requested(backend)
    n, d = _size("factor", "projected", projected)
    layers = _check(
        "factor",
        projected=(projected, (n, d)),
        keys=(keys, (n, d)),
        innovation=(innovation, (n, None)),
        noise=(noise, (n,)),
    )
    _check_sign("factor", sign)
    u, a, lower, info = run("factor", name, layers, (projected, keys, innovation, noise), sign)
    return u, a, lower, info


def downdate_(base: Tensor, pending: Tensor, signs: Tensor, *, backend: str | None = None) -> None:
    """Computes `C_base <- C_base - U_p^T D U_p` in place; see `reference.downdate_`.

    Args:
        base: `C_base [d_k, d_k]`, symmetric.
        pending: `U_p [r, d_k]`.
        signs: `[r]`, each +1 or -1.
        backend: as for `panel`.

    Raises:
        InputError: A shape, dtype or device does not match, or the backend is unknown.
        BackendError: the requested backend cannot run this operation.

    Example:
        >>> import torch
        >>> from rlsedit_fast import ops
        >>> base = torch.eye(2)
        >>> ops.downdate_(base, torch.tensor([[0.5, 0.5]]), torch.tensor([1.0]))
        >>> base
        tensor([[ 0.7500, -0.2500],
                [-0.2500,  0.7500]])
    """
    name = requested(backend)
    _, d = _size("downdate_", "base", base)
    r, _ = _size("downdate_", "pending", pending)
    layers = _check("downdate_", base=(base, (d, d)), pending=(pending, (r, d)), signs=(signs, (r,)))
    run("downdate_", name, layers, (base, pending, signs))


def correct_(weight: Tensor, whitened: Tensor, rows: Tensor, sign: int, *, backend: str | None = None) -> None:
    """Computes `W <- W + sign * A^T U` in place; see `reference.correct_`.

    Args:
        weight: `W [d_v, d_k]`.
        whitened: `A [n, d_v]`.
        rows: `U [n, d_k]`.
        sign: +1 for an update, -1 for a removal.
        backend: as for `panel`.

    Raises:
        InputError: A shape, dtype, device or the sign does not match, or the backend is unknown.
        BackendError: the requested backend cannot run this operation.

    Example:
        >>> import torch
        >>> from rlsedit_fast import ops
        >>> weight = torch.zeros(2, 3)
        >>> ops.correct_(weight, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0]]), 1)
        >>> weight
        tensor([[1., 0., 3.],
                [2., 0., 6.]])
    """
    name = requested(backend)
    n, d_k = _size("correct_", "rows", rows)
    _, d_v = _size("correct_", "whitened", whitened)
    layers = _check("correct_", weight=(weight, (d_v, d_k)), whitened=(whitened, (n, d_v)), rows=(rows, (n, d_k)))
    _check_sign("correct_", sign)
    run("correct_", name, layers, (weight, whitened, rows), sign)


def correct_split_(
    high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int, *, backend: str | None = None
) -> None:
    """Computes `W <- W + sign * A^T U` in place on a split float32 weight; see `reference.correct_split_`.

    Args:
        high: bfloat16 half `[d_v, d_k]`, see `split`.
        low: int16 half `[d_v, d_k]`.
        whitened: `A [n, d_v]`, float32.
        rows: `U [n, d_k]`, float32.
        sign: +1 for an update, -1 for a removal.
        backend: as for `panel`.

    Raises:
        InputError: A shape, dtype, device or the sign does not match, or the backend is unknown.
        BackendError: the requested backend cannot run this operation.

    Example:
        >>> import torch
        >>> from rlsedit_fast import ops
        >>> high, low = ops.split(torch.zeros(1, 2))
        >>> ops.correct_split_(high, low, torch.tensor([[0.1]]), torch.tensor([[1.0, 2.0]]), 1)
        >>> ops.join(high, low)  # the bfloat16 half alone is [[0.1001, 0.2002]]
        tensor([[0.1000, 0.2000]])
    """
    name, op = requested(backend), "correct_split_"
    n, d_k = _size(op, "rows", rows)
    _, d_v = _size(op, "whitened", whitened)
    layers = _check(op, whitened=(whitened, (n, d_v)), rows=(rows, (n, d_k)))
    shape = (d_v, d_k) if layers is None else (layers, d_v, d_k)
    for half_name, half, dtype in (("high", high, torch.bfloat16), ("low", low, torch.int16)):
        if half.shape != shape or half.dtype != dtype or half.device != rows.device:
            raise InputError(
                f"{op}: {half_name} is {half.dtype} {list(half.shape)} on {half.device}, expected {dtype} "
                f"{list(shape)} on {rows.device}"
            )
    if rows.dtype != torch.float32:
        raise InputError(f"{op}: rows is {rows.dtype}, expected float32")
    _check_sign(op, sign)
    run(op, name, layers, (high, low, whitened, rows), sign)


def moment_(moment: Tensor, rows: Tensor, *, backend: str | None = None) -> None:
    """Computes `M <- M + X^T X` in place, accumulated in M's dtype; see `reference.moment_`.

    Args:
        moment: `M [d, d]`, float32 or float64, symmetric.
        rows: `X [t, d]`, any floating dtype.
        backend: as for `panel`.

    Raises:
        InputError: A shape, dtype or device does not match, or the backend is unknown.
        BackendError: the requested backend cannot run this operation.

    Example:
        >>> import torch
        >>> from rlsedit_fast import ops
        >>> moment = torch.zeros(2, 2)
        >>> ops.moment_(moment, torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> moment
        tensor([[1., 2.],
                [2., 5.]])
    """
    name = requested(backend)
    _, d = _size("moment_", "moment", moment)
    layers = _check("moment_", moment=(moment, (d, d)), rows=(rows, (None, d)))
    if moment.dtype not in (torch.float32, torch.float64):
        raise InputError(f"moment_: moment is {moment.dtype}, expected float32 or float64")
    run("moment_", name, layers, (moment, rows))


def _check(op: str, **arguments: tuple[Tensor, _Shape]) -> int | None:
    """Checks shapes (None matches any size), devices and dtypes.

    Returns:
        The number of layers if the first tensor (and then every tensor) has a dimension of layers, else None.

    Raises:
        InputError: A tensor does not match.
    """
    (first_name, (first, first_shape)), *_ = arguments.items()
    layers = first.shape[0] if first.dim() == len(first_shape) + 1 else None
    for name, (tensor, one) in arguments.items():
        expected = one if layers is None else (layers, *one)
        shape = tensor.shape
        if len(shape) != len(expected) or any(e is not None and e != s for s, e in zip(shape, expected, strict=True)):
            wanted = ", ".join("any" if e is None else str(e) for e in expected)
            raise InputError(f"{op}: {name} has shape {list(shape)}, expected [{wanted}]")
        if tensor.device != first.device or (tensor.dtype != first.dtype and op != "moment_"):
            raise InputError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device}, but {first_name} is {first.dtype} on "
                f"{first.device}; convert one of them"
            )
    if not all(tensor.dtype.is_floating_point for tensor, _ in arguments.values()):
        raise InputError(f"{op}: expected floating-point tensors, got {[t.dtype for t, _ in arguments.values()]}")
    return layers


def _check_sign(op: str, sign: int) -> None:
    if sign not in (1, -1):
        raise InputError(f"{op}: sign is {sign}, expected +1 (update) or -1 (removal)")


def _size(op: str, name: str, tensor: Tensor) -> tuple[int, int]:
    """Returns the last two sizes of a matrix or a batch of matrices."""
    if tensor.dim() not in (2, 3):
        raise InputError(f"{op}: {name} has shape {list(tensor.shape)}, expected a matrix or one matrix per layer")
    return tensor.shape[-2], tensor.shape[-1]
