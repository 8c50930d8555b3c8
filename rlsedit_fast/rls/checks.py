"""Validation of the solver's tensor arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError


def matrix(name: str, value: Tensor, *, rows: int | None = None, columns: int | None = None) -> None:
    """Raises InputError unless `value` is a floating-point `[rows, columns]`; None leaves a size free."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; expected a floating-point tensor [rows, columns].")
    if not value.is_floating_point():
        raise InputError(f"{name} has dtype {value.dtype}; expected a floating-point tensor.")
    expected = f"[{'n' if rows is None else rows}, {'d' if columns is None else columns}]"
    fits = value.ndim == 2 and rows in (None, value.shape[0]) and columns in (None, value.shape[1])
    if not fits:
        raise InputError(f"{name} has shape {list(value.shape)}; expected {expected}.")


def vector(name: str, value: Tensor, *, size: int) -> None:
    """Raises InputError unless `value` is a floating-point `[size]`."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; expected a floating-point tensor [{size}].")
    if not value.is_floating_point():
        raise InputError(f"{name} has dtype {value.dtype}; expected a floating-point tensor.")
    if list(value.shape) != [size]:
        raise InputError(f"{name} has shape {list(value.shape)}; expected [{size}].")


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raises InputError unless `value` is on `device`."""
    if value.device != device:
        raise InputError(f"{name} is on {value.device}, but the weight is on {device}; move {name} to {device}.")


def finite(**named: Tensor) -> None:
    """Raises InputError that names the first argument and row with a NaN or an infinity.

    Synchronizes with the host once, and a second time only to build the error message.
    """
    if all_finite(*named.values()):
        return
    for name, value in named.items():
        bad = ~torch.isfinite(value).reshape(value.shape[0], -1).all(dim=1) if value.ndim else ~torch.isfinite(value)
        if bool(bad.any()):
            row = f" in row {int(bad.nonzero()[0, 0])}" if value.ndim else ""
            raise InputError(f"{name} contains NaN or Inf{row} (dtype {value.dtype}). No state was modified.")


def all_finite(*tensors: Tensor) -> bool:
    """Returns whether all entries are finite, with one host synchronization for tensors on one device.

    Checks the minimum and maximum, which propagate NaN; `isfinite` would allocate tensors of the size of the inputs.
    """
    return all(map(math.isfinite, numbers(*ends(*tensors))))


def ends(*tensors: Tensor) -> list[Tensor]:
    """Returns the minimum and the maximum of each tensor that has entries, as scalars on its device."""
    return [end for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor.detach())]


def numbers(*scalars: Tensor) -> list[float]:
    """Returns scalars of any dtypes on one device, with one host synchronization."""
    found: list[float] = torch.stack(scalars).tolist() if scalars else []
    return found


def batch(found: Sequence[float], given: Mapping[str, Tensor]) -> None:
    """Raises InputError if an argument of a batch is not finite or a weight is not positive.

    Args:
        found: the numbers of `ends` of the arguments.
        given: the arguments by name; the weights are named `weights`.
    """
    if not sound(found, given):
        finite(**given)
        if "weights" in given:
            positive_weights(given["weights"])


def sound(found: Sequence[float], given: Mapping[str, Tensor]) -> bool:
    """Returns whether `batch` accepts these numbers."""
    if not all(map(math.isfinite, found)):
        return False
    if "weights" not in given:
        return True
    least = found[2 * [*given].index("weights")]
    return least > 0 and 1 / least < torch.finfo(given["weights"].dtype).max


def positive_weights(weights: Tensor) -> None:
    """Raises InputError unless all weights and their inverses are positive and finite."""
    bad = ~((weights > 0) & torch.isfinite(weights) & torch.isfinite(1 / weights))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise InputError(
            f"weights[{row}] is {float(weights[row]):g} ({weights.dtype}); weights and their inverses must be positive "
            "and finite. To omit an edit, do not pass its row."
        )


def lowered(old: Tensor, new: Tensor) -> bool:
    """Returns whether all weights become smaller; False if all become larger.

    Raises:
        InputError: the weights are not vectors of equal size, a weight is not positive, or neither holds.
    """
    vector("old_weights", old, size=len(old) if isinstance(old, Tensor) and old.ndim else 0)
    vector("new_weights", new, size=len(old))
    same_device("new_weights", new, old.device)
    positive_weights(torch.cat([old, new.to(old.dtype)]))
    smaller = new < old
    if bool(smaller.all()):
        return True
    if bool((new > old).all()):
        return False
    raise InputError("new_weights must all be smaller than old_weights, or all larger. No state was modified.")
