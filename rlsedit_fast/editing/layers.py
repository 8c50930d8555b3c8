"""The edited layers together: rows of edits are written into all of them, or removed from all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.activity import report_activity
from rlsedit_fast.baselines import RECURSIVE, LayerState, make_layer
from rlsedit_fast.editing.attachment import check_finite_weights, mark
from rlsedit_fast.editing.config import Experts, KeyRows, StoredRows
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.records import Point
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.rows import EditRows, edit_rows, goals_of_contexts, row_weights, rows_of_contexts
from rlsedit_fast.editing.value_search import Values
from rlsedit_fast.errors import ModelError, RemovalError
from rlsedit_fast.export import WeightChange
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.models.sites import Site
from rlsedit_fast.rls import BlockLayout, BlockPrior, BlockState, Prior, RLSState, Saved, SeparateState
from rlsedit_fast.rls.prior import parts
from rlsedit_fast.rls.rounding import rounded
from rlsedit_fast.rls.shares import amplify_innovation, amplify_values, memit_share

logger = logging.getLogger(__name__)

_RECURSIVE = (RLSState, BlockState, SeparateState)
_ROWS_AT_ONCE = 128  # protected rows per update
_EDITS_AT_ONCE = 256  # edits whose keys are read in one pass


def _make_state(
    projection: Projection,
    prior: Prior | BlockPrior,
    rule: str,
    options: Mapping[str, Any],
    delay: int,
    saved: Saved | None,
    experts: Experts,
) -> LayerState:
    """Returns the state of a projection, which updates the weight in place."""
    if isinstance(prior, BlockPrior):
        kind = BlockState if experts == "exact" else SeparateState
        return kind(projection.blocks, prior, name=projection.name)
    (weight,) = projection.blocks
    return make_layer(rule, options, weight, prior, delay=delay, label=projection.name, saved=saved)


@dataclass(frozen=True, eq=False)
class LayersSnapshot:
    """Contents of `EditedLayers` at one point.

    Attributes:
        states: snapshot of each layer.
        protected: the protected rows.
    """

    states: list[Any]
    protected: list[EditRows]


class EditedLayers:
    """The solver states of the edited layers. The weights are those of the model, updated in place.

    Args:
        site: the hidden state that the value search changes.
        projections: the edited projections, ascending by layer.
        priors: prior of each layer.
        delay: see `RLSState`.
        bare_weight: see `ContextConfig`.
        stored_rows: see `EditConfig`; with `fp16` rows are rounded before they are written.
        saved: saved contents of each state, to continue from; the weights of the model are still the original ones.
        rule: editing method, see `rlsedit_fast.baselines`.
        rule_options: options of the rule.
        experts: see `EditConfig`.
    """

    def __init__(
        self,
        site: Site,
        projections: Sequence[Projection],
        priors: Sequence[Prior | BlockPrior],
        *,
        delay: int,
        bare_weight: float,
        stored_rows: StoredRows | None = "full",
        saved: Sequence[Saved] | None = None,
        rule: str = RECURSIVE,
        rule_options: Mapping[str, Any] | None = None,
        experts: Experts = "exact",
    ) -> None:
        self._site, self._decoder, self._projections = site, site.decoder, projections
        self._half, self._bare_weight = stored_rows == "fp16", bare_weight
        self.states: list[LayerState] = [
            _make_state(p, prior, rule, rule_options or {}, delay, one, experts)
            for p, prior, one in zip(projections, priors, saved or repeat(None, len(priors)), strict=True)
        ]
        self._protected: list[EditRows] = []
        self._marks = [mark(projection) for projection in projections]

    def point(self, edits: int) -> Point:
        """Returns the objective of each layer and its terms, for a number of active edits."""
        terms = tuple(state.terms() for state in self.states if isinstance(state, _RECURSIVE))
        return Point(edits, tuple(state.objective for state in self.states), terms)

    @property
    def protected(self) -> list[EditRows]:
        """The protected rows."""
        return list(self._protected)

    def check_attached(self) -> None:
        """Raises ModelError if a weight was moved, cast, replaced or modified by other code."""
        modules = dict(self._decoder.model.named_modules())
        for projection, known in zip(self._projections, self._marks, strict=True):
            if modules.get(projection.name) is not projection.module or mark(projection) != known:
                raise ModelError(
                    f"{projection.name} was replaced, moved, cast or modified by other code since the last edit, so "
                    "its solver state does not match",
                    hint="load the model again and create a new editor",
                )

    def snapshot(self) -> LayersSnapshot:
        """Takes a snapshot for `restore`. Pending work is not completed until `settle`.

        Raises:
            ModelError: see `check_attached`.
        """
        self.check_attached()
        return LayersSnapshot([state.snapshot() for state in self.states], list(self._protected))

    def restore(self, snapshot: LayersSnapshot) -> None:
        """Restores the layers, including the weights of the model, bit for bit."""
        for state, taken in zip(reversed(self.states), reversed(snapshot.states), strict=True):
            state.restore(taken)
        self._protected = list(snapshot.protected)
        self._marks = [mark(projection) for projection in self._projections]

    def originals(self) -> dict[str, Tensor]:
        """Returns the edited parameters as they were before the first edit, by name."""
        found = dict[str, Tensor]()
        for projection, state in zip(self._projections, self.states, strict=True):
            found |= projection.assembled(state.originals())
        return found

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Gives the model its original weights inside the block, and the edited ones back bit for bit after it."""
        edited = [projection.copies() for projection in self._projections]
        try:
            for projection, state in zip(self._projections, self.states, strict=True):
                projection.restore(list(projection.assembled(state.originals()).values()))
            yield
        finally:
            for projection, copies in zip(self._projections, edited, strict=True):
                projection.restore(copies)
            self._marks = [mark(projection) for projection in self._projections]

    def changes(self) -> list[WeightChange]:
        """Returns the original and the edited weight of each layer; of a mixture those of the experts that changed."""
        return [
            WeightChange(
                name=name,
                original=pair[0],
                current=pair[1],
                stored=projection.blocks[block],
                transposed=transposed,
                expert=projection.layout is not None and block < projection.layout.experts,
            )
            for projection, state in zip(self._projections, self.states, strict=True)
            for block, pair in enumerate(state.weights())
            if pair is not None
            for name, transposed in (projection.block_name(block),)
        ]

    def check_finite(self) -> None:
        """Raises UpdateError if a written weight contains NaN/Inf in the dtype of the model."""
        check_finite_weights(self._projections)

    def settle(self) -> None:
        """Completes pending work; called after a change was committed and its snapshot dropped."""
        self._marks = [mark(projection) for projection in self._projections]
        for state in self.states:
            state.settle()

    def write(
        self,
        requests: Sequence[Request],
        values: Values,
        key_rows: KeyRows,
        *,
        adherence: float | None = None,
        weights: Sequence[float] | None = None,
    ) -> list[EditRows]:
        """Writes a batch, layer by layer; the model is read again before each layer.

        The decoder layers between an edited layer and the edited hidden state transform what the layer adds. Every
        layer therefore realizes its share (`memit_share`) of the change that is still missing. The output of the last
        layer is the edited hidden state itself, so it realizes all of the rest.

        Args:
            requests: the batch.
            values: target states of each request.
            key_rows: rows per request.
            adherence: fraction of the target change that should arrive. If a crowded layer would realize less, the
                last layer aims at more (`amplify_innovation`). None: it aims at the target change.
            weights: weight of each request; by default those of the edits.

        Returns:
            The rows of each request; `update` with them, from the same states, is equal bit for bit.
        """
        contexts = values.start.shape[1] if key_rows == "contexts" else 1
        each = row_weights(contexts, self._bare_weight)
        weights = [request.edit.weight for request in requests] if weights is None else weights
        scaled = torch.tensor([float(weight) * one for weight in weights for one in each])
        goal, aimed = values.goal, torch.zeros(0)
        keys, written = list[Tensor](), list[Tensor]()
        for at, (projection, state) in enumerate(zip(self._projections, self.states, strict=True), start=1):
            report_activity(f"writing layer {projection.layer}")
            (read,), now = request_keys(self._decoder, [projection], requests, output_of=self._site.module)
            assert now is not None
            rows = rows_of_contexts(read, key_rows)
            # In their own memory: replayed rows are aligned in the same way, so that products round equally.
            rows = rounded(rows) if self._half else rows.clone(memory_format=torch.contiguous_format)
            panel = state.project(rows, scaled.to(rows.device))
            missing = goals_of_contexts(goal.to(now) - now, key_rows)
            innovation = memit_share(missing, at, len(self.states)).to(panel.keys)
            if at == len(self.states) and adherence is not None and isinstance(state, _RECURSIVE):
                bare = torch.arange(0, len(innovation), contexts)
                innovation = amplify_innovation(panel, innovation, values.delta.norm(dim=1), bare, adherence)
            # Values are rounded before they are written, so that removing and replaying them is exact.
            outputs = state.outputs(panel.keys)
            value = rounded(outputs + innovation) if self._half else outputs + innovation
            applied = value - outputs
            state.update_projected(panel, applied)
            keys.append(panel.keys)
            written.append(value)
            aimed = rows_of_contexts(now, key_rows) + applied.to(now)
            check_finite_weights([projection])  # the next layer reads the model
        return edit_rows(keys, written, contexts, weights, aimed)

    def move_values(
        self, requests: Sequence[Request], rows: Sequence[EditRows], values: Values, key_rows: KeyRows, fraction: float
    ) -> list[EditRows]:
        """Moves the edited hidden states of active edits, by changing the values of their rows in the last layer.

        Keys and weights of the rows stay, so C does not change.

        Args:
            requests: the edits.
            rows: their rows.
            values: the changes that are still missing, found in the present model.
            key_rows: see `write`.
            fraction: fraction of the changes that should arrive, at the keys that the last layer receives now.

        Returns:
            The new rows, in the same order.
        """
        state, last = self.states[-1], len(self.states) - 1
        assert isinstance(state, _RECURSIVE)
        keys, old, weights = self._stacked(rows, last)
        counts = [len(one) for one in rows]
        bare = torch.tensor([0, *counts[:-1]]).cumsum(0)
        change = values.delta.repeat_interleave(torch.tensor(counts, device=values.delta.device), dim=0).to(keys)
        (read,), _ = request_keys(self._decoder, self._projections[last:], requests)
        now = rows_of_contexts(read, key_rows).to(keys)
        step = amplify_values(state.project(keys, weights), now, change, values.delta.norm(dim=1), bare, fraction)
        new = old + step.to(old)
        if self._half:
            new = rounded(new)
        moved = [
            replace(one, values=(*one.values[:last], value), goal=None if one.goal is None else one.goal + added)
            for one, value, added in zip(rows, *(side.cpu().split(counts) for side in (new, new - old)), strict=True)
        ]
        self.replace_values(rows, moved)
        return moved

    def replace_values(self, old: Sequence[EditRows], new: Sequence[EditRows]) -> None:
        """Replaces the values of rows in the last layer; their keys and weights are equal."""
        state, last = self.states[-1], len(self.states) - 1
        assert isinstance(state, _RECURSIVE)
        keys, values, weights = self._stacked(old, last)
        state.replace(keys, values, self._stacked(new, last)[1], weights)

    def remove(
        self, removed: Sequence[EditRows], kept: Sequence[EditRows], rebuilt: Sequence[bool] | None = None
    ) -> tuple[bool, ...]:
        """Removes rows from every layer; a layer that cannot remove them accurately is rebuilt from the kept rows.

        Args:
            removed: rows to remove.
            kept: all other rows, except the protected ones.
            rebuilt: for a replay, which layers are rebuilt.

        Returns:
            Which layers were rebuilt.
        """
        return self._changed(lambda at: self.states[at].remove(*self._stacked(removed, at)), kept, rebuilt)

    def lower_weights(
        self,
        old: Sequence[EditRows],
        new: Sequence[EditRows],
        kept: Sequence[EditRows],
        rebuilt: Sequence[bool] | None = None,
    ) -> tuple[bool, ...]:
        """Lowers the weights of rows in every layer; one that cannot lower them accurately is rebuilt.

        Args:
            old: the rows.
            new: the same rows with their new weights.
            kept: all rows with the weights that result, except the protected ones.
            rebuilt: for a replay, which layers are rebuilt.

        Returns:
            Which layers were rebuilt.
        """
        return self._changed(lambda at: self._lower(at, old, new), kept, rebuilt)

    def _changed(
        self, change: Callable[[int], object], kept: Sequence[EditRows], rebuilt: Sequence[bool] | None
    ) -> tuple[bool, ...]:
        """Changes every layer, by its index; see `remove` for the other arguments and the result."""
        done = []
        for layer, state in enumerate(self.states):
            if rebuilt is not None:
                reason = "replay" if rebuilt[layer] else None
                if not reason:
                    change(layer)
            else:
                reason = "no edit remains" if not kept else _accurately(state, partial(change, layer))
            if reason:
                logger.info("rebuilding %s from %d active edits: %s", state.name, len(kept), reason)
                state.refresh(*self._stacked([*self._protected, *kept], layer))
            done.append(reason is not None)
        return tuple(done)

    def _lower(self, layer: int, old: Sequence[EditRows], new: Sequence[EditRows]) -> None:
        state = self.states[layer]
        assert isinstance(state, _RECURSIVE)
        for part in parts(len(old), _ROWS_AT_ONCE):
            keys, values, weights = self._stacked(old[part], layer)
            state.reweigh(keys, values, weights, self._stacked(new[part], layer)[2])

    def update(self, rows: Sequence[EditRows]) -> None:
        """Adds rows."""
        for layer, state in enumerate(self.states):
            state.update(*self._stacked(rows, layer))

    def rebuild(self, rows: Sequence[EditRows]) -> None:
        """Rebuilds every layer in float64 from its prior, the protected rows and `rows`."""
        for layer, state in enumerate(self.states):
            state.refresh(*self._stacked([*self._protected, *rows], layer))

    def rebuild_at_present_keys(
        self, requests: Sequence[Request], rows: Sequence[EditRows], key_rows: KeyRows
    ) -> list[EditRows]:
        """Reads the keys of edits again in the present model and rebuilds every layer from them.

        Later edits change the inputs of deeper edited layers, so stored keys become outdated. Every layer but the last
        is rebuilt with its stored values at the present keys. Then the model is read again, and the last layer gets
        what is missing to the goal of each edit.

        Args:
            requests: all active edits.
            rows: their rows.
            key_rows: see `write`.

        Returns:
            The new rows, in the same order.
        """
        last = len(self.states) - 1
        below = self._read_in_parts(requests, range(last), key_rows)[0] if last else []
        fresh = [replace(one, keys=(*(layer[at] for layer in below), one.keys[last])) for at, one in enumerate(rows)]
        for layer in range(last):
            self.states[layer].refresh(*self._stacked([*self._protected, *fresh], layer))
        (deepest,), now = self._read_in_parts(requests, range(last, last + 1), key_rows)
        state = self.states[last]
        found = []
        for one, key, reached in zip(fresh, deepest, now, strict=True):
            assert one.goal is not None
            missing = (one.goal - reached).to(state.device)
            values = state.outputs(key.to(missing.device, state.dtype)) + missing
            values = (rounded(values) if self._half else values).cpu()
            found.append(replace(one, keys=(*one.keys[:last], key), values=(*one.values[:last], values)))
        state.refresh(*self._stacked([*self._protected, *found], last))
        return found

    def key_shift(self, requests: Sequence[Request], rows: Sequence[EditRows], key_rows: KeyRows) -> list[float]:
        """Returns the median of `||now - stored|| / ||stored||` over keys of edits, per layer."""
        keys, _ = self._read_in_parts(requests, range(len(self.states)), key_rows)
        return [
            float(torch.cat([_shift(now, one.keys[layer], projection.layout) for now, one in pairs]).median())
            for layer, (projection, pairs) in enumerate(
                (projection, zip(found, rows, strict=True))
                for projection, found in zip(self._projections, keys, strict=True)
            )
        ]

    def protect(self, keys: Sequence[Tensor], weight: float) -> list[EditRows]:
        """Preserves the present outputs of every layer on `keys [t, d_k]`, per layer, with the weight of an edit.

        Returns:
            The rows; `add_protected` with them, from the same states, is equal bit for bit.
        """
        rows: list[EditRows] = []
        for part in parts(len(keys[0]), _ROWS_AT_ONCE):
            held = []
            for state, layer_keys in zip(self.states, keys, strict=True):
                some = layer_keys[part].to(state.device, state.dtype)
                held.append((some, state.outputs(some)))  # outputs of exactly these rows, so that the residual is 0
            these, outputs = zip(*held, strict=True)
            rows += edit_rows(these, outputs, 1, [weight] * len(these[0]))
        self.add_protected(rows)
        return rows

    def add_protected(self, rows: Sequence[EditRows]) -> None:
        """Adds rows to every layer as protected ones."""
        for part in parts(len(rows), _ROWS_AT_ONCE):
            self.update(rows[part])
        self.register_protected(rows)

    def register_protected(self, rows: Sequence[EditRows], *, replace_all: bool = False) -> None:
        """Marks rows that the layers already contain as protected, in addition to or instead of others."""
        self._protected = list(rows) if replace_all else [*self._protected, *rows]

    def _read_in_parts(
        self, requests: Sequence[Request], layers: range, key_rows: KeyRows
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Reads keys of edits, per layer and edit, and the edited hidden states per edit, into host memory."""
        keys: list[list[Tensor]] = [[] for _ in layers]
        states: list[Tensor] = []
        projections = [self._projections[i] for i in layers]
        for part in parts(len(requests), _EDITS_AT_ONCE):
            some = requests[part]
            read, now = request_keys(self._decoder, projections, some, output_of=self._site.module)
            assert now is not None
            for kept, layer, state in zip(keys, read, (self.states[i] for i in layers), strict=True):
                rows = rows_of_contexts(layer, key_rows).to(state.dtype)
                kept += (rounded(rows) if self._half else rows).cpu().unflatten(0, (len(some), -1))
            states += rows_of_contexts(now, key_rows).cpu().unflatten(0, (len(some), -1))
        return keys, states

    def _stacked(self, edits: Sequence[EditRows], layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns keys, values and weights of the rows of edits in one layer, on its device."""
        state = self.states[layer]
        d_v, d_k, device = state.value_width, state.key_width, state.device
        keys = [rows.keys[layer] for rows in edits]
        values = [rows.values[layer] for rows in edits]
        weights = [rows.weight * one for rows in edits for one in row_weights(len(rows), self._bare_weight)]
        return (
            (torch.cat(keys) if keys else torch.zeros(0, d_k)).to(device),
            (torch.cat(values) if values else torch.zeros(0, d_v)).to(device),
            torch.tensor(weights, dtype=torch.float32, device=device),
        )


def _shift(now: Tensor, then: Tensor, layout: BlockLayout | None) -> Tensor:
    """Returns `||now - then|| / ||then||` of rows of keys, `[n]`."""
    if layout is None:
        return (now - then).norm(dim=1) / then.norm(dim=1)
    return layout.distance(now, then) / layout.norm(then)


def _accurately(state: LayerState, change: Callable[[], object]) -> str | None:
    """Removes rows, or parts of them, from a state by `change`; returns why the state must be rebuilt, or None."""
    try:
        change()
    except RemovalError as error:
        return str(error)
    health = state.monitor()
    return health.advice if health.needs_refresh else None
