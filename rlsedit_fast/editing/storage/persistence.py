"""How edits, rows and settings are stored: their encoding in a store, and the writer of an editor's changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from datetime import datetime, timezone
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlsedit_fast._version import __version__
from rlsedit_fast.baselines import RECURSIVE
from rlsedit_fast.data.edits import Edit
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.held_out import HeldOut
from rlsedit_fast.editing.layers import EditedLayers
from rlsedit_fast.editing.ledger import Ledger, TransactionRecord
from rlsedit_fast.editing.records import EditRecord, Point, Progress
from rlsedit_fast.editing.rows import EditRows
from rlsedit_fast.editing.storage.stored_priors import about_prior, prior_tensors
from rlsedit_fast.editing.storage.stored_rows import encode_rows
from rlsedit_fast.errors import InputError, StoreError
from rlsedit_fast.models.fingerprint import fingerprint, identify
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.ops import dispatch
from rlsedit_fast.processes import ALONE, Processes
from rlsedit_fast.rls import BlockPrior, Prior, RLSState, Saved, Terms
from rlsedit_fast.rls.layer import dtype_of
from rlsedit_fast.store import Change, Entry, Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

START, EDIT, REVISE, PROTECT, REBUILD = "start", "edit", "revise", "protect", "rebuild"
"""Kinds of changes in a store."""

FIXED = (
    *("layers", "layer_module", "projection_module", "fact_token", "contexts", "prior", "same_subject"),
    *("stored_rows", "experts", "delay", "halve_after"),
)
"""Settings that hold for all edits of a store. Others may change between edits."""

_SAVED_TENSORS = ("weight", "base", "pending", "signs", "image")
_SAVED_NUMBERS = ("floor", "objective", "edits")


def open_store(
    directory: str | Path | None, model: PreTrainedModel, config: EditConfig | None, processes: Processes
) -> tuple[Store | None, EditConfig]:
    """Opens a store for writing, if there is one, and returns it with the settings for further edits.

    Args:
        directory: folder of the store; None without a store.
        model: the unedited model.
        config: settings of the user.
        processes: the processes that edit the model.

    Raises:
        InputError: a setting is fixed by the store and differs, or a store does not support the rule.
        StoreError: the store was created with another model, is damaged, has another version, or is in use.
    """
    if directory is None:
        return None, config or EditConfig()
    _check_rule(directory, config)
    if not processes.same(Store.exists(directory)):
        return None, config or EditConfig()
    store = processes.in_turn(lambda: Store(directory, write=processes.first))
    try:
        about = store.about
        settings = settings_of(about, config)  # before the fingerprint, which reads all weights
        if (found := fingerprint(model)) != about["fingerprint"]:
            raise StoreError(
                f"the store {str(directory)!r} was created with the model {about['model'] or 'without a path'!r} "
                f"(fingerprint {about['fingerprint'][:12]}), and this model is {identify(model, found)}: weights, "
                "dtype or config differ, or the model is already edited; nothing was modified",
                hint="load the unedited model that the store was created with",
            )
    except BaseException:
        store.close()
        raise
    return store, settings


def check_store(directory: str | Path, config: EditConfig | None) -> None:
    """Checks, without the model, that a store can be opened or created with these settings.

    Raises:
        InputError: a setting is fixed by the store and differs, or a store does not support the rule.
        StoreError: the store is damaged, has another version or is in use, or the folder contains other files.
    """
    _check_rule(directory, config)
    if not Store.exists(directory):
        Store.check_empty(directory)
        return
    with Store(directory) as store:
        settings_of(store.about, config)


def _check_rule(directory: str | Path, config: EditConfig | None) -> None:
    if config is not None and (config.rule != RECURSIVE or config.norm_anchor):
        raise InputError(
            f"store={str(directory)!r} with rule={config.rule!r}, norm_anchor={config.norm_anchor}: a store does not "
            "contain the memory of these",
            hint=f"use rule={RECURSIVE!r} without norm_anchor, or no store",
        )


def create_store(directory: str | Path, context: ModelContext, given: EditConfig) -> Store:
    """Creates a store for the edits of a model.

    Args:
        directory: folder that is empty or does not exist.
        context: the model.
        given: the settings as the user passed them.

    Raises:
        StoreError: the folder is not empty or is not writable.
    """
    path = str(getattr(context.model.config, "_name_or_path", ""))
    about = {
        "fingerprint": fingerprint(context.model),  # by all processes
        "model": str(Path(path).resolve()) if path and Path(path).exists() else path,
        "given": given.to_dict(),
        "config": context.config.to_dict(),
        "layers": [
            {"layer": p.layer, "name": p.name, "shape": [p.value_width, p.key_width], "dtype": str(p.dtype)}
            for p in context.projections
        ],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
    }
    processes = context.decoder.processes
    # The other processes only read it.
    return processes.in_turn(
        lambda: Store.create(directory, about) if processes.first else Store(directory, write=False)
    )


def settings_of(about: Mapping[str, Any], given: EditConfig | None = None) -> EditConfig:
    """Returns the settings for further edits of a store.

    Args:
        about: metadata of the store.
        given: settings of the user; those that are not in `FIXED` override the stored ones.

    Raises:
        InputError: a setting in `FIXED` differs from the one that the store was created with.
    """
    stored = EditConfig.from_store(about["config"])
    if given is None:
        return stored
    first = EditConfig(**about["given"])
    changed = [
        (path, mine, theirs)
        for name in FIXED
        for path in _paths(first, name)
        if (mine := attrgetter(path)(given)) != (theirs := attrgetter(path)(first))
    ]
    if changed:
        differences = "; ".join(f"{path}={mine!r}, the store has {theirs!r}" for path, mine, theirs in changed)
        raise InputError(
            f"{differences}: these settings are fixed for all edits of a store; nothing was modified",
            hint="omit --config and the options of settings to use those of the store (Python: config=None), or create "
            "another store",
        )
    return given.replace(**{name: getattr(stored, name) for name in FIXED})


def _paths(config: EditConfig, name: str) -> list[str]:
    """Returns the dotted names of the settings of a group, or the name itself."""
    fields = getattr(type(getattr(config, name)), "model_fields", None)
    return [name] if fields is None else [f"{name}.{field}" for field in fields]


def decode_snapshot(snapshot: Entry, tensors: Mapping[str, Tensor]) -> list[Saved]:
    """Returns the saved state of each layer that `Recorder.snapshot` wrote."""
    found = []
    for at, about in enumerate(snapshot.about["layers"]):
        contents: dict[str, Any] = {name: tensors[f"{at}.{name}"] for name in _SAVED_TENSORS}
        found.append(Saved(**contents, **{name: about[name] for name in _SAVED_NUMBERS}))
    return found


def decode_transaction(entry: Entry) -> TransactionRecord:
    """Returns a transaction of the journal, without its rows."""
    about = entry.about
    made = [decode_edit(text) for text in about["made"]]
    return TransactionRecord(
        removed=tuple(about["removed"]),
        outcome=about["outcome"],
        rewritten_ids=tuple(about["rewritten_ids"]),
        rebuilt=tuple(about["rebuilt"]),
        edits=tuple(edit for edit, _ in made),
        records=tuple(record for _, record in made),
        rewritten=tuple(EditRecord.from_dict(text) for text in about["rewritten"]),
        aged={identity: weight for identity, weight in about["aged"]},
        aged_rebuilt=tuple(about["aged_rebuilt"]),
    )


def encode_edit(edit: Edit, record: EditRecord) -> dict[str, Any]:
    """Returns an edit and its record, JSON-serializable."""
    return {"edit": edit.to_dict(), "record": record.to_dict()}


def decode_edit(text: Mapping[str, Any]) -> tuple[Edit, EditRecord]:
    """Returns the edit and the record that `encode_edit` encoded."""
    return Edit.from_dict(text["edit"]), EditRecord.from_dict(text["record"])


class Recorder:
    """Writes the changes of an editor into a store.

    Args:
        store: store that is open for writing.
        config: settings of the editor.
        projections: the edited projections.
        processes: the processes that hold the model; only the first one writes.
    """

    def __init__(
        self, store: Store, config: EditConfig, projections: Sequence[Projection], processes: Processes = ALONE
    ) -> None:
        self.store, self._processes = store, processes
        self._stored_rows = config.stored_rows
        # C and W are most of a snapshot. The shapes suffice: states would assemble bfloat16 weights.
        self._snapshot_bytes = sum(
            p.key_width * (p.key_width + p.value_width) * dtype_of(p.blocks[0]).itemsize for p in projections
        )
        # A mixture of experts is restored from its rows: its state is a function of them.
        self._snapshots = all(p.layout is None for p in projections)
        self.held_out: HeldOut | None = None  # measured in snapshots
        self._start: Change | None = None
        self._about: dict[str, Any] | None = None
        self._held: list[Change] | None = None

    def update_settings(self, config: EditConfig) -> None:
        """Replaces the settings in the metadata of the store with the next change."""
        about, settings = self.store.about, config.to_dict()
        if about["config"] != settings:
            self._about = about | {"config": settings}

    def begin(
        self,
        priors: Sequence[Prior | BlockPrior],
        protected: Sequence[Sequence[EditRows]],
        prompts: Sequence[str],
        norms: Sequence[Mapping[str, Any]],
        held_out: HeldOut | None,
    ) -> None:
        """Sets the start of the store, which is written with the first change.

        Args:
            priors: prior of each layer.
            protected: protected rows of each call of `Editor.protect`.
            prompts: the protected prompts.
            norms: norms of each layer, see `status.Norms`.
            held_out: held-out tokens of the anchors; None without them.
        """
        about = {
            "priors": [about_prior(prior) for prior in priors],
            "protected": [[row.weight for row in rows] for rows in protected],
            "prompts": list(prompts),
            "norms": list(norms),
            "held_out": held_out.about() if held_out else None,
        }
        tensors = {name: tensor for i, prior in enumerate(priors) for name, tensor in prior_tensors(prior, i).items()}
        for at, rows in enumerate(protected):
            tensors |= encode_rows(rows, f"protected.{at}.")
        tensors |= held_out.tensors() if held_out else {}
        self.held_out = held_out
        self._start = Change(START, about, tensors)

    def discard_start(self) -> None:
        """Discards the start that `begin` set."""
        self._start = None

    def write_start(self) -> None:
        """Writes the start now."""
        if self._start:
            try:
                self.prepare()
                self.commit()
            except BaseException:
                self.abort()
                raise

    def edit(self, transaction: TransactionRecord, progress: Progress, point: Point) -> Change:
        """Returns the change of a transaction, with the progress that it leads to."""
        rows = transaction.rows or {}
        about = {
            "removed": transaction.removed,
            "outcome": transaction.outcome,
            "rewritten_ids": transaction.rewritten_ids,
            "rebuilt": transaction.rebuilt,
            "made": [encode_edit(*pair) for pair in zip(transaction.edits, transaction.records, strict=True)],
            "rewritten": [record.to_dict() for record in transaction.rewritten],
            "written": list(rows),
            "rows": [len(one) for one in rows.values()],
            "aged": list(transaction.aged.items()),
            "aged_rebuilt": transaction.aged_rebuilt,
            **_progress(progress, point),
        }
        return Change(EDIT, about, self._encoded(list(rows.values())))

    def revision(
        self, records: Sequence[EditRecord], rows: Mapping[int, EditRows], progress: Progress, point: Point
    ) -> Change:
        """Returns the change of records and of values in the last layer of active edits."""
        about = {
            "revised": list(rows),
            "rewritten": [record.to_dict() for record in records],
            "rows": [len(one) for one in rows.values()],
            **_progress(progress, point),
        }
        last = [replace(one, keys=(), values=one.values[-1:]) for one in rows.values()]
        return Change(REVISE, about, self._encoded(last))

    def protection(self, rows: Sequence[EditRows], prompts: Sequence[str]) -> Change:
        """Returns the change of protecting the rows of prompts."""
        about = {"weights": [row.weight for row in rows], "prompts": list(prompts)}
        return Change(PROTECT, about, encode_rows(rows, "protected."))

    def rebuild(
        self,
        ledger: Ledger,
        rows: Sequence[EditRows],
        protected: Sequence[EditRows],
        progress: Progress,
        point: Point,
    ) -> Change:
        """Returns the change of a rebuild from the rows of the active edits; it replaces all earlier changes."""
        active = ledger.active
        edits = dict(zip(active, ledger.edits(active), strict=True))
        about = {
            "history": [encode_edit(edits.get(record.id) or _edit_of(record), record) for record in ledger.records],
            "written": active,
            "rows": [len(one) for one in rows],
            "weights": [row.weight for row in protected],
            "prompts": progress.protected,
            "trace": [_about_point(point) for point in progress.trace],
            **_progress(progress, point),
        }
        return Change(REBUILD, about, self._encoded(rows) | encode_rows(protected, "protected."))

    def prepare(self, *changes: Change) -> None:
        """Writes changes, after the start if that was not written yet; to be committed or aborted.

        They record the backends of the operations, for a replay bit for bit.
        """
        if self._held is not None:
            self._held += changes
            return
        self._processes.lead(lambda: self._prepare(changes))
        self._about = None

    def _prepare(self, changes: Sequence[Change]) -> None:
        if self._about is not None:
            self.store.describe(self._about)
            self._about = None
        backends = {"backends": dispatch.used()}
        changes = [replace(one, about={**one.about, **backends}) for one in changes]
        self.store.prepare([one for one in (self._start, *changes) if one is not None])

    def commit(self) -> None:
        """Commits the prepared changes."""
        if self._held is None:
            self._processes.lead(self.store.commit)
            self._start = None

    def abort(self) -> None:
        """Discards the prepared changes; without other processes, one of which may have failed."""
        if self._processes.first:
            self.store.abort()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Collects the changes that are committed in the block and commits them together at its end.

        An error in the block discards them.
        """
        self._held = held = list[Change]()
        try:
            yield
        finally:
            self._held = None
        if held:
            try:
                self.prepare(*held)
                self.commit()
            except BaseException:
                self.abort()
                raise

    def compact(self) -> None:
        """Deletes the changes that the last one contains; if that fails, logs a warning."""
        try:
            self._processes.lead(self.store.compact)
        except (StoreError, RuntimeError, MemoryError) as error:
            logger.warning("the change is stored, but the store was not compacted: %s", error)

    def snapshot_if_due(self, layers: EditedLayers) -> None:
        """Writes a snapshot if one is due; if writing fails, the next change tries again."""
        if self._held is None and self._snapshots:
            due = self._processes.first and self.store.snapshot_due(self._snapshot_bytes)
            if self._processes.same(due):
                self.try_snapshot(layers)

    def try_snapshot(self, layers: EditedLayers) -> None:
        """Writes a snapshot; if that fails, logs a warning, since all changes are stored in any case.

        No snapshot is written with a mixture of experts.
        """
        if not self._snapshots:
            return
        try:
            self.snapshot(layers)
        except (StoreError, RuntimeError, MemoryError) as error:
            logger.warning("the edits are stored, but the snapshot could not be written: %s", error)

    def snapshot(self, layers: EditedLayers) -> None:
        """Writes a snapshot."""
        about, tensors = [], dict[str, Tensor]()
        changes = self.held_out.changes(layers.states) if self.held_out else [None] * len(layers.states)
        for at, state in enumerate(layers.states):
            assert isinstance(state, RLSState)  # stores require the rule rls
            saved, health = state.columns.join(state.saved()), state.monitor()
            if health.needs_refresh:
                logger.warning("%s: %s `consolidate` does this.", state.name, health.advice)
            if saved is None:  # only the first process has all columns
                continue
            numbers = {name: getattr(saved, name) for name in _SAVED_NUMBERS}
            about.append(numbers | {"monitor": asdict(health), "held_out": changes[at]})
            tensors |= {f"{at}.{name}": getattr(saved, name).cpu() for name in _SAVED_TENSORS}
        self._processes.lead(
            lambda: self.store.snapshot({"layers": about}, tensors, drop_changes=self._stored_rows is None)
        )

    def _encoded(self, rows: Sequence[EditRows]) -> dict[str, Tensor]:
        return encode_rows(rows, "", half=self._stored_rows == "fp16")


def _edit_of(record: EditRecord) -> Edit:
    return Edit(
        *(record.prompt, record.subject, record.target, record.weight, record.name),
        join=record.join,
        messages=record.messages,
    )


def _progress(progress: Progress, point: Point) -> dict[str, Any]:
    return {
        "batches": progress.batches,
        "writes": progress.writes,
        "time": progress.time.isoformat(),
        "point": _about_point(point),
    }


def _about_point(point: Point) -> dict[str, Any]:
    return {"edits": point.edits, "objective": point.objective, "terms": [astuple(terms) for terms in point.terms]}


def decode_point(about: Mapping[str, Any]) -> Point:
    """Returns a point of the trace."""
    return Point(about["edits"], tuple(about["objective"]), tuple(Terms(*terms) for terms in about["terms"]))
