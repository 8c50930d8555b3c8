"""The edited layers together: rows of edits are written into all of them, or removed from all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rlsedit_fast.activity import report_activity
from rlsedit_fast.baselines import RECURSIVE, ExpertRuleLayer, LayerState, make_layer, make_rule
from rlsedit_fast.baselines.experts import Carriers
from rlsedit_fast.editing.attachment import check_finite_weights, mark
from rlsedit_fast.editing.config import Experts, KeyRows, StoredRows
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.layer_states import RECURSIVE_STATES, ROWS_AT_ONCE, LayerStates
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.rows import EditRows, edit_rows, goals_of_contexts, row_weights, rows_of_contexts
from rlsedit_fast.editing.search.value_search import Values
from rlsedit_fast.errors import ModelError
from rlsedit_fast.export import WeightChange
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.models.sites import Site
from rlsedit_fast.rls import BlockLayout, BlockPrior, BlockState, Prior, Saved, SeparateState
from rlsedit_fast.rls.prior import parts
from rlsedit_fast.rls.rounding import rounded
from rlsedit_fast.rls.shares import amplify_innovation, amplify_values, memit_share

logger = logging.getLogger(__name__)

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
        if (baseline := make_rule(rule, options)) is not None:
            return ExpertRuleLayer(projection.blocks, prior, baseline, cast("Carriers", experts), name=projection.name)
        kind = BlockState if experts == "exact" else SeparateState
        return kind(projection.blocks, prior, name=projection.name)
    (weight,) = projection.blocks
    columns = projection.columns
    return make_layer(rule, options, weight, prior, delay=delay, label=projection.name, saved=saved, columns=columns)


@dataclass(frozen=True, eq=False)
class LayersSnapshot:
    """Contents of `EditedLayers` at one point.

    Attributes:
        states: snapshot of each layer.
        protected: the protected rows.
    """

    states: list[Any]
    protected: list[EditRows]


class Writing(NamedTuple):
    """Result of writing a batch.

    Attributes:
        rows: rows of each request.
        energy: what each request added to the objective of the first layer; None for a rule without an objective.
    """

    rows: list[EditRows]
    energy: list[float] | None


class EditedLayers(LayerStates):
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
        self._processes = site.decoder.processes
        self._half = stored_rows == "fp16"
        states = [
            _make_state(p, prior, rule, rule_options or {}, delay, one, experts)
            for p, prior, one in zip(projections, priors, saved or repeat(None, len(priors)), strict=True)
        ]
        super().__init__(states, bare_weight)
        self._marks = [mark(projection) for projection in projections]

    def check_attached(self) -> None:
        """Raises ModelError if a weight was moved, cast, replaced or modified by other code."""
        self._processes.agree(self._check_attached)

    def _check_attached(self) -> None:
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
            blocks = [projection.columns.gather(block, "terms") for block in state.originals()]
            found |= projection.assembled(blocks)
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
        """Returns the original and the edited weight of each layer; of a mixture those of the experts that changed.

        Of several processes only the first one has whole weights, in host memory; the others return an empty list.
        """
        found = list[WeightChange]()
        for projection, state in zip(self._projections, self.states, strict=True):
            for block, pair in enumerate(state.weights()):
                if pair is None:
                    continue
                name, transposed = projection.block_name(block)
                original, current, stored = map(projection.columns.first_only, (*pair, projection.blocks[block]))
                if original is None or current is None or stored is None:
                    continue
                stack = projection.stack_of(block)
                found.append(WeightChange(name, original, stored, current, transposed, stack))
        return found

    def check_finite(self) -> None:
        """Raises UpdateError if a written weight contains NaN/Inf in the dtype of the model."""
        check_finite_weights(self._projections, self._processes)

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
    ) -> Writing:
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
            The rows of each request; `update` with them, from the same states, is equal bit for bit. And what each
            request added to the objective of the first layer.
        """
        contexts = values.start.shape[1] if key_rows == "contexts" else 1
        each = row_weights(contexts, self._bare_weight)
        weights = [request.edit.weight for request in requests] if weights is None else weights
        scaled = torch.tensor([float(weight) * one for weight in weights for one in each])
        goal, aimed = values.goal, torch.zeros(0)
        keys, written, energy = list[Tensor](), list[Tensor](), None
        for at, (projection, state) in enumerate(zip(self._projections, self.states, strict=True), start=1):
            report_activity(f"writing layer {projection.layer}")
            (read,), now = request_keys(self._decoder, [projection], requests, output_of=self._site.module)
            assert now is not None
            rows = rows_of_contexts(read, key_rows)
            # In their own memory: replayed rows are aligned in the same way, so that products round equally.
            rows = rounded(rows) if self._half else rows.clone(memory_format=torch.contiguous_format)
            rows = rows.to(state.dtype)
            panel = state.project(rows, scaled.to(rows.device))
            missing = goals_of_contexts(goal.to(now) - now, key_rows)
            innovation = memit_share(missing, at, len(self.states)).to(panel.keys)
            if at == len(self.states) and adherence is not None and isinstance(state, RECURSIVE_STATES):
                bare = torch.arange(0, len(innovation), contexts)
                innovation = amplify_innovation(panel, innovation, values.delta.norm(dim=1), bare, adherence)
            self._processes.same_tensors(innovation)
            # Values are rounded before they are written, so that removing and replaying them is exact.
            outputs = state.outputs(panel.keys)
            value = rounded(outputs + innovation) if self._half else outputs + innovation
            applied = value - outputs
            step = state.update_projected(panel, applied)
            if at == 1 and step.energy is not None:
                energy = step.energy.view(len(requests), -1).sum(1).tolist()
            keys.append(rows)
            written.append(value)
            aimed = rows_of_contexts(now, key_rows) + applied.to(now)
            check_finite_weights([projection], self._processes)  # the next layer reads the model
        return Writing(edit_rows(keys, written, contexts, weights, aimed), energy)

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
        assert isinstance(state, RECURSIVE_STATES)
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

    def protect_values(
        self, requests: Sequence[Request], values: Values, key_rows: KeyRows, weight: float, adherence: float | None
    ) -> list[EditRows]:
        """Writes values of requests as `write` does, as protected rows; see `most_at_once` for their number.

        Returns:
            The rows; `add_protected` with them, from the same states, is equal bit for bit.
        """
        weights = [weight] * len(requests)
        written = self.write(requests, values, key_rows, adherence=adherence, weights=weights).rows
        rows = [single for one in written for single in one.singles(self._bare_weight)]
        self.register_protected(rows)
        return rows

    @staticmethod
    def most_at_once(contexts: int) -> int:
        """Returns how many requests `protect_values` writes at once, so that a replay adds their rows at once."""
        return max(1, ROWS_AT_ONCE // contexts)

    def reset_weights(self) -> None:
        """Gives the model its original weights; the layers are not used afterwards."""
        for projection, state in zip(self._projections, self.states, strict=True):
            projection.restore(list(projection.assembled(state.originals()).values()))

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


def _shift(now: Tensor, then: Tensor, layout: BlockLayout | None) -> Tensor:
    """Returns `||now - then|| / ||then||` of rows of keys, `[n]`."""
    if layout is None:
        return (now - then).norm(dim=1) / then.norm(dim=1)
    return layout.distance(now, then) / layout.norm(then)
