"""Forecast of a stream of planned edits before the first one: realized fraction and drift by number of edits.

The keys of the planned edits are read in the unedited model, which takes a small part of the time of editing, and run
through the solver; the target changes are drawn from the statistics of a searched pilot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.held_out import HeldOut
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.priors import Pilot, Tradeoff, try_adherence
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.rows import row_weights, rows_of_contexts
from rlsedit_fast.editing.status import DEFAULT_BUDGET, IDENTIFIED, Norms, calibrated_adherence
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.rls import ChangeStatistics, Prior, forecast_stream
from rlsedit_fast.rls.forecast import StreamPoint
from rlsedit_fast.rls.prior import parts
from rlsedit_fast.statistics.key_statistics import Moment

ADHERENCES = (0.8, 0.9, 0.95, 0.975, 0.99)
"""Adherences that are compared by default."""

LEAST_REALIZED = 0.5
"""Default of the fraction of its change that the oldest batch must keep."""

_AT_ONCE = 64  # edits whose keys are read in one pass

Report = Callable[[str, int, int], object]
"""Called with what is done, how many edits are done, and of how many."""


@dataclass(frozen=True)
class LayerForecast:
    """Forecast for one layer.

    Attributes:
        layer: index of the decoder layer.
        weight: `||W - W0||_F / ||W0||_F`.
        weight_norm: `||W - W0||_F`.
        anchors: `||K0 (W - W0)^T||_F / ||K0 W0^T||_F` over the anchors; None without anchors.
        held_out: the same over the held-out tokens of the anchor text; None without them.
        free: fraction of the freedom of the prior that is left in the direction of new keys, `(k C k^T) / (k C0 k^T)`.
        realized_oldest: fraction of what was written for the first batch that the layer still has.
        realized_newest: the same for the last batch.
    """

    layer: int
    weight: float
    weight_norm: float
    anchors: float | None
    held_out: float | None
    free: float
    realized_oldest: float
    realized_newest: float

    @property
    def drift(self) -> float:
        """The relative change on held-out tokens; without them on the anchors, without anchors that of the weights."""
        return next(change for change in (self.held_out, self.anchors, self.weight) if change is not None)


@dataclass(frozen=True)
class ForecastPoint:
    """Forecast after a number of edits.

    Attributes:
        edits: number of edits.
        rows_per_dimension: rows of the edits per key dimension d_k, in the layer with the smallest one.
        extrapolated: whether there are fewer planned edits, so that drawn keys stand for others, see `forecast_stream`.
        realized: fraction of its target change that an edit has at the edited hidden state, mean over the batches.
        realized_oldest: the same for the first batch.
        realized_newest: the same for the last batch.
        drift: largest drift of a layer, see `LayerForecast.drift`.
        layers: the layers.
    """

    edits: int
    rows_per_dimension: float
    extrapolated: bool
    realized: float
    realized_oldest: float
    realized_newest: float
    drift: float
    layers: list[LayerForecast]


@dataclass(frozen=True)
class SettingForecast:
    """Forecast for one adherence.

    Attributes:
        tradeoff: the priors of this adherence, and their effect on the pilot.
        points: the forecast by number of edits.
        capacity: number of edits up to which the limits hold, interpolated; None if they hold at the last point.
    """

    tradeoff: Tradeoff
    points: list[ForecastPoint]
    capacity: int | None


@dataclass(frozen=True)
class Proposal:
    """Settings with which the planned edits stay within the limits.

    Attributes:
        adherence: the largest compared adherence with which they do; None if there is none.
        mu: its mu.
        lam: its lam per layer.
        edits: number of edits up to which the limits hold, with this adherence or the one with the largest number; None
            if they hold for all planned edits.
        rows_per_dimension: rows per key dimension at that number of edits.
        layers: number of edited layers with which the limits would hold for all planned edits, if the change of each is
            inversely proportional to their number; the present number if they hold.
        reason: what decided.
    """

    adherence: float | None
    mu: float | None
    lam: list[float] | None
    edits: int | None
    rows_per_dimension: float
    layers: int
    reason: str


@dataclass(frozen=True)
class Forecast:
    """Forecast of a stream of planned edits, see `Editor.forecast`.

    Attributes:
        keys: number of planned edits whose keys were read.
        searched: number of edits whose target changes were searched.
        rows: rows per edit in each layer.
        max_drift: allowed drift.
        min_realized: fraction of its change that the oldest batch must keep.
        settings: forecast per adherence.
        proposal: proposed settings.
        notes: what limits the accuracy.
    """

    keys: int
    searched: int
    rows: int
    max_drift: float
    min_realized: float
    settings: list[SettingForecast]
    proposal: Proposal
    notes: list[str]


class Forecaster:
    """Forecasts a stream of requests.

    Args:
        context: the model, unedited.
        moments: moment of the anchors per layer; None without anchors.
        held_out: held-out tokens of the anchors and their moments; None without them.

    Raises:
        ModelError: the model contains mixtures of experts.
    """

    def __init__(
        self, context: ModelContext, moments: Sequence[Moment] | None, held_out: tuple[int, list[Moment]] | None
    ) -> None:
        mixtures = [projection.name for projection in context.projections if projection.layout is not None]
        if mixtures:
            raise ModelError(
                f"{mixtures[0]} is a mixture of experts, for which there is no forecast",
                hint="compare adherences on a pilot: `rlsedit calibrate` without --count (Python: Editor.assess)",
            )
        self._context, self._moments = context, moments
        self._weights = [projection.blocks for projection in context.projections]
        self._held_out = HeldOut.of(*held_out, self._weights, context.projections) if held_out else None

    def keys(self, requests: Sequence[Request], report: Report) -> list[Tensor]:
        """Returns per layer the keys of requests, `[n, rows, d_k]`, float32 in host memory."""
        found: list[list[Tensor]] = [[] for _ in self._context.projections]
        for part in parts(len(requests), _AT_ONCE):
            some = requests[part]
            read, _ = request_keys(self._context.decoder, self._context.projections, some)
            for kept, one in zip(found, read, strict=True):
                rows = rows_of_contexts(one, self._context.config.effective_rows)
                kept.append(rows.unflatten(0, (len(some), -1)).cpu())
            report("reading keys", min(part.stop, len(requests)), len(requests))
        return [torch.cat(kept) for kept in found]

    def run(
        self,
        requests: Sequence[Request],
        pilot: Pilot,
        *,
        adherences: Sequence[float] = ADHERENCES,
        count: int | None = None,
        max_drift: float = DEFAULT_BUDGET,
        min_realized: float = LEAST_REALIZED,
        report: Report | None = None,
    ) -> Forecast:
        """Returns the forecast; see `Editor.forecast`."""
        config, report = self._context.config, report or (lambda *_: None)
        count = _check(requests, adherences, count, max_drift, min_realized)
        keys = [one[:count] for one in self.keys(requests[:count], report)]
        given, rows = keys[0].shape[:2]
        weights = torch.tensor([float(request.edit.weight) for request in requests[:given]])
        weights = weights[:, None] * torch.tensor(row_weights(rows, config.contexts.bare_weight))
        changes = ChangeStatistics.of(pilot.changes).draw(count)[_groups(requests[:given], count)]
        found = []
        for adherence in adherences:
            tradeoff, priors, routes = try_adherence(config, self._moments, pilot, adherence)
            changed = config.replace(prior={"adherence": adherence})
            points = forecast_stream(
                keys,
                weights,
                changes,
                [prior for prior in priors if isinstance(prior, Prior)],
                routes=routes,
                batch_size=config.batch_size,
                share=calibrated_adherence(changed, anchored=self._moments is not None),
                common_first=True,
                points=list(_decades(count)),
                held_out=[m for m in self._held_out.moments if isinstance(m, Tensor)] if self._held_out else None,
                devices=[projection.device for projection in self._context.projections],
                progress=_progress(report, f"adherence {adherence:g}", count),
            )
            norms = [
                Norms.of(blocks, prior, projection.columns)
                for blocks, prior, projection in zip(self._weights, priors, self._context.projections, strict=True)
            ]
            of_edits = [self._point(point, norms, given) for point in points]
            found.append(SettingForecast(tradeoff, of_edits, _capacity(of_edits, max_drift, min_realized)))
        return Forecast(
            keys=given,
            searched=len(pilot.changes),
            rows=rows,
            max_drift=max_drift,
            min_realized=min_realized,
            settings=found,
            proposal=propose(found, max_drift, min_realized, len(self._context.decoder.blocks)),
            notes=_notes(given, count, len(pilot.changes)),
        )

    def _point(self, point: StreamPoint, norms: Sequence[Norms], given: int) -> ForecastPoint:
        layers = []
        for at, (projection, one, norm) in enumerate(zip(self._context.projections, point.layers, norms, strict=True)):
            held_out = None
            if self._held_out and one.held_out is not None and self._held_out.norms[at]:
                held_out = one.held_out / self._held_out.norms[at]
            layers.append(
                LayerForecast(
                    layer=projection.layer,
                    weight=one.weight / norm.weight if norm.weight else 0.0,
                    weight_norm=one.weight,
                    anchors=one.anchors / norm.anchors if one.anchors is not None and norm.anchors else None,
                    held_out=held_out,
                    free=one.free,
                    realized_oldest=one.realized[0],
                    realized_newest=one.realized[-1],
                )
            )
        return ForecastPoint(
            edits=point.edits,
            rows_per_dimension=point.rows / min(projection.key_width for projection in self._context.projections),
            extrapolated=point.edits > given,
            realized=sum(point.realized) / len(point.realized),
            realized_oldest=point.realized[0],
            realized_newest=point.realized[-1],
            drift=max(layer.drift for layer in layers),
            layers=layers,
        )


def _progress(report: Report, about: str, count: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        report(about, done, count)

    return show


def propose(settings: Sequence[SettingForecast], max_drift: float, min_realized: float, depth: int) -> Proposal:
    """Returns the largest adherence with which the limits hold at the last point, or what would be needed.

    Args:
        settings: at least one.
        max_drift: allowed drift.
        min_realized: fraction of its change that the oldest batch must keep.
        depth: number of decoder layers.
    """
    layers, last = len(settings[0].points[-1].layers), settings[0].points[-1]
    if within := [one for one in settings if one.capacity is None]:
        best = max(within, key=lambda one: one.tradeoff.adherence)
        point = best.points[-1]
        reason = (
            f"after {point.edits} edits the drift is {point.drift:.3g} (at most {max_drift:g}) and the oldest batch "
            f"keeps {point.realized_oldest:.2f} of its changes (at least {min_realized:g})"
        )
        one = best.tradeoff
        return Proposal(one.adherence, one.mu[0], one.lam, None, point.rows_per_dimension, layers, reason)
    best = max(settings, key=lambda one: (one.capacity or 0, one.tradeoff.adherence))
    point = best.points[-1]
    needed = min(depth, max(layers + 1, math.ceil(layers * point.drift / max_drift)))
    which = "the drift" if point.drift > max_drift else "what the oldest batch keeps"
    reason = (
        f"no compared adherence keeps the limits for {last.edits} edits; adherence {best.tradeoff.adherence:g} keeps "
        f"them up to about {best.capacity}, then {which} exceeds its limit: apply fewer edits, edit about {needed} "
        "layers, or allow more drift"
    )
    if which != "the drift":
        reason = reason.replace("exceeds its limit", "is below its limit").replace("allow more drift", "accept less")
    share = point.rows_per_dimension * (best.capacity or 0) / point.edits
    return Proposal(None, None, None, best.capacity, share, needed, reason)


def _check(
    requests: Sequence[Request], adherences: Sequence[float], count: int | None, max_drift: float, min_realized: float
) -> int:
    """Checks the arguments of a forecast and returns the number of edits."""
    if not adherences or any(isinstance(a, bool) or not 0 < a < 1 for a in adherences):
        raise InputError(f"adherences={list(adherences)}: expected numbers above 0 and below 1, such as 0.9")
    if count is not None and (isinstance(count, bool) or count < 1):
        raise InputError(f"count={count!r}: expected at least 1, or None for the number of edits")
    if not 0 < max_drift < math.inf:
        raise InputError(f"max_drift={max_drift!r}: expected a finite number above 0, such as {DEFAULT_BUDGET}")
    if not 0 <= min_realized < 1:
        raise InputError(f"min_realized={min_realized!r}: expected at least 0 and below 1, such as {LEAST_REALIZED}")
    return len(requests) if count is None else count


def _decades(count: int) -> Iterator[int]:
    """Yields 100, 300, 1000, 3000 ... up to a number of edits."""
    at = 100
    while at < count:
        yield at
        at = at * 3 if str(at).startswith("1") else at // 3 * 10


def _groups(requests: Sequence[Request], count: int) -> list[int]:
    """Returns for each edit the index of the first one of its subject, since they share one change."""
    first: dict[object, int] = {}
    found = [first.setdefault(one.subject_key or one.prompt_key, at) for at, one in enumerate(requests)]
    return [*found, *range(len(requests), count)]


def _capacity(points: Sequence[ForecastPoint], max_drift: float, min_realized: float) -> int | None:
    """Returns the number of edits at which a limit is reached, linear between points; None if it is not."""
    before = replace(points[0], edits=0, drift=0.0, realized_oldest=1.0)
    for point in points:
        crossed = [
            (limit - start) / (end - start)
            for start, end, limit, over in (
                (before.drift, point.drift, max_drift, point.drift > max_drift),
                (before.realized_oldest, point.realized_oldest, min_realized, point.realized_oldest < min_realized),
            )
            if over
        ]
        if crossed:
            return int(before.edits + min(crossed) * (point.edits - before.edits))
        before = point
    return None


def _notes(given: int, count: int, searched: int) -> list[str]:
    """Returns what limits the accuracy of a forecast."""
    notes = [f"{given} keys were read, and {searched} target changes were searched"]
    if given < IDENTIFIED:
        notes.append(
            f"{given} keys do not determine what later ones add: beyond them the forecast may be wrong by a factor; "
            f"{IDENTIFIED} keys are enough for about 10 %"
        )
    if count > given:
        notes.append(
            f"beyond {given} edits the forecast is extrapolated: drawn keys with the second moment of those that were "
            "read stand for others"
        )
    return notes
