"""Forecast of a stream of edits from its keys alone: the solver runs on drawn changes instead of searched ones.

What a stream does to a layer depends on its keys through C, and on the target changes only through their inner
products. So the keys are exact, and the changes are drawn in a few dimensions from the statistics of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.rls.prior import Prior
from rlsedit_fast.rls.shares import amplify_innovation, memit_share, realized_fraction
from rlsedit_fast.rls.state import RLSState

DIMENSIONS = 128
"""Default dimension of drawn changes: norms of random sums then vary by about 6 %, their mean over edits much less."""

_SAMPLED = 20  # edits of a batch that are measured again later
_PROBES = 256  # drawn edits that determine the share of new directions


@dataclass(frozen=True)
class ChangeStatistics:
    """Statistics of target changes, from which changes are drawn.

    Attributes:
        norms: norms of the sampled changes, `[n]`.
        common: fraction of the mean square that all changes have in common: `<d_i, d_j> / E|d|^2`, mean over pairs.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import ChangeStatistics
        >>> ChangeStatistics.of(torch.tensor([[3.0, 4.0], [3.0, 4.0]])).common
        1.0
    """

    norms: Tensor
    common: float

    @classmethod
    def of(cls, changes: Tensor) -> ChangeStatistics:
        """Returns the statistics of changes `[n, d]`.

        Raises:
            InputError: there is no change, or all are zero.
        """
        changes = changes.double()
        norms = changes.norm(dim=1)
        squares = float(norms.square().sum())
        if not squares:
            raise InputError("the sampled edits ask for no change; sample other edits")
        count = len(changes)
        pairs = float(changes.sum(0).square().sum()) - squares
        common = pairs / (count - 1) / squares if count > 1 else 0.0
        return cls(norms, min(max(common, 0.0), 1.0))

    def draw(self, count: int, *, dimensions: int = DIMENSIONS, seed: int = 0) -> Tensor:
        """Draws changes `[count, dimensions]`, float64: norms of the sample, directions with the common part."""
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
        own[:, 0] = 0.0
        directions = own / own.norm(dim=1, keepdim=True) * (1 - self.common) ** 0.5
        directions[:, 0] = self.common**0.5
        chosen = torch.randint(len(self.norms), (count,), generator=generator)
        return self.norms.cpu()[chosen, None] * directions


@dataclass(frozen=True)
class Route:
    """How the output of an edited layer reaches the edited hidden state.

    Attributes:
        gain: the part that arrives, along itself: 1 if the layers between keep it as it is.
        spill: norm of what arrives in other directions, relative to the output.

    Example:
        >>> from rlsedit_fast.rls import Route
        >>> Route()
        Route(gain=1.0, spill=0.0)
    """

    gain: float = 1.0
    spill: float = 0.0

    @classmethod
    def of(cls, added: Tensor, arrived: Tensor) -> Route:
        """Returns the route that fits outputs `added [n, d]` and the changes `arrived [n, d]` that they caused."""
        added, arrived = added.double(), arrived.double()
        energy = float(added.square().sum())
        if not energy:
            return cls()
        gain = float((added * arrived).sum()) / energy
        rest = float((arrived - gain * added).square().sum())
        return cls(gain, (rest / energy) ** 0.5)


@dataclass(frozen=True)
class LayerPoint:
    """Forecast for one layer after a number of edits.

    Attributes:
        weight: `||W - W0||_F`.
        anchors: `||K0 (W - W0)^T||_F`, with K0 as in the prior; None without anchors.
        held_out: the same for the moment of held-out keys; None without one.
        objective: `J`.
        free: fraction of the freedom of the prior that was left to the last batch before it was written: mean of
            `k C k^T` over that of `k C0 k^T`, at the bare prompts.
        realized: per batch, oldest first, the fraction of what was written for its edits that the layer still has:
            mean of `1 - ||v - k W^T|| / ||v - k W_before^T||` at the bare prompts.
    """

    weight: float
    anchors: float | None
    held_out: float | None
    objective: float
    free: float
    realized: list[float]


@dataclass(frozen=True)
class StreamPoint:
    """Forecast of a stream after a number of edits.

    Attributes:
        edits: number of edits.
        rows: number of rows in each layer.
        realized: per batch, oldest first, the fraction of the target changes that the edited hidden state has.
        layers: the layers.
    """

    edits: int
    rows: int
    realized: list[float]
    layers: list[LayerPoint]


@dataclass
class _Written:
    """Some edits of a batch, to be measured again.

    Attributes:
        keys: per layer the keys at the bare prompt.
        values: per layer the values.
        norms: per layer the norms of the innovations.
        outputs: per layer the outputs after the write.
        left: what was missing at the edited hidden state after the write.
        total: norms of the target changes.
    """

    keys: list[Tensor]
    values: list[Tensor]
    norms: list[Tensor]
    outputs: list[Tensor]
    left: Tensor
    total: Tensor


@torch.no_grad()
def forecast_stream(
    keys: Sequence[Tensor],
    weights: Tensor,
    changes: Tensor,
    priors: Sequence[Prior],
    *,
    routes: Sequence[Route] | None = None,
    batch_size: int = 100,
    share: float | None = None,
    common_first: bool = False,
    points: Sequence[int] = (),
    held_out: Sequence[Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    devices: Sequence[torch.device] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[StreamPoint]:
    """Runs the solver over the keys of a stream with given changes and measures it on the way.

    Every batch is written as by the editor: layer by layer, each with its share of what is still missing, the last one
    with an amplified request if it would realize less than `share`. The keys do not change as edits are applied. If
    there are more changes than keys, drawn keys stand for the others: random combinations of the given ones, which have
    their second moment, and an isotropic part as large as that of the last given batch that was new to the layer.

    Args:
        keys: per layer `[n, rows, d_k]`, the rows of each edit in order; the bare prompt is the first row.
        weights: weights of the rows, `[n, rows]`; repeated for further edits.
        changes: target changes, `[count, d]` with `count >= n`, such as `ChangeStatistics.draw` returns.
        priors: prior of each layer.
        routes: per layer how its output reaches the edited hidden state; by default unchanged. Without effect for the
            last layer, whose output is the hidden state.
        batch_size: edits per batch.
        share: fraction of the changes that the last layer maintains, see `amplify_innovation`; None for none.
        common_first: whether the first dimension of the changes is the part that all edits have in common, as in
            `ChangeStatistics.draw`. Values are searched in the edited model, so what earlier edits already add to it
            at new keys is not asked for again.
        points: numbers of edits after which the stream is measured, rounded up to whole batches; the end is always one.
        held_out: per layer the moment of other keys, `[d_k, d_k]`, on which the change is measured as well.
        dtype: dtype of the solver.
        devices: device of each layer; by default the CPU.
        progress: called with the number of edits after each batch.

    Returns:
        The points, ascending.

    Raises:
        InputError: shapes do not match.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, forecast_stream
        >>> keys, changes = torch.eye(4)[:, None], torch.ones(4, 1)
        >>> (point,) = forecast_stream([keys], torch.ones(4, 1), changes, [Prior(lam=1.0)])
        >>> round(point.layers[0].weight, 3), point.realized
        (1.0, [0.5])
    """
    given, rows = _checked(keys, weights, changes, priors)
    count, layers = len(changes), len(priors)
    weights = weights.repeat(-(-count // given), 1)
    devices = devices or [torch.device("cpu")] * layers
    routes = [*(routes or [Route()] * layers)[:-1], Route()]  # the output of the last layer is the hidden state
    states = [
        RLSState(
            torch.zeros(changes.shape[1], one.shape[-1], dtype=dtype, device=device),
            prior,
            dtype=dtype,
            name=f"layer {at}",
        )
        for at, (one, prior, device) in enumerate(zip(keys, priors, devices, strict=True))
    ]
    diagonals = [float(state.saved().base.diagonal().double().mean()) for state in states]
    before = [_energies(state, one[:, 0]) for state, one in zip(states, keys, strict=True)]
    batches = [*_batches(0, given, batch_size), *_batches(given, count, batch_size)]
    asked_for = [point for point in (*points, count) if 0 < point <= count]
    stops = {next(part.stop for part in batches if part.stop >= point) for point in asked_for}
    drawn: DrawnKeys | None = None
    last = [0.0] * layers
    generator = torch.Generator().manual_seed(1)
    written, found = list[_Written](), list[StreamPoint]()
    for part in batches:
        if part.start == given:
            drawn = DrawnKeys(keys, states, last)
        rows_of = drawn.take(part.stop - part.start) if drawn else [one[part] for one in keys]
        asked = changes[part].double().clone()
        if common_first:
            asked[:, 0] -= _common(states, routes, rows_of)
        missing = asked.repeat_interleave(rows, dim=0)
        sample = torch.arange(0, len(asked), max(1, len(asked) // _SAMPLED))
        bare, free = rows * sample, list[float]()
        one = _Written([], [], [], [], missing, asked.norm(dim=1)[sample])
        for at, (state, route) in enumerate(zip(states, routes, strict=True), start=1):
            these = rows_of[at - 1].flatten(0, 1).to(state.device, dtype)
            panel = state.project(these, weights[part].flatten().to(state.device, dtype))
            energy = (panel.projected.double() * these.double()).sum(1)[::rows].cpu()
            last[at - 1] = float(energy.mean())
            if drawn is None:
                full = float(before[at - 1][part].mean())
            else:
                full = drawn.energy(at - 1, float(before[at - 1].mean()), diagonals[at - 1])
            free.append(last[at - 1] / full)
            innovation = memit_share(missing, at, layers).to(state.device, dtype)
            if at == layers and share is not None:
                places = torch.arange(0, len(innovation), rows)
                innovation = amplify_innovation(panel, innovation, asked.norm(dim=1), places, share)
            outputs = state.outputs(these[bare])
            step = state.update_projected(panel, innovation)
            moved = (innovation - step.residual).double().cpu()
            aside = _aside(missing[::rows], generator).repeat_interleave(rows, dim=0)
            missing = missing - route.gain * moved - route.spill * moved.norm(dim=1, keepdim=True) * aside
            one.keys.append(these[bare])
            one.values.append(outputs + innovation[bare])
            one.norms.append(innovation[bare].norm(dim=1).double())
            one.outputs.append(state.outputs(these[bare]).double().cpu())
        one.left = missing[bare]
        written.append(one)
        if progress is not None:
            progress(part.stop)
        if part.stop in stops:
            measured = [_measured(state, at, written, free[at], held_out) for at, state in enumerate(states)]
            found.append(StreamPoint(part.stop, part.stop * rows, _arrived(states, routes, written), measured))
    return found


def _batches(begin: int, end: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, end)) for at in range(begin, end, size)]


class DrawnKeys:
    """Keys that stand for those of further edits.

    A drawn edit is `sqrt(1 - s) sum_j z_j K_j / sqrt(n) + sqrt(s) |k| u`: a random combination of the given edits, the
    same in all layers and rows, which has their second moment, and an isotropic part, since a few keys do not span the
    directions of others. The share `s` of a layer is the one with which `k C k^T` of drawn keys equals that of the last
    given batch before it was written.

    Args:
        keys: per layer `[n, rows, d_k]`.
        states: states of the layers, with the given keys.
        last: per layer the mean of `k C k^T` over the last given batch at the bare prompt.
    """

    def __init__(self, keys: Sequence[Tensor], states: Sequence[RLSState], last: Sequence[float]) -> None:
        self._keys, self._generator = keys, torch.Generator().manual_seed(2)
        self._scales = [float(one.float().square().sum(-1).mean()) ** 0.5 for one in keys]
        self._shares = [0.0] * len(keys)
        known, other = self._parts(_PROBES)
        for at, (state, aim) in enumerate(zip(states, last, strict=True)):
            low, high = (float(_energies(state, some[at][:, 0]).mean()) for some in (known, other))
            if high > low:
                self._shares[at] = min(max((aim - low) / (high - low), 0.0), 1.0)

    def energy(self, layer: int, known: float, mean: float) -> float:
        """Returns the mean of `k C0 k^T` of drawn keys, from that of the given keys and the mean diagonal of C0."""
        share = self._shares[layer]
        return (1 - share) * known + share * self._scales[layer] ** 2 * mean

    def take(self, count: int) -> list[Tensor]:
        """Returns per layer the keys of `count` further edits, `[count, rows, d_k]`."""
        each = zip(*self._parts(count), self._shares, strict=True)
        return [(1 - share) ** 0.5 * one + share**0.5 * other for one, other, share in each]

    def _parts(self, count: int) -> tuple[list[Tensor], list[Tensor]]:
        given = len(self._keys[0])
        mix = torch.randn(count, given, generator=self._generator) / given**0.5
        known, other = list[Tensor](), list[Tensor]()
        for keys, scale in zip(self._keys, self._scales, strict=True):
            known.append((mix @ keys.flatten(1).float().cpu()).unflatten(1, keys.shape[1:]))
            drawn = torch.randn(count, 1, keys.shape[-1], generator=self._generator)
            other.append((scale * drawn / keys.shape[-1] ** 0.5).expand_as(known[-1]))
        return known, other


def _checked(keys: Sequence[Tensor], weights: Tensor, changes: Tensor, priors: Sequence[Prior]) -> tuple[int, int]:
    shapes = [tuple(one.shape[:2]) for one in keys]
    if (
        not shapes
        or len(keys) != len(priors)
        or any(one.ndim != 3 for one in keys)
        or {*shapes} != {tuple(weights.shape)}
        or changes.ndim != 2
        or len(changes) < len(weights)
        or 0 in weights.shape
    ):
        raise InputError(
            f"keys {[list(one.shape) for one in keys]}, weights {list(weights.shape)}, changes {list(changes.shape)}, "
            f"{len(priors)} priors; expected keys [n, rows, d_k] and a prior per layer, weights [n, rows] and changes "
            "[at least n, d]"
        )
    count, rows = weights.shape
    return count, rows


def _energies(state: RLSState, keys: Tensor) -> Tensor:
    """Returns `k C k^T` of keys `[n, d_k]`, in parts."""
    found = []
    for part in keys.split(512):
        rows = part.to(state.device, state.dtype)
        panel = state.project(rows)
        found.append(panel.columns.total((panel.projected.double() * panel.keys.double()).sum(1), "terms").cpu())
    return torch.cat(found)


def _common(states: Sequence[RLSState], routes: Sequence[Route], keys: Sequence[Tensor]) -> Tensor:
    """Returns what the layers add in the first dimension at the bare prompts of edits, `[n]`, float64."""
    found = torch.zeros(len(keys[0]), dtype=torch.float64)
    for state, route, one in zip(states, routes, keys, strict=True):
        found += route.gain * state.outputs(one[:, 0].to(state.device, state.dtype))[:, 0].double().cpu()
    return found


def _aside(missing: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a direction orthogonal to each missing change `[n, d]`, as the spill is to what a layer adds."""
    drawn = torch.randn(missing.shape, generator=generator, dtype=missing.dtype)
    energy = missing.square().sum(1, keepdim=True).clamp_min(torch.finfo(missing.dtype).tiny)
    if missing.shape[1] > 1:
        drawn = drawn - (drawn * missing).sum(1, keepdim=True) / energy * missing
    return drawn / drawn.norm(dim=1, keepdim=True)


