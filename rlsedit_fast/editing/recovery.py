"""What a store holds, read: its records and status without the model, or all of it, done again without its passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from torch import Tensor

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import Edit, EditRecord
from rlsedit_fast.editing.gradient import GradientScale
from rlsedit_fast.editing.inspection import ModelContext
from rlsedit_fast.editing.layers import EditedLayers, EditRows
from rlsedit_fast.editing.ledger import Ledger, TransactionRecord
from rlsedit_fast.editing.progress import Point, Progress
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.status import DEFAULT_BUDGET, LayerStatus, Norms, Status, adherence_asked, assess
from rlsedit_fast.editing.written import (
    EDIT,
    FIXED,
    PROTECT,
    REBUILD,
    REVISE,
    config_of,
    made_of,
    record_of,
    revised,
    rows_of,
    settings_of,
    transaction_of,
)
from rlsedit_fast.errors import StoreError
from rlsedit_fast.rls import Prior, Saved
from rlsedit_fast.store import Entry, Store


def given_settings(directory: str | Path) -> EditConfig | None:
    """The settings that a store was made with, as the user gave them; None where there is no store.

    Raises:
        StoreError: it is damaged.
    """
    if not Store.exists(directory):
        return None
    with Store(directory, write=False) as store:
        about = store.about
        settings, first = config_of(about["config"]), config_of(about["given"])
    return replace(settings, **{name: getattr(first, name) for name in FIXED})


def read_history(directory: str | Path) -> list[EditRecord]:
    """The records of a store, without the model, also while an editor writes it.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    with Store(directory, write=False) as store:
        return read_ledger(store)[0].records


def read_ledger(store: Store) -> tuple[Ledger, Progress]:
    """The edits of a store without their rows, and how far it has come."""

    def without_model(_edits: Sequence[Edit]) -> list[Request]:
        raise AssertionError("only records are read")

    ledger, progress = Ledger(settings_of(store.about), without_model), Progress()
    for entry in _needed(store.entries):
        if entry.kind == REBUILD:
            _enter_history(ledger, entry, {})
        elif entry.kind == EDIT:
            ledger.enter(transaction_of(entry))
        elif entry.kind == REVISE:
            ledger.revise([record_of(text) for text in entry.about["rewritten"]], {})
        _take_up_progress(progress, entry, {})
    return ledger, progress


def read_status(directory: str | Path, *, budget: float = DEFAULT_BUDGET) -> Status:
    """The status of a store without the model; residuals and deviations are those of the last snapshot.

    Raises:
        StoreError: there is none, or it is damaged.
        InputError: a budget that is not above 0.
    """
    with Store(directory, write=False) as store:
        ledger, progress = read_ledger(store)
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
                    deviation=seen["deviation"] if seen else None,
                    residual=seen["monitor"]["residual"] if seen else None,
                    advice=seen["monitor"]["advice"] if seen and seen["monitor"]["needs_refresh"] else None,
                )
            )
        anchored = any(prior["mu"] for entry in store.entries[:1] for prior in entry.about["priors"])
        return assess(
            ledger.records,
            progress.trace,
            layers,
            batches=progress.batches,
            adherence=adherence_asked(settings_of(about), anchored=anchored),
            budget=budget,
            sizes=store.sizes(),
        )


def recover(store: Store, around: ModelContext, ledger: Ledger, progress: Progress) -> EditedLayers | None:
    """Brings layers, ledger and progress to where the store is: the newest whole snapshot, and what came after it.

    The model's edited weights are the original ones, and are so again if this raises.

    Returns:
        The layers; None where nothing is in the store yet.

    Raises:
        StoreError: a file that is needed is damaged, or was not kept.
    """
    entries = _needed(store.entries)
    if not entries:
        return None
    originals = [projection.weight.clone() for projection in around.projections]
    try:
        return _Recovery(store, around, ledger, progress).run(entries)
    except BaseException:
        for projection, original in zip(around.projections, originals, strict=True):
            projection.write(original)
        raise


