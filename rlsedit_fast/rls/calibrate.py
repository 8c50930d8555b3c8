"""Choosing lam and mu by what they do to a pilot batch: how much of an edit is realised, what it costs the anchors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, PriorError
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.prior import symmetric

MU_SPAN = 1e12
"""How far from the pilot's own scale mu is looked for, either way."""

HALVINGS = 60
"""Of the logarithm of mu's interval: beyond the digits of float64."""


@dataclass(frozen=True)
class Calibration:
    """Numbers for the prior, and what they mean for the pilot edits.

    Attributes:
        lam: one per layer.
        mu: shared by all layers.
        realised: the mean over the pilot edits of `1 - ||e_i^T Sig^-1||`, `Sig = I + sum_l G_l`: the part of an edit
            that is realised when the edits' innovations have equal norms and independent directions.
        leakage: per layer `||K0 dW_l^T||_F / ||R||_F`, what the pilot batch would do to all its anchors together.
    """

    lam: list[float]
    mu: float
    realised: float
    leakage: list[float]


@torch.no_grad()
def choose(moments: Sequence[Tensor], pilot_keys: Sequence[Tensor], adherence: float, ridge: float) -> Calibration:
    """The mu at which the layers together realise `adherence` of the pilot edits (joint share, weights 1).

    `lam_l^2 = ridge mu^2 trace(M_l) / d_k`, so `S0_l = mu^2 (M_l + ridge trace(M_l)/d_k I)` and every Gram is that at
    mu = 1 over `mu^2`: one Cholesky per layer, one eigendecomposition of their sum, and bisection on its spectrum.

    Args:
        moments: `K0^T K0 [d_k, d_k]` per layer, as in `Prior.anchor_moment`, on any device.
        pilot_keys: `K [n, d_k]` per layer, of the same n edits, where the work is to be done.
        adherence: between 0 and 1, exclusive.
        ridge: positive (0 only if every moment is of full rank).

    Raises:
        InputError: an argument is wrong, or the keys repeat themselves too much for the adherence to be reached.
        PriorError: a moment with this ridge is not positive definite.
    """
    if not 0 < adherence < 1:
        raise InputError(f"adherence is {adherence}; a fraction between 0 and 1, both excluded, is expected.")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise InputError(f"ridge is {ridge}; a finite number of at least 0 is expected.")
    _check_layers(moments, pilot_keys)
    scales = [ridge * float(moment.double().trace()) / moment.shape[0] for moment in moments]
    pilot = _Pilot(moments, pilot_keys, scales)
    low, high = (math.log(pilot.scale) + side * math.log(MU_SPAN) for side in (-1, 1))
    best = pilot.realised(math.exp(low))
    if best < adherence:
        raise InputError(
            f"adherence {adherence} cannot be reached: the pilot keys depend on one another, and even an arbitrarily "
            f"small mu realises {best:.4f}. Ask for less, or pass keys of different edits."
        )
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if pilot.realised(math.exp(middle)) > adherence else (low, middle)
    mu = math.exp(0.5 * (low + high))
    return Calibration([mu * math.sqrt(scale) for scale in scales], mu, pilot.realised(mu), pilot.leakage(mu))


@torch.no_grad()
def assess(moments: Sequence[Tensor], pilot_keys: Sequence[Tensor], lam: Sequence[float], mu: float) -> Calibration:
    """What given numbers mean for the pilot edits: the same measures as `choose`, nothing chosen.

    Args:
        moments: as for `choose`.
        pilot_keys: as for `choose`.
        lam: one per layer.
        mu: positive.

    Raises:
        InputError: an argument is wrong.
        PriorError: a precision with these numbers is not positive definite.
    """
    if not (math.isfinite(mu) and mu > 0):
        raise InputError(f"mu is {mu}; a positive, finite number is expected.")
    _check_layers(moments, pilot_keys)
    if len(lam) != len(moments) or not all(math.isfinite(value) and value >= 0 for value in lam):
        raise InputError(f"lam is {list(lam)}; {len(moments)} finite numbers of at least 0 are expected.")
    pilot = _Pilot(moments, pilot_keys, [(value / mu) ** 2 for value in lam])
    return Calibration(list(lam), mu, pilot.realised(mu), pilot.leakage(mu))


