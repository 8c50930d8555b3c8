"""An editor's work, written into a store."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import EditRecord
from rlsedit_fast.editing.layers import EditedLayers, EditRows
from rlsedit_fast.editing.ledger import Ledger, TransactionRecord
from rlsedit_fast.editing.progress import Progress
from rlsedit_fast.editing.written import (
    EDIT,
    PROTECT,
    REBUILD,
    REVISE,
    START,
    asked_of,
    entered,
    record_text,
    tensors_of,
)
from rlsedit_fast.errors import StoreError
from rlsedit_fast.models.projections import Projection
from rlsedit_fast.rls import Prior, RLSState
from rlsedit_fast.rls.state import dtype_of
from rlsedit_fast.store import Change, Store

logger = logging.getLogger(__name__)

_SAVED = ("weight", "base", "pending", "signs", "image")


class Recorder:
    """Writes an editor's changes into a store.

    Args:
        store: open for writing.
        config: the editor's.
        projections: the edited ones.
    """

    def __init__(self, store: Store, config: EditConfig, projections: Sequence[Projection]) -> None:
        self.store = store
        self._config = config
        # Of C and W, which is what a snapshot mostly is; asking the states would put bfloat16 weights together.
        self._snapshot_bytes = sum(
            p.weight.shape[1] * sum(p.weight.shape) * dtype_of(p.weight).itemsize for p in projections
        )
        self._start: Change | None = None
        self._about: dict[str, Any] | None = None

    def describe(self, about: dict[str, Any]) -> None:
        """The store is to say this of itself, from the next change on."""
        self._about = about

    def begin(
        self,
        priors: Sequence[Prior],
        protected: Sequence[Sequence[EditRows]],
        prompts: Sequence[str],
        norms: Sequence[Mapping[str, Any]],
    ) -> None:
        """The first change is to be preceded by these; nothing is written yet."""
        about = {
            "priors": [{"lam": prior.lam, "mu": prior.mu} for prior in priors],
            "protected": [[row.weight for row in rows] for rows in protected],
            "prompts": list(prompts),
            "norms": list(norms),
        }
        held = {f"moment.{i}": p.anchor_moment for i, p in enumerate(priors) if p.anchor_moment is not None}
        for at, rows in enumerate(protected):
            held |= tensors_of(rows, f"protected.{at}.")
        self._start = Change(START, about, held)

    def forget_start(self) -> None:
        """The layers that `begin` described were not kept."""
        self._start = None

    def write_start(self) -> None:
        """Writes that down now."""
        if self._start:
            try:
                self._prepare([])
                self.commit()
            except BaseException:
                self.abort()
                raise

    def record(
        self, transaction: TransactionRecord, progress: Progress, objective: Sequence[float], active: int
    ) -> None:
        """Prepares a transaction, with the progress and the objective that it leads to."""
        rows = transaction.rows or {}
        about = {
            "gone": transaction.gone,
            "outcome": transaction.outcome,
            "again": transaction.again,
            "rebuilt": transaction.rebuilt,
            "made": [entered(*pair) for pair in zip(transaction.edits, transaction.records, strict=True)],
            "rewritten": [record_text(record) for record in transaction.rewritten],
            "written": list(rows),
            "rows": [len(one) for one in rows.values()],
            **_progress(progress, objective, active),
        }
        tensors = tensors_of(list(rows.values()), "", halved=self._config.keys == "fp16") | _scale(progress)
        self._prepare([Change(EDIT, about, tensors)])

    def revise(
        self,
        records: Sequence[EditRecord],
        rows: Mapping[int, EditRows],
        progress: Progress,
        objective: Sequence[float],
        active: int,
    ) -> None:
        """Prepares new records and new values in the last layer of active edits."""
        about = {
            "revised": list(rows),
            "rewritten": [record_text(record) for record in records],
            "rows": [len(one) for one in rows.values()],
            **_progress(progress, objective, active),
        }
        halved = self._config.keys == "fp16"
        tensors = tensors_of(
            [replace(one, keys=(), values=one.values[-1:]) for one in rows.values()], "", halved=halved
        )
        self._prepare([Change(REVISE, about, tensors)])

    def protect(self, rows: Sequence[EditRows], prompts: Sequence[str]) -> None:
        """Prepares the protection of the rows of prompts."""
        about = {"weights": [row.weight for row in rows], "prompts": list(prompts)}
        self._prepare([Change(PROTECT, about, tensors_of(rows, "protected."))])

    def rebuild(
        self,
        ledger: Ledger,
        rows: Sequence[EditRows],
        protected: Sequence[EditRows],
        progress: Progress,
        objective: Sequence[float],
    ) -> None:
        """Prepares a rebuild from the rows of the active edits; it replaces all changes before it."""
        active = ledger.active
        edits = dict(zip(active, ledger.edits(active), strict=True))
        about = {
            "history": [entered(edits.get(record.id) or asked_of(record), record) for record in ledger.records],
            "written": active,
            "rows": [len(one) for one in rows],
            "weights": [row.weight for row in protected],
            "prompts": progress.protected,
            "trace": [[point.edits, point.objective] for point in progress.trace],
            **_progress(progress, objective, len(active)),
        }
        tensors = tensors_of(rows, "", halved=self._config.keys == "fp16")
        tensors |= tensors_of(protected, "protected.") | _scale(progress)
        self._prepare([Change(REBUILD, about, tensors)])

    def commit(self) -> None:
        """What was prepared counts."""
        self.store.commit()
        self._start = None

    def abort(self) -> None:
        """What was prepared does not count."""
        self.store.abort()

    def snapshot_if_due(self, layers: EditedLayers, progress: Progress) -> None:
        """Writes a snapshot where it is time for one; where the disk refuses, the next change tries again."""
        if self.store.snapshot_due(self._snapshot_bytes):
            try:
                self.snapshot(layers, progress)
            except (StoreError, RuntimeError, MemoryError) as error:  # the edits stand, whatever it is
                logger.warning("the edits are in the store, but no new snapshot is: %s", error)

    def snapshot(self, layers: EditedLayers, progress: Progress) -> None:
        """Writes a snapshot."""
        about, tensors = [], dict[str, Tensor]()
        for at, state in enumerate(layers.states):
            assert isinstance(state, RLSState)  # no other rule goes with a store
            saved, health = state.saved(), state.monitor()
            if health.needs_refresh:
                logger.warning("%s: %s `consolidate` does that", state.name, health.advice)
            about.append(
                {
                    "floor": saved.floor,
                    "objective": saved.objective,
                    "edits": saved.edits,
                    "monitor": asdict(health),
                    "deviation": state.deviation(),
                }
            )
            tensors |= {f"{at}.{name}": getattr(saved, name).cpu() for name in _SAVED}
        self.store.snapshot({"layers": about}, tensors | _scale(progress), drop_changes=self._config.keys is None)

    def _prepare(self, changes: list[Change]) -> None:
        if self._about is not None:
            self.store.describe(self._about)
            self._about = None
        self.store.prepare([self._start, *changes] if self._start else changes)


def _scale(progress: Progress) -> dict[str, Tensor]:
    """Of the gradient values, where there are any."""
    return {} if progress.scale.squares is None else {"scale": progress.scale.squares}


def _progress(progress: Progress, objective: Sequence[float], active: int) -> dict[str, Any]:
    return {
        "batches": progress.batches,
        "writes": progress.writes,
        "time": progress.time.isoformat(),
        "objective": list(objective),
        "active": active,
    }
