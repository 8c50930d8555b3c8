"""Status of a stream of edits: bounds, objective, remaining capacity and warnings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from rlsedit_fast.baselines import LayerState
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.held_out import HeldOut, output_energy
from rlsedit_fast.editing.records import EditRecord, Point
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.rls import BlockPrior, Prior, Terms
from rlsedit_fast.rls.columns import Columns

if TYPE_CHECKING:
    from rlsedit_fast.editing.layers import EditedLayers

DEFAULT_BUDGET = 0.25
"""Default budget: relative change of the outputs on the anchors, or of the weights without anchors."""

SAMPLED = 32
"""Default number of active edits that are measured in the model."""

RECENT = 100
"""Number of active edits that count as recent."""

IDENTIFIED = 1000
"""Number of edits whose keys show which directions new keys have; a hundred do not."""

_FITTED_POINTS = 10
_FEW_LEFT = 0.1  # relative to the number of active edits
_FALLEN_SHORT = 0.1  # below the adherence
_TOO_MANY_SHORT = 0.2  # fraction of recent edits
_SHIFTED = 0.1  # relative to the norm of a key


@dataclass(frozen=True)
class Norms:
    """Norms that the deviations of a layer are relative to.

    Attributes:
        weight: `||W0||_F`.
        anchors: `||K0 W0^T||_F`; None without anchors.
    """

    weight: float
    anchors: float | None

    @classmethod
    def of(cls, originals: Sequence[Tensor], prior: Prior | BlockPrior, columns: Columns) -> Norms:
        """Returns the norms of the blocks of `W0`; needs one product with the anchor moment, in float32.

        Of a weight that several processes hold, the block has the held `columns`. For a mixture of experts the norm of
        the outputs on the anchors was measured with the moment.
        """
        if isinstance(prior, BlockPrior):
            norm = math.sqrt(sum(float(block.double().square().sum()) for block in originals))
            return cls(norm, None if prior.moment is None else math.sqrt(prior.moment.energy))
        (original,) = originals
        moment = prior.anchor_moment
        energy = None if moment is None else columns.measure(partial(output_energy, moment=moment), original)
        return cls(columns.norm(original), None if energy is None else math.sqrt(energy))


@dataclass(frozen=True)
class Sample:
    """Some active edits, measured in the present model.

    Attributes:
        edits: number of edits.
        success: fraction whose target tokens are all ranked first; None without edits.
        key_shift: per layer the median of `||now - stored|| / ||stored||` over their keys; None if rows are not stored.
    """

    edits: int
    success: float | None
    key_shift: list[float] | None


@dataclass(frozen=True)
class LayerStatus:
    """Status of an edited layer.

    Attributes:
        layer: index of the decoder layer.
        objective: `J`.
        weight_bound: upper bound of `||W - W0||_F / ||W0||_F`.
        weight: the same, exact; None if it is not known.
        anchors_bound: upper bound of `||K0 (W - W0)^T||_F / ||K0 W0^T||_F` over the anchors; None without anchors.
        residual: drift of C, see `RLSState.monitor`; None if it was not measured.
        advice: what to do about the drift; None if nothing.
        anchors: what `anchors_bound` bounds, exact (of a mixture of experts a tighter bound); None if it is not known.
        misfit: the part of `J` that the misfit of the edits is; the prior is the rest. None if it is not known.
        held_out: `||K (W - W0)^T||_F / ||K W0^T||_F` over held-out tokens of the anchor text, measured, see
            `HeldOut.changes`; None without such tokens, or if it was not measured.
    """

    layer: int
    objective: float
    weight_bound: float
    weight: float | None
    anchors_bound: float | None
    residual: float | None
    advice: str | None
    anchors: float | None = None
    misfit: float | None = None
    held_out: float | None = None

    @classmethod
    def of(
        cls,
        layer: int,
        norms: Norms,
        lam: float,
        mu: float,
        objective: float,
        *,
        terms: Terms | None,
        residual: float | None,
        advice: str | None,
        held_out: float | None = None,
    ) -> LayerStatus:
        """Returns the status from the prior, `J` and its terms of a layer."""
        root = math.sqrt(objective)
        anchored, fits = (terms.anchors, terms.edits) if terms is not None else (None, None)
        return cls(
            layer=layer,
            objective=objective,
            weight_bound=root / lam / norms.weight if lam and norms.weight else math.inf,
            weight=terms.weight / norms.weight if terms is not None and norms.weight else None,
            anchors_bound=root / mu / norms.anchors if mu and norms.anchors else None,
            residual=residual,
            advice=advice,
            anchors=anchored / norms.anchors if anchored is not None and norms.anchors else None,
            misfit=fits**2 / objective if fits is not None and objective else None,
            held_out=held_out,
        )

    @property
    def bound(self) -> float:
        """The bound on the change that counts against a budget: on the anchors, or on the weights without anchors."""
        return self.weight_bound if self.anchors_bound is None else self.anchors_bound

    @property
    def change(self) -> float:
        """The change that counts against a budget: exact if it is known, otherwise its bound."""
        exact = self.weight if self.anchors_bound is None else self.anchors
        return self.bound if exact is None else exact


@dataclass(frozen=True)
class LayerDeviation:
    """Deviation of an edited layer from the pre-trained one, and its upper bounds.

    Attributes:
        layer: index of the decoder layer.
        weight: `||W - W0||_F`, exact.
        weight_bound: upper bound of `||W - W0||_F`, `sqrt(J) / lam`.
        anchor_bound: upper bound of `||K0 (W - W0)^T||_F` over the anchors, `sqrt(J) / mu`.
        anchors: `||K0 (W - W0)^T||_F`, exact (of a mixture of experts a tighter bound); None without anchors.
        edits: `sqrt(sum_i w_i ||K_i W^T - V_i||^2)` over the edits and the protected prompts, exact; None if the solver
            does not know it.
        protected: the same over the protected prompts alone, exact; at most `sqrt(J)`.
    """

    layer: int
    weight: float
    weight_bound: float
    anchor_bound: float
    anchors: float | None = None
    edits: float | None = None
    protected: float = 0.0


@dataclass(frozen=True)
class Status:
    """Status of a stream of edits.

    Attributes:
        edits: number of edits in each state.
        batches: number of batches.
        adherence: the adherence that the priors were calibrated to; None if mu and lam were given.
        realized: mean fraction of the target change that arrived at the edited hidden state, over the last `RECENT`
            active edits, measured when each was written; None without edits.
        success: fraction of these that the model stated after the write.
        search_converged: fraction of these whose value search met its stopping rule.
        layers: status of the edited layers.
        budget: allowed relative change of the outputs on the anchors, or of the weights without anchors.
        spent: change of the layer with the largest one, relative to the budget: exact if it is known, otherwise its
            bound.
        edits_left: estimate of the number of edits until the change of a layer reaches the budget; None if there are
            too few edits, or the change does not increase.
        edits_left_basis: what the estimate is based on, and how uncertain it is; None without an estimate.
        sample: some edits measured in the present model; None if they were not measured.
        sizes: bytes of the store, by part; empty without a store.
        warnings: problems, and what to do about them.

    Example:
        >>> from rlsedit_fast import Edit, EditConfig, Editor
        >>> from rlsedit_fast.world import load_demo_model
        >>> config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
        >>> editor = Editor(*load_demo_model(), config=config)
        >>> records = editor.edit([Edit("{} speaks", "Toze Lado Rekuno", "Kubeish")])
        >>> editor.status().edits["active"]
        1
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
    edits_left_basis: str | None = None
    sample: Sample | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def layer_statuses(
    edited: Sequence[tuple[Projection, LayerState]], norms: Sequence[Norms], held_out: HeldOut | None
) -> list[LayerStatus]:
    """Measures edited layers and returns their status; reads C of each layer once."""
    found = []
    changes = held_out.changes([state for _, state in edited]) if held_out and edited else [None] * len(edited)
    for (projection, state), norm, change in zip(edited, norms, changes, strict=True):
        health = state.monitor()
        found.append(
            LayerStatus.of(
                projection.layer,
                norm,
                state.prior.lam,
                state.prior.mu,
                state.objective,
                terms=state.terms(),
                residual=health.residual,
                advice=health.advice if health.needs_refresh else None,
                held_out=change,
            )
        )
    return found


