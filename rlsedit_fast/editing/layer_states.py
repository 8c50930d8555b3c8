"""The solver states of the edited layers: rows are added to all of them, removed, reweighted, or protected."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rlsedit_fast.baselines import LayerState
from rlsedit_fast.editing.records import Point
from rlsedit_fast.editing.rows import EditRows, edit_rows, row_weights
from rlsedit_fast.errors import RemovalError
from rlsedit_fast.rls import BlockState, RLSState, SeparateState
from rlsedit_fast.rls.prior import parts

logger = logging.getLogger(__name__)

RECURSIVE_STATES = (RLSState, BlockState, SeparateState)
ROWS_AT_ONCE = 128
"""Protected rows per update, and edits per change of weights."""


class LayerStates:
    """The solver states of the edited layers, and the protected rows in them.

    Args:
        states: state of each layer.
        bare_weight: see `ContextConfig`.
    """

    def __init__(self, states: list[LayerState], bare_weight: float) -> None:
        self.states, self._bare_weight = states, bare_weight
        self._protected: list[EditRows] = []

    def point(self, edits: int) -> Point:
        """Returns the objective of each layer and its terms, for a number of active edits."""
        terms = tuple(state.terms() for state in self.states if isinstance(state, RECURSIVE_STATES))
        return Point(edits, tuple(state.objective for state in self.states), terms)

    @property
    def protected(self) -> list[EditRows]:
        """The protected rows."""
        return list(self._protected)

    def replace_values(self, old: Sequence[EditRows], new: Sequence[EditRows]) -> None:
        """Replaces the values of rows in the last layer; their keys and weights are equal."""
        state, last = self.states[-1], len(self.states) - 1
        assert isinstance(state, RECURSIVE_STATES)
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
        assert isinstance(state, RECURSIVE_STATES)
        for part in parts(len(old), ROWS_AT_ONCE):
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

    def protect(self, keys: Sequence[Tensor], weight: float, values: Sequence[Tensor] | None = None) -> list[EditRows]:
        """Preserves outputs of every layer on `keys [t, d_k]`, per layer, with the weight of an edit.

        Args:
            keys: keys per layer.
            weight: weight of each row.
            values: outputs per layer, `[t, d_v]`; by default the present ones.

        Returns:
            The rows; `add_protected` with them, from the same states, is equal bit for bit.
        """
        rows: list[EditRows] = []
        for part in parts(len(keys[0]), ROWS_AT_ONCE):
            held = []
            for at, (state, layer_keys) in enumerate(zip(self.states, keys, strict=True)):
                some = layer_keys[part].to(state.device, state.dtype)
                # Outputs of exactly these rows, so that the residual is 0.
                held.append((some, state.outputs(some) if values is None else values[at][part].to(some)))
            these, outputs = zip(*held, strict=True)
            rows += edit_rows(these, outputs, 1, [weight] * len(these[0]))
        self.add_protected(rows)
        return rows

    def protected_misfit(self) -> list[float]:
        """Returns `sqrt(sum_i w_i ||K_i W^T - V_i||^2)` over the protected rows of each layer."""
        found = []
        for layer, state in enumerate(self.states):
            keys, values, weights = self._stacked(self._protected, layer)
            missing = (values.to(state.dtype) - state.outputs(keys.to(state.dtype))).double()
            found.append(float((missing.square().sum(1) * weights).sum().sqrt()))
        return found

    def add_protected(self, rows: Sequence[EditRows]) -> None:
        """Adds rows to every layer as protected ones."""
        for part in parts(len(rows), ROWS_AT_ONCE):
            self.update(rows[part])
        self.register_protected(rows)

    def register_protected(self, rows: Sequence[EditRows], *, replace_all: bool = False) -> None:
        """Marks rows that the layers already contain as protected, in addition to or instead of others."""
        self._protected = list(rows) if replace_all else [*self._protected, *rows]

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


def _accurately(state: LayerState, change: Callable[[], object]) -> str | None:
    """Removes rows, or parts of them, from a state by `change`; returns why the state must be rebuilt, or None."""
    try:
        change()
    except RemovalError as error:
        return str(error)
    health = state.monitor()
    return health.advice if health.needs_refresh else None
