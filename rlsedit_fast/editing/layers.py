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

from rlsedit_fast.editing.config import Keys, Share
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.rounding import rounded
from rlsedit_fast.errors import ModelError, RemovalError, UpdateError
from rlsedit_fast.models.projections import Projection
from rlsedit_fast.models.sites import Site
from rlsedit_fast.rls import Prior, Saved, Step
from rlsedit_fast.rls.checks import all_finite
from rlsedit_fast.rls.prior import parts
from rlsedit_fast.rls.shares import joint_innovations, memit_share
from rlsedit_fast.rls.state import dtype_of
from rlsedit_fast.rules import RECURSIVE, LayerState, RuleLayer, layer_under

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 128  # protected rows that go in together


@dataclass(frozen=True)
class Told:
    """A row of every layer's problem: what removal and a rebuild need of an edit, in the host's memory.

    Attributes:
        keys: per layer `[d_k]`.
        values: per layer `[d_v]`.
        weight: the same in every layer.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    weight: float


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
        self._protected: list[Told] = []
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
        residual: Tensor,
        weights: Tensor,
        share: Share,
        *,
        start: Tensor | None = None,
    ) -> tuple[list[Told], Tensor]:
        """Writes a batch.

        Args:
            requests: the batch.
            residual: the change wanted of each, `[n, d_v]`.
            weights: `[n]`.
            share: how the layers divide it.
            start: the states at the site that `residual` starts from, `[n, d_v]`, where something has been written
                since; None takes them as they are now.

        Returns:
            What was told, and what is left over of the changes, `[n, d_v]`. `update` with the same rows, at the same
            states, does the same bit for bit.
        """
        other = isinstance(self.states[0], RuleLayer)  # one layer, or share='memit': the editor sees to it
        rows = self._jointly if share == "joint" and not other else self._in_turn
        keys, values, left = rows(requests, residual, weights, start)
        return _told(keys, values, weights.tolist()), left

    def remove(
        self, gone: Sequence[Told], kept: Sequence[Told], rebuilt: Sequence[bool] | None = None
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

    def update(self, rows: Sequence[Told]) -> None:
        """Puts rows in, as they are."""
        for layer, state in enumerate(self.states):
            state.update(*_rows(rows, layer, state))

    def rebuild(self, kept: Sequence[Told]) -> None:
        """Makes every layer afresh in float64 from its prior, the protected rows and these."""
        for layer, state in enumerate(self.states):
            state.refresh(*_rows([*self._protected, *kept], layer, state))

    @property
    def protected(self) -> list[Told]:
        """The rows that are protected."""
        return list(self._protected)

    def protect(self, keys: Sequence[Tensor], weight: float) -> list[Told]:
        """Holds every layer to its present outputs on `keys [t, d_k]`, per layer, as firmly as edits of that weight.

        Returns:
            The rows; `hold` with them, at the same states, does the same bit for bit.
        """
        rows: list[Told] = []
        for part in parts(len(keys[0]), _ROWS_AT_ONCE):
            held = []
            for state, layer_keys in zip(self.states, keys, strict=True):
                some = layer_keys[part].to(state.original.device, dtype_of(state.original))
                held.append((some, state.outputs(some)))  # of the very rows that go in: nothing is left over to write
            here, outputs = zip(*held, strict=True)
            rows += _told(here, outputs, [weight] * len(here[0]))
        self.hold(rows)
        return rows

    def hold(self, rows: Sequence[Told]) -> None:
        """Protects rows."""
        for part in parts(len(rows), _ROWS_AT_ONCE):
            self.update(rows[part])
        self.count_as_protected(rows)

    def protect_only(self, rows: Sequence[Told]) -> None:
        """Notes that of all rows these are the protected ones."""
        self._protected = list(rows)

    def count_as_protected(self, rows: Sequence[Told]) -> None:
        """Notes rows that the states hold already as protected ones."""
        self._protected += rows

    def _jointly(
        self, requests: Sequence[Request], residual: Tensor, weights: Tensor, start: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """All layers from one key pass."""
        place = None if start is None else self._site.module
        keys, now = request_keys(self._decoder, self._projections, requests, output_of=place)
        if start is not None and now is not None:
            residual = residual + (start - now.to(start))
        panels = [self._panel(state, key, weights) for state, key in zip(self.states, keys, strict=True)]
        innovations = joint_innovations(panels, residual)
        values, left = [], residual.clone()
        for state, panel, innovation in zip(self.states, panels, innovations, strict=True):
            told, step, applied = self._apply(state, panel, innovation)
            values.append(told)
            left -= (applied - step.left_over).to(left)
        return [panel.keys for panel in panels], values, left

    def _in_turn(
        self, requests: Sequence[Request], residual: Tensor, weights: Tensor, start: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """MEMIT's share: each layer is written before the next one's keys and residual are read."""
        all_keys, values = [], []
        goal = None if start is None else start + residual
        left = residual.clone()
        for i, (projection, state) in enumerate(zip(self._projections, self.states, strict=True), start=1):
            (keys,), now = request_keys(self._decoder, [projection], requests, output_of=self._site.module)
            assert now is not None
            now = now.to(residual)
            if i == 1:
                goal = now + residual if goal is None else goal
                left = goal - now
            assert goal is not None
            innovation = memit_share(goal - now, i, len(self._projections)).to(keys)
            panel = self._panel(state, keys, weights)
            all_keys.append(panel.keys)
            told, step, applied = self._apply(state, panel, innovation)
            values.append(told)
            left -= (applied - step.left_over).to(left)
        return all_keys, values, left

    def _panel(self, state: LayerState, keys: Tensor, weights: Tensor) -> Any:
        # In memory of their own: what is replayed later lies as well aligned, and products round alike.
        keys = rounded(keys) if self._halved else keys.clone(memory_format=torch.contiguous_format)
        return state.project(keys, weights.to(keys.device))

    def _apply(self, state: LayerState, panel: Any, innovation: Tensor) -> tuple[Tensor, Step, Tensor]:
        """Writes a layer's part; gives the values, the step, and the innovation that these values are.

        The values are rounded before they are written: what is kept of an edit is what was written, so that taking it
        out, and writing it again, are exact.
        """
        now = state.outputs(panel.keys)
        values = now + innovation
        if self._halved:
            values = rounded(values)
        applied = values - now
        return values, state.update_projected(panel, applied), applied


def _mark(projection: Projection) -> tuple[object, ...]:
    """Differs once the weight lies elsewhere, has another dtype or was written to."""
    weight = projection.parameter
    return weight.data_ptr(), weight.device, weight.dtype, weight._version


def _told(keys: Sequence[Tensor], values: Sequence[Tensor], weights: Sequence[float]) -> list[Told]:
    """A batch's rows, `[n, d_k]` and `[n, d_v]` of each layer."""
    sides = [list(zip(*(layer.cpu() for layer in side), strict=True)) for side in (keys, values)]
    return [Told(*row) for row in zip(*sides, weights, strict=True)]


def _rows(told: Sequence[Told], layer: int, state: LayerState) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and weights of edits in one layer, where it is."""
    (d_v, d_k), device = state.original.shape, state.original.device
    keys = [what.keys[layer] for what in told]
    values = [what.values[layer] for what in told]
    return (
        (torch.stack(keys) if keys else torch.zeros(0, d_k)).to(device),
        (torch.stack(values) if values else torch.zeros(0, d_v)).to(device),
        torch.tensor([what.weight for what in told], dtype=torch.float32, device=device),
    )


def _remove_accurately(state: LayerState, rows: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """Removes rows from a state; says why it must be rebuilt all the same, if it must."""
    try:
        state.remove(*rows)
    except RemovalError as error:
        return str(error)
    health = state.monitor()
    return health.advice if health.needs_refresh else None
