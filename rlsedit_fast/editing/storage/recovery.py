"""Reads a store: its records and status without the model, or everything, replayed without forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.held_out import HeldOut
from rlsedit_fast.editing.layers import EditedLayers
from rlsedit_fast.editing.ledger import Ledger
from rlsedit_fast.editing.records import EditRecord, Point, Progress
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.rows import EditRows
from rlsedit_fast.editing.status import DEFAULT_BUDGET, LayerStatus, Norms, Status, assess, calibrated_adherence
from rlsedit_fast.editing.storage.persistence import (
    EDIT,
    FIXED,
    PROTECT,
    REBUILD,
    REVISE,
    decode_edit,
    decode_point,
    decode_snapshot,
    decode_transaction,
    settings_of,
)
from rlsedit_fast.editing.storage.stored_priors import decode_prior
from rlsedit_fast.editing.storage.stored_rows import decode_revision, decode_rows
from rlsedit_fast.editing.storage.transaction import Transaction
from rlsedit_fast.errors import StoreError
from rlsedit_fast.ops import dispatch
from rlsedit_fast.rls import Saved
from rlsedit_fast.store import Entry, Store


def read_settings(directory: str | Path) -> EditConfig | None:
    """Returns the settings that a store was created with, as the user passed them; None if there is no store.

    Raises:
        StoreError: the store is damaged.
    """
    if not Store.exists(directory):
        return None
    with Store(directory, write=False) as store:
        settings, given = EditConfig.from_store(store.about["config"]), EditConfig(**store.about["given"])
    return settings.replace(**{name: getattr(given, name) for name in FIXED})


def read_history(directory: str | Path) -> list[EditRecord]:
    """Returns the records of a store, without the model, also while an editor writes to it.

    Raises:
        StoreError: the store does not exist or is damaged.
    """
    with Store(directory, write=False) as store:
        return _read_ledger(store)[0].records


def select_edits(directory: str | Path, **criteria: Any) -> list[int]:
    """Returns the ids of the active edits of a store that match all criteria, without the model.

    Args:
        directory: folder of the store.
        **criteria: arguments of `Editor.select`.

    Raises:
        StoreError: the store does not exist or is damaged.
        InputError: see `Editor.select`.
    """
    with Store(directory, write=False) as store:
        return _read_ledger(store)[0].select(**criteria)


def _read_ledger(store: Store) -> tuple[Ledger, Progress]:
    """Returns the edits of a store without their rows, and the progress."""

    def unavailable(_edits: Sequence[Edit]) -> list[Request]:
        raise AssertionError("requests require a model")

    ledger, progress = Ledger(settings_of(store.about), unavailable), Progress()
    for entry in _required(store.entries):
        if entry.kind == REBUILD:
            _enter_history(ledger, entry, {})
        elif entry.kind == EDIT:
            ledger.enter(decode_transaction(entry))
        elif entry.kind == REVISE:
            ledger.revise(_revised_records(entry), {})
        _restore_progress(progress, entry)
    return ledger, progress


@dataclass(frozen=True)
class Contents:
    """The contents of a store, without the rows of its edits.

    Attributes:
        about: metadata of the store: model, fingerprint, settings, layers, version.
        records: records of all edits.
        edits: the active edits by id, with the prompts for their evaluation.
        protected: the protected prompts.
        trace: recent values of the objective.
        status: the status.
    """

    about: dict[str, Any]
    records: list[EditRecord]
    edits: dict[int, Edit]
    protected: list[str]
    trace: list[Point]
    status: Status


def read_status(directory: str | Path, *, budget: float = DEFAULT_BUDGET) -> Status:
    """Returns the status of a store without the model; residuals are those of the last snapshot.

    Raises:
        StoreError: the store does not exist or is damaged.
        InputError: the budget is not above 0.
    """
    return read_contents(directory, budget=budget).status


def read_contents(directory: str | Path, *, budget: float = DEFAULT_BUDGET) -> Contents:
    """Returns the contents of a store without the model; see `read_status`.

    Raises:
        StoreError: the store does not exist or is damaged.
        InputError: the budget is not above 0.
    """
    with Store(directory, write=False) as store:
        ledger, progress = _read_ledger(store)
        about, layers = store.about, list[LayerStatus]()
        newest = store.newest_snapshot()
        for at, layer in enumerate(about["layers"]) if progress.trace else ():
            seen = newest.about["layers"][at] if newest else None
            prior = store.entries[0].about["priors"][at]
            layers.append(
                LayerStatus.of(
                    layer["layer"],
                    Norms(**store.entries[0].about["norms"][at]),
                    prior["lam"],
                    prior["mu"],
                    progress.trace[-1].objective[at],
                    terms=progress.trace[-1].terms[at],
                    residual=seen["monitor"]["residual"] if seen else None,
                    advice=seen["monitor"]["advice"] if seen and seen["monitor"]["needs_refresh"] else None,
                    held_out=seen.get("held_out") if seen else None,
                )
            )
        anchored = any(prior["mu"] for entry in store.entries[:1] for prior in entry.about["priors"])
        status = assess(
            ledger.records,
            progress.trace,
            layers,
            batches=progress.batches,
            adherence=calibrated_adherence(settings_of(about), anchored=anchored),
            budget=budget,
            sizes=store.sizes(),
        )
        edits = dict(zip(ledger.active, ledger.edits(ledger.active), strict=True))
        return Contents(about, ledger.records, edits, progress.protected, progress.trace, status)


def recover(
    store: Store, context: ModelContext, ledger: Ledger, progress: Progress
) -> tuple[EditedLayers | None, HeldOut | None]:
    """Restores the state of a store: the newest intact snapshot, and the changes after it.

    The edited weights of the model are the original ones; they are restored if this raises.

    Args:
        store: the store.
        context: the model.
        ledger: empty; receives the edits.
        progress: empty; receives the progress.

    Returns:
        The layers, None if the store has no changes yet; and the held-out tokens of the anchors, None without them.

    Raises:
        StoreError: a required file is damaged or was not kept.
    """
    entries = _required(store.entries)
    if not entries:
        return None, None
    originals = [projection.copies() for projection in context.projections]
    try:
        recovery = _Recovery(store, context, ledger, progress)
        return recovery.run(entries), recovery.held_out
    except BaseException:
        for projection, original in zip(context.projections, originals, strict=True):
            projection.restore(original)
        raise


class _Recovery:
    def __init__(self, store: Store, context: ModelContext, ledger: Ledger, progress: Progress) -> None:
        self._store, self._config, self._ledger, self._progress = store, context.config, ledger, progress
        self._site, self._projections = context.site, context.projections
        self.held_out: HeldOut | None = None

    def run(self, entries: Sequence[Entry]) -> EditedLayers:
        snapshot, tensors = next(self._store.snapshots(), (None, {}))
        reached = snapshot.seq if snapshot else 0
        saved = decode_snapshot(snapshot, tensors) if snapshot else None
        active = _active([entry for entry in entries if entry.seq <= reached])
        layers = self._start(entries[0], saved)
        _restore_progress(self._progress, entries[0])
        for entry in entries[1:]:
            included = entry.seq <= reached  # in the snapshot
            needed = not included or (self._config.stored_rows is not None and self._has_rows_of(entry, active))
            tensors = self._read(entry, included) if needed else {}
            with dispatch.pinned(entry.about.get("backends", {})):
                if entry.kind == EDIT:
                    self._edit(layers, entry, tensors, included)
                elif entry.kind == REVISE:
                    self._revise(layers, entry, tensors, included)
                elif entry.kind == PROTECT and needed:
                    self._protect(layers, self._rows(tensors, "protected.", entry.about["weights"]), included)
                elif entry.kind == REBUILD:
                    self._rebuild(layers, entry, tensors, included)
            _restore_progress(self._progress, entry)
        return layers

    def _start(self, entry: Entry, saved: Sequence[Saved] | None) -> EditedLayers:
        tensors = self._store.tensors(entry)
        if about := entry.about.get("held_out"):
            self.held_out = HeldOut.decode(about, tensors, self._projections)
        priors = [
            decode_prior(about, tensors, at, projection)
            for at, (about, projection) in enumerate(zip(entry.about["priors"], self._projections, strict=True))
        ]
        layers = EditedLayers(
            self._site,
            self._projections,
            priors,
            delay=self._config.delay,
            bare_weight=self._config.contexts.bare_weight,
            stored_rows=self._config.stored_rows,
            saved=saved,
            experts=self._config.experts,
        )
        for at, weights in enumerate(entry.about["protected"]):
            self._protect(layers, self._rows(tensors, f"protected.{at}.", weights), included=saved is not None)
        return layers

    def _protect(self, layers: EditedLayers, rows: Sequence[EditRows], included: bool) -> None:
        if included:
            layers.register_protected(rows)
            return
        with Transaction(layers) as transaction:
            layers.add_protected(rows)
            transaction.commit()

    def _edit(self, layers: EditedLayers, entry: Entry, tensors: Mapping[str, Tensor], included: bool) -> None:
        record, ledger, ids = decode_transaction(entry), self._ledger, entry.about["written"]
        weights = {one.id: one.present_weight for one in (*record.records, *record.rewritten)}
        rows = self._rows(tensors, "", [weights[i] for i in ids], entry.about["rows"]) if tensors else []
        record = replace(record, rows=dict(zip(ids, rows, strict=True)) if rows else {})
        if not included:
            with Transaction(layers) as transaction:
                if removed := [*record.removed, *record.rewritten_ids]:
                    layers.remove(ledger.rows(removed), ledger.rows_except(set(removed)), record.rebuilt)
                if record.aged:
                    lower = ledger.rows(list(record.aged))
                    new = {i: replace(one, weight=record.aged[i]) for i, one in zip(record.aged, lower, strict=True)}
                    kept = [new.get(i, ledger.rows([i])[0]) for i in ledger.active if i not in removed]
                    layers.lower_weights(lower, list(new.values()), kept, record.aged_rebuilt)
                if rows:
                    layers.update(rows)
                transaction.commit()
        ledger.enter(record)

    def _revise(self, layers: EditedLayers, entry: Entry, tensors: Mapping[str, Tensor], included: bool) -> None:
        ledger, ids = self._ledger, entry.about["revised"]
        revised = dict[int, EditRows]()
        if tensors:
            rows = ledger.rows(ids)
            revised = dict(zip(ids, decode_revision(tensors, rows, self._projections), strict=True))
            if not included:
                with Transaction(layers) as transaction:
                    layers.replace_values(rows, list(revised.values()))
                    transaction.commit()
        ledger.revise(_revised_records(entry), revised)

    def _rebuild(self, layers: EditedLayers, entry: Entry, tensors: Mapping[str, Tensor], included: bool) -> None:
        history = [EditRecord.from_dict(made["record"]) for made in entry.about["history"]]
        weights = {record.id: record.present_weight for record in history}
        rows: dict[int, EditRows] = {}
        if tensors:
            ids = entry.about["written"]
            found = self._rows(tensors, "", [weights[i] for i in ids], entry.about["rows"])
            rows = dict(zip(ids, found, strict=True))
            protected = self._rows(tensors, "protected.", entry.about["weights"])
            layers.register_protected(protected, replace_all=True)
        _enter_history(self._ledger, entry, rows)
        if not included:
            with Transaction(layers) as transaction:
                layers.rebuild(self._ledger.rows(self._ledger.active))
                transaction.commit()

    def _rows(
        self, tensors: Mapping[str, Tensor], prefix: str, weights: Sequence[float], counts: Sequence[int] | None = None
    ) -> list[EditRows]:
        """Returns the rows of edits, or protected rows with a count of 1 each."""
        return decode_rows(
            tensors, prefix, weights, [1] * len(weights) if counts is None else counts, self._projections
        )

    def _has_rows_of(self, entry: Entry, active: set[int]) -> bool:
        if entry.kind in (PROTECT, REBUILD):
            return True
        return bool(active.intersection(entry.about["revised" if entry.kind == REVISE else "written"]))

    def _read(self, entry: Entry, included: bool) -> dict[str, Tensor]:
        try:
            return self._store.tensors(entry)
        except StoreError as error:
            if self._config.stored_rows is None and not included:
                raise StoreError(
                    f"{error} This store deletes keys and values once two snapshots include them (stored_rows=None), "
                    "and no snapshot is intact"
                ) from error
            raise


def _required(entries: Sequence[Entry]) -> list[Entry]:
    """Returns the first change and those from the last rebuild on, which replaces the changes before it."""
    last = max((at for at, entry in enumerate(entries) if entry.kind == REBUILD), default=1)
    return [*entries[:1], *entries[last:]]


def _active(entries: Sequence[Entry]) -> set[int]:
    """Returns the ids of the edits that are active after these changes."""
    active: set[int] = set()
    for entry in entries:
        about = entry.about
        if entry.kind == EDIT:
            active |= set(about["written"])
            active -= set(about["removed"])
        elif entry.kind == REBUILD:
            active = set(about["written"])
    return active


def _revised_records(entry: Entry) -> list[EditRecord]:
    return [EditRecord.from_dict(text) for text in entry.about["rewritten"]]


def _enter_history(ledger: Ledger, entry: Entry, rows: Mapping[int, EditRows]) -> None:
    for text in entry.about["history"]:
        edit, record = decode_edit(text)
        ledger.enter_one(edit, record, rows.get(record.id))


def _restore_progress(progress: Progress, entry: Entry) -> None:
    about = entry.about
    if entry.kind == PROTECT:
        progress.protected += about["prompts"]
    elif entry.kind not in (EDIT, REVISE):
        progress.protected = list(about["prompts"])
    if entry.kind not in (EDIT, REVISE, REBUILD):
        return
    progress.batches, progress.writes = about["batches"], about["writes"]
    progress.time = datetime.fromisoformat(about["time"])
    if entry.kind == REBUILD:
        progress.trace = [decode_point(point) for point in about["trace"]]
    progress.append(decode_point(about["point"]))
