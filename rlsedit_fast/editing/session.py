"""A session applies and removes edits; each change is one transaction of layers, store and ledger."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace

from rlsedit_fast.activity import report_activity
from rlsedit_fast.baselines import LayerState
from rlsedit_fast.baselines.memory import check_memory
from rlsedit_fast.editing.capacity.overlap import Overlap, check_overlaps, find_overlaps
from rlsedit_fast.editing.capacity.remaining import continued_by_keys
from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.held_out import HeldOut
from rlsedit_fast.editing.layers import EditedLayers
from rlsedit_fast.editing.ledger import BatchResult, Ledger
from rlsedit_fast.editing.measurement import Answers, Measurement
from rlsedit_fast.editing.priors import Pilot, choose_priors
from rlsedit_fast.editing.protection import Protection
from rlsedit_fast.editing.records import EditRecord, EditState, Point, Progress
from rlsedit_fast.editing.refinement import Refiner
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.rows import EditRows
from rlsedit_fast.editing.search.value_search import ValueFinder, Values
from rlsedit_fast.editing.status import Norms, Status, assess, calibrated_adherence, layer_statuses
from rlsedit_fast.editing.storage.persistence import Recorder
from rlsedit_fast.editing.storage.recovery import recover
from rlsedit_fast.editing.storage.transaction import Transaction
from rlsedit_fast.errors import RequestError, listed
from rlsedit_fast.interrupts import interrupts_deferred
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.rls import BlockPrior, Prior
from rlsedit_fast.statistics.key_statistics import Moment

logger = logging.getLogger(__name__)

PILOT = 100
"""Number of edits that the priors are calibrated on by default: the first edits of the stream."""


class EditSession:
    """Applies and removes edits, batch by batch, and keeps layers, store and ledger consistent.

    Args:
        context: the model.
        recorder: writes into the store; None without a store.

    Attributes:
        config: the settings.
        ledger: the edits.
        progress: counters.
        layers: the edited layers; None until the priors are set.
        norms: norms of each layer; empty until the priors are set.
        moments: moments of the anchors per layer; None without anchors.
        held_out_moments: number of held-out tokens of the anchors and their moments per layer; None without them.
        held_out: the held-out tokens, when the priors are set; None without them.
        measurement: measures edits in the present model.
        finder: searches values.
        refiner: refines edits that the model does not state.
        waiting: protections to be added when the priors are set.
    """

    def __init__(self, context: ModelContext, recorder: Recorder | None) -> None:
        self.ledger = Ledger(context.config, context.prepare)
        self.progress = Progress()
        self.layers: EditedLayers | None = None
        self.norms: list[Norms] = []
        self.moments: list[Moment] | None = None
        self.held_out_moments: tuple[int, list[Moment]] | None = None
        self.held_out: HeldOut | None = None
        self.waiting: list[Protection] = []
        self.config = context.config
        self._context, self._recorder = context, recorder
        self.finder = ValueFinder(context.site, context.config)
        self.refiner = Refiner(self, self.finder, context.config)
        self.measurement = Measurement(context)
        self._pilot: tuple[list[Request], Values] | None = None

    @property
    def edited(self) -> list[tuple[Projection, LayerState]]:
        """The projections and their states; empty until the priors are set."""
        return list(zip(self._context.projections, self.layers.states, strict=True)) if self.layers else []

    @property
    def priors(self) -> list[Prior | BlockPrior]:
        """The prior of each layer; empty until the priors are set."""
        return [state.prior for _, state in self.edited]

    @property
    def protected(self) -> list[str]:
        """The protected prompts."""
        waiting = self.waiting if self.layers is None else []
        return [*self.progress.protected, *(text for one in waiting for text in one.texts)]

    @property
    def used_moments(self) -> list[Moment] | None:
        """The moments of the anchors; None if `mu = 0`, which gives the anchors no weight."""
        return None if self.config.prior.mu == 0 else self.moments

    def recover(self) -> None:
        """Restores the edits of the store.

        Raises:
            StoreError: a required file is damaged.
        """
        if self._recorder:
            store = self._recorder.store
            self.layers, self.held_out = recover(store, self._context, self.ledger, self.progress)
            self._recorder.held_out = self.held_out
            self.norms = [Norms(**norms) for entry in store.entries[:1] for norms in entry.about["norms"]]

    def pilot(self, requests: Sequence[Request]) -> Pilot:
        """Returns a pilot with values searched in the unedited model. They are reused if it is the first batch."""
        # Edits of one subject or prompt have nearly equal keys, which would make the pilot look hard to realize.
        distinct = list({request.subject_key or request.prompt_key: request for request in requests}.values())
        values = self.finder.find(distinct)
        self._pilot = distinct, values
        return Pilot(self._context, self.used_moments, distinct, values)

    def start(self, requests: Sequence[Request]) -> None:
        """Chooses the priors, with the requests as pilot if necessary, and creates the states of the layers.

        Raises:
            InputError: see `choose_priors`.
            ResourceError: there is not enough memory.
        """
        config = self.config
        self._context.processes.agree(lambda: check_memory(self._context.memory()))
        anchored = self.used_moments is not None
        if not anchored:
            logger.warning(
                "no anchors: only the weight change is penalized. To preserve the outputs on text, pass --text FILE or "
                "collect key statistics once with `rlsedit statistics` (Python: Editor.anchor('text.txt'), or "
                "Editor.anchor() for collected statistics)"
            )
        calibrated = calibrated_adherence(config, anchored=anchored) is not None
        pilot = self.pilot(requests) if calibrated else None
        report_activity("calibrating mu and lam")
        layouts = [projection.layout for projection in self._context.projections]
        priors = choose_priors(config, self.used_moments, layouts, pilot)
        del pilot  # its factors take memory that the states need
        report_activity("building the states of the layers")
        layers = EditedLayers(
            self._context.site,
            self._context.projections,
            priors,
            delay=config.delay,
            bare_weight=config.contexts.bare_weight,
            stored_rows=config.stored_rows,
            rule=config.rule,
            rule_options=config.rule_options,
            experts=config.experts,
        )
        protected, prompts = list[list[EditRows]](), self.protected
        try:
            for protection in self.waiting:
                for part in protection.parts():
                    with Transaction(layers) as transaction:
                        protected.append(part.add(layers, self._context, self._adherence_with(priors)))
                        transaction.commit()
                self._pilot = self._pilot if protection.keeps_outputs else None
        except BaseException:
            layers.reset_weights()
            raise
        self.norms = [Norms.of(state.originals(), state.prior, state.columns) for state in layers.states]
        if self.held_out_moments:
            originals = [state.originals() for state in layers.states]
            self.held_out = HeldOut.of(*self.held_out_moments, originals, self._context.projections)
        if self._recorder:
            norms = [asdict(norms) for norms in self.norms]
            self._recorder.begin(priors, protected, prompts, norms, self.held_out)
        self.layers, self.progress.protected = layers, prompts

    def write_start(self) -> None:
        """Writes the priors into the store; if that fails, the session is not started.

        Raises:
            StoreError: the store cannot be written.
        """
        if self._recorder:
            try:
                self._recorder.write_start()
            except BaseException:
                self.discard_start()
                raise

    def discard_start(self) -> None:
        """Discards priors and states; the session is not started, and the model has its original weights."""
        if self.layers is not None and not all(protection.keeps_outputs for protection in self.waiting):
            self.layers.reset_weights()
        self.layers, self.norms, self.progress.protected, self.held_out = None, [], [], None
        if self._recorder:
            self._recorder.discard_start()

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Makes all changes in the block one change; an error in the block, or in storing it, undoes all of them."""
        assert self.layers is not None
        layers, ledger = self.layers.snapshot(), self.ledger.copy()
        progress = replace(self.progress, trace=list(self.progress.trace), protected=list(self.progress.protected))
        try:
            with self._recorder.held() if self._recorder else nullcontext():
                yield
        except BaseException:
            with interrupts_deferred():
                self.layers.restore(layers)
                self.ledger, self.progress = ledger, progress
            raise
        del layers
        self.layers.settle()
        if self._recorder:
            self._recorder.snapshot_if_due(self.layers)

    def apply_batch(
        self, requests: Sequence[Request], *, replaced: Sequence[int] = (), values: Values | None = None
    ) -> list[EditRecord]:
        """Applies one batch, replaces edits and rewrites those that share a subject with it.

        Args:
            requests: the batch.
            replaced: ids of edits that the requests replace, one per request, or none.
            values: values of the batch, if they are known.

        Returns:
            The records of the batch.
        """
        before = self.measurement.answers(requests)
        overlaps = None if replaced else self.overlaps(requests)
        skipped, values = self.finder.leave_out(requests, check_overlaps(self.config, requests, overlaps), values)
        while True:
            removed, rewritten = self._affected(requests, replaced, skipped)
            if self.config.same_subject == "joint":
                self.check_stored("apply another edit of the subject of", sorted({*removed, *rewritten}))
            if values is None and not (removed or rewritten or skipped):
                values = self._pilot_values(requests)
            records = self._transact(
                requests,
                removed=removed,
                rewritten=rewritten,
                outcome="replaced",
                replaced=replaced,
                values=values,
                skipped=skipped,
                answers_before=before,
                overlaps=overlaps,
            )
            if records is not None:
                self.refiner.refine([*(record.id for record in records), *rewritten], measured=True)
                return self.ledger.get([record.id for record in records])
            values = None

    def overlaps(self, requests: Sequence[Request]) -> list[Overlap] | None:
        """Returns the overlap of each request with the active edits; None if the rule does not know it."""
        return find_overlaps(self._context, self.layers, self.ledger, requests)

    def undo(self, ids: Sequence[int]) -> None:
        """Removes active edits; edits that shared a value with one of them are written again without it."""
        self.check_stored("undo", ids)
        partners = {partner for record in self.ledger.get(ids) for partner in record.joint_with}
        rewritten = sorted(partners.intersection(self.ledger.active).difference(ids))
        self._transact([], removed=list(ids), rewritten=rewritten, outcome="undone")
        self.refiner.refine(rewritten, measured=True)

    def protect(self, protection: Protection) -> None:
        """Adds a protection; before the priors are set it waits for them."""
        if self.layers is None:
            self.waiting.append(protection)
            return
        parts = protection.parts()
        with self.atomic() if len(parts) > 1 else nullcontext():
            for part in parts:
                self._protect(part)

    def _protect(self, protection: Protection) -> None:
        assert self.layers is not None
        with self.transaction("protecting prompts", "protect fewer prompts, or edit fewer layers") as transaction:
            rows = protection.add(self.layers, self._context, self._adherence())
            transaction.commit(
                lambda recorder: recorder.protection(rows, protection.texts),
                lambda: self.progress.protected.extend(protection.texts),
            )

    def rebuild(self) -> None:
        """Rebuilds every layer in float64 at the present keys of the active edits."""
        assert self.layers is not None
        layers, active = self.layers, self.ledger.active
        self.check_stored("rebuild the layers from", active)
        with self.transaction("rebuilding the layers", "edit fewer layers") as transaction:
            report_activity("rebuilding the layers")
            rows = self.ledger.rows(active)
            if active:
                requests = self.ledger.requests(active)
                rows = layers.rebuild_at_present_keys(requests, rows, self.config.effective_rows)
            else:
                layers.rebuild([])
            progress = replace(self.progress, writes=self.progress.writes + 1)
            point = layers.point(len(active))

            def enter() -> None:
                self.ledger.set_rows(dict(zip(active, rows, strict=True)))
                self._advance(progress, point)

            transaction.commit(
                lambda recorder: recorder.rebuild(self.ledger, rows, layers.protected, progress, point), enter
            )

    def refine(self) -> None:
        """Refines the active edits that the model does not state."""
        self.refiner.refine(self.ledger.active)

    def revise(self, transaction: Transaction, records: Sequence[EditRecord], rows: Mapping[int, EditRows]) -> None:
        """Commits a transaction with new records of active edits, and new rows of some of them."""
        assert self.layers is not None
        progress = replace(self.progress, writes=self.progress.writes + bool(rows))
        point = self.layers.point(len(self.ledger.active))

        def enter() -> None:
            self.ledger.revise(records, rows)
            self._advance(progress, point)

        transaction.commit(lambda recorder: recorder.revision(records, rows, progress, point), enter)

    def status(self, budget: float, sample: int) -> Status:
        """Returns the status; see `Editor.status`."""
        return assess(
            self.ledger.records,
            self.progress.trace,
            layer_statuses(self.edited, self.norms, self.held_out),
            batches=self.progress.batches,
            adherence=self._adherence(),
            budget=budget,
            sizes=self._recorder.store.sizes() if self._recorder else {},
            sample=self.measurement.sample(self.ledger, self.layers, sample) if sample and self.layers else None,
            continued=continued_by_keys(self.edited, self.ledger, self.config),
        )

    def transaction(self, action: str, hint: str) -> Transaction:
        """Returns a transaction of this session; the arguments are those of `Transaction`."""
        assert self.layers is not None
        return Transaction(self.layers, self._recorder, action, hint)

    def check_stored(self, action: str, ids: Sequence[int]) -> None:
        """Raises RequestError if edits must be removed and their rows are not stored."""
        if self.config.stored_rows is None and ids:
            some = ", ".join(listed(ids, 5))
            raise RequestError(
                f"cannot {action} edits {some}: their keys and values are not stored (stored_rows=None); nothing was "
                "modified",
                hint="use an editor with stored_rows='full' or 'fp16'",
            )

    def _advance(self, progress: Progress, point: Point) -> None:
        self.progress = progress
        progress.append(point)

    def _pilot_values(self, requests: Sequence[Request]) -> Values | None:
        """Returns the values of a first batch whose requests are all in the pilot."""
        if self._pilot is None or self.progress.writes or len(self.finder.groups(requests)) < len(requests):
            return None
        pilot, values = self._pilot
        places = {_texts(request): at for at, request in enumerate(pilot)}
        found = [places.get(_texts(request)) for request in requests]
        self._pilot = None  # later batches are searched in the edited model
        return None if None in found else values.taken([at for at in found if at is not None])

    def _affected(
        self, requests: Sequence[Request], replaced: Sequence[int], skipped: Collection[int]
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of active edits that a batch replaces, and of those that are written again with it.

        Args:
            requests: the batch.
            replaced: see `apply_batch`.
            skipped: positions of skipped requests.
        """
        chosen = [request for at, request in enumerate(requests) if at not in skipped]
        removed, rewritten = {i for at, i in enumerate(replaced) if at not in skipped}, list[int]()
        if self.config.same_subject == "joint":
            removed.update(self.ledger.ids_by_prompt(chosen))
            rewritten = [i for i in self.ledger.ids_by_subject(chosen) if i not in removed]
        return sorted(removed), rewritten

    def _transact(
        self,
        requests: Sequence[Request],
        *,
        removed: list[int],
        rewritten: list[int],
        outcome: EditState,
        replaced: Sequence[int] = (),
        values: Values | None = None,
        skipped: dict[int, Values] | None = None,
        answers_before: Answers | None = None,
        overlaps: Sequence[Overlap] | None = None,
    ) -> list[EditRecord] | None:
        """Removes edits, writes new ones, and writes some active ones again, in one transaction.

        Args:
            requests: the new edits.
            removed: ids of active edits to remove.
            rewritten: ids of active edits to remove and write again together with `requests`; they keep their ids.
            outcome: new state of the removed edits.
            replaced: see `apply_batch`.
            values: values of `requests`, if they are known; only without `rewritten`.
            skipped: values of requests to skip, by position; requests that do not converge are added if this changes
                which edits are removed.
            answers_before: answers to `requests` before the change.
            overlaps: overlaps of `requests`, if they are known.

        Returns:
            The records of the new edits. None if requests were added to `skipped`; nothing was modified.
        """
        assert self.layers is not None
        skipped = {} if skipped is None else skipped
        everything = [*requests, *self.ledger.requests(rewritten)]
        rebuilt: tuple[bool, ...] = ()
        aged_rebuilt: tuple[bool, ...] = ()
        aged = self.ledger.aged(len(requests), {*removed, *rewritten})
        result = BatchResult({}, [], [])
        action, hint = f"writing a batch of {len(everything)} edits", "decrease batch_size or use fewer contexts"
        with self.transaction(action, hint) as transaction:
            if out := [*removed, *rewritten]:
                rebuilt = self.layers.remove(self.ledger.rows(out), self.ledger.rows_except(set(out)))
            if aged:
                old = self.ledger.rows(list(aged))
                kept = [aged.get(i, self.ledger.rows([i])[0]) for i in self.ledger.active if i not in out]
                aged_rebuilt = self.layers.lower_weights(old, list(aged.values()), kept)
            if everything:
                found, short = self.finder.find_rest(everything, len(requests), values, skipped)
                if requests and self._affected(requests, replaced, short) != (removed, rewritten):
                    skipped.update({at: found.taken([at]) for at in short})
                    return None
                # Called directly, so that a kernel is few calls away from Editor.edit.
                chosen = [at for at in range(len(everything)) if at not in short]
                rows, energy = dict[int, EditRows](), dict[int, float]()
                if chosen:
                    some = [everything[at] for at in chosen]
                    weights = [
                        *(one.edit.weight for one in requests),
                        *(one.present_weight for one in self.ledger.get(rewritten)),
                    ]
                    written = self.layers.write(
                        some,
                        found.taken(chosen),
                        self.config.effective_rows,
                        adherence=self._adherence(),
                        weights=[weights[at] for at in chosen],
                    )
                    rows = dict(zip(chosen, written.rows, strict=True))
                    energy = dict(zip(chosen, written.energy or (), strict=False))
                fields = self.measurement.record_fields(everything, found, rows, answers_before)
                active = len(self.ledger.active) - len(removed) + sum(at < len(requests) for at in rows)
                mean = self.layers.states[0].objective / max(1, active)
                for at in range(len(requests)):
                    fields[at]["used"] = overlaps[at].used if overlaps else None
                    fields[at]["innovation"] = energy[at] / mean if at in energy and mean > 0 else None
                groups = [[chosen[at] for at in group] for group in self.finder.groups([everything[i] for i in chosen])]
                result = BatchResult(rows, fields, groups)
            record = self.ledger.transaction(
                requests,
                result,
                rewritten_ids=rewritten,
                time=self._context.processes.same(self.progress.now()) if requests else self.progress.time,
                batch=self.progress.batches + 1,
                removed=tuple(removed),
                outcome=outcome,
                rebuilt=rebuilt,
                aged={i: rows.weight for i, rows in aged.items()},
                aged_rebuilt=aged_rebuilt,
            )
            progress = replace(
                self.progress,
                batches=self.progress.batches + bool(requests),
                writes=self.progress.writes + bool(out) + bool(everything),
            )
            added = sum(one.state == "active" for one in record.records)
            point = self.layers.point(len(self.ledger.active) + added - len(removed))

            def enter() -> None:
                self.ledger.enter(record)
                self._advance(progress, point)

            transaction.commit(lambda recorder: recorder.edit(record, progress, point), enter)
        if self._recorder:
            self._recorder.snapshot_if_due(self.layers)
        return self.ledger.get([one.id for one in record.records])

    def _adherence(self) -> float | None:
        """Returns the adherence that the last layer maintains, or None."""
        return self._adherence_with(self.priors)

    def _adherence_with(self, priors: Sequence[Prior | BlockPrior]) -> float | None:
        return calibrated_adherence(self.config, anchored=any(prior.mu for prior in priors))


def _texts(request: Request) -> tuple[object, ...]:
    """Returns the token ids of a request, which determine its value."""
    return tuple(tuple(row.ids) for row in (*request.contexts, *request.kl))
