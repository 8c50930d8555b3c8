"""The prior of a layer: a penalty on the change of the weight (lam) and of its outputs on anchor keys (mu)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, PriorError
from rlsedit_fast.ops import moment_
from rlsedit_fast.rls import checks

CHUNK = 2048
"""Rows that are converted to float64 at a time, which bounds temporary memory."""

ROUNDING_GROWTH = 1000
"""Allowed rounding error of a moment, in eps: the errors of a million accumulated rows grow as their square root."""


def parts(count: int, width: int) -> list[slice]:
    """Returns consecutive slices of at most `width` rows that cover `count` rows."""
    return [slice(start, min(start + width, count)) for start in range(0, count, width)]


def chunks(rows: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yields the rows in float64 on `device`, `CHUNK` at a time."""
    return (rows[part].to(device, torch.float64) for part in parts(rows.shape[0], CHUNK))


def symmetric(moment: Tensor, device: torch.device) -> Tensor:
    """Returns `(M + M^T) / 2` in float64 on `device`; uses memory for one matrix and one chunk there."""
    whole = torch.empty(moment.shape, dtype=torch.float64, device=device)
    for rows in parts(moment.shape[0], CHUNK):
        torch.add(moment[rows].to(device, torch.float64), moment[:, rows].to(device).T, out=whole[rows])
    return whole.mul_(0.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prior:
    """The prior term `lam^2 ||W - W0||_F^2 + mu^2 ||K0 W^T - V0||_F^2` of the objective.

    Anchors are given as rows (`anchor_keys`) or as their moment (`anchor_moment`). By default the anchor values are the
    outputs of the original weight, `V0 = K0 W0^T`; `anchor_values` or `anchor_cross` set other values. The tensors are
    kept by reference (a refresh reads them again), must not be modified, and may be on any device.

    Args:
        lam: weight of the penalty on `W - W0`; at least 0.
        mu: weight of the penalty on the anchors; at least 0, and positive if and only if there are anchors.
        anchor_keys: `K0 [n0, d_k]`, any floating dtype.
        anchor_moment: `K0^T K0 [d_k, d_k]`, float32 or float64, symmetric.
        anchor_values: `V0 [n0, d_v]`, any floating dtype; requires `anchor_keys`.
        anchor_cross: `V0^T K0 [d_v, d_k]`, float32 or float64; requires `anchor_moment`.
        anchor_energy: `||V0||_F^2`; required if and only if `anchor_cross` is given (the objective includes it).

    Raises:
        PriorError: lam and mu are both 0, or the combination of arguments is invalid.
        InputError: an argument has the wrong shape, dtype or sign, is not finite, or a moment is not symmetric.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior
        >>> Prior(lam=0.5).precision(2, torch.device("cpu")).tolist()
        [[0.25, 0.0], [0.0, 0.25]]
        >>> anchors = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> Prior(lam=0.0, mu=1.0, anchor_keys=anchors).precision(2, torch.device("cpu")).tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """

    lam: float
    mu: float = 0.0
    anchor_keys: Tensor | None = None
    anchor_moment: Tensor | None = None
    anchor_values: Tensor | None = None
    anchor_cross: Tensor | None = None
    anchor_energy: float | None = None

    def __post_init__(self) -> None:
        given: tuple[tuple[str, object], ...] = (("lam", self.lam), ("mu", self.mu))
        for name, value in given:
            number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
            if not (math.isfinite(number) and number >= 0 and math.isfinite(number * number)):
                raise InputError(f"{name} is {value!r}; expected a finite number that is at least 0.")
        self._check_combination()
        self._check_tensors()

    def _check_combination(self) -> None:
        anchored = self.anchor_keys is not None or self.anchor_moment is not None
        if self.lam * self.lam == 0 and self.mu * self.mu == 0:
            raise PriorError("lam and mu are both 0; at least one of them must be positive.")
        if self.anchor_keys is not None and self.anchor_moment is not None:
            raise PriorError("anchor_keys and anchor_moment are both given; pass only one of them.")
        if self.mu > 0 and not anchored:
            raise PriorError(f"mu is {self.mu} but there are no anchors; pass anchor_keys or anchor_moment, or mu=0.")
        if self.mu == 0 and anchored:
            raise PriorError("anchors are given but mu is 0; use a positive mu or pass no anchors.")
        if self.anchor_values is not None and self.anchor_keys is None:
            raise PriorError("anchor_values requires anchor_keys; with anchor_moment pass anchor_cross.")
        if self.anchor_cross is not None and self.anchor_moment is None:
            raise PriorError("anchor_cross requires anchor_moment; with anchor_keys pass anchor_values.")
        if (self.anchor_cross is None) != (self.anchor_energy is None):
            raise PriorError("anchor_cross (V0^T K0) and anchor_energy (||V0||_F^2) must be passed together.")

    def _check_tensors(self) -> None:
        if self.anchor_keys is not None:
            checks.matrix("anchor_keys", self.anchor_keys)
            if self.anchor_keys.shape[0] == 0:
                raise InputError("anchor_keys has no rows; pass at least one anchor, or use mu=0 without anchors.")
            checks.finite(anchor_keys=self.anchor_keys)
        if self.anchor_values is not None and self.anchor_keys is not None:
            checks.matrix("anchor_values", self.anchor_values, rows=self.anchor_keys.shape[0])
            checks.finite(anchor_values=self.anchor_values)
        if self.anchor_moment is not None:
            checks.matrix("anchor_moment", self.anchor_moment, columns=self.anchor_moment.shape[0])
            _check_summed("anchor_moment", self.anchor_moment)
            _check_symmetric(self.anchor_moment)
        if self.anchor_cross is not None and self.anchor_moment is not None:
            checks.matrix("anchor_cross", self.anchor_cross, columns=self.anchor_moment.shape[0])
            _check_summed("anchor_cross", self.anchor_cross)
        if self.anchor_energy is not None and not (math.isfinite(self.anchor_energy) and self.anchor_energy >= 0):
            raise InputError(f"anchor_energy is {self.anchor_energy}; expected a finite number that is at least 0.")

    @property
    def custom(self) -> bool:
        """Whether the anchors have values other than the outputs of the original weight."""
        return self.anchor_values is not None or self.anchor_cross is not None

    def check_shape(self, d_v: int, d_k: int, name: str) -> None:
        """Raises InputError unless the anchors match a weight `[d_v, d_k]`."""
        widths = {
            "anchor_keys": (self.anchor_keys, d_k),
            "anchor_moment": (self.anchor_moment, d_k),
            "anchor_values": (self.anchor_values, d_v),
        }
        for argument, (tensor, width) in widths.items():
            if tensor is not None and tensor.shape[1] != width:
                raise InputError(
                    f"{argument} of {name} has shape {list(tensor.shape)}; expected {width} columns for a weight "
                    f"[{d_v}, {d_k}]."
                )
        if self.anchor_cross is not None and self.anchor_cross.shape[0] != d_v:
            raise InputError(
                f"anchor_cross of {name} has shape {list(self.anchor_cross.shape)}; expected [{d_v}, {d_k}]."
            )

    def precision(self, d_k: int, device: torch.device) -> Tensor:
        """Returns `S0 = lam^2 I + mu^2 K0^T K0 [d_k, d_k]` in float64, exactly symmetric if built from a moment."""
        if self.anchor_moment is not None:
            total = symmetric(self.anchor_moment, device).mul_(self.mu**2)
        else:
            total = torch.zeros(d_k, d_k, dtype=torch.float64, device=device)
            if self.anchor_keys is not None:
                for rows in chunks(self.anchor_keys, device):
                    moment_(total, rows.mul(self.mu), backend="auto")
        total.diagonal().add_(self.lam**2)
        return total

    def pull(self, original: Tensor) -> Tensor | None:
        """Returns `mu^2 (V0 - K0 W0^T)^T K0 [d_v, d_k]` in float64, or None if it is zero (default anchor values).

        Args:
            original: `W0 [d_v, d_k]`, float64.
        """
        if not self.custom:
            return None
        if self.anchor_cross is not None:
            cross = self.anchor_cross.to(original.device, torch.float64)
            return (cross - self.times_moment(original)).mul_(self.mu**2)
        total = torch.zeros_like(original)
        for keys, values in self._anchor_rows(original):
            total.addmm_((values - keys @ original.T).T, keys)
        return total.mul_(self.mu**2)

    def energy(self, original: Tensor, delta: Tensor) -> float:
        """Returns the value of the prior at `W = W0 + delta`, computed in float64.

        Args:
            original: `W0 [d_v, d_k]`, float64.
            delta: `[d_v, d_k]`, float64.

        Raises:
            PriorError: `anchor_energy` is too small for the given `anchor_cross`.
        """
        return self.lam**2 * float(delta.square().sum()) + self.mu**2 * self.anchor_misfit(original, delta)

    def anchor_misfit(self, original: Tensor, delta: Tensor) -> float:
        """Returns `||K0 W^T - V0||_F^2` at `W = W0 + delta`; arguments and errors are those of `energy`."""
        if self.anchor_cross is not None:
            return self._custom_moment_energy(original + delta)
        if self.anchor_values is not None:
            weight = original + delta
            return sum(float((k @ weight.T - v).square().sum()) for k, v in self._anchor_rows(original))
        return self.anchor_change(delta)

    def anchor_change(self, delta: Tensor) -> float:
        """Returns `||K0 delta^T||_F^2`, for `delta [d_v, d_k]`; products are in its dtype, sums in float64."""
        if self.anchor_moment is not None:
            return max(float((self.times_moment(delta).double() * delta.double()).sum()), 0.0)
        if self.anchor_keys is not None:
            rows = chunks(self.anchor_keys, delta.device)
            return sum(float((k.to(delta.dtype) @ delta.T).double().square().sum()) for k in rows)
        return 0.0

    def _custom_moment_energy(self, weight: Tensor) -> float:
        assert self.anchor_moment is not None
        assert self.anchor_cross is not None
        assert self.anchor_energy is not None
        cross = self.anchor_cross.to(weight.device, torch.float64)
        quadratic = float((self.times_moment(weight) * weight).sum())
        value = quadratic - 2 * float((cross * weight).sum()) + self.anchor_energy
        eps = max(torch.finfo(self.anchor_cross.dtype).eps, torch.finfo(self.anchor_moment.dtype).eps)
        if value < -ROUNDING_GROWTH * eps * (abs(quadratic) + self.anchor_energy):
            raise PriorError(
                f"anchor_energy is {self.anchor_energy:g}, but then the misfit of the anchors would be {value:g}, "
                f"below 0. Pass ||V0||_F^2 of the values from which anchor_cross was computed."
            )
        return max(value, 0.0)

    def times_moment(self, rows: Tensor, columns: slice = slice(None)) -> Tensor:
        """Returns `rows @ K0^T K0` in the dtype of `rows [n, d_k]`, reading the anchors in chunks; there are some.

        Args:
            rows: the rows.
            columns: the columns of the result to compute.
        """
        result = torch.zeros_like(rows[:, columns])
        if self.anchor_moment is None:
            assert self.anchor_keys is not None
            for keys in chunks(self.anchor_keys, rows.device):
                narrow = keys.to(rows.dtype)
                result.addmm_(rows @ narrow.T, narrow[:, columns])
            return result
        for part in parts(self.anchor_moment.shape[0], CHUNK):
            result.addmm_(rows[:, part], self.anchor_moment[part, columns].to(rows.device, rows.dtype))
        return result

    def _anchor_rows(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.anchor_keys is not None
        assert self.anchor_values is not None
        return zip(chunks(self.anchor_keys, like.device), chunks(self.anchor_values, like.device), strict=True)


def _check_summed(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{name} has dtype {value.dtype}; expected float32 or float64.")
    checks.finite(**{name: value})


def _check_symmetric(moment: Tensor) -> None:
    """Raises InputError if the moment differs from its transpose by more than rounding errors."""
    allowed = ROUNDING_GROWTH * torch.finfo(moment.dtype).eps * float(moment.abs().max())
    gap = max(float((moment[rows] - moment[:, rows].T).abs().max()) for rows in parts(moment.shape[0], CHUNK))
    if gap > allowed:
        raise InputError(
            f"anchor_moment is not symmetric: it differs from its transpose by up to {gap:g} (at most {allowed:g} is "
            f"allowed in {moment.dtype}). Pass K0^T K0."
        )
