"""The edited layers together: a batch is written into all of them or into none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.editing.config import KeyRows, Keys, Share
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
from rlsedit_fast.rls.shares import joint_innovations, memit_share, raised_innovation
from rlsedit_fast.rls.state import dtype_of
from rlsedit_fast.rules import RECURSIVE, LayerState, layer_under

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 128  # protected rows that go in together


@dataclass(frozen=True)
class EditRows:
    """An edit's rows in every layer's least-squares problem: what its removal and a rebuild need, in host memory.

    Attributes:
        keys: per layer `[rows, d_k]`.
        values: per layer `[rows, d_v]`.
        weight: of each row, the same in every layer.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    weight: float

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.keys[0])


def groups_of(layers: int, share: Share) -> list[range]:
    """Which layers are written together, by their places: every group reads keys and state after the one before it.

    With `grouped` all layers but the last are one group and the last is another. What a layer adds reaches the site
    through the blocks in between, which change it; only the last layer's output is the site's, so the group of that
    layer alone writes exactly what is still missing there. With `memit` every layer is a group.

    Args:
        layers: how many are edited.
        share: how they share a change.
    """
    if share == "memit":
        return [range(i, i + 1) for i in range(layers)]
    return [range(layers - 1), range(layers - 1, layers)] if layers > 1 else [range(1)]


def rows_of_contexts(per_context: Tensor, key_rows: KeyRows) -> Tensor:
    """Keys `[n, contexts, d]` as rows of the least-squares problem: one per context, or the mean of an edit's."""
    return per_context.flatten(0, 1) if key_rows == "contexts" else per_context.mean(1)


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
        keys: as in `EditConfig`; what is told is rounded to it before it is written.
        saved: of each state, where they are to go on from there; the weights are then still the original ones.
        rule: what a batch is written by; see `rlsedit_fast.rules`.
        rule_options: its settings.
    """

    def __init__(
        self,
        site: Site,
        projections: Sequence[Projection],
        priors: Sequence[Prior],
        *,
        delay: int,
        keys: Keys | None = "full",
        saved: Sequence[Saved] | None = None,
        rule: str = RECURSIVE,
        rule_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._site, self._decoder, self._projections = site, site.decoder, projections
        self._halved = keys == "fp16"
        self.states: list[LayerState] = [
            layer_under(rule, rule_options or {}, p.weight, prior, delay=delay, label=p.name, saved=one)
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
                for projection in self._projections:
                    if not all_finite(projection.weight):
                        raise UpdateError(
                            f"{projection.name}: a weight left the range of {projection.weight.dtype}; nothing was "
                            "changed. Load the model in bfloat16 or float32"
                        )
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
        share: Share,
        key_rows: KeyRows,
        *,
        adherence: float | None = None,
    ) -> list[EditRows]:
        """Writes a batch, group by group (`groups_of`).

        Args:
            requests: the batch.
            values: of each request, the wanted states.
            weights: of each request.
            share: how the layers share the change.
            key_rows: rows per request.
            adherence: share of the wanted change that is to arrive at the site. Where a layer full of edits would
                shrink it below that, the last layer asks for more (`raised_innovation`). None asks for the change.

        Returns:
            What was written of each request; `update` with the same rows at the same states writes the same bits.
        """
        contexts = values.start.shape[1] if key_rows == "contexts" else 1
        row_weights = torch.tensor([float(weight) / contexts for weight in weights]).repeat_interleave(contexts)
        goal = values.goal
        keys, written = list[Tensor](), list[Tensor]()
        for group in groups_of(len(self.states), share):
            states = [self.states[i] for i in group]
            projections = [self._projections[i] for i in group]
            read, now = request_keys(self._decoder, projections, requests, output_of=self._site.module)
            assert now is not None
            missing = goals_of_contexts(goal.to(now) - now, key_rows)
            if share == "memit":
                missing = memit_share(missing, group[0] + 1, len(self.states))
            panels = [
                self._panel(state, rows_of_contexts(key, key_rows), row_weights)
                for state, key in zip(states, read, strict=True)
            ]
            innovations = joint_innovations(panels, missing) if len(group) > 1 else [missing]
            last = group[-1] + 1 == len(self.states)
            for state, panel, innovation in zip(states, panels, innovations, strict=True):
                innovation = innovation.to(panel.keys)
                if last and adherence is not None and isinstance(state, RLSState):
                    bare = torch.arange(0, len(innovation), contexts)
                    innovation = raised_innovation(panel, innovation, values.delta.norm(dim=1), bare, adherence)
                keys.append(panel.keys)
                written.append(self._apply(state, panel, innovation))
        return _edit_rows(keys, written, contexts, weights)

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
                    state.remove(*_rows(gone, layer, state))
            else:
                reason = "no edit remains" if not kept else _remove_accurately(state, _rows(gone, layer, state))
            if reason:
                logger.info("%s is rebuilt from the %d edits that remain: %s", state.name, len(kept), reason)
                state.refresh(*_rows([*self._protected, *kept], layer, state))
            done.append(reason is not None)
        return tuple(done)

    def update(self, rows: Sequence[EditRows]) -> None:
        """Puts rows in, as they are."""
        for layer, state in enumerate(self.states):
            state.update(*_rows(rows, layer, state))

    def rebuild(self, kept: Sequence[EditRows]) -> None:
        """Makes every layer afresh in float64 from its prior, the protected rows and these."""
        for layer, state in enumerate(self.states):
            state.refresh(*_rows([*self._protected, *kept], layer, state))

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

    def _apply(self, state: LayerState, panel: Any, innovation: Tensor) -> Tensor:
        """Writes one layer's part and returns the values.

        Values are rounded before they are written: what is kept of an edit is what was written, so that removing it
        and writing it again are exact.
        """
        now = state.outputs(panel.keys)
        values = now + innovation
        if self._halved:
            values = rounded(values)
        state.update_projected(panel, values - now)
        return values


def _mark(projection: Projection) -> tuple[object, ...]:
    """Differs once the weight lies elsewhere, has another dtype or was written to."""
    weight = projection.parameter
    return weight.data_ptr(), weight.device, weight.dtype, weight._version


def _edit_rows(keys: Sequence[Tensor], values: Sequence[Tensor], each: int, weights: Sequence[float]) -> list[EditRows]:
    """A batch's rows, `[n each, d_k]` and `[n each, d_v]` per layer, `each` of them an edit's; weights are edits'."""
    sides = [
        list(zip(*(layer.cpu().unflatten(0, (-1, each)) for layer in side), strict=True)) for side in (keys, values)
    ]
    return [EditRows(k, v, float(weight) / each) for k, v, weight in zip(*sides, weights, strict=True)]


def _rows(edits: Sequence[EditRows], layer: int, state: LayerState) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and weights of edits in one layer, on its device."""
    (d_v, d_k), device = state.original.shape, state.original.device
    keys = [rows.keys[layer] for rows in edits]
    values = [rows.values[layer] for rows in edits]
    weights = [rows.weight for rows in edits for _ in range(len(rows))]
    return (
        (torch.cat(keys) if keys else torch.zeros(0, d_k)).to(device),
        (torch.cat(values) if values else torch.zeros(0, d_v)).to(device),
        torch.tensor(weights, dtype=torch.float32, device=device),
    )


def _remove_accurately(state: LayerState, rows: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """Removes rows from a state; says why it must be rebuilt all the same, if it must."""
    try:
        state.remove(*rows)
    except RemovalError as error:
        return str(error)
    health = state.monitor()
    return health.advice if health.needs_refresh else None
