"""How a stream of edits is doing: what its bounds allow, where its objective is heading, and what is to be done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import EditRecord
from rlsedit_fast.editing.progress import Point
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import Prior
from rlsedit_fast.rls.prior import chunks

DEFAULT_BUDGET = 0.25
"""Of the outputs on the anchors, or of the weights where there are none."""

RECENT = 100
"""Edits that count as recent."""

_FITTED_POINTS = 100
_FEW_LEFT = 0.1  # of the edits so far
_FALLEN_SHORT = 0.1  # of adherence, below what was asked for
_TOO_MANY_SHORT = 0.2  # of recent edits whose search did not converge
_SHIFTED = 0.1  # of a key's norm


@dataclass(frozen=True)
class Norms:
    """What deviations of a layer are measured by.

    Attributes:
        weight: `||W0||_F`.
        anchors: `||K0 W0^T||_F`; None without anchors.
    """

    weight: float
    anchors: float | None

    @classmethod
    def of(cls, original: Tensor, prior: Prior) -> Norms:
        """From `W0 [d_v, d_k]`; one product with the anchor moment, in float32."""
        weight = original.float()
        anchors = None
        if (moment := prior.anchor_moment) is not None:
            energy, start = 0.0, 0
            for part in chunks(moment, original.device):
                rows = part.float()
                energy += float(((rows @ weight.T).T * weight[:, start : start + len(rows)]).double().sum())
                start += len(rows)
            anchors = math.sqrt(max(energy, 0.0))
        return cls(float(torch.linalg.vector_norm(weight)), anchors)


@dataclass(frozen=True)
class Sample:
    """What the model does now at some of the active edits.

    Attributes:
        edits: how many were looked at.
        success: of these, the share whose target is ranked first at every token; None where none was looked at.
        key_shift: per layer the median of `||now - then|| / ||then||` over their keys, since they were written; None
            where keys are not kept.
    """

    edits: int
    success: float | None
    key_shift: list[float] | None


@dataclass(frozen=True)
class LayerStatus:
    """One edited layer.

    Attributes:
        layer: index of the block.
        objective: `J`.
        weight_bound: what `||W - W0||_F / ||W0||_F` cannot exceed.
        weight: the same, measured; None where the layer was not looked at.
        anchors_bound: what `||K0 (W - W0)^T||_F / ||K0 W0^T||_F` over the anchors cannot exceed; None without anchors.
        residual: how far C has drifted, see `RLSState.monitor`; None where it was not looked at.
        advice: what is to be done about that; None where nothing is.
    """

    layer: int
    objective: float
    weight_bound: float
    weight: float | None
    anchors_bound: float | None
    residual: float | None
    advice: str | None

    @classmethod
    def of(
        cls,
        layer: int,
        norms: Norms,
        lam: float,
        mu: float,
        objective: float,
        *,
        deviation: float | None,
        residual: float | None,
        advice: str | None,
    ) -> LayerStatus:
        """From a layer's prior and `J`; `deviation` is `||W - W0||_F`."""
        root = math.sqrt(objective)
        return cls(
            layer=layer,
            objective=objective,
            weight_bound=root / lam / norms.weight if lam and norms.weight else math.inf,
            weight=deviation / norms.weight if deviation is not None and norms.weight else None,
            anchors_bound=root / mu / norms.anchors if mu and norms.anchors else None,
            residual=residual,
            advice=advice,
        )


@dataclass(frozen=True)
class Status:
    """How a stream of edits is doing.

    Attributes:
        edits: how many edits are in each state.
        batches: how many were made.
        adherence: share of each edit that was to be realised; None where mu and lam were given instead.
        realized: of the last `RECENT` active edits, the mean share of the wanted change that arrived at the edited
            state, measured when each was written; None without edits.
        success: of these, the share that the model stated after the write.
        search_converged: of these, the share whose value search reached its stopping rule.
        layers: the edited ones.
        budget: the deviation that is allowed: of the outputs on the anchors, or of the weights where there are none.
        spent: the largest layer's share of it that its bound has reached.
        edits_left: how many edits more until the first layer's bound reaches the budget, by a line fitted to the
            objective's recent course; None where there is no course yet or it does not rise.
        sample: what the model does now at some of the edits; None where it was not asked.
        sizes: bytes of the store, by part; empty without one.
        warnings: what is amiss, and what to do about it.
    """

    edits: dict[str, int]
    batches: int
    adherence: float | None
    realized: float | None
    success: float | None
    search_converged: float | None
    layers: list[LayerStatus]
    budget: float
    spent: float
    edits_left: int | None
    sample: Sample | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def assess(
    records: Sequence[EditRecord],
    trace: Sequence[Point],
    layers: Sequence[LayerStatus],
    *,
    batches: int,
    adherence: float | None,
    budget: float,
    sizes: dict[str, int],
    sample: Sample | None = None,
) -> Status:
    """Puts a status together.

    Args:
        records: all of them.
        trace: the objective's course.
        layers: as they are.
        batches: how many were made.
        adherence: that was asked for.
        budget: above 0.
        sizes: of the store.
        sample: what the model does now, where it was asked.

    Raises:
        InputError: a budget that is not above 0.
    """
    if not 0 < budget < math.inf:
        raise InputError(f"budget={budget}: expected a finite number above 0, such as {DEFAULT_BUDGET}")
    counts = Counter(record.state for record in records)
    recent = [record for record in records if record.state == "active"][-RECENT:]
    realized = sum(r.realized for r in recent) / len(recent) if recent else None
    success = sum(r.success for r in recent) / len(recent) if recent else None
    converged = sum(r.search_converged for r in recent) / len(recent) if recent else None
    spent = [_reached(layer) / budget for layer in layers]
    left = [edits_left(trace, at, layer, budget) for at, layer in enumerate(layers)]
    known = [count for count in left if count is not None]
    status = Status(
        edits={state: counts[state] for state in ("active", "undone", "replaced", "skipped")},
        batches=batches,
        adherence=adherence,
        realized=realized,
        success=success,
        search_converged=converged,
        layers=list(layers),
        budget=budget,
        spent=max(spent, default=0.0),
        edits_left=min(known) if known else None,
        sample=sample,
        sizes=sizes,
    )
    status.warnings.extend(_warnings(status))
    return status


