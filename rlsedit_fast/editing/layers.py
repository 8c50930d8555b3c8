"""The edited layers together: a batch is written into all of them or into none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.baselines import RECURSIVE, LayerState, make_layer
from rlsedit_fast.editing.config import KeyRows, Keys
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.rounding import rounded
from rlsedit_fast.editing.values import Values
from rlsedit_fast.errors import ModelError, RemovalError, UpdateError
from rlsedit_fast.models.projections import Projection
from rlsedit_fast.models.sites import Site
from rlsedit_fast.rls import Prior, RLSState, Saved
from rlsedit_fast.rls.checks import all_finite
from rlsedit_fast.rls.prior import parts
from rlsedit_fast.rls.shares import amplify_innovation, amplify_values, memit_share
from rlsedit_fast.rls.state import dtype_of

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 128  # protected rows that go in together
_EDITS_AT_ONCE = 256  # edits whose keys are read in one pass


@dataclass(frozen=True)
class EditRows:
    """An edit's rows in every layer's least-squares problem: what its removal and a rebuild need, in host memory.

    Attributes:
        keys: per layer `[rows, d_k]`.
        values: per layer `[rows, d_v]`.
        weight: of the edit; see `row_weights`.
        goal: the edited state that the rows ask for, `[rows, d_v]`: the wanted one, and what was asked beyond it for
            the adherence or by a refinement. With a mean key it is the mean over contexts. `reread` writes towards it.
            None for protected rows.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    weight: float
    goal: Tensor | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.keys[0])


def rows_of_contexts(per_context: Tensor, key_rows: KeyRows) -> Tensor:
    """Keys `[n, contexts, d]` as rows of the least-squares problem: one per context, or the mean of an edit's."""
    return per_context.flatten(0, 1) if key_rows == "contexts" else per_context.mean(1)


def row_weights(rows: int, bare_weight: float) -> list[float]:
    """Weights of an edit's rows, which sum to 1: the bare prompt's, and equal ones for the other contexts."""
    return [1.0] if rows == 1 else [bare_weight, *[(1 - bare_weight) / (rows - 1)] * (rows - 1)]


def goals_of_contexts(per_context: Tensor, key_rows: KeyRows) -> Tensor:
    """States `[n, contexts, d]` beside `rows_of_contexts`; the bare prompt's stands for the mean key."""
    return per_context.flatten(0, 1) if key_rows == "contexts" else per_context[:, 0]