def layer_deviations(
    edited: Sequence[tuple[Projection, LayerState]], layers: EditedLayers | None
) -> list[LayerDeviation]:
    """Measures the deviation of edited layers and returns it with its bounds; empty without layers."""
    protected = layers.protected_misfit() if layers else []
    return [
        LayerDeviation(projection.layer, terms.weight, bounds.weight, bounds.anchors, terms.anchors, terms.edits, held)
        for (projection, state), held in zip(edited, protected, strict=True)
        for bounds, terms in ((state.bounds(), state.terms()),)
    ]


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
    continued: Continued | None = None,
) -> Status:
    """Returns the status of a stream.

    Args:
        records: all records.
        trace: recent values of the objective.
        layers: status of each layer.
        batches: number of batches.
        adherence: see `Status`.
        budget: above 0.
        sizes: sizes of the store.
        sample: see `Status`.
        continued: continues the recursion of a layer from its keys, if they are known.

    Raises:
        InputError: the budget is not above 0.
    """
    if not isinstance(budget, (int, float)) or not 0 < budget < math.inf:
        raise InputError(f"budget={budget!r}: expected a finite number above 0, such as {DEFAULT_BUDGET}")
    counts = Counter(record.state for record in records)
    recent = [record for record in records if record.state == "active"][-RECENT:]
    realized = sum(r.realized for r in recent) / len(recent) if recent else None
    success = sum(r.success for r in recent) / len(recent) if recent else None
    converged = sum(r.search_converged for r in recent) / len(recent) if recent else None
    spent = [layer.change / budget for layer in layers]
    left, basis = _edits_left(trace, layers, budget, continued)
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
        edits_left=left,
        edits_left_basis=basis,
        sample=sample,
        sizes=sizes,
    )
    status.warnings.extend(_warnings(status))
    return status


