"""The operations' public names, argument checks, `torch.library` schemas and fakes.

In eager mode a call goes straight to its backend; under `torch.compile` it becomes one node of the graph,
`torch.ops.rlsedit_fast.<name>`. None of them has a derivative. What the arguments are is told in `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.ops.dispatch import choose, requested


def _check(op: str, **arguments: tuple[Tensor, tuple[int | None, ...]]) -> None:
    """Raises InputError unless each tensor has its shape, where None is any size, and all share device and dtype."""
    (first_name, (first, _)), *_ = arguments.items()
    for name, (tensor, expected) in arguments.items():
        shape = tensor.shape
        if len(shape) != len(expected) or any(e is not None and e != s for s, e in zip(shape, expected, strict=True)):
            wanted = ", ".join("any" if e is None else str(e) for e in expected)
            raise InputError(f"{op}: {name} has shape {list(shape)}, expected [{wanted}] to go with the others")
        if tensor.device != first.device or (tensor.dtype != first.dtype and op != "moment_"):
            raise InputError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device}, but {first_name} is {first.dtype} on "
                f"{first.device}: convert one to the other's"
            )
    if not all(tensor.dtype.is_floating_point for tensor, _ in arguments.values()):
        raise InputError(f"{op}: expected floating-point tensors, got {[t.dtype for t, _ in arguments.values()]}")


def _check_sign(op: str, sign: int) -> None:
    if sign not in (1, -1):
        raise InputError(f"{op}: sign={sign}: expected +1 for an edit or -1 for a removal")


def _width(op: str, name: str, tensor: Tensor) -> int:
    """The last size of what must be a matrix."""
    if tensor.dim() != 2:
        raise InputError(f"{op}: {name} has shape {list(tensor.shape)}, expected a matrix")
    return tensor.shape[1]


def _panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor, backend: str) -> Tensor:
    d = _width("panel", "base", base)
    _check(
        "panel",
        base=(base, (d, d)),
        keys=(keys, (None, d)),
        pending=(pending, (None, d)),
        signs=(signs, tuple(pending.shape[:1])),
    )
    return choose("panel", backend, (base, keys, pending, signs))(base, keys, pending, signs)


def _factor(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = _width("factor", "projected", projected)
    n = projected.shape[0]
    _check(
        "factor",
        projected=(projected, (n, d)),
        keys=(keys, (n, d)),
        innovation=(innovation, (n, None)),
        noise=(noise, (n,)),
    )
    _check_sign("factor", sign)
    run = choose("factor", backend, (projected, keys, innovation, noise))
    return run(projected, keys, innovation, noise, sign)


def _downdate(base: Tensor, pending: Tensor, signs: Tensor, backend: str) -> None:
    d = _width("downdate_", "base", base)
    _check("downdate_", base=(base, (d, d)), pending=(pending, (None, d)), signs=(signs, tuple(pending.shape[:1])))
    choose("downdate_", backend, (base, pending, signs))(base, pending, signs)


def _correct(weight: Tensor, whitened: Tensor, rows: Tensor, sign: int, backend: str) -> None:
    d_k, d_v = _width("correct_", "rows", rows), _width("correct_", "whitened", whitened)
    _check("correct_", weight=(weight, (d_v, d_k)), whitened=(whitened, (None, d_v)), rows=(rows, (len(whitened), d_k)))
    _check_sign("correct_", sign)
    choose("correct_", backend, (weight, whitened, rows))(weight, whitened, rows, sign)


def _correct_split(high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int, backend: str) -> None:
    op = "correct_split_"
    d_k, d_v = _width(op, "rows", rows), _width(op, "whitened", whitened)
    _check(op, whitened=(whitened, (None, d_v)), rows=(rows, (len(whitened), d_k)))
    for name, half, dtype in (("high", high, torch.bfloat16), ("low", low, torch.int16)):
        if half.shape != (d_v, d_k) or half.dtype != dtype or half.device != rows.device:
            raise InputError(
                f"{op}: {name} is {half.dtype} {list(half.shape)} on {half.device}, expected {dtype} {[d_v, d_k]} on "
                f"{rows.device} to go with the others"
            )
    if rows.dtype != torch.float32:
        raise InputError(f"{op}: rows is {rows.dtype}: a weight in two halves is corrected in float32")
    _check_sign(op, sign)
    choose(op, backend, (high, low, whitened, rows))(high, low, whitened, rows, sign)


def _moment(moment: Tensor, rows: Tensor, backend: str) -> None:
    d = _width("moment_", "moment", moment)
    _check("moment_", moment=(moment, (d, d)), rows=(rows, (None, d)))
    if moment.dtype not in (torch.float32, torch.float64):
        raise InputError(f"moment_: moment is {moment.dtype}: expected float32 or float64 to accumulate in")
    choose("moment_", backend, (moment, rows))(moment, rows)


@torch.library.custom_op("rlsedit_fast::panel", mutates_args=())
def panel_op(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor, *, backend: str = "auto") -> Tensor:
    return _panel(base, keys, pending, signs, backend)


@panel_op.register_fake
def _(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor, *, backend: str = "auto") -> Tensor:
    return keys.new_empty(keys.shape)


@torch.library.custom_op("rlsedit_fast::factor", mutates_args=())
def factor_op(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _factor(projected, keys, innovation, noise, sign, backend)


@factor_op.register_fake
def _(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = projected.shape[0]
    return (
        projected.new_empty(projected.shape),
        innovation.new_empty(innovation.shape),
        projected.new_empty(n, n),
        projected.new_empty((), dtype=torch.int32),
    )


@torch.library.custom_op("rlsedit_fast::downdate_", mutates_args=("base",))
def downdate_op(base: Tensor, pending: Tensor, signs: Tensor, *, backend: str = "auto") -> None:
    _downdate(base, pending, signs, backend)


@torch.library.custom_op("rlsedit_fast::correct_", mutates_args=("weight",))
def correct_op(weight: Tensor, whitened: Tensor, rows: Tensor, sign: int, *, backend: str = "auto") -> None:
    _correct(weight, whitened, rows, sign, backend)


@torch.library.custom_op("rlsedit_fast::correct_split_", mutates_args=("high", "low"))
def correct_split_op(
    high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int, *, backend: str = "auto"
) -> None:
    _correct_split(high, low, whitened, rows, sign, backend)


@torch.library.custom_op("rlsedit_fast::moment_", mutates_args=("moment",))
def moment_op(moment: Tensor, rows: Tensor, *, backend: str = "auto") -> None:
    _moment(moment, rows, backend)


@downdate_op.register_fake
@correct_op.register_fake
@correct_split_op.register_fake
@moment_op.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    """What only writes in place has nothing to return."""
    return None


def panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor, *, backend: str | None = None) -> Tensor:
    """`F = K C [n, d_k]` for the deferred `C = C_base - U_p^T D U_p`; see `reference.panel`.

    Raises:
        InputError: a shape, dtype or device does not fit.
        BackendError: the backend asked for by name cannot run this.
    """
    name = requested(backend)
    if torch.compiler.is_compiling():
        return panel_op(base, keys, pending, signs, backend=name)
    return _panel(base, keys, pending, signs, name)


def factor(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(U, A, L, info)` from `Sig = diag(noise) + sign * F K^T = L L^T`; see `reference.factor`.

    Raises:
        InputError: a shape, dtype, device or the sign does not fit.
        BackendError: the backend asked for by name cannot run this.
    """
    name = requested(backend)
    if torch.compiler.is_compiling():
        return factor_op(projected, keys, innovation, noise, sign, backend=name)
    return _factor(projected, keys, innovation, noise, sign, name)


