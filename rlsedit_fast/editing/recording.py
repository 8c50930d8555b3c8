"""An editor's work in a store: how it is written down, read again, and done again without the model's passes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor, stack

from rlsedit_fast._version import __version__
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import Edit, EditRecord
from rlsedit_fast.editing.gradient import GradientScale
from rlsedit_fast.editing.layers import EditedLayers, Told
from rlsedit_fast.editing.ledger import Ledger, Telling
from rlsedit_fast.editing.progress import Point, Progress
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.rounding import packed, unpacked
from rlsedit_fast.editing.status import DEFAULT_BUDGET, LayerStatus, Norms, Status, assess
from rlsedit_fast.errors import InputError, StoreError
from rlsedit_fast.models.projections import Projection
from rlsedit_fast.models.sites import Site
from rlsedit_fast.rls import Prior, Saved
from rlsedit_fast.rls.state import dtype_of
from rlsedit_fast.store import Change, Entry, Store

logger = logging.getLogger(__name__)

START, TELL, PROTECT, REBUILD = "start", "tell", "protect", "rebuild"

FIXED = (
    "layers layer_module projection_module fact_token adherence lam mu ridge delay context_prefixes context_samples "
    "context_tokens context_seed same_subject keys"
).split()
"""Settings that a store's edits were made under, and that hold for all of them. The others may change in between."""


class Recorder:
    """Writes an editor's changes into a store.

    Args:
        store: open for writing.
        config: the editor's.
        projections: the edited ones.
    """

    def __init__(self, store: Store, config: EditConfig, projections: Sequence[Projection]) -> None:
        self.store = store
        self._config, self._projections = config, projections
        self._start: Change | None = None

    def begin(
        self, priors: Sequence[Prior], protected: Sequence[Sequence[Told]], norms: Sequence[Mapping[str, Any]]
    ) -> None:
        """The first change is to be preceded by these; nothing is written yet."""
        about = {
            "priors": [{"lam": prior.lam, "mu": prior.mu} for prior in priors],
            "protected": [[row.weight for row in rows] for rows in protected],
            "norms": list(norms),
        }
        held = {f"moment.{i}": p.anchor_moment for i, p in enumerate(priors) if p.anchor_moment is not None}
        for at, rows in enumerate(protected):
            held |= _tensors(rows, f"protected.{at}.")
        self._start = Change(START, about, held)

    def forget_start(self) -> None:
        """The layers that `begin` told of were not kept."""
        self._start = None

    def write_start(self) -> None:
        """Writes that down now."""
        if self._start:
            self._prepare([])
            self.commit()

    def tell(self, telling: Telling, progress: Progress, objective: Sequence[float], active: int) -> None:
        """Prepares a telling, with the progress and the objective that it leads to."""
        told = telling.told or {}
        about = {
            "gone": telling.gone,
            "outcome": telling.outcome,
            "again": telling.again,
            "stay": telling.stay,
            "rebuilt": telling.rebuilt,
            "made": [_entered(*pair) for pair in zip(telling.edits, telling.records, strict=True)],
            "retold": [_record_text(record) for record in telling.retold],
            "told": list(told),
            **_progress(progress, objective, active),
        }
        tensors = _tensors(list(told.values()), "", halved=self._config.keys == "fp16")
        if progress.scale.squares is not None:
            tensors["scale"] = progress.scale.squares
        self._prepare([Change(TELL, about, tensors)])

    def protect(self, rows: Sequence[Told]) -> None:
        """Prepares the protection of rows."""
        self._prepare([Change(PROTECT, {"weights": [row.weight for row in rows]}, _tensors(rows, "protected."))])

    def rebuild(
        self,
        ledger: Ledger,
        protected: Sequence[Told],
        progress: Progress,
        objective: Sequence[float],
    ) -> None:
        """Prepares a rebuild, which says all that the changes before it said."""
        active = ledger.active
        edits = dict(zip(active, ledger.edits(active), strict=True))
        about = {
            "history": [_entered(edits.get(record.id) or _asked(record), record) for record in ledger.records],
            "told": active,
            "weights": [row.weight for row in protected],
            "trace": [[point.edits, point.objective] for point in progress.trace],
            **_progress(progress, objective, len(active)),
        }
        tensors = _tensors(ledger.told(active), "", halved=self._config.keys == "fp16")
        tensors |= _tensors(protected, "protected.")
        if progress.scale.squares is not None:
            tensors["scale"] = progress.scale.squares
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
        size = sum(s.base.nbytes + s.weight.nbytes for s in (state.saved() for state in layers.states))
        if self.store.snapshot_due(size):
            try:
                self.snapshot(layers, progress)
            except StoreError as error:
                logger.warning("the edits are in the store, but no new snapshot is: %s", error)

    def snapshot(self, layers: EditedLayers, progress: Progress) -> None:
        """Writes a snapshot."""
        about, tensors = [], dict[str, Tensor]()
        for at, state in enumerate(layers.states):
            saved = state.saved()
            about.append(
                {
                    "floor": saved.floor,
                    "objective": saved.objective,
                    "edits": saved.edits,
                    "monitor": asdict(state.monitor()),
                    "deviation": state.deviation(),
                }
            )
            tensors |= {f"{at}.{name}": getattr(saved, name) for name in _SAVED}
        if progress.scale.squares is not None:
            tensors["scale"] = progress.scale.squares
        self.store.snapshot({"layers": about}, tensors, drop_changes=self._config.keys is None)

    def _prepare(self, changes: list[Change]) -> None:
        self.store.prepare([self._start, *changes] if self._start else changes)


