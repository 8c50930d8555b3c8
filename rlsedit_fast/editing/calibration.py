"""From settings to priors: given numbers as they are, the rest from the adherence that a pilot batch must show.

The pilot is written into the model on trial, through the layers as `EditedLayers.write` goes through them, and what
arrives at the site is measured; then the weights are put back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from scipy.optimize import brentq
from torch import Tensor

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.inspection import ModelContext
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.layers import goals_of_contexts, row_weights, rows_of_contexts
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.values import Values
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior
from rlsedit_fast.rls.calibrate import TrialLayer
from rlsedit_fast.rls.shares import memit_share, realized_fraction

logger = logging.getLogger(__name__)

_LOG_SPAN = 12.0  # mu is searched within a factor of e^12 of the scale at which it equals lam
_WIDE_LOG_SPAN = 27.0  # and, where the model need not be run, within e^27 of the pilot's own scale
_CLOSE = 0.004  # of the adherence, at which the search for mu ends
_MOST_TRIALS = 8
_SHORT_OF_LIMIT = 0.01  # below what the smallest mu reaches, where the adherence is out of reach


@dataclass(frozen=True)
class Tradeoff:
    """What a prior does to the pilot edits.

    Attributes:
        adherence: as asked for.
        lam: per layer.
        mu: per layer; 0 without anchors.
        realized: share of the pilot's wanted changes that arrives at the site, measured on the pilot written on trial:
            mean over the edits of `1 - ||arrived - wanted|| / ||wanted||` at the bare prompt, or at the mean key where
            an edit has one row.
        leakage: per layer `||K0 dW^T||_F / ||R||_F`, what the pilot does to the anchors; `||dW||_F / ||R||_F` without
            anchors.
    """

    adherence: float
    lam: list[float]
    mu: list[float]
    realized: float
    leakage: list[float]


def needs_pilot(config: EditConfig, *, anchored: bool) -> bool:
    """Whether a number of the prior must be found from a pilot."""
    return (config.mu is None or config.lam is None) if anchored and config.mu != 0 else config.lam is None


def choose_priors(
    config: EditConfig, moments: Sequence[Tensor] | None, layers: int, pilot: Pilot | None
) -> list[Prior]:
    """A prior per layer.

    Without anchors, or with mu=0, only lam holds the weights, and lam is found from the adherence if it is open. Mu,
    where it is open, is the one at which the pilot shows `config.adherence`.

    Args:
        config: the editor's settings.
        moments: `E[k k^T] [d_k, d_k]` per layer, or None without anchors.
        layers: how many are edited.
        pilot: the pilot, on the same moments; None where nothing is open.

    Raises:
        InputError: mu is given and there are no anchors, or lam is given and no mu beside it gives the adherence.
    """
    if config.mu == 0:
        moments = None
    elif moments is None and config.mu is not None:
        raise InputError(
            f"mu={config.mu} requires anchors, and there are none",
            hint="pass --text, --statistics or --self-generate (Python: Editor.anchor(texts))",
        )
    if moments is None:
        lam = config.lam
        if lam is None:
            assert pilot is not None
            lam = pilot.mu_for(config.adherence)
        return [Prior(lam=lam) for _ in range(layers)]
    mu = config.mu
    if mu is None:
        assert pilot is not None
        mu = pilot.mu_for(config.adherence) if config.lam is None else _mu_beside(config, moments, pilot)
    lams = [mu * math.sqrt(ridge) if config.lam is None else config.lam for ridge in _ridges(config.ridge, moments)]
    return [Prior(lam=lam, mu=mu, anchor_moment=moment) for lam, moment in zip(lams, moments, strict=True)]


def tabulate(
    config: EditConfig, moments: Sequence[Tensor] | None, pilot: Pilot, adherences: Sequence[float]
) -> list[Tradeoff]:
    """What `choose_priors` gives for each adherence, and what that does to the pilot."""
    rows = []
    for adherence in adherences:
        priors = choose_priors(replace(config, adherence=adherence), moments, len(pilot.layers), pilot)
        mu = priors[0].mu or priors[0].lam
        trial = pilot.trial(mu, [(prior.lam / mu) ** 2 for prior in priors] if priors[0].mu else None)
        lams, mus = [prior.lam for prior in priors], [prior.mu for prior in priors]
        rows.append(Tradeoff(adherence, lams, mus, trial.realized, trial.leakage))
    return rows


@dataclass(frozen=True)
class Trial:
    """What a pilot written on trial showed; see `Tradeoff`."""

    realized: float
    leakage: list[float]


class Pilot:
    """A batch that is written into a model on trial, under any prior.

    Args:
        context: the model, unedited.
        moments: `E[k k^T] [d_k, d_k]` per layer; None where no anchors hold, and `mu` stands for lam.
        requests: the pilot, at least one.
        values: theirs.
    """

    def __init__(
        self, context: ModelContext, moments: Sequence[Tensor] | None, requests: Sequence[Request], values: Values
    ) -> None:
        config = context.config
        self.layers = context.projections
        self._context, self._requests = context, requests
        self._key_rows = config.effective_key_rows
        self._ridge = config.ridge if moments is not None else 0.0
        self._moments = moments or [torch.eye(p.weight.shape[1], device=p.weight.device) for p in self.layers]
        values = replace(values, delta=_changes(values.delta))
        self._norms = values.delta.norm(dim=1)
        self._goal = values.goal
        self._keys, now = request_keys(context.decoder, self.layers, requests, output_of=context.site.module)
        assert now is not None
        self._now = now
        self._rows = values.start.shape[1] if self._key_rows == "contexts" else 1
        self._weights = torch.tensor(row_weights(self._rows, config.bare_weight) * len(requests)).double()
        self._fitted: tuple[list[float], list[TrialLayer]] | None = None

    def mu_for(self, adherence: float) -> float:
        """The mu at which the pilot shows an adherence, at the ridge of the settings; says so where none does.

        The first guess is closed form: the layers together, every one's output reaching the site as it is. From there
        the secant on `log(realized / (1 - realized))` over `log mu`, which is nearly a line, takes a few trials.
        """
        guess, reached = self._first_guess(adherence)
        if len(self.layers) == 1:
            return guess
        aim, points = min(adherence, reached), list[tuple[float, float]]()
        at = math.log(guess)
        for _ in range(_MOST_TRIALS):
            found = self.trial(math.exp(at)).realized
            points.append((at, found))
            if abs(found - aim) <= _CLOSE:
                break
            at = _next_point(points, aim)
        best, found = min(points, key=lambda point: abs(point[1] - aim))
        if abs(found - adherence) > 2 * _CLOSE:
            logger.warning(
                "adherence=%g is not reached: of the pilot's wanted changes %.3f arrives at the edited site",
                adherence,
                found,
            )
        return math.exp(best)

    @torch.no_grad()
    def trial(self, mu: float, ridges: Sequence[float] | None = None) -> Trial:
        """Writes the pilot, measures what arrives, and puts the weights back.

        Args:
            mu: positive.
            ridges: `(lam / mu)^2` per layer; by default those of the settings.
        """
        layers, noise = self._under(ridges), mu * mu / self._weights
        leakage, left = [], torch.zeros(0)
        total = float(self._norms.norm())
        with self._restored():
            for at, layer in enumerate(layers):
                keys, now = (self._keys[0], self._now) if at == 0 else self._read(at)
                missing = goals_of_contexts(self._goal.to(now) - now, self._key_rows).double()
                panel = layer.project(rows_of_contexts(keys, self._key_rows))
                shared = _solved(panel.gram, memit_share(missing, at + 1, len(layers)).to(panel.gram), noise)
                change = panel.change(shared)
                leakage.append(panel.leakage(shared) / total)
                self.layers[at].write(self.layers[at].weight.double() + change)
                # The last layer's output at the lookup token is the site's own.
                judged = rows_of_contexts(keys, self._key_rows)[:: self._rows].double()
                left = missing[:: self._rows] - (judged @ change.T).to(missing)
        realized = float(realized_fraction(left, self._norms.to(left)).mean())
        return Trial(realized, leakage)

    def _first_guess(self, adherence: float) -> tuple[float, float]:
        """The mu at which the closed form gives an adherence, or nearly the most that it can; and what it gives."""
        layers = self._under(None)
        grams = [
            layer.project(rows_of_contexts(key, self._key_rows)).gram
            for layer, key in zip(layers, self._keys, strict=True)
        ]
        device = grams[-1].device
        scales = self._weights.to(device).sqrt()
        total = sum(gram.to(device) for gram in grams[:-1]) + grams[-1]
        spectrum, vectors = torch.linalg.eigh(scales[:, None] * total * scales)
        rounding = len(spectrum) * torch.finfo(torch.float64).eps * float(spectrum[-1])
        spectrum = torch.where(spectrum > rounding, spectrum, 0.0)
        scale = math.sqrt(float(spectrum.mean()))
        if not scale > 0:
            raise InputError("the keys of the pilot edits are all zero; check the model's weights and the prompts")
        missing = goals_of_contexts(self._goal - self._now.to(self._goal), self._key_rows).to(device, torch.float64)
        turned, norms = vectors.T @ (scales[:, None] * missing), self._norms.to(device, torch.float64)

        def realized(log_mu: float) -> float:
            noise = math.exp(2 * log_mu)
            bare = vectors[:: self._rows] / scales[:: self._rows, None]
            left = bare @ ((noise / (noise + spectrum))[:, None] * turned)
            return float(realized_fraction(left, norms).mean())

        low, high = (math.log(scale) + side * _WIDE_LOG_SPAN for side in (-1, 1))
        most = realized(low)
        aim = adherence
        if most < adherence:
            aim = most - _SHORT_OF_LIMIT
            logger.warning(
                "adherence=%g cannot be reached: the pilot's edits contradict one another or share keys, and at most "
                "%.3f of the wanted changes arrives",
                adherence,
                most,
            )
            if aim <= 0:
                raise InputError(
                    f"adherence={adherence}: the pilot's edits contradict one another; at most {most:.3f} of the "
                    "wanted changes arrives. Calibrate on different edits"
                )
        return math.exp(_falling_root(realized, aim, low, high)), aim

    def _under(self, ridges: Sequence[float] | None) -> list[TrialLayer]:
        wanted = list(ridges) if ridges is not None else _ridges(self._ridge, self._moments)
        if self._fitted is None or self._fitted[0] != wanted:
            made = [
                TrialLayer(moment, ridge, p.weight.device, p.name)
                for moment, ridge, p in zip(self._moments, wanted, self.layers, strict=True)
            ]
            self._fitted = wanted, made
        return self._fitted[1]

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys in a layer and states at the site, in the model as it is now."""
        context = self._context
        (keys,), now = request_keys(
            context.decoder, [self.layers[layer]], self._requests, output_of=context.site.module
        )
        assert now is not None
        return keys, now

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Puts the weights back, bit for bit."""
        originals = [projection.weight.clone() for projection in self.layers]
        try:
            yield
        finally:
            for projection, original in zip(self.layers, originals, strict=True):
                projection.write(original)


def _changes(delta: Tensor) -> Tensor:
    """Wanted changes `[n, d]`, with a random one of the others' mean length for an edit that wants none.

    How its keys crowd the layers counts all the same.
    """
    norms = delta.norm(dim=1)
    some = norms > 0
    length = float(norms[some].mean()) if bool(some.any()) else 1.0
    drawn = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)).to(delta)
    return torch.where(some[:, None], delta, length * drawn / drawn.norm(dim=1, keepdim=True))


def _ridges(ridge: float, moments: Sequence[Tensor]) -> list[float]:
    """`lam^2 / mu^2` per layer: a share of the moment's mean diagonal."""
    return [ridge * float(moment.diagonal().double().mean()) for moment in moments]