class EditedLayers:
    """The solver states of the edited layers; their weights are the model's own, kept current in place.

    Args:
        site: where the changes that are written were searched.
        projections: the edited ones, ascending.
        priors: one each.
        delay: as in `RLSState`.
        bare_weight: as in `EditConfig`.
        keys: as in `EditConfig`; what is told is rounded to it before it is written.
        saved: of each state, where they are to go on from there; the weights are then still the original ones.
        rule: what a batch is written by; see `rlsedit_fast.baselines`.
        rule_options: its settings.
    """

    def __init__(
        self,
        site: Site,
        projections: Sequence[Projection],
        priors: Sequence[Prior],
        *,
        delay: int,
        bare_weight: float,
        keys: Keys | None = "full",
        saved: Sequence[Saved] | None = None,
        rule: str = RECURSIVE,
        rule_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._site, self._decoder, self._projections = site, site.decoder, projections
        self._halved, self._bare_weight = keys == "fp16", bare_weight
        self.states: list[LayerState] = [
            make_layer(rule, rule_options or {}, p.weight, prior, delay=delay, label=p.name, saved=one)
            for p, prior, one in zip(projections, priors, saved or repeat(None, len(priors)), strict=True)
        ]
        self._protected: list[EditRows] = []
        self._marks = [_mark(projection) for projection in projections]

    def check_attached(self) -> None:
        """Raises ModelError if a weight was moved, cast, replaced or written to by something else."""
        modules = dict(self._decoder.model.named_modules())
        for projection, mark in zip(self._projections, self._marks, strict=True):
            if modules.get(projection.name) is not projection.module or _mark(projection) != mark:
                raise ModelError(
                    f"{projection.name} was replaced, moved, cast or written to by something else since the editor "
                    "looked at it last; its state no longer fits. Put the model as it should be and make a new editor"
                )

    @contextmanager
    def transaction(self) -> Iterator[list[Callable[[], object]]]:
        """Puts every layer, model included, back if the block raises.

        Yields:
            A list. The functions that the block puts there are called in order once all is written and found fit to
            stay; if one raises, all is put back too.

        Raises:
            ModelError: see `check_attached`; nothing is done.
            UpdateError: a weight that was written is not finite in the model's dtype; nothing has changed.
        """
        self.check_attached()
        protected, last = list(self._protected), list[Callable[[], object]]()
        try:
            with ExitStack() as stack:
                for state in self.states:
                    stack.enter_context(state.transaction())
                yield last
                _check_finite(self._projections)
                for action in last:
                    action()
        except BaseException:
            self._protected = protected
            raise
        finally:
            self._marks = [_mark(projection) for projection in self._projections]
        for state in self.states:
            state.settle()

    def write(
        self,
        requests: Sequence[Request],
        values: Values,
        weights: Sequence[float],
        key_rows: KeyRows,
        *,
        adherence: float | None = None,
    ) -> list[EditRows]:
        """Writes a batch, layer by layer; the model is read again before each.

        What a layer adds reaches the site through the blocks in between, which change it, so every layer takes its
        share (`memit_share`) of what is still missing at the site. The last layer's output is the site's own, and
        takes all of the rest.

        Args:
            requests: the batch.
            values: of each request, the wanted states.
            weights: of each request.
            key_rows: rows per request.
            adherence: share of the wanted change that is to arrive at the site. Where a layer full of edits would
                shrink it below that, the last layer asks for more (`amplify_innovation`). None asks for the change.

        Returns:
            What was written of each request; `update` with the same rows at the same states writes the same bits.
        """
        contexts = values.start.shape[1] if key_rows == "contexts" else 1
        each = row_weights(contexts, self._bare_weight)
        scaled = torch.tensor([float(weight) * one for weight in weights for one in each])
        goal, asked = values.goal, torch.zeros(0)
        keys, written = list[Tensor](), list[Tensor]()
        for at, (projection, state) in enumerate(zip(self._projections, self.states, strict=True), start=1):
            (read,), now = request_keys(self._decoder, [projection], requests, output_of=self._site.module)
            assert now is not None
            panel = self._panel(state, rows_of_contexts(read, key_rows), scaled)
            missing = goals_of_contexts(goal.to(now) - now, key_rows)
            innovation = memit_share(missing, at, len(self.states)).to(panel.keys)
            if at == len(self.states) and adherence is not None and isinstance(state, RLSState):
                bare = torch.arange(0, len(innovation), contexts)
                innovation = amplify_innovation(panel, innovation, values.delta.norm(dim=1), bare, adherence)
            keys.append(panel.keys)
            value, applied = self._apply(state, panel, innovation)
            written.append(value)
            asked = rows_of_contexts(now, key_rows) + applied.to(now)
            _check_finite([projection])  # the next layer reads the model
        return _edit_rows(keys, written, contexts, weights, asked)

    def raise_values(
        self, requests: Sequence[Request], rows: Sequence[EditRows], values: Values, key_rows: KeyRows, share: float
    ) -> list[EditRows]:
        """Moves the edited states of edits that the layers hold further, by new values of their rows in the last layer.

        The rows keep their keys and weights, so C does not change, and nothing is removed.

        Args:
            requests: the edits.
            rows: theirs.
            values: the changes that are still wanted, found in the present model.
            key_rows: as in `write`.
            share: of the changes that is to arrive, at the keys that the last layer receives now.

        Returns:
            The rows that the layers hold now, in the same order.
        """
        state, last = self.states[-1], len(self.states) - 1
        assert isinstance(state, RLSState)
        keys, held, weights = self._rows(rows, last)
        counts = [len(one) for one in rows]
        bare = torch.tensor([0, *counts[:-1]]).cumsum(0)
        change = values.delta.repeat_interleave(torch.tensor(counts, device=values.delta.device), dim=0).to(keys)
        (read,), _ = request_keys(self._decoder, self._projections[last:], requests)
        now = rows_of_contexts(read, key_rows).to(keys)
        raised = amplify_values(state.project(keys, weights), now, change, values.delta.norm(dim=1), bare, share)
        fresh = held + raised.to(held)
        if self._halved:
            fresh = rounded(fresh)
        revised = [
            replace(one, values=(*one.values[:last], value), goal=None if one.goal is None else one.goal + more)
            for one, value, more in zip(
                rows, *(side.cpu().split(counts) for side in (fresh, fresh - held)), strict=True
            )
        ]
        self.exchange(rows, revised)
        return revised

    def exchange(self, held: Sequence[EditRows], fresh: Sequence[EditRows]) -> None:
        """Gives rows that the layers hold the last layer's values of `fresh`."""
        state, last = self.states[-1], len(self.states) - 1
        assert isinstance(state, RLSState)
        keys, old, weights = self._rows(held, last)
        state.replace(keys, old, self._rows(fresh, last)[1], weights)

    def remove(
        self, gone: Sequence[EditRows], kept: Sequence[EditRows], rebuilt: Sequence[bool] | None = None
    ) -> tuple[bool, ...]:
        """Takes rows out of every layer; a layer that cannot let go accurately is rebuilt from those that are kept.

        Args:
            gone: to be taken out.
            kept: all others but the protected ones.
            rebuilt: which layers are to be rebuilt, where that was found before.

        Returns:
            Which layers were rebuilt.
        """
        done = []
        for layer, state in enumerate(self.states):
            if rebuilt is not None:
                reason = "it was so before" if rebuilt[layer] else None
                if not reason:
                    state.remove(*self._rows(gone, layer))
            else:
                reason = "no edit remains" if not kept else _remove_accurately(state, self._rows(gone, layer))
            if reason:
                logger.info("%s is rebuilt from the %d edits that remain: %s", state.name, len(kept), reason)
                state.refresh(*self._rows([*self._protected, *kept], layer))
            done.append(reason is not None)
        return tuple(done)

    def update(self, rows: Sequence[EditRows]) -> None:
        """Puts rows in, as they are."""
        for layer, state in enumerate(self.states):
            state.update(*self._rows(rows, layer))

    def rebuild(self, kept: Sequence[EditRows]) -> None:
        """Makes every layer afresh in float64 from its prior, the protected rows and these."""
        for layer, state in enumerate(self.states):
            state.refresh(*self._rows([*self._protected, *kept], layer))

    def reread(self, requests: Sequence[Request], rows: Sequence[EditRows], key_rows: KeyRows) -> list[EditRows]:
        """Reads the keys of edits again in the present model, and rebuilds every layer from them.

        Later edits change what the deeper edited layers receive, so an edit's stored keys age. Every layer but the
        last is rebuilt to give its stored values at the new keys. Then the model is read once more, and the last layer
        is given what is missing to each edit's goal.

        Args:
            requests: all active edits.
            rows: theirs.
            key_rows: as in `write`.

        Returns:
            The rows that the layers hold now, in the same order.
        """
        last = len(self.states) - 1
        below = self._read_in_parts(requests, range(last), key_rows)[0] if last else []
        fresh = [replace(one, keys=(*(layer[at] for layer in below), one.keys[last])) for at, one in enumerate(rows)]
        for layer in range(last):
            self.states[layer].refresh(*self._rows([*self._protected, *fresh], layer))
        (deepest,), now = self._read_in_parts(requests, range(last, last + 1), key_rows)
        state = self.states[last]
        found = []
        for one, key, reached in zip(fresh, deepest, now, strict=True):
            assert one.goal is not None
            missing = (one.goal - reached).to(state.original.device)
            values = state.outputs(key.to(missing.device, dtype_of(state.original))) + missing
            values = (rounded(values) if self._halved else values).cpu()
            found.append(replace(one, keys=(*one.keys[:last], key), values=(*one.values[:last], values)))
        state.refresh(*self._rows([*self._protected, *found], last))
        return found

    def key_shift(self, requests: Sequence[Request], rows: Sequence[EditRows], key_rows: KeyRows) -> list[float]:
        """How far keys have moved since edits were written: the median of `||now - then|| / ||then||`, per layer."""
        keys, _ = self._read_in_parts(requests, range(len(self.states)), key_rows)
        return [
            float(torch.cat([(now - then).norm(dim=1) / then.norm(dim=1) for now, then in pairs]).median())
            for pairs in (
                [(now, one.keys[layer]) for now, one in zip(found, rows, strict=True)]
                for layer, found in enumerate(keys)
            )
        ]

    def _read_in_parts(
        self, requests: Sequence[Request], places: range, key_rows: KeyRows
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Keys of edits in some layers, per layer and edit, and states at the site per edit, in host memory."""
        keys: list[list[Tensor]] = [[] for _ in places]
        states: list[Tensor] = []
        projections = [self._projections[i] for i in places]
        for part in parts(len(requests), _EDITS_AT_ONCE):
            some = requests[part]
            read, now = request_keys(self._decoder, projections, some, output_of=self._site.module)
            assert now is not None
            for kept, layer, i in zip(keys, read, places, strict=True):
                rows = rows_of_contexts(layer, key_rows).to(dtype_of(self._projections[i].weight))
                kept += (rounded(rows) if self._halved else rows).cpu().unflatten(0, (len(some), -1))
            states += rows_of_contexts(now, key_rows).cpu().unflatten(0, (len(some), -1))
        return keys, states

    @property
    def protected(self) -> list[EditRows]:
        """The rows that are protected."""
        return list(self._protected)

    def protect(self, keys: Sequence[Tensor], weight: float) -> list[EditRows]:
        """Holds every layer to its present outputs on `keys [t, d_k]`, per layer, as firmly as edits of that weight.

        Returns:
            The rows; `hold` with them, at the same states, does the same bit for bit.
        """
        rows: list[EditRows] = []
        for part in parts(len(keys[0]), _ROWS_AT_ONCE):
            held = []
            for state, layer_keys in zip(self.states, keys, strict=True):
                some = layer_keys[part].to(state.original.device, dtype_of(state.original))
                held.append((some, state.outputs(some)))  # of the very rows that go in: nothing is left over to write
            here, outputs = zip(*held, strict=True)
            rows += _edit_rows(here, outputs, 1, [weight] * len(here[0]))
        self.hold(rows)
        return rows

    def hold(self, rows: Sequence[EditRows]) -> None:
        """Protects rows."""
        for part in parts(len(rows), _ROWS_AT_ONCE):
            self.update(rows[part])
        self.count_as_protected(rows)

    def protect_only(self, rows: Sequence[EditRows]) -> None:
        """Notes that of all rows these are the protected ones."""
        self._protected = list(rows)

    def count_as_protected(self, rows: Sequence[EditRows]) -> None:
        """Notes rows that the states hold already as protected ones."""
        self._protected += rows

    def _panel(self, state: LayerState, keys: Tensor, weights: Tensor) -> Any:
        # In memory of their own: what is replayed later lies as well aligned, and products round alike.
        keys = rounded(keys) if self._halved else keys.clone(memory_format=torch.contiguous_format)
        return state.project(keys, weights.to(keys.device))

    def _rows(self, edits: Sequence[EditRows], layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and weights of edits in one layer, on its device."""
        original = self.states[layer].original
        (d_v, d_k), device = original.shape, original.device
        keys = [rows.keys[layer] for rows in edits]
        values = [rows.values[layer] for rows in edits]
        weights = [rows.weight * one for rows in edits for one in row_weights(len(rows), self._bare_weight)]
        return (
            (torch.cat(keys) if keys else torch.zeros(0, d_k)).to(device),
            (torch.cat(values) if values else torch.zeros(0, d_v)).to(device),
            torch.tensor(weights, dtype=torch.float32, device=device),
        )

    def _apply(self, state: LayerState, panel: Any, innovation: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's part; returns the values, and the innovation that they are.

        Values are rounded before they are written: what is kept of an edit is what was written, so that removing it
        and writing it again are exact.
        """
        now = state.outputs(panel.keys)
        values = now + innovation
        if self._halved:
            values = rounded(values)
        applied = values - now
        state.update_projected(panel, applied)
        return values, applied


def _check_finite(projections: Sequence[Projection]) -> None:
    """Raises UpdateError where a written weight is not finite in the model's dtype."""
    for projection in projections:
        if not all_finite(projection.weight):
            raise UpdateError(
                f"{projection.name}: a weight left the range of {projection.weight.dtype}; nothing was changed. Load "
                "the model in bfloat16 or float32"
            )


def _mark(projection: Projection) -> tuple[object, ...]:
    """Differs once the weight lies elsewhere, has another dtype or was written to."""
    weight = projection.parameter
    return weight.data_ptr(), weight.device, weight.dtype, weight._version


def _edit_rows(
    keys: Sequence[Tensor], values: Sequence[Tensor], each: int, weights: Sequence[float], goal: Tensor | None = None
) -> list[EditRows]:
    """A batch's rows, `[n each, d_k]` and `[n each, d_v]` per layer, `each` of them an edit's; weights are edits'."""
    sides = [
        list(zip(*(layer.cpu().unflatten(0, (-1, each)) for layer in side), strict=True)) for side in (keys, values)
    ]
    goals = repeat(None, len(weights)) if goal is None else goal.cpu().unflatten(0, (-1, each))
    return [EditRows(k, v, float(weight), g) for k, v, weight, g in zip(*sides, weights, goals, strict=True)]


def _remove_accurately(state: LayerState, rows: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """Removes rows from a state; says why it must be rebuilt all the same, if it must."""
    try:
        state.remove(*rows)
    except RemovalError as error:
        return str(error)
    health = state.monitor()
    return health.advice if health.needs_refresh else None