def calibrated_adherence(config: EditConfig, *, anchored: bool) -> float | None:
    """Returns the adherence that the priors are calibrated to; None if mu (without anchors: lam) is given."""
    given = config.prior.mu if anchored else config.prior.lam
    return config.prior.adherence if given is None else None


Continued = Callable[[int, float], tuple[int, int] | None]
"""Returns, for the index of a layer and a growth, the result of `rls.continuation.edits_until` and the number of edits
whose keys it is based on; None if there are too few."""


def _edits_left(
    trace: Sequence[Point], layers: Sequence[LayerStatus], budget: float, continued: Continued | None
) -> tuple[int | None, str | None]:
    """Returns the number of edits until the change of the first layer reaches the budget, and its basis.

    The layer is the one with the fewest edits left by a line. The line and the recursion that is continued from the
    keys of this layer are two estimates; the smaller one is returned, and the basis states both.
    """
    if any(layer.change >= budget for layer in layers):
        return 0, "the budget is used up"
    growths = [(growth, at) for at, one in enumerate(layers) if (growth := edits_by_line(trace, at, one, budget))]
    if not growths:
        return None, None
    growth, at = min(growths)
    if continued is None or (found := continued(at, growth)) is None:
        return int(growth), "a line through the recorded squares of the change, which may be wrong by a factor"
    count, known = found
    low, high = sorted((int(growth), count))
    rough = "" if known >= IDENTIFIED else f"; fewer than {IDENTIFIED} edits do not show which directions new keys have"
    return low, (
        f"two estimates, {low} to {high} edits: a line through the recorded squares of the change gives {int(growth)}, "
        f"and the recursion continued with keys like those of {known} edits {count}{rough}"
    )