_SAVED = ("weight", "base", "pending", "signs", "image")


def describe(
    config: EditConfig, given: EditConfig, projections: Sequence[Projection], identity: str, model: str
) -> Any:
    """What a store says of itself."""
    return {
        "fingerprint": identity,
        "model": model,
        "given": asdict(given),
        "config": asdict(config),
        "layers": [
            {"layer": p.layer, "name": p.name, "shape": list(p.weight.shape), "dtype": str(p.weight.dtype)}
            for p in projections
        ],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
    }


def settings_of(about: Mapping[str, Any], given: EditConfig | None = None) -> EditConfig:
    """The settings that a store's edits go on under.

    Args:
        about: what the store says of itself.
        given: by the user, who may change some of them.

    Raises:
        InputError: one is changed that holds for all edits of a store.
    """
    stored = _config_of(about["config"])
    if given is None:
        return stored
    first = _config_of(about["given"])
    if changed := [name for name in FIXED if getattr(given, name) != getattr(first, name)]:
        told = "; ".join(
            f"{name}={getattr(given, name)!r}, the store's is {getattr(first, name)!r}" for name in changed
        )
        raise InputError(
            f"{told}: these hold for all edits of a store. Leave config out to go on with the store's settings, or "
            "make another store"
        )
    return replace(given, **{name: getattr(stored, name) for name in FIXED})


def given_settings(directory: str | Path) -> EditConfig | None:
    """The settings that a store was made with, as the user gave them; None where there is no store.

    Raises:
        StoreError: it is damaged.
    """
    if not Store.exists(directory):
        return None
    with Store(directory, write=False) as store:
        about = store.about
        settings, first = _config_of(about["config"]), _config_of(about["given"])
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
        elif entry.kind == TELL:
            ledger.enter(_telling(entry))
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
        config = settings_of(about)
        return assess(
            ledger.records,
            progress.trace,
            layers,
            batches=progress.batches,
            adherence=None if config.lam is not None and config.mu is not None else config.adherence,
            budget=budget,
            sizes=store.sizes(),
        )


def recover(
    store: Store, config: EditConfig, site: Site, projections: Sequence[Projection], ledger: Ledger, progress: Progress
) -> EditedLayers | None:
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
    originals = [projection.weight.clone() for projection in projections]
    try:
        return _Recovery(store, config, site, projections, ledger, progress).run(entries)
    except BaseException:
        for projection, original in zip(projections, originals, strict=True):
            projection.write(original)
        raise