class _Recovery:
    def __init__(self, store: Store, around: ModelContext, ledger: Ledger, progress: Progress) -> None:
        self._store, self._config, self._ledger, self._progress = store, around.config, ledger, progress
        self._site, self._projections = around.site, around.projections

    def run(self, entries: Sequence[Entry]) -> EditedLayers:
        snapshot, held = next(self._store.snapshots(), (None, {}))
        reached = snapshot.seq if snapshot else 0
        saved = _saved(snapshot, held) if snapshot else None
        alive = _alive([entry for entry in entries if entry.seq <= reached])
        layers = self._begun(entries[0], saved)
        _take_up_progress(self._progress, entries[0], {})
        self._take_up_scale(entries[0], reached, held)
        for entry in entries[1:]:
            done = entry.seq <= reached
            wanted = not done or (self._config.keys is not None and self._has_needed(entry, alive))
            tensors = self._read(entry, done) if wanted else {}
            if entry.kind == EDIT:
                self._edit(layers, entry, tensors, done)
            elif entry.kind == REVISE:
                self._revise(layers, entry, tensors, done)
            elif entry.kind == PROTECT and wanted:
                rows = self._rows(tensors, "protected.", entry.about["weights"])
                if done:
                    layers.count_as_protected(rows)
                else:
                    with layers.transaction():
                        layers.hold(rows)
            elif entry.kind == REBUILD:
                self._rebuild(layers, entry, tensors, done)
            _take_up_progress(self._progress, entry, tensors)
            self._take_up_scale(entry, reached, held)
        squares = self._progress.scale.squares
        if squares is not None:
            self._progress.scale = GradientScale(squares.to(self._projections[-1].weight.device))
        return layers

    def _take_up_scale(self, entry: Entry, reached: int, held: Mapping[str, Tensor]) -> None:
        """From the snapshot, once that is where the replay has come to: changes before it may not have been read."""
        if entry.seq == reached and "scale" in held:
            self._progress.scale = GradientScale(held["scale"])

    def _begun(self, entry: Entry, saved: Sequence[Saved] | None) -> EditedLayers:
        tensors = self._store.tensors(entry)
        priors = [
            Prior(**prior, anchor_moment=tensors.get(f"moment.{at}")) for at, prior in enumerate(entry.about["priors"])
        ]
        layers = EditedLayers(
            self._site,
            self._projections,
            priors,
            delay=self._config.delay,
            bare_weight=self._config.bare_weight,
            keys=self._config.keys,
            saved=saved,
        )
        for at, weights in enumerate(entry.about["protected"]):
            rows = self._rows(tensors, f"protected.{at}.", weights)
            if saved:
                layers.count_as_protected(rows)
            else:
                with layers.transaction():
                    layers.hold(rows)
        return layers

    def _edit(self, layers: EditedLayers, entry: Entry, tensors: Mapping[str, Tensor], done: bool) -> None:
        transaction, ledger, ids = transaction_of(entry), self._ledger, entry.about["written"]
        weights = _weights(transaction, ledger)
        rows = self._rows(tensors, "", [weights[i] for i in ids], entry.about["rows"]) if tensors else []
        transaction = replace(transaction, rows=dict(zip(ids, rows, strict=True)) if rows else {})
        if not done:
            with layers.transaction():
                out = [*transaction.gone, *transaction.again]
                if out:
                    layers.remove(ledger.rows(out), ledger.rows_except(set(out)), transaction.rebuilt)
                if rows:
                    layers.update(rows)
        ledger.enter(transaction)

    def _revise(self, layers: EditedLayers, entry: Entry, tensors: Mapping[str, Tensor], done: bool) -> None:
        ledger, ids = self._ledger, entry.about["revised"]
        fresh = dict[int, EditRows]()
        if tensors:
            held = ledger.rows(ids)
            fresh = dict(zip(ids, revised(tensors, held, self._projections), strict=True))
            if not done:
                with layers.transaction():
                    layers.exchange(held, list(fresh.values()))
        ledger.revise([record_of(text) for text in entry.about["rewritten"]], fresh)

    def _rebuild(self, layers: EditedLayers, entry: Entry, tensors: Mapping[str, Tensor], done: bool) -> None:
        weights = {made["record"]["id"]: made["edit"]["weight"] for made in entry.about["history"]}
        rows: dict[int, EditRows] = {}
        if tensors:
            ids = entry.about["written"]
            found = self._rows(tensors, "", [weights[i] for i in ids], entry.about["rows"])
            rows = dict(zip(ids, found, strict=True))
            layers.protect_only(self._rows(tensors, "protected.", entry.about["weights"]))
        _enter_history(self._ledger, entry, rows)
        if not done:
            with layers.transaction():
                layers.rebuild(self._ledger.rows(self._ledger.active))

    def _rows(
        self, tensors: Mapping[str, Tensor], prefix: str, weights: Sequence[float], counts: Sequence[int] | None = None
    ) -> list[EditRows]:
        """Rows of edits, or protected ones, of which each stands alone."""
        return rows_of(tensors, prefix, weights, [1] * len(weights) if counts is None else counts, self._projections)

    def _has_needed(self, entry: Entry, alive: set[int]) -> bool:
        if entry.kind in (PROTECT, REBUILD):
            return True
        return bool(alive.intersection(entry.about["revised" if entry.kind == REVISE else "written"]))

    def _read(self, entry: Entry, done: bool) -> dict[str, Tensor]:
        try:
            return self._store.tensors(entry)
        except StoreError as error:
            if self._config.keys is None and not done:
                raise StoreError(
                    f"{error} Keys and values are not kept in this store (keys=None) once two snapshots hold them, and "
                    "no snapshot is whole"
                ) from error
            raise