class _Pilot:
    """The pilot batch at mu = 1, from which any mu is a matter of its spectrum."""

    def __init__(self, moments: Sequence[Tensor], pilot_keys: Sequence[Tensor], ridges: Sequence[float]) -> None:
        grams, self._leaks = [], []
        for index, (moment, keys, ridge) in enumerate(zip(moments, pilot_keys, ridges, strict=True)):
            projected, gram = _project(moment, keys.double(), ridge, index)
            grams.append(gram.to(pilot_keys[0].device))
            # C M C = C - ridge C^2 at mu = 1, so the moment itself is not needed again.
            self._leaks.append((gram - ridge * (projected @ projected.T)).to(pilot_keys[0].device))
        spectrum, self._vectors = torch.linalg.eigh(sum(grams[1:], grams[0]))
        rounding = len(spectrum) * torch.finfo(torch.float64).eps * float(spectrum[-1])
        self._spectrum = torch.where(spectrum > rounding, spectrum, 0.0)  # else an edit no mu realises would seem to be
        self.scale = math.sqrt(float(self._spectrum.mean()))
        if not self.scale > 0:
            raise InputError("the pilot keys are all zero; pass the keys of real edits.")

    def realised(self, mu: float) -> float:
        """The mean of `1 - ||e_i^T Sig(mu)^-1||`; falls as mu grows."""
        left = (1 + self._spectrum / mu**2).reciprocal().square()
        return 1 - float((self._vectors.square() @ left).sqrt().mean())

    def leakage(self, mu: float) -> list[float]:
        """Per layer `sqrt(tr(Sig^-1 K C M C K^T Sig^-1) / n)`, innovations as in `realised`."""
        inverse = self._vectors * (1 + self._spectrum / mu**2).reciprocal() @ self._vectors.T
        count = inverse.shape[0]
        return [math.sqrt(max(float(((inverse @ leak) * inverse).sum()), 0.0) / count) / mu**2 for leak in self._leaks]


def _project(moment: Tensor, keys: Tensor, ridge: float, index: int) -> tuple[Tensor, Tensor]:
    """`F = K C` and `G = F K^T` for `C = (M + ridge I)^-1`, in float64 where the keys are."""
    precision = symmetric(moment, keys.device)
    precision.diagonal().add_(ridge)
    lower, info = torch.linalg.cholesky_ex(precision)
    if int(info):
        raise PriorError(f"moments[{index}] with ridge {ridge:g} is not positive definite; raise ridge (or lam).")
    projected = torch.cholesky_solve(keys.T, lower).T
    gram = projected @ keys.T
    return projected, 0.5 * (gram + gram.T)


def _check_layers(moments: Sequence[Tensor], pilot_keys: Sequence[Tensor]) -> None:
    if not moments or len(moments) != len(pilot_keys):
        raise InputError(f"{len(moments)} moments and {len(pilot_keys)} pilot_keys are given; pass one each per layer.")
    for index, (moment, keys) in enumerate(zip(moments, pilot_keys, strict=True)):
        checks.matrix(f"moments[{index}]", moment, columns=moment.shape[0])
        checks.matrix(f"pilot_keys[{index}]", keys, rows=pilot_keys[0].shape[0], columns=moment.shape[0])
        if keys.shape[0] == 0:
            raise InputError(f"pilot_keys[{index}] has no rows; pass the keys of at least one edit.")
        checks.finite(**{f"moments[{index}]": moment})  # on its own: it may lie elsewhere
        checks.finite(**{f"pilot_keys[{index}]": keys})