def adherence_asked(config: EditConfig, *, anchored: bool) -> float | None:
    """The adherence, where it decided how firmly is held, and no number given in its place did."""
    decided = config.mu if anchored else config.lam
    return config.adherence if decided is None else None


def edits_left(trace: Sequence[Point], at: int, layer: LayerStatus, budget: float) -> int | None:
    """How many edits more until a layer's bound reaches the budget.

    The bound is `sqrt(J)` times a constant, so it is there when `J` is `(budget / bound)^2` of what it is now. The line
    is fitted by least squares through the last `J` over the number of edits.

    Args:
        trace: the objective's course.
        at: the layer's place in it.
        layer: as it is now.
        budget: above 0.
    """
    points = [(point.edits, point.objective[at]) for point in trace][-_FITTED_POINTS:]
    reached = _reached(layer)
    if reached >= budget:
        return 0
    if len({edits for edits, _ in points}) < 2 or not reached:
        return None
    mean = [sum(column) / len(points) for column in zip(*points, strict=True)]
    spread = sum((edits - mean[0]) ** 2 for edits, _ in points)
    slope = sum((edits - mean[0]) * (objective - mean[1]) for edits, objective in points) / spread
    if slope <= 0:
        return None
    return int(layer.objective * ((budget / reached) ** 2 - 1) / slope)


def _reached(layer: LayerStatus) -> float:
    return layer.weight_bound if layer.anchors_bound is None else layer.anchors_bound


def _warnings(status: Status) -> list[str]:
    told = [
        f"layer {layer.layer}: {layer.advice} `consolidate` does that."
        for layer in status.layers
        if layer.advice is not None
    ]
    what = "weights" if any(layer.anchors_bound is None for layer in status.layers) else "outputs on the anchors"
    if status.spent >= 1:
        told.append(
            f"the bound on how far the {what} can have moved is over the budget of {status.budget:g}: undo what is no "
            "longer needed, or test the model on what matters to you and raise the budget"
        )
    elif status.edits_left is not None and status.edits_left < _FEW_LEFT * max(1, status.edits["active"]):
        told.append(
            f"about {status.edits_left} edits are left until the {what} can have moved by the budget of "
            f"{status.budget:g}: plan to train the facts in, or undo what is no longer needed"
        )
    if status.adherence and status.realized is not None and status.realized < status.adherence - _FALLEN_SHORT:
        told.append(
            f"of recent edits {status.realized:.2f} of the wanted change arrived, {status.adherence:g} was asked for: "
            "the layers are full of similar edits; undo what is no longer needed, or edit more layers in a new store"
        )
    if status.search_converged is not None and 1 - status.search_converged > _TOO_MANY_SHORT:
        told.append(
            f"the value search of {1 - status.search_converged:.0%} of recent edits fell short: raise search_steps or "
            "clamp"
        )
    if status.success is not None and 1 - status.success > _TOO_MANY_SHORT:
        told.append(
            f"the model does not state {1 - status.success:.0%} of recent edits: see `success` in the history, and "
            "apply these again, or raise the adherence in a new store"
        )
    if status.sample and status.sample.key_shift and max(status.sample.key_shift) > _SHIFTED:
        told.append(
            f"the keys of the edits have moved by {max(status.sample.key_shift):.0%} since they were written, as later "
            "edits changed the layers before: `consolidate` reads them again"
        )
    if status.layers and what == "weights":
        told.append("no anchors: only the weights are held; name what the model is to go on doing in a new store")
    return told