def _needed(entries: Sequence[Entry]) -> list[Entry]:
    """The first change and those from the last rebuild on, which says all that was before it."""
    last = max((at for at, entry in enumerate(entries) if entry.kind == REBUILD), default=1)
    return [*entries[:1], *entries[last:]]


def _alive(entries: Sequence[Entry]) -> set[int]:
    """Ids of the edits that are active after these."""
    alive: set[int] = set()
    for entry in entries:
        about = entry.about
        if entry.kind == EDIT:
            alive |= set(about["written"])
            alive -= set(about["gone"])
        elif entry.kind == REBUILD:
            alive = set(about["written"])
    return alive


def _weights(transaction: TransactionRecord, ledger: Ledger) -> dict[int, float]:
    weights = {record.id: record.weight for record in transaction.records}
    return weights | {i: ledger.edit(i).weight for i in transaction.again}


def _enter_history(ledger: Ledger, entry: Entry, rows: Mapping[int, EditRows]) -> None:
    for text in entry.about["history"]:
        edit, record = made_of(text)
        ledger.enter_one(edit, record, rows.get(record.id))


def _saved(entry: Entry, held: Mapping[str, Tensor]) -> list[Saved]:
    return [
        Saved(
            weight=held[f"{at}.weight"],
            base=held[f"{at}.base"],
            pending=held[f"{at}.pending"],
            signs=held[f"{at}.signs"],
            image=held[f"{at}.image"],
            floor=about["floor"],
            objective=about["objective"],
            edits=about["edits"],
        )
        for at, about in enumerate(entry.about["layers"])
    ]


def _take_up_progress(progress: Progress, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
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
        progress.trace = [Point(edits, tuple(objective)) for edits, objective in about["trace"]]
    progress.reached(Point(about["active"], tuple(about["objective"])))
    if "scale" in tensors:
        progress.scale = GradientScale(tensors["scale"])