def edits_by_line(trace: Sequence[Point], at: int, layer: LayerStatus, budget: float) -> float | None:
    """Returns the number of edits until the change of a layer reaches the budget if it grows as at present.

    It does when its square has grown by `(budget / change)^2`. The growth is extrapolated by a least-squares line
    through recent squares over the number of edits.

    Args:
        trace: recent values of the objective.
        at: index of the layer in the values.
        layer: status of the layer, whose change is below the budget.
        budget: above 0.

    Returns:
        The number; None if there are too few values, or they do not increase.
    """
    points = [(point.edits, _spent_energy(point, at, layer)) for point in trace][-_FITTED_POINTS:]
    reached = layer.change
    if len({edits for edits, _ in points}) < 2 or not reached:
        return None
    mean = [sum(column) / len(points) for column in zip(*points, strict=True)]
    spread = sum((edits - mean[0]) ** 2 for edits, _ in points)
    slope = sum((edits - mean[0]) * (objective - mean[1]) for edits, objective in points) / spread
    if slope <= 0:
        return None
    return points[-1][1] * ((budget / reached) ** 2 - 1) / slope


def _spent_energy(point: Point, at: int, layer: LayerStatus) -> float:
    """Returns the square of what counts against the budget, up to a constant: an exact term of `J`, or `J`."""
    if not point.terms:
        return point.objective[at]
    terms = point.terms[at]
    return (terms.weight if layer.anchors_bound is None or terms.anchors is None else terms.anchors) ** 2


def largest_changes(trace: Sequence[Point], layers: Sequence[LayerStatus]) -> list[tuple[int, float]]:
    """Returns for each point the number of edits and the change of the layer with the largest one.

    Args:
        trace: recent values of the objective and its terms.
        layers: status of each layer at the last point.
    """
    if not trace or not layers:
        return []
    scales = []
    for at, layer in enumerate(layers):
        now = math.sqrt(_spent_energy(trace[-1], at, layer))
        scales.append(layer.change / now if now else 0.0)
    return [
        (
            point.edits,
            max(scale * math.sqrt(_spent_energy(point, at, layers[at])) for at, scale in enumerate(scales)),
        )
        for point in trace
    ]


def _warnings(status: Status) -> list[str]:
    warnings = [
        f"layer {layer.layer}: {layer.advice} `consolidate` does this."
        for layer in status.layers
        if layer.advice is not None
    ]
    what = "weights" if any(layer.anchors_bound is None for layer in status.layers) else "outputs on the anchors"
    if status.spent >= 1:
        warnings.append(
            f"the change of the {what} exceeds the budget of {status.budget:g}: undo edits that are no "
            "longer needed, or test the model on your own data and increase the budget"
        )
    elif status.edits_left is not None and status.edits_left < _FEW_LEFT * max(1, status.edits["active"]):
        warnings.append(
            f"the change of the {what} reaches the budget of {status.budget:g} after about "
            f"{status.edits_left} more edits: undo edits that are no longer needed, or fine-tune the model on the facts"
        )
    if status.adherence and status.realized is not None and status.realized < status.adherence - _FALLEN_SHORT:
        warnings.append(
            f"recent edits realized {status.realized:.2f} of their target change instead of {status.adherence:g}: the "
            "layers contain many similar edits; undo edits that are no longer needed, or edit more layers in a new "
            "store"
        )
    if status.search_converged is not None and 1 - status.search_converged > _TOO_MANY_SHORT:
        warnings.append(
            f"the value search of {1 - status.search_converged:.0%} of recent edits did not converge: increase "
            "search.steps or search.clamp"
        )
    if status.success is not None and 1 - status.success > _TOO_MANY_SHORT:
        warnings.append(
            f"the model does not state {1 - status.success:.0%} of recent edits: see `success` in the history, and "
            "apply these again, or increase the adherence in a new store"
        )
    if status.sample and status.sample.key_shift and max(status.sample.key_shift) > _SHIFTED:
        warnings.append(
            f"the keys of the edits changed by {max(status.sample.key_shift):.0%} since they were written, because "
            "later edits changed earlier layers: `consolidate` reads them again"
        )
    if status.layers and what == "weights":
        warnings.append("no anchors: only the weight change is penalized; use anchors in a new store")
    return warnings