def _solved(gram: Tensor, wanted: Tensor, noise: Tensor) -> Tensor:
    """`(G + diag(noise))^-1 wanted`."""
    total = gram.clone()
    total.diagonal().add_(noise.to(total))
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(total))


def _next_point(points: Sequence[tuple[float, float]], aim: float) -> float:
    """Where to look next for the log mu at which `aim` is realized, from what was seen."""

    def odds(share: float) -> float:
        share = min(max(share, 1e-4), 1 - 1e-4)
        return math.log(share / (1 - share))

    at, found = points[-1]
    slope = -2.0  # what a ridge gives
    if len(points) > 1:
        before, then = points[-2]
        if at != before and (odds(found) - odds(then)) / (at - before) < -0.2:
            slope = (odds(found) - odds(then)) / (at - before)
    return at + max(-3.0, min(3.0, (odds(aim) - odds(found)) / slope))


def _falling_root(realized: Callable[[float], float], aim: float, low: float, high: float) -> float:
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if realized(middle) > aim else (low, middle)
    return 0.5 * (low + high)


def _mu_beside(config: EditConfig, moments: Sequence[Tensor], pilot: Pilot) -> float:
    """The mu at which the pilot shows the adherence beside a given lam."""
    lam = config.lam
    assert lam is not None
    scale = lam / math.sqrt(float(moments[0].diagonal().double().mean())) or 1.0

    def excess(log_mu: float) -> float:
        mu = scale * math.exp(log_mu)
        return pilot.trial(mu, [(lam / mu) ** 2] * len(moments)).realized - config.adherence

    if excess(_LOG_SPAN) > 0:
        raise InputError(
            f"lam={config.lam}: no mu beside it brings what the pilot realizes down to adherence={config.adherence}, "
            "as lam alone holds what no anchor reaches; raise lam or the adherence, leave lam open, or anchor more text"
        )
    if excess(-_LOG_SPAN) < 0:
        raise InputError(
            f"lam={config.lam} alone leaves less than adherence={config.adherence} of the pilot realized; lower lam or "
            "the adherence, or leave lam open"
        )
    return scale * math.exp(float(brentq(excess, -_LOG_SPAN, _LOG_SPAN, xtol=1e-2)))
