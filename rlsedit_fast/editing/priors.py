"""From settings to priors: explicit numbers as they are, the rest from the adherence that a pilot batch is to show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import brentq
from torch import Tensor

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior
from rlsedit_fast.rls.calibrate import assess, choose

_LOG_SPAN = 12.0  # mu is looked for within e^12 of the scale at which it equals lam, either way


def choose_priors(config: EditConfig, moments: Sequence[Tensor] | None, pilot_keys: Sequence[Tensor]) -> list[Prior]:
    """A prior per layer.

    Without anchors, or with mu=0, only lam holds the weights, and lam is found from the adherence if it is open.
    With the joint share the layers together realise the adherence; with MEMIT's each layer does, of its share.

    Args:
        config: the editor's settings.
        moments: `E[k k^T] [d_k, d_k]` per layer, or None without anchors.
        pilot_keys: `K [n, d_k]` per layer.

    Raises:
        InputError: mu is given and there are no anchors, or the adherence cannot be reached.
    """
    if config.mu == 0:
        moments = None
    elif moments is None and config.mu is not None:
        raise InputError(f"mu={config.mu} holds anchors, and there are none; name them with Editor.anchor(texts)")
    if config.share == "memit":
        each = [None] * len(pilot_keys) if moments is None else [[moment] for moment in moments]
        return [
            prior for layer, keys in zip(each, pilot_keys, strict=True) for prior in _together(config, layer, [keys])
        ]
    return _together(config, moments, pilot_keys)


@dataclass(frozen=True)
class Tradeoff:
    """What a prior would do to the pilot edits.

    Attributes:
        adherence: as asked for.
        lam: per layer.
        mu: per layer; 0 without anchors.
        realised: share of the pilot's changes that would be realised; with MEMIT's share the mean over the layers.
        leakage: per layer `||K0 dW^T||_F / ||R||_F`, what the pilot would do to the anchors; `||dW||_F / ||R||_F`
            without anchors.
    """

    adherence: float
    lam: list[float]
    mu: list[float]
    realised: float
    leakage: list[float]


def tabulate(
    config: EditConfig, moments: Sequence[Tensor] | None, pilot_keys: Sequence[Tensor], adherences: Sequence[float]
) -> list[Tradeoff]:
    """What `choose_priors` gives for each adherence, and what that means; otherwise the same arguments and errors."""
    count = len(pilot_keys)
    groups = [list(range(count))] if config.share == "joint" else [[layer] for layer in range(count)]
    rows = []
    for adherence in adherences:
        priors = choose_priors(replace(config, adherence=adherence), moments, pilot_keys)
        held, lams, mus = moments, [prior.lam for prior in priors], [prior.mu for prior in priors]
        if held is None or not any(mus):
            # lam^2 I is what mu = lam makes of the unit moment.
            held = [torch.eye(keys.shape[1], device=keys.device) for keys in pilot_keys]
            lams, mus = [0.0] * count, lams
        found = [
            assess([held[i] for i in group], [pilot_keys[i] for i in group], [lams[i] for i in group], mus[group[0]])
            for group in groups
        ]
        rows.append(
            Tradeoff(
                adherence,
                [prior.lam for prior in priors],
                [prior.mu for prior in priors],
                sum(one.realised for one in found) / len(found),
                [leak for one in found for leak in one.leakage],
            )
        )
    return rows


def _together(config: EditConfig, moments: Sequence[Tensor] | None, pilot_keys: Sequence[Tensor]) -> list[Prior]:
    if moments is None:
        lam = config.lam
        if lam is None:
            # S0 = lam^2 I is what mu = lam makes of the unit moment.
            units = [torch.eye(keys.shape[1], device=keys.device) for keys in pilot_keys]
            lam = choose(units, pilot_keys, config.adherence, 0.0).mu
        return [Prior(lam=lam) for _ in pilot_keys]
    mu = config.mu
    if mu is None and config.lam is None:
        mu = choose(moments, pilot_keys, config.adherence, config.ridge).mu
    elif mu is None:
        mu = _mu_beside(config, moments, pilot_keys)
    lams = [
        mu * math.sqrt(config.ridge * float(moment.diagonal().double().mean())) if config.lam is None else config.lam
        for moment in moments
    ]
    return [Prior(lam=lam, mu=mu, anchor_moment=moment) for lam, moment in zip(lams, moments, strict=True)]


def _mu_beside(config: EditConfig, moments: Sequence[Tensor], pilot_keys: Sequence[Tensor]) -> float:
    """The mu at which the pilot shows the adherence beside a given lam."""
    assert config.lam is not None
    lams = [config.lam] * len(moments)
    scale = config.lam / math.sqrt(float(moments[0].diagonal().double().mean())) or 1.0

    def excess(log_mu: float) -> float:
        return assess(moments, pilot_keys, lams, scale * math.exp(log_mu)).realised - config.adherence

    if excess(_LOG_SPAN) > 0:
        raise InputError(
            f"lam={config.lam}: no mu beside it brings what the pilot realises down to adherence={config.adherence}, "
            "as lam alone holds what no anchor reaches; raise lam or the adherence, leave lam open, or anchor more text"
        )
    if excess(-_LOG_SPAN) < 0:
        raise InputError(
            f"lam={config.lam} alone leaves less than adherence={config.adherence} of the pilot realised; lower lam or "
            "the adherence, or leave lam open"
        )
    return scale * math.exp(brentq(excess, -_LOG_SPAN, _LOG_SPAN, xtol=1e-3))
