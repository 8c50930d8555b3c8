"""Edits applied and removed: layers, store and ledger change together, or none of them does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.editing.batches import batches_of, unrelated
from rlsedit_fast.editing.edits import EditRecord, EditState
from rlsedit_fast.editing.finding import Finder
from rlsedit_fast.editing.inspection import ModelContext
from rlsedit_fast.editing.interrupts import held_back
from rlsedit_fast.editing.layers import EditedLayers, EditRows
from rlsedit_fast.editing.ledger import BatchResult, Ledger
from rlsedit_fast.editing.measurement import Measured, measure
from rlsedit_fast.editing.progress import Point, Progress
from rlsedit_fast.editing.recording import Recorder
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.status import Sample, adherence_asked
from rlsedit_fast.editing.values import Values
from rlsedit_fast.errors import RequestError, ResourceError, RLSEditError, listed

logger = logging.getLogger(__name__)

_REFINED_SHARE = 0.99  # of the change that a second search asks for


@dataclass(frozen=True)
class _Ending:
    """How a change is brought to its end, once all is written and found fit to stay.

    Attributes:
        before: called before the commit, and may still refuse: what prepares the change in the store.
        after: called after it, and cannot fail: what enters it in memory.
    """

    before: list[Callable[[], object]]
    after: list[Callable[[], object]]


class _FellShort(Exception):
    """Requests fell short for whose sake edits were taken out: the batch must be written again without them.

    Attributes:
        values: what was found for each of them, by its place in the batch.
    """

    def __init__(self, values: Mapping[int, Values]) -> None:
        super().__init__()
        self.values = values


class _NoGain(Exception):
    """Refining edits did not help them."""


class EditSession:
    """Applies edits to a model's layers, a batch at a time, and keeps the ledger and the store in step.

    Args:
        context: the model.
        recorder: what writes into the store; None without one.

    Attributes:
        ledger: the edits.
        progress: what else goes on from batch to batch.
        layers: the edited layers; None until their priors are set.
    """

    def __init__(self, context: ModelContext, recorder: Recorder | None) -> None:
        self.ledger = Ledger(context.config, context.prepare)
        self.progress = Progress()
        self.layers: EditedLayers | None = None
        self._config, self._site = context.config, context.site
        self._finder = Finder(context.site, context.config)
        self._pilot: tuple[list[Request], Values] | None = None
        self._recorder = recorder

    def search_pilot(self, requests: Sequence[Request]) -> Values:
        """The values of a pilot in the unedited model; its edits are not searched again if they come first."""
        # What a gradient search goes on from counts the edits that are made, and a pilot's are not.
        values = self._finder.find(requests, Progress())
        if self._config.values == "search":
            self._pilot = list(requests), values
        return values

    def stream(self, requests: Sequence[Request]) -> Iterator[list[EditRecord]]:
        """Applies edits batch by batch, and yields each batch's records once it is written."""
        for batch, found in self._searched_ahead(requests):
            yield self.apply_batch(batch, found=found)

    def apply_batch(
        self, requests: Sequence[Request], *, replaced: Sequence[int] = (), found: Values | None = None
    ) -> list[EditRecord]:
        """Applies one batch, with what becomes of the edits that it replaces or shares a subject with.

        Args:
            requests: the batch.
            replaced: ids of edits that it replaces, whatever they ask: of each request's own, or of none.
            found: its values, where they were searched ahead.
        """
        left_out: dict[int, Values] = {}
        while True:  # again only with fewer requests
            gone, again = self._affected(requests, replaced, left_out)
            if self._config.same_subject == "joint":
                self.check_kept("apply another edit about the subject of", sorted({*gone, *again}))
            try:
                records = self._transact(
                    requests,
                    gone=gone,
                    outcome="replaced",
                    again=again,
                    replaced=replaced,
                    found=found if found is not None or again or gone else self._from_pilot(requests),
                    left_out=left_out,
                )
            except _FellShort as error:
                left_out |= error.values
            else:
                ids = [record.id for record in records]
                self.refine([*ids, *again], measured=True)
                return self.ledger.get(ids)

    def _from_pilot(self, requests: Sequence[Request]) -> Values | None:
        """The values of a first batch whose requests all are in the pilot."""
        if self._pilot is None or self.progress.writes or len(self._finder.groups(requests)) < len(requests):
            return None
        pilot, values = self._pilot
        places = {_mark(request): at for at, request in enumerate(pilot)}
        at = [places.get(_mark(request)) for request in requests]
        self._pilot = None  # what is found for them does not hold for later batches
        return None if None in at else values.taken([place for place in at if place is not None])

    def refine(self, ids: Sequence[int], *, measured: bool = False) -> None:
        """Moves the values of edits further that the model does not state now, as often as the settings say.

        Edits whose search found no value that states the target are left as they are. Where refining does not help,
        nothing changes.

        Args:
            ids: of the edits.
            measured: whether their records were measured in the present model.
        """
        records = [one for one in self.ledger.get(ids) if one.state == "active" and one.search_rank == 1]
        ids, without_gain = [record.id for record in records], set[int]()
        for attempt in range(self._config.effective_refine if ids else 0):
            if measured and not attempt:
                short = [record.id for record in records if not record.success]
            else:  # of all edits, since refining some of them affects the others
                ranks = self._measure(self.ledger.requests(ids)).rank.tolist()
                short = [i for i, rank in zip(ids, ranks, strict=True) if rank > 1 and i not in without_gain]
            if not short:
                return
            logger.info("%d active edits are not stated by the model; searching them again", len(short))
            partners = {partner for record in self.ledger.get(short) for partner in record.joint_with}
            again = sorted(partners.union(short))
            groups = self._finder.groups(self.ledger.requests(again))
            for part in _packed(groups, self._config.batch_size):
                try:
                    self._raise_values([again[at] for at in part])
                except _NoGain:
                    without_gain.update(again[at] for at in part)
                except RLSEditError as error:  # the edits are made, and stay as they are
                    logger.warning("%d edits are not stated and could not be refined: %s", len(short), error)
                    return

    def update_ranks(self, ids: Sequence[int]) -> None:
        """Measures active edits again and updates the records of those whose targets have another rank now."""
        records = [record for record in self.ledger.get(ids) if record.state == "active"]
        if not records:
            return
        now = self._measure(self.ledger.requests([record.id for record in records]))
        changed = [
            replace(record, nll=nll, rank=rank)
            for record, nll, rank in zip(records, now.nll.tolist(), now.rank.tolist(), strict=True)
            if rank != record.rank
        ]
        if changed:
            with self._change("records were updated", "Lower batch_size") as ending:
                self._revise(ending, changed, {})

    def earlier(self, than: int, most: int) -> list[int]:
        """Draws at most `most` active edits with ids below `than`, ascending; the same ones for the same arguments."""
        ids = [i for i in self.ledger.active if i < than]
        return sorted(Random(than).sample(ids, min(most, len(ids))))

    def _measure(self, requests: Sequence[Request]) -> Measured:
        """What the model says at requests now; how much of a change arrived is not asked."""
        nothing = torch.zeros(len(requests), 1)
        return measure(self._site, requests, nothing, nothing[:, 0])

    def _raise_values(self, ids: list[int]) -> None:
        """Searches active edits once more in the written model and adds what is missing to their values.

        Raises:
            _NoGain: no more of them are stated than before, and their mean NLL is no lower; nothing has changed.
        """
        assert self.layers is not None
        requests, held, config = self.ledger.requests(ids), self.ledger.rows(ids), self._config
        before = self._measure(requests)
        with self._change(f"{len(ids)} edits were refined", "Lower batch_size") as ending:
            values = self._finder.find(requests, Progress())
            rows = self.layers.raise_values(requests, held, values, config.effective_key_rows, _REFINED_SHARE)
            after = self._measure(requests)
            if not _better(before, after):
                raise _NoGain
            records = [
                replace(record, nll=nll, rank=rank)
                for record, nll, rank in zip(self.ledger.get(ids), after.nll.tolist(), after.rank.tolist(), strict=True)
            ]
            self._revise(ending, records, dict(zip(ids, rows, strict=True)))

    def _revise(self, ending: _Ending, records: Sequence[EditRecord], rows: Mapping[int, EditRows]) -> None:
        """Ends a change with new records of active edits, and with new rows of some of them."""
        assert self.layers is not None
        progress = replace(self.progress, writes=self.progress.writes + bool(rows))
        objective = tuple(state.objective for state in self.layers.states)
        active = len(self.ledger.active)
        if self._recorder:
            ending.before.append(partial(self._recorder.revise, records, rows, progress, objective, active))
        ending.after.append(partial(self._go_on_from, progress, Point(active, objective)))
        ending.after.append(partial(self.ledger.revise, records, rows))

    def _affected(
        self, requests: Sequence[Request], replaced: Sequence[int], left_out: Collection[int]
    ) -> tuple[list[int], list[int]]:
        """Ids of active edits that a batch takes the place of, and of those to be written again with it.

        Args:
            requests: the batch.
            replaced: see `apply_batch`.
            left_out: places in it of requests that are left out.
        """
        chosen = [request for at, request in enumerate(requests) if at not in left_out]
        gone, again = {i for at, i in enumerate(replaced) if at not in left_out}, list[int]()
        if self._config.same_subject == "joint":
            gone.update(self.ledger.ids_by_prompt(chosen))
            again = [i for i in self.ledger.ids_by_subject(chosen) if i not in gone]
        return sorted(gone), again

    def undo(self, gone: list[int]) -> None:
        """Removes edits; those that shared a value with one of them are written again without it."""
        self.check_kept("undo", gone)
        partners = {partner for record in self.ledger.get(gone) for partner in record.joint_with}
        again = sorted(partners.intersection(self.ledger.active).difference(gone))
        self._transact([], gone=gone, outcome="undone", again=again)
        self.refine(again, measured=True)

    def protect(self, prompts: Sequence[str], keys: Sequence[Tensor], weight: float) -> None:
        """Holds what the layers do on the keys of prompts, `[n, d_k]` each."""
        assert self.layers is not None
        with self._change("rows were protected", "Protect fewer prompts, or edit fewer layers") as ending:
            rows = self.layers.protect(keys, weight)
            if self._recorder:
                ending.before.append(partial(self._recorder.protect, rows, prompts))
            ending.after.append(partial(self.progress.protected.extend, prompts))

    def rebuild(self) -> None:
        """Reads the keys of the active edits again and rebuilds every layer in float64; see `EditedLayers.reread`."""
        assert self.layers is not None
        active = self.ledger.active
        self.check_kept("rebuild the layers from", active)
        with self._change("the layers were rebuilt", "Edit fewer layers") as ending:
            rows = self.ledger.rows(active)
            if active:
                requests = self.ledger.requests(active)
                rows = self.layers.reread(requests, rows, self._config.effective_key_rows)
            else:
                self.layers.rebuild([])
            progress = replace(self.progress, writes=self.progress.writes + 1)
            objective = tuple(state.objective for state in self.layers.states)
            if self._recorder:
                recorded = partial(
                    self._recorder.rebuild, self.ledger, rows, self.layers.protected, progress, objective
                )
                ending.before.append(recorded)
            ending.after.append(partial(self.ledger.set_rows, dict(zip(active, rows, strict=True))))
            ending.after.append(partial(self._go_on_from, progress, Point(len(active), objective)))

    def sample(self, most: int) -> Sample:
        """Reads the model again at some active edits, evenly spaced over the stream."""
        active = self.ledger.active
        ids = [active[at * len(active) // min(most, len(active))] for at in range(min(most, len(active)))]
        if not ids or self.layers is None:
            return Sample(0, None, None)
        requests = self.ledger.requests(ids)
        shift = None
        if self._config.keys is not None:
            shift = self.layers.key_shift(requests, self.ledger.rows(ids), self._config.effective_key_rows)
        now = self._measure(requests)
        return Sample(len(ids), float((now.rank == 1).float().mean()), shift)

    def check_kept(self, what: str, ids: Sequence[int]) -> None:
        """Raises RequestError where active edits are to be taken out and their rows are not kept."""
        if self._config.keys is None and ids:
            some = ", ".join(listed(ids, 5))
            raise RequestError(
                f"cannot {what} edits {some}: their keys and values are not kept (keys=None), so they cannot be taken "
                "back; nothing was changed. Make an editor with keys='full' or 'fp16' for edits that are to be undone"
            )

    @contextmanager
    def _change(self, what: str, advice: str) -> Iterator[_Ending]:
        """A transaction of layers, store and ledger: the block's changes are in all of them, or in none if it raises.

        From the commit on until the ledger has it, Ctrl-C waits.

        Args:
            what: is done, for the error.
            advice: what helps where memory runs out.

        Raises:
            ResourceError: memory ran out.
        """
        assert self.layers is not None
        ending = _Ending([], [])
        with ExitStack() as uninterrupted:
            try:
                with self.layers.transaction() as last:
                    yield ending
                    last += ending.before
                    last.append(lambda: uninterrupted.enter_context(held_back()))
                    if self._recorder:
                        last.append(self._recorder.commit)
            except BaseException as error:
                if self._recorder:
                    self._recorder.abort()
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ResourceError(
                    f"memory ran out while {what}; nothing of it was changed. {advice}. ({error})"
                ) from error
            for action in ending.after:
                action()

    def _go_on_from(self, progress: Progress, point: Point) -> None:
        self.progress = progress
        progress.reached(point)

    def _searched_ahead(self, requests: Sequence[Request]) -> Iterator[tuple[list[Request], Values | None]]:
        """Batches in order, with their values where these are found for several at once."""
        window: list[list[Request]] = []
        for batch in batches_of(requests, self._config.batch_size, apart=self._config.same_subject == "joint"):
            held = sum(map(len, window))
            if window and held + len(batch) > (self._config.search_ahead or 0):
                yield from self._with_values(window)
                window = []
            window.append(batch)
        yield from self._with_values(window)

    def _with_values(self, batches: Sequence[list[Request]]) -> Iterator[tuple[list[Request], Values | None]]:
        """A batch that bears upon active edits or on another of the batches has its values found when it comes."""
        alone = range(len(batches)) if self._config.same_subject == "separate" else unrelated(batches, self.ledger)
        found: dict[int, Values] = {}
        if len(batches) > 1 and len(alone) > 1:
            values = self._finder.find([request for at in alone for request in batches[at]], self.progress)
            first = 0
            for at in alone:
                found[at] = values.taken(range(first, first + len(batches[at])))
                first += len(batches[at])
        for at, batch in enumerate(batches):
            yield batch, found.get(at)

    def _transact(
        self,
        requests: Sequence[Request],
        *,
        gone: list[int],
        again: list[int],
        outcome: EditState,
        replaced: Sequence[int] = (),
        found: Values | None = None,
        left_out: Mapping[int, Values] | None = None,
    ) -> list[EditRecord]:
        """Removes edits, writes new ones, and writes some active ones again; all of it or nothing.

        Args:
            requests: new edits.
            gone: ids of active edits to remove.
            again: ids of active edits to remove and to write again together with `requests`; they keep their ids.
            outcome: what becomes of `gone`.
            replaced: see `apply_batch`.
            found: the values of `requests`, searched before; only with no `again`.
            left_out: what was found for requests that are to be left out, by place.

        Returns:
            The records of the new edits.

        Raises:
            _FellShort: with further requests left out, others would be removed; nothing has changed.
        """
        assert self.layers is not None
        everything = [*requests, *self.ledger.requests(again)]
        written = BatchResult({}, [], [])
        rebuilt: tuple[bool, ...] = ()
        before, scale = self.progress, self.progress.scale
        try:
            doing = f"a batch of {len(everything)} edits was written"
            with self._change(doing, "Lower batch_size or take fewer context_prefixes") as ending:
                if gone or again:
                    out = {*gone, *again}
                    rebuilt = self.layers.remove(self.ledger.rows([*gone, *again]), self.ledger.rows_except(out))
                if everything:
                    values, short = self._values(everything, len(requests), found, left_out or {})
                    if requests and self._affected(requests, replaced, short) != (gone, again):
                        raise _FellShort({at: values.taken([at]) for at in short})
                    written = self._write(everything, values, short)
                transaction = self.ledger.transaction(
                    requests,
                    written,
                    again=again,
                    time=self.progress.now() if requests else self.progress.time,
                    batch=self.progress.batches + 1,
                    gone=tuple(gone),
                    outcome=outcome,
                    rebuilt=rebuilt,
                )
                progress = replace(
                    self.progress,
                    batches=self.progress.batches + bool(requests),
                    writes=self.progress.writes + bool(gone or again) + bool(everything),
                )
                objective = tuple(state.objective for state in self.layers.states)
                active = len(self.ledger.active) + sum(r.state == "active" for r in transaction.records)
                active -= len(gone)
                if self._recorder:
                    ending.before.append(partial(self._recorder.record, transaction, progress, objective, active))
                ending.after.append(partial(self._go_on_from, progress, Point(active, objective)))
                ending.after.append(partial(self.ledger.enter, transaction))
        except BaseException:
            if self.progress is not before:  # it was made; somebody pressed Ctrl-C in the meantime
                raise
            before.scale = scale
            raise
        if self._recorder:
            self._recorder.snapshot_if_due(self.layers, self.progress)
        return self.ledger.get([record.id for record in transaction.records])

    def _values(
        self, requests: Sequence[Request], new: int, found: Values | None, left_out: Mapping[int, Values]
    ) -> tuple[Values, set[int]]:
        """The values of a batch, and the places in it of those that are left out, now or before.

        Args:
            requests: the batch.
            new: how many of them, the first ones, are new.
            found: their values, if these are known.
            left_out: see `_transact`.
        """
        rest = [at for at in range(len(requests)) if at not in left_out]
        parts, short = list(left_out.values()), set(left_out)
        if rest:
            values, fell = self._finder.reached(
                [requests[at] for at in rest], new - len(left_out), found, self.progress
            )
            parts.append(values)
            short.update(rest[at] for at in fell)
        return Values.joined(parts, [*left_out, *rest]), short

    def _write(self, requests: Sequence[Request], values: Values, short: Collection[int]) -> BatchResult:
        """Writes a batch into the layers, without the requests at the places `short`, and measures all of it."""
        assert self.layers is not None
        chosen = [at for at in range(len(requests)) if at not in short]
        rows = dict[int, EditRows]()
        if chosen:
            config = self._config
            written = self.layers.write(
                [requests[at] for at in chosen],
                values.taken(chosen),
                [requests[at].edit.weight for at in chosen],
                config.effective_key_rows,
                adherence=adherence_asked(config, anchored=any(state.prior.mu for state in self.layers.states)),
            )
            rows = dict(zip(chosen, written, strict=True))
        now = measure(self._site, requests, values.goal[:, 0], values.delta.norm(dim=1))
        now.realized[list(short)] = 0.0
        groups = self._finder.groups([requests[at] for at in chosen])
        return BatchResult(
            rows,
            _figures(values, now),
            [[chosen[at] for at in group] for group in groups],
        )


def _figures(values: Values, now: Measured) -> list[dict[str, Any]]:
    """Of each edit, the fields of its record that the search and the model after the write give."""
    columns = {
        "search_converged": values.converged,
        "search_nll": values.nll,
        "search_rank": values.rank,
        "search_steps": values.steps,
        "realized": now.realized,
        "nll": now.nll,
        "rank": now.rank,
    }
    each = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in each]


def _mark(request: Request) -> tuple[object, ...]:
    """The same for requests whose values are the same."""
    return tuple(tuple(row.ids) for row in (*request.contexts, *request.kl))


def _better(before: Measured, after: Measured) -> bool:
    """Whether more edits are stated, or as many at a lower mean NLL."""
    stated = [int((one.rank == 1).sum()) for one in (before, after)]
    return stated[1] > stated[0] or (stated[1] == stated[0] and float(after.nll.mean()) < float(before.nll.mean()))


def _packed(groups: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Groups together, about `size` members at a time."""
    part: list[int] = []
    for group in groups:
        if part and len(part) + len(group) > size:
            yield part
            part = []
        part += group
    yield part
