"""The operations' public names, argument checks, `torch.library` schemas and fakes.

In eager mode a call goes straight to its backend; under `torch.compile` it becomes one node of the graph,
`torch.ops.rlsedit_fast.<name>`. None of them has a derivative. What the arguments are is told in `reference`; every
operation also takes all of its tensors, and gives its results, with a dimension of layers in front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.ops.dispatch import requested, run

_Shape = tuple[int | None, ...]


def _check(op: str, **arguments: tuple[Tensor, _Shape]) -> int | None:
    """Raises InputError unless each tensor has its shape, where None is any size, and all share device and dtype.

    Returns:
        The number of layers, if the first tensor (and then every one) has a dimension of layers in front, else None.
    """
    (first_name, (first, first_shape)), *_ = arguments.items()
    layers = first.shape[0] if first.dim() == len(first_shape) + 1 else None
    for name, (tensor, one) in arguments.items():
        expected = one if layers is None else (layers, *one)
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
    return layers


def _check_sign(op: str, sign: int) -> None:
    if sign not in (1, -1):
        raise InputError(f"{op}: sign={sign}: expected +1 for an edit or -1 for a removal")


def _size(op: str, name: str, tensor: Tensor) -> tuple[int, int]:
    """The sizes of what must be a matrix, or one a layer."""
    if tensor.dim() not in (2, 3):
        raise InputError(f"{op}: {name} has shape {list(tensor.shape)}, expected a matrix, or one for each layer")
    return tensor.shape[-2], tensor.shape[-1]


def _panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor, backend: str) -> Tensor:
    _, d = _size("panel", "base", base)
    r, _ = _size("panel", "pending", pending)
    shapes = {"base": (base, (d, d)), "keys": (keys, (None, d)), "pending": (pending, (r, d)), "signs": (signs, (r,))}
    layers = _check("panel", **shapes)
    projected: Tensor = run("panel", backend, layers, (base, keys, pending, signs))
    return projected


def _factor(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d = _size("factor", "projected", projected)
    layers = _check(
        "factor",
        projected=(projected, (n, d)),
        keys=(keys, (n, d)),
        innovation=(innovation, (n, None)),
        noise=(noise, (n,)),
    )
    _check_sign("factor", sign)
    u, a, lower, info = run("factor", backend, layers, (projected, keys, innovation, noise), sign)
    return u, a, lower, info


def _downdate(base: Tensor, pending: Tensor, signs: Tensor, backend: str) -> None:
    _, d = _size("downdate_", "base", base)
    r, _ = _size("downdate_", "pending", pending)
    layers = _check("downdate_", base=(base, (d, d)), pending=(pending, (r, d)), signs=(signs, (r,)))
    run("downdate_", backend, layers, (base, pending, signs))


def _correct(weight: Tensor, whitened: Tensor, rows: Tensor, sign: int, backend: str) -> None:
    n, d_k = _size("correct_", "rows", rows)
    _, d_v = _size("correct_", "whitened", whitened)
    layers = _check("correct_", weight=(weight, (d_v, d_k)), whitened=(whitened, (n, d_v)), rows=(rows, (n, d_k)))
    _check_sign("correct_", sign)
    run("correct_", backend, layers, (weight, whitened, rows), sign)


def _correct_split(high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int, backend: str) -> None:
    op = "correct_split_"
    n, d_k = _size(op, "rows", rows)
    _, d_v = _size(op, "whitened", whitened)
    layers = _check(op, whitened=(whitened, (n, d_v)), rows=(rows, (n, d_k)))
    shape = (d_v, d_k) if layers is None else (layers, d_v, d_k)
    for name, half, dtype in (("high", high, torch.bfloat16), ("low", low, torch.int16)):
        if half.shape != shape or half.dtype != dtype or half.device != rows.device:
            raise InputError(
                f"{op}: {name} is {half.dtype} {list(half.shape)} on {half.device}, expected {dtype} {list(shape)} on "
                f"{rows.device} to go with the others"
            )
    if rows.dtype != torch.float32:
        raise InputError(f"{op}: rows is {rows.dtype}: a weight in two halves is corrected in float32")
    _check_sign(op, sign)
    run(op, backend, layers, (high, low, whitened, rows), sign)


def _moment(moment: Tensor, rows: Tensor, backend: str) -> None:
    _, d = _size("moment_", "moment", moment)
    layers = _check("moment_", moment=(moment, (d, d)), rows=(rows, (None, d)))
    if moment.dtype not in (torch.float32, torch.float64):
        raise InputError(f"moment_: moment is {moment.dtype}: expected float32 or float64 to accumulate in")
    run("moment_", backend, layers, (moment, rows))


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
    *layers, n, _ = projected.shape
    return (
        projected.new_empty(projected.shape),
        innovation.new_empty(innovation.shape),
        projected.new_empty(*layers, n, n),
        projected.new_empty(layers, dtype=torch.int32),
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