def downdate_(base: Tensor, pending: Tensor, signs: Tensor, *, backend: str | None = None) -> None:
    """`C_base <- C_base - U_p^T D U_p` in place; see `reference.downdate_`.

    Raises:
        InputError: a shape, dtype or device does not fit.
        BackendError: the backend asked for by name cannot run this.
    """
    name = requested(backend)
    if torch.compiler.is_compiling():
        downdate_op(base, pending, signs, backend=name)
    else:
        _downdate(base, pending, signs, name)


def correct_(weight: Tensor, whitened: Tensor, rows: Tensor, sign: int, *, backend: str | None = None) -> None:
    """`W <- W + sign * A^T U` in place; see `reference.correct_`.

    Raises:
        InputError: a shape, dtype, device or the sign does not fit.
        BackendError: the backend asked for by name cannot run this.
    """
    name = requested(backend)
    if torch.compiler.is_compiling():
        correct_op(weight, whitened, rows, sign, backend=name)
    else:
        _correct(weight, whitened, rows, sign, name)


def correct_split_(
    high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int, *, backend: str | None = None
) -> None:
    """`W <- W + sign * A^T U` in place on a float32 weight in two halves; see `reference.correct_split_`.

    Raises:
        InputError: a shape, dtype, device or the sign does not fit.
        BackendError: the backend asked for by name cannot run this.
    """
    name = requested(backend)
    if torch.compiler.is_compiling():
        correct_split_op(high, low, whitened, rows, sign, backend=name)
    else:
        _correct_split(high, low, whitened, rows, sign, name)


def moment_(moment: Tensor, rows: Tensor, *, backend: str | None = None) -> None:
    """`M <- M + X^T X` in place, X of any floating dtype, M float32 or float64; see `reference.moment_`.

    Raises:
        InputError: a shape, dtype or device does not fit.
        BackendError: the backend asked for by name cannot run this.
    """
    name = requested(backend)
    if torch.compiler.is_compiling():
        moment_op(moment, rows, backend=name)
    else:
        _moment(moment, rows, name)
