"""The checks that every tensor passes before the solver computes or writes anything with it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError


def matrix(name: str, value: Tensor, *, rows: int | None = None, columns: int | None = None) -> None:
    """Raises InputError unless `value` is a floating-point `[rows, columns]`; None leaves a size free."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; a floating-point tensor [rows, columns] is expected.")
    if not value.is_floating_point():
        raise InputError(f"{name} has dtype {value.dtype}; pass a floating-point tensor.")
    expected = f"[{'n' if rows is None else rows}, {'d' if columns is None else columns}]"
    fits = value.ndim == 2 and rows in (None, value.shape[0]) and columns in (None, value.shape[1])
    if not fits:
        raise InputError(f"{name} has shape {list(value.shape)}; {expected} is expected.")


def vector(name: str, value: Tensor, *, size: int) -> None:
    """Raises InputError unless `value` is a floating-point `[size]`."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; a floating-point tensor [{size}] is expected.")
    if not value.is_floating_point():
        raise InputError(f"{name} has dtype {value.dtype}; pass a floating-point tensor.")
    if list(value.shape) != [size]:
        raise InputError(f"{name} has shape {list(value.shape)}; [{size}] is expected.")


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raises InputError unless `value` lies on `device`."""
    if value.device != device:
        raise InputError(f"{name} is on {value.device}; the weight is on {device}: move it there.")


def finite(**named: Tensor) -> None:
    """Raises InputError that names the first argument, and its first row, with a NaN or an infinity.

    One host synchronisation for all of them; a second one only to word the error.
    """
    if all_finite(*named.values()):
        return
    for name, value in named.items():
        bad = ~torch.isfinite(value).reshape(value.shape[0], -1).all(dim=1) if value.ndim else ~torch.isfinite(value)
        if bool(bad.any()):
            row = f" in row {int(bad.nonzero()[0, 0])}" if value.ndim else ""
            raise InputError(f"{name} is not finite{row} (seen as {value.dtype}): nothing was changed, mend the input.")


def all_finite(*tensors: Tensor) -> bool:
    """Whether no entry of any is a NaN or an infinity; one host synchronisation for tensors on one device.

    By their ends, which a NaN goes through: `isfinite` would make tensors of the inputs' size, and takes longer.
    """
    ends = [torch.isfinite(end) for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor.detach())]
    return not ends or bool(torch.stack(ends).all())


def positive_weights(weights: Tensor) -> None:
    """Raises InputError unless every weight of an edit, and its inverse, is positive and finite."""
    bad = ~((weights > 0) & torch.isfinite(weights) & torch.isfinite(1 / weights))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise InputError(
            f"weights[{row}] is {float(weights[row]):g} as {weights.dtype}; every weight must be positive, finite "
            "and invertible in that dtype. To leave an edit out, do not pass its row."
        )