class _Recovery:
    def __init__(
        self,
        store: Store,
        config: EditConfig,
        site: Site,
        projections: Sequence[Projection],
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self._store, self._config, self._ledger, self._progress = store, config, ledger, progress
        self._site, self._projections = site, projections

    def run(self, entries: Sequence[Entry]) -> EditedLayers:
        snapshot, held = next(self._store.snapshots(), (None, {}))
        reached = snapshot.seq if snapshot else 0
        saved = _saved(snapshot, held) if snapshot else None
        alive = _alive([entry for entry in entries if entry.seq <= reached])
        layers = self._begun(entries[0], saved)
        for entry in entries[1:]:
            done = entry.seq <= reached
            wanted = not done or (self._config.keys is not None and self._has_needed(entry, alive))
            tensors = self._read(entry, done) if wanted else {}
            if entry.kind == TELL:
                self._tell(layers, entry, tensors, done)
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
        squares = held.get("scale") if reached == entries[-1].seq else self._progress.scale.squares
        if squares is not None:
            self._progress.scale = GradientScale(squares.to(self._projections[-1].weight.device))
        return layers

    def _begun(self, entry: Entry, saved: Sequence[Saved] | None) -> EditedLayers:
        tensors = self._store.tensors(entry)
        priors = [
            Prior(**prior, anchor_moment=moment.to(projection.weight.device) if moment is not None else None)
            for at, (prior, projection) in enumerate(zip(entry.about["priors"], self._projections, strict=True))
            for moment in (tensors.get(f"moment.{at}"),)
        ]
        layers = EditedLayers(
            self._site, self._projections, priors, delay=self._config.delay, keys=self._config.keys, saved=saved
        )
        for at, weights in enumerate(entry.about["protected"]):
            rows = self._rows(tensors, f"protected.{at}.", weights)
            if saved:
                layers.count_as_protected(rows)
            else:
                with layers.transaction():
                    layers.hold(rows)
        return layers

    def _tell(self, layers: EditedLayers, entry: Entry, tensors: Mapping[str, Tensor], done: bool) -> None:
        telling, ledger = _telling(entry), self._ledger
        weights = _weights(telling, ledger)
        rows = self._rows(tensors, "", [weights[i] for i in entry.about["told"]]) if tensors else []
        telling = replace(telling, told=dict(zip(entry.about["told"], rows, strict=True)) if rows else {})
        if not done:
            with layers.transaction():
                out = [*telling.gone, *telling.again]
                if out:
                    layers.remove(ledger.told(out), ledger.but(set(out)), telling.rebuilt)
                if telling.stay:
                    layers.update(ledger.told(telling.stay))
                if rows:
                    layers.update(rows)
        ledger.enter(telling)

    def _rebuild(self, layers: EditedLayers, entry: Entry, tensors: Mapping[str, Tensor], done: bool) -> None:
        weights = {made["record"]["id"]: made["edit"]["weight"] for made in entry.about["history"]}
        told: dict[int, Told] = {}
        if tensors:
            ids = entry.about["told"]
            told = dict(zip(ids, self._rows(tensors, "", [weights[i] for i in ids]), strict=True))
            layers.protect_only(self._rows(tensors, "protected.", entry.about["weights"]))
        _enter_history(self._ledger, entry, told)
        if not done:
            with layers.transaction():
                layers.rebuild(self._ledger.told(self._ledger.active))

    def _has_needed(self, entry: Entry, alive: set[int]) -> bool:
        return entry.kind in (PROTECT, REBUILD) or bool(alive.intersection(entry.about["told"]))

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

    def _rows(self, tensors: Mapping[str, Tensor], prefix: str, weights: Sequence[float]) -> list[Told]:
        """What `_tensors` was given."""
        if not weights:
            return []
        sides = []
        for side in ("keys", "values"):
            each = []
            for at, projection in enumerate(self._projections):
                name = f"{prefix}{side}.{at}"
                rows = tensors[name].to(projection.weight.device)
                if f"{name}.exponents" in tensors:
                    rows = unpacked(rows, tensors[f"{name}.exponents"].to(rows.device), dtype_of(projection.weight))
                each.append(rows)
            sides.append(list(zip(*each, strict=True)))
        return [Told(k, v, weight) for k, v, weight in zip(*sides, weights, strict=True)]


def _tensors(rows: Sequence[Told], prefix: str, *, halved: bool = False) -> dict[str, Tensor]:
    """Rows as a tensor per layer and side."""
    tensors: dict[str, Tensor] = {}
    for side in ("keys", "values") if rows else ():
        for at in range(len(rows[0].keys)):
            name, whole = f"{prefix}{side}.{at}", stack([getattr(row, side)[at] for row in rows])
            if halved:
                tensors[name], tensors[f"{name}.exponents"] = packed(whole)
            else:
                tensors[name] = whole
    return tensors


def _needed(entries: Sequence[Entry]) -> list[Entry]:
    """The first change and those from the last rebuild on, which says all that was before it."""
    last = max((at for at, entry in enumerate(entries) if entry.kind == REBUILD), default=1)
    return [*entries[:1], *entries[last:]]


def _alive(entries: Sequence[Entry]) -> set[int]:
    """Ids of the edits that are active after these."""
    alive: set[int] = set()
    for entry in entries:
        about = entry.about
        if entry.kind == TELL:
            alive |= set(about["told"])
            alive -= set(about["gone"]) - set(about["stay"])
        elif entry.kind == REBUILD:
            alive = set(about["told"])
    return alive


def _telling(entry: Entry) -> Telling:
    """A telling as it was journalled, without its rows."""
    about = entry.about
    made = [_made(text) for text in about["made"]]
    return Telling(
        gone=tuple(about["gone"]),
        outcome=about["outcome"],
        again=tuple(about["again"]),
        stay=tuple(about["stay"]),
        rebuilt=tuple(about["rebuilt"]),
        edits=tuple(edit for edit, _ in made),
        records=tuple(record for _, record in made),
        retold=tuple(_record(text) for text in about["retold"]),
    )


def _weights(telling: Telling, ledger: Ledger) -> dict[int, float]:
    weights = {record.id: record.weight for record in telling.records}
    return weights | {i: ledger.edit(i).weight for i in telling.again}


def _enter_history(ledger: Ledger, entry: Entry, told: Mapping[int, Told]) -> None:
    for text in entry.about["history"]:
        edit, record = _made(text)
        ledger.enter_one(edit, record, told.get(record.id))


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


def _progress(progress: Progress, objective: Sequence[float], active: int) -> dict[str, Any]:
    return {
        "batches": progress.batches,
        "writes": progress.writes,
        "time": progress.time.isoformat(),
        "objective": list(objective),
        "active": active,
    }


def _take_up_progress(progress: Progress, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
    about = entry.about
    if entry.kind not in (TELL, REBUILD):
        return
    progress.batches, progress.writes = about["batches"], about["writes"]
    progress.time = datetime.fromisoformat(about["time"])
    if entry.kind == REBUILD:
        progress.trace = [Point(edits, tuple(objective)) for edits, objective in about["trace"]]
    progress.reached(Point(about["active"], tuple(about["objective"])))
    if "scale" in tensors:
        progress.scale = GradientScale(tensors["scale"])


def _entered(edit: Edit, record: EditRecord) -> dict[str, Any]:
    return {"edit": asdict(edit), "record": _record_text(record)}


def _record_text(record: EditRecord) -> dict[str, Any]:
    return asdict(record) | {"time": record.time.isoformat()}


def _made(text: Mapping[str, Any]) -> tuple[Edit, EditRecord]:
    return Edit(**_tuples(text["edit"])), _record(text["record"])


def _record(text: Mapping[str, Any]) -> EditRecord:
    return EditRecord(**_tuples(text) | {"time": datetime.fromisoformat(text["time"])})


def _asked(record: EditRecord) -> Edit:
    return Edit(record.prompt, record.subject, record.target, record.weight, record.name)


def _config_of(text: Mapping[str, Any]) -> EditConfig:
    known = {one.name for one in fields(EditConfig)}
    return EditConfig(**{name: value for name, value in _tuples(text).items() if name in known})


def _tuples(text: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in text.items()}
