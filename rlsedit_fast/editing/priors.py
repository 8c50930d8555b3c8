"""Choice of the priors: given numbers, or those at which a pilot batch realizes the adherence.

The pilot is written into the model layer by layer, as by `EditedLayers.write`; the fraction of the change that arrives
at the edited hidden state is measured, and the weights are restored.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from rlsedit_fast.editing.config import EditConfig, PriorConfig
from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.rows import goals_of_contexts, row_weights, rows_of_contexts
from rlsedit_fast.editing.search.value_search import Values
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.rls import BlockLayout, BlockMoment, BlockPrior, BlockTrialLayer, Prior, Route, TrialLayer
from rlsedit_fast.rls.shares import memit_share, realized_fraction
from rlsedit_fast.statistics.key_statistics import Moment

logger = logging.getLogger(__name__)

_LOG_SPAN = 12.0  # mu beside a given lam is searched within a factor of e^12 of lam / sqrt(mean diagonal of the moment)
_WIDE_LOG_SPAN = 27.0  # without forward passes, mu is searched within a factor of e^27 of the scale of the pilot
_CLOSE = 0.004  # error of the adherence at which the search for mu ends
_MOST_TRIALS = 8
_SHORT_OF_LIMIT = 0.01  # below the fraction that the smallest mu realizes, if the adherence cannot be reached


@dataclass(frozen=True)
class Tradeoff:
    """Effect of a prior on the pilot edits.

    Attributes:
        adherence: the requested adherence.
        lam: per layer.
        mu: per layer; 0 without anchors.
        realized: fraction of the target changes of the pilot that arrives at the edited hidden state, measured after
            writing the pilot: mean over the edits of `1 - ||state - goal|| / ||target change||` at the bare prompt, or
            at the mean key if an edit has one row.
        leakage: per layer `||K0 dW^T||_F / ||R||_F`, the effect of the pilot on the anchors; without anchors
            `||dW||_F / ||R||_F`.
    """

    adherence: float
    lam: list[float]
    mu: list[float]
    realized: float
    leakage: list[float]


def choose_priors(
    config: EditConfig, moments: Sequence[Moment] | None, layouts: Sequence[BlockLayout | None], pilot: Pilot | None
) -> list[Prior | BlockPrior]:
    """Returns the prior of each layer.

    Without anchors lam is calibrated unless given. Otherwise mu is, and lam follows from `ridge`.

    Args:
        config: settings of the editor.
        moments: moment of the anchors per layer, or None without anchors; see `EditSession.used_moments`.
        layouts: per layer the layout of the keys of a mixture of experts, or None.
        pilot: the pilot, with the same moments; None if nothing is calibrated, see `calibrated_adherence`.

    Raises:
        InputError: mu is given and there are no anchors, or lam is given and no mu gives the adherence.
    """
    prior = config.prior
    if moments is None and prior.mu:
        raise InputError(
            f"mu={prior.mu} requires anchors, and there are none",
            hint="pass --text, --statistics or --self-generate (Python: Editor.anchor(texts))",
        )
    if moments is None:
        lam = prior.lam
        if lam is None:
            assert pilot is not None
            lam = pilot.mu_for(prior.adherence)
        return [Prior(lam=lam) if layout is None else BlockPrior(layout=layout, lam=lam) for layout in layouts]
    mu = prior.mu
    if mu is None:
        assert pilot is not None
        mu = pilot.mu_for(prior.adherence) if prior.lam is None else _mu_with_lam(prior, moments, pilot)
    ridges = _ridges(prior.ridge, moments, layouts)
    lams = [mu * math.sqrt(ridge) if prior.lam is None else prior.lam for ridge in ridges]
    return [
        BlockPrior(layout=layout, lam=lam, mu=mu, moment=moment if mu else None)
        if layout is not None and isinstance(moment, BlockMoment)
        else Prior(lam=lam, mu=mu, anchor_moment=cast("Tensor", moment))
        for lam, moment, layout in zip(lams, moments, layouts, strict=True)
    ]


def tabulate(
    config: EditConfig, moments: Sequence[Moment] | None, pilot: Pilot, adherences: Sequence[float]
) -> list[Tradeoff]:
    """Returns the priors that `choose_priors` gives for each adherence, and their effect on the pilot."""
    return [try_adherence(config, moments, pilot, adherence)[0] for adherence in adherences]


def try_adherence(
    config: EditConfig, moments: Sequence[Moment] | None, pilot: Pilot, adherence: float
) -> tuple[Tradeoff, list[Prior | BlockPrior], list[Route]]:
    """Returns the priors that `choose_priors` gives for an adherence, their effect on the pilot, and the routes."""
    changed = config.replace(prior={"adherence": adherence})
    priors = choose_priors(changed, moments, [layer.layout for layer in pilot.layers], pilot)
    mu = priors[0].mu or priors[0].lam
    trial = pilot.trial(mu, [(prior.lam / mu) ** 2 for prior in priors] if priors[0].mu else None)
    lams, mus = [prior.lam for prior in priors], [prior.mu for prior in priors]
    return Tradeoff(adherence, lams, mus, trial.realized, trial.leakage), priors, trial.routes


@dataclass(frozen=True)
class Trial:
    """Measurements of a pilot that was written and restored; see `Tradeoff`.

    Attributes:
        realized: see `Tradeoff`.
        leakage: see `Tradeoff`.
        routes: how the output of each layer reached the edited hidden state.
    """

    realized: float
    leakage: list[float]
    routes: list[Route]


class Pilot:
    """A batch that is written into a model under a prior and restored afterwards.

    Args:
        context: the model, unedited.
        moments: moment of the anchors per layer; None without anchors, in which case `mu` stands for lam.
        requests: the pilot, at least one request.
        values: values of the requests.

    Attributes:
        layers: the edited projections.
        changes: target changes of the requests, `[n, d]`; a zero change is replaced by a random one.
    """

    def __init__(
        self, context: ModelContext, moments: Sequence[Moment] | None, requests: Sequence[Request], values: Values
    ) -> None:
        config = context.config
        self.layers = context.projections
        self._context, self._requests = context, requests
        self._key_rows = config.effective_rows
        self._ridge = config.prior.ridge if moments is not None else 0.0
        self._layouts = [p.layout for p in self.layers]
        self._moments: Sequence[Moment | None] = moments or [
            None if p.layout else torch.eye(p.key_width, device=p.device) for p in self.layers
        ]
        values = replace(values, delta=_changes(values.delta))
        self.changes = values.delta
        self._norms = values.delta.norm(dim=1)
        self._goal = values.goal
        self._keys, now = request_keys(context.decoder, self.layers, requests, output_of=context.site.module)
        assert now is not None
        self._now = now
        self._rows = values.start.shape[1] if self._key_rows == "contexts" else 1
        self._weights = torch.tensor(row_weights(self._rows, config.contexts.bare_weight) * len(requests)).double()
        self._fitted: tuple[list[float], list[TrialLayer | BlockTrialLayer]] | None = None

    def mu_for(self, adherence: float) -> float:
        """Returns the mu at which the pilot realizes an adherence, with the ridge of the settings; warns if none does.

        The first guess is closed form and assumes that the outputs of all layers reach the edited hidden state
        unchanged. It is improved by the secant method on `log(realized / (1 - realized))` over `log mu`, which is
        almost linear, in a few trials.
        """
        guess, reached = self._context.processes.same(self._first_guess(adherence))
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
                "adherence=%g is not reached: %.3f of the target changes of the pilot is realized",
                adherence,
                found,
            )
        return math.exp(best)

    @torch.no_grad()
    def trial(self, mu: float, ridges: Sequence[float] | None = None) -> Trial:
        """Writes the pilot, measures the realized change, and restores the weights.

        Args:
            mu: positive.
            ridges: `(lam / mu)^2` per layer; by default those of the settings.
        """
        layers, noise = self._under(ridges), mu * mu / self._weights
        leakage, left, added, gaps = [], torch.zeros(0), list[Tensor](), list[Tensor]()
        total = float(self._norms.norm())
        with self._restored():
            for at, layer in enumerate(layers):
                keys, now = (self._keys[0], self._now) if at == 0 else self._read(at)
                missing = goals_of_contexts(self._goal.to(now) - now, self._key_rows).double()
                panel = layer.project(rows_of_contexts(keys, self._key_rows))
                shared = _solved(panel.gram, memit_share(missing, at + 1, len(layers)).to(panel.gram), noise)
                leakage.append(panel.leakage(shared) / total)
                self.layers[at].add(panel.change(shared))
                # The output of the last layer at the edited token is the edited hidden state itself.
                bare = rows_of_contexts(keys, self._key_rows)[:: self._rows]
                added.append(panel.outputs(bare, shared).cpu())
                gaps.append(missing[:: self._rows].cpu())
                left = missing[:: self._rows] - added[-1].to(missing)
        realized = self._context.processes.same(float(realized_fraction(left, self._norms.to(left)).mean()))
        gaps.append(left.cpu())
        routes = [Route.of(one, before - after) for one, before, after in zip(added, gaps, gaps[1:], strict=False)]
        return Trial(realized, leakage, routes)

    def _first_guess(self, adherence: float) -> tuple[float, float]:
        """Returns the mu at which the closed form gives the adherence, or almost the maximum; and that fraction."""
        from scipy.optimize import brentq  # slow to import

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
                "adherence=%g cannot be reached: edits of the pilot contradict each other or share keys, and at most "
                "%.3f of the target changes can be realized",
                adherence,
                most,
            )
            if aim <= 0:
                raise InputError(
                    f"adherence={adherence}: edits of the pilot contradict each other; at most {most:.3f} of the "
                    "target changes can be realized",
                    hint="calibrate on other edits",
                )
        return math.exp(float(brentq(lambda log_mu: realized(log_mu) - aim, low, high, xtol=1e-12))), aim

    def _under(self, ridges: Sequence[float] | None) -> list[TrialLayer | BlockTrialLayer]:
        wanted = list(ridges) if ridges is not None else _ridges(self._ridge, self._moments, self._layouts)
        if self._fitted is None or self._fitted[0] != wanted:
            made = [
                _trial_layer(p, moment, ridge)
                for moment, ridge, p in zip(self._moments, wanted, self.layers, strict=True)
            ]
            self._fitted = wanted, made
        return self._fitted[1]

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Reads keys in a layer and the edited hidden states in the present model."""
        context = self._context
        (keys,), now = request_keys(
            context.decoder, [self.layers[layer]], self._requests, output_of=context.site.module
        )
        assert now is not None
        return keys, now

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restores the weights bit for bit after the block."""
        originals = [projection.copies() for projection in self.layers]
        try:
            yield
        finally:
            for projection, original in zip(self.layers, originals, strict=True):
                projection.restore(original)


def _changes(delta: Tensor) -> Tensor:
    """Returns target changes `[n, d]`; a zero change is replaced by a random one of the mean length of the others.

    The keys of such an edit occupy the layers nevertheless.
    """
    norms = delta.norm(dim=1)
    some = norms > 0
    length = float(norms[some].mean()) if bool(some.any()) else 1.0
    drawn = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)).to(delta)
    return torch.where(some[:, None], delta, length * drawn / drawn.norm(dim=1, keepdim=True))


def _trial_layer(projection: Projection, moment: Moment | None, ridge: float) -> TrialLayer | BlockTrialLayer:
    if projection.layout is not None:
        assert moment is None or isinstance(moment, BlockMoment)
        return BlockTrialLayer(projection.layout, moment, ridge, projection.device, projection.name)
    assert isinstance(moment, Tensor)
    return TrialLayer(moment, ridge, projection.device, projection.name)


def _ridges(ridge: float, moments: Sequence[Moment | None], layouts: Sequence[BlockLayout | None]) -> list[float]:
    """Returns `lam^2 / mu^2` per layer: a fraction of the mean diagonal of the moment."""
    return [ridge * _mean_diagonal(moment, layout) for moment, layout in zip(moments, layouts, strict=True)]


def _mean_diagonal(moment: Moment | None, layout: BlockLayout | None) -> float:
    """Returns the mean diagonal of a moment, for a mixture of experts times kappa, see `BlockPrior`; 1 without one."""
    if isinstance(moment, BlockMoment):
        assert layout is not None
        return layout.overlap * moment.mean_energy()
    return 1.0 if moment is None else float(moment.diagonal().double().mean())


def _solved(gram: Tensor, wanted: Tensor, noise: Tensor) -> Tensor:
    """Returns `(G + diag(noise))^-1 wanted`."""
    total = gram.clone()
    total.diagonal().add_(noise.to(total))
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(total))


def _next_point(points: Sequence[tuple[float, float]], aim: float) -> float:
    """Returns the next log mu of the secant search for the one at which `aim` is realized."""

    def odds(share: float) -> float:
        share = min(max(share, 1e-4), 1 - 1e-4)
        return math.log(share / (1 - share))

    at, found = points[-1]
    slope = -2.0  # the slope of a ridge regression
    if len(points) > 1:
        before, then = points[-2]
        if at != before and (odds(found) - odds(then)) / (at - before) < -0.2:
            slope = (odds(found) - odds(then)) / (at - before)
    return at + max(-3.0, min(3.0, (odds(aim) - odds(found)) / slope))


def _mu_with_lam(prior: PriorConfig, moments: Sequence[Moment], pilot: Pilot) -> float:
    """Returns the mu at which the pilot realizes the adherence with a given lam."""
    from scipy.optimize import brentq

    lam = prior.lam
    assert lam is not None
    scale = lam / math.sqrt(_mean_diagonal(moments[0], pilot.layers[0].layout)) or 1.0

    def excess(log_mu: float) -> float:
        mu = scale * math.exp(log_mu)
        return pilot.trial(mu, [(lam / mu) ** 2] * len(moments)).realized - prior.adherence

    if excess(_LOG_SPAN) > 0:
        raise InputError(
            f"lam={lam}: with every mu the pilot realizes more than adherence={prior.adherence}, because anchors do "
            "not constrain directions in which only lam acts",
            hint="increase lam or the adherence, omit lam, or use more text for the anchors",
        )
    if excess(-_LOG_SPAN) < 0:
        raise InputError(
            f"lam={lam}: the pilot realizes less than adherence={prior.adherence} even without anchors",
            hint="decrease lam or the adherence, or omit lam",
        )
    return scale * math.exp(float(brentq(excess, -_LOG_SPAN, _LOG_SPAN, xtol=1e-2)))