def _measured(
    state: RLSState, at: int, written: Sequence[_Written], free: float, held_out: Sequence[Tensor] | None
) -> LayerPoint:
    weight, prior = state.weight, state.prior
    realized = []
    for one in written:
        left = (one.values[at] - state.outputs(one.keys[at])).double()
        realized.append(float(realized_fraction(left, one.norms[at]).mean()))
    return LayerPoint(
        weight=state.deviation(),
        anchors=_energy(weight, prior.anchor_moment) ** 0.5 if prior.anchor_moment is not None else None,
        held_out=_energy(weight, held_out[at]) ** 0.5 if held_out is not None else None,
        objective=state.objective,
        free=free,
        realized=realized,
    )


def _energy(weight: Tensor, moment: Tensor) -> float:
    return max(float(((weight @ moment.to(weight)) * weight).sum(dtype=torch.float64)), 0.0)


def _arrived(states: Sequence[RLSState], routes: Sequence[Route], written: Sequence[_Written]) -> list[float]:
    """Returns per batch the fraction of the target changes that the edited hidden state has now."""
    found = []
    for one in written:
        left, aside = one.left.clone(), torch.zeros(len(one.left), dtype=torch.float64)
        for at, (state, route) in enumerate(zip(states, routes, strict=True)):
            moved = state.outputs(one.keys[at]).double().cpu() - one.outputs[at]
            left -= route.gain * moved
            aside += (route.spill * moved.norm(dim=1)).square()
        rest = (left.square().sum(1) + aside).sqrt()
        found.append(float(realized_fraction(rest[:, None], one.total).mean()))
    return found
