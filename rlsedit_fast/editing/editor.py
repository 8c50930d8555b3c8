"""The editor: a transformers model, the solver state of each edited layer, and the record of what was told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from rlsedit_fast.baselines import RECURSIVE, LayerState, make_rule
from rlsedit_fast.editing import memory
from rlsedit_fast.editing.calibration import Pilot, Tradeoff, choose_priors, needs_pilot, tabulate
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import Edit, EditRecord, weight_trouble
from rlsedit_fast.editing.inspection import inspect_model
from rlsedit_fast.editing.interrupts import held_back
from rlsedit_fast.editing.layers import EditedLayers
from rlsedit_fast.editing.recording import Recorder
from rlsedit_fast.editing.recovery import recover
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.session import EditSession
from rlsedit_fast.editing.sources import GivenTexts, Source, each_text
from rlsedit_fast.editing.statistics import KeyStatistics
from rlsedit_fast.editing.status import DEFAULT_BUDGET, LayerStatus, Norms, Status, adherence_asked, assess
from rlsedit_fast.editing.written import describe, settings_of
from rlsedit_fast.errors import InputError, RLSEditError, StoreError
from rlsedit_fast.export import AdapterReport, DeltaReport, WeightChange, write_adapter, write_delta
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import Projection
from rlsedit_fast.rls import Prior
from rlsedit_fast.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SAMPLED = 32
"""Active edits that `status` asks the model about."""

PILOT = 100
"""Edits that the priors are calibrated on where the user names no pilot: the first of the stream."""


@dataclass(frozen=True)
class LayerDeviation:
    """How far an edited layer has gone from the pre-trained one, and how far it can have gone.

    Attributes:
        layer: index of the block.
        weight: `||W - W0||_F`, measured.
        weight_bound: `sqrt(J) / lam`, which it cannot exceed.
        anchor_bound: what `||K0 (W - W0)^T||_F` over the anchors cannot exceed, `sqrt(J) / mu`.
    """

    layer: int
    weight: float
    weight_bound: float
    anchor_bound: float


class Editor:
    """Edits a transformers model in place.

    The model that is handed in stays an ordinary model: after every batch its weights are the edited ones. With a
    store, what `edit` has returned, or handed to `on_batch`, is there when the store is opened again, whatever became
    of the process or the power; a batch under way is then wholly there or wholly absent.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: EditConfig | None = None,
        store: str | Path | None = None,
    ) -> None:
        """Looks the model over, with a forward over two tokens; nothing of it is changed, but where a store has edits.

        Args:
            model: a causal language model; with a store, the one that its edits were made in, without them.
            tokenizer: its tokenizer.
            config: which layers, and how; by default what the store has, else `EditConfig()`.
            store: folder to keep the edits in. One that has some is taken up: the model's weights become the edited
                ones, without a forward pass.

        Raises:
            ModelError: the layers or their projections are not there, or cannot be edited (together).
            InputError: a weight to be edited is not finite, the tokenizer has more tokens than the model, `config`
                changes what holds for all edits of the store, or asks for what its rule cannot do.
            StoreError: the store is another model's, is damaged, of another version, or being written by another
                editor; nothing was changed.
        """
        given = config or EditConfig()
        held = Store(store) if store is not None and Store.exists(store) else None
        try:
            if held:
                given = _check_store(held, model, config)
            self._context = inspect_model(model, tokenizer, given)
            self.model, self.tokenizer = model, tokenizer
            self._moments: list[Tensor] | None = None
            self._to_protect: list[tuple[list[str], list[Tensor], float]] = []
            self._norms: list[Norms] = []
            if store is not None and (given.rule != RECURSIVE or given.norm_anchor):
                raise InputError(
                    f"store={str(store)!r} with rule={given.rule!r}, norm_anchor={given.norm_anchor}: what these go on "
                    f"from batch to batch is not kept. Take rule={RECURSIVE!r} and no norm_anchor, or no store"
                )
            if store is not None and held is None:
                path = str(getattr(model.config, "_name_or_path", ""))
                path = str(Path(path).resolve()) if path and Path(path).is_dir() else path
                held = Store.create(store, describe(self.config, given, self.projections, fingerprint(model), path))
            self._recorder = Recorder(held, self.config, self.projections) if held else None
            self._session = EditSession(self._context, self._recorder)
            if self._recorder:
                self._take_up(self._recorder, config)
        except BaseException:
            if held:
                held.close()
            raise

    def _take_up(self, recorder: Recorder, config: EditConfig | None) -> None:
        """Goes on where a store is."""
        store = recorder.store
        about = store.about
        if config is not None and about["config"] != (now := asdict(self.config)):
            recorder.describe(about | {"config": now})
        with quiet(self.model):
            self._session.layers = recover(store, self._context, self._session.ledger, self._session.progress)
        self._norms = [Norms(**norms) for entry in store.entries[:1] for norms in entry.about["norms"]]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: EditConfig | None = None,
        store: str | Path | None = None,
        **model_options: Any,
    ) -> Editor:
        """Loads model and tokenizer with transformers and makes an editor of them.

        Args:
            path: whatever `AutoModelForCausalLM.from_pretrained` takes.
            config: which layers, and how; by default what the store has, else `EditConfig()`.
            store: folder to keep the edits in, see `Editor`.
            **model_options: handed on to it, `dtype` and `device_map` for example.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, **model_options)
        return cls(model.eval(), AutoTokenizer.from_pretrained(path), config=config, store=store)

    @classmethod
    def open(cls, store: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Editor:
        """Takes up a store that is there: the model becomes the edited one; see `Editor`.

        Raises:
            StoreError: there is no store, or as `Editor` says.
        """
        if not Store.exists(store):
            raise StoreError(
                f"{str(store)!r} does not contain a store; pass the folder of a store",
                hint="create one with `rlsedit edit --store DIR` (Python: Editor(..., store=DIR))",
            )
        return cls(model, tokenizer, store=store)

    def close(self) -> None:
        """Lets others write the store; the model stays edited. Without a store it does nothing."""
        if self._recorder:
            self._recorder.store.close()

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def config(self) -> EditConfig:
        """The settings, with the context prefixes that the model wrote."""
        return self._context.config

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that are edited, ascending."""
        return self._context.layers

    @property
    def projections(self) -> list[Projection]:
        """What is edited in them."""
        return list(self._context.projections)

    @property
    def priors(self) -> list[Prior]:
        """What holds each edited layer, in the order of `layers`; nothing before calibration or the first edit."""
        return [state.prior for _, state in self._edited]

    def memory(self) -> list[memory.LayerMemory]:
        """What editing takes beside the model, layer by layer, before it is taken."""
        rule = make_rule(self.config.rule, self.config.rule_options)
        rows = len(self.config.context_prefixes) if self.config.effective_key_rows == "contexts" else 1
        return memory.plan(self.projections, delay=self.config.delay, rows=rows, rule=rule)

    def anchor(self, what: Iterable[str] | KeyStatistics) -> int:
        """Names what the model is to go on doing: the edited layers' outputs on every token of some text.

        Args:
            what: running text of the kind that matters, some thousands of tokens, more than d_k if that can be; or
                what `statistics` collected from it.

        Returns:
            The number of tokens seen.

        Raises:
            InputError: the priors are set already, by `calibrate` or the first edit; no texts were given; or the
                statistics are of another model or lack a layer.
        """
        if self._session.layers:
            raise InputError("anchor(): the priors are set already, under other anchors; make a new editor")
        if isinstance(what, KeyStatistics):
            what.check(self.fingerprint(), self.layers)
            found = what
        else:
            # They are not kept, so nobody will ask whose they are; a fingerprint would read all of the weights.
            found = self._context.collect(GivenTexts(what), identity="")
        # Read only when a state is made, and then a chunk at a time; beside the model they would crowd it.
        self._moments = [found.moments[layer].cpu() for layer in self.layers]
        return found.tokens

    def statistics(
        self,
        source: Source,
        *,
        tokens: int | None = None,
        progress: Callable[[int, int | None], None] | None = None,
        checkpoint: str | Path | None = None,
    ) -> KeyStatistics:
        """Collects key statistics of the edited layers, for `anchor` and for keeping; see `statistics.collect`.

        Raises:
            InputError: there are edits already; or as `collect` says.
        """
        if len(self._session.ledger):
            raise InputError("statistics(): the model is edited already; collect them from the unedited one")
        return self._context.collect(source, tokens=tokens, progress=progress, checkpoint=checkpoint)

    def fingerprint(self) -> str:
        """Of the model as it was before any edit; one read of its weights. See `models.fingerprint`."""
        originals = {
            f"{projection.name}.weight": state.original.T if projection.transposed else state.original
            for projection, state in self._edited
        }
        return fingerprint(self.model, instead=originals)

    def protect(self, prompts: Iterable[str], *, weight: float = 1.0) -> int:
        """Holds the edited layers to what they do now on every token of `prompts`, beside the anchors.

        Args:
            prompts: texts whose continuations are to stay.
            weight: how firmly each token, against an edit of weight 1. The more tokens, the less room for edits: the
                comparison protects its many neighbours at 0.01 (bench/results/paper/demo, "rls protecting").

        Returns:
            The number of tokens that are held.

        Raises:
            InputError: prompts that are not several texts, one without tokens or too long for the model, or a weight
                that an edit may not have.
        """
        if trouble := weight_trouble(weight):
            raise InputError(trouble)
        self._check_attached()
        texts = list(each_text(prompts))
        with quiet(self.model):
            keys = self._context.text_keys(texts)
            if self._session.layers is None:
                self._to_protect.append((texts, [key.cpu() for key in keys], weight))
            else:
                self._session.protect(texts, keys, weight)
        return len(keys[0])

    @property
    def protected(self) -> list[str]:
        """The prompts that are protected, in a store's editor also those of earlier ones."""
        waiting = self._to_protect if self._session.layers is None else []
        return [*self._session.progress.protected, *(text for texts, _, _ in waiting for text in texts)]

    def calibrate(self, edits: Iterable[Edit]) -> list[Prior]:
        """Finds each layer's prior from a pilot batch, changing nothing of the model.

        `config.lam` and `config.mu` win where they are given; what is left open is set such that the share
        `config.adherence` of the pilot's changes would be realised.

        Args:
            edits: the pilot, edits like those to come; a hundred are plenty.

        Returns:
            The priors, in the order of `layers`, which all edits from now on are made under.

        Raises:
            InputError: the priors are set already, or `mu` was given and no anchors were.
            RequestError: an edit of the pilot cannot be made.
            ResourceError: there is less memory than the states take.
        """
        if self._session.layers:
            raise InputError("calibrate(): the priors are set already; make a new editor")
        requests = self._context.prepare(edits)
        with quiet(self.model):
            self._start(requests)
        if self._recorder:
            with held_back():
                try:
                    self._recorder.write_start()
                except BaseException:
                    self._forget_start()
                    raise
        return self.priors

    def assess(self, edits: Iterable[Edit], adherences: Sequence[float]) -> list[Tradeoff]:
        """What `calibrate` would choose for each of some adherences, and what that would do to the pilot.

        Nothing is set. The arguments and errors are those of `calibrate`.
        """
        if self._session.layers:
            raise InputError("assess(): the priors are set already; make a new editor")
        with quiet(self.model):
            pilot = self._pilot(self._context.prepare(edits))
            return tabulate(self.config, self._moments_held(), pilot, adherences)

    def check(self, edits: Iterable[Edit]) -> dict[int, str]:
        """Which edits cannot be made, by their place in `edits`, and why; `edit` would refuse the whole call."""
        return self._context.troubles(edits)

    def requests(self, edits: Iterable[Edit]) -> list[Request]:
        """Edits as tokens, with the token at which the model would be edited.

        Raises:
            RequestError: an edit that cannot be made as written.
        """
        return self._context.prepare(edits)

    def edit(
        self, edits: Iterable[Edit], *, on_batch: Callable[[list[EditRecord]], None] | None = None
    ) -> list[EditRecord]:
        """Tells the model facts, `config.batch_size` at a time.

        All edits are checked before the first is made. A batch is written whole or not at all; an error in one
        leaves the batches before it in place, and says how many they are.

        An edit that asks what an active one asks takes its place, and active edits of the same subject are written
        again with it, sharing one value (`EditConfig.same_subject`). Edits that the model does not state after their
        batch or at the end of the call are refined, and so are earlier ones, as many as the call made
        (`EditConfig.refine`).

        Args:
            edits: at least one.
            on_batch: called with the records of each batch when it has been written. Refinement after the last batch
                may change `rank` and `nll` of records that it was given; the returned records are up to date.

        Returns:
            A record per edit, in order, with what the model does after its batch. Look at `success`: an edit that the
            model does not state is kept, unless `unconverged` says otherwise.

        Raises:
            RequestError: an edit that cannot be made as written; nothing was changed.
            ModelError: an edited weight is not where it was, or what it was, after the last batch.
            ResourceError: there is less memory than the work takes.
            RLSEditError: a batch failed; it changed nothing.
        """
        requests = self._context.prepare(edits)
        made: list[EditRecord] = []
        session, fresh = self._session, self._session.layers is None
        with quiet(self.model):
            if fresh:
                self._start(requests[:PILOT])
            before = session.progress.writes
            try:
                for records in session.stream(requests):
                    made += records
                    if on_batch is not None:
                        on_batch(records)
                # Later batches may have undone what earlier ones stated.
                again = [record.id for record in made] if len(made) > self.config.batch_size else []
                session.refine([*session.earlier(made[0].id, len(made)), *again])
                session.update_ranks(again)
            except BaseException as error:
                if session.progress.writes == before:
                    if fresh:
                        self._forget_start()
                elif isinstance(error, RLSEditError):
                    raise type(error)(f"{error}\nThe first {len(made)} of {len(requests)} edits are made.") from error
                raise
        made = session.ledger.get([record.id for record in made])
        if failed := sum(not record.success and record.state == "active" for record in made):
            logger.warning(
                "%d of %d edits were written and the model does not state them; see `success`, and `search_converged` "
                "for whether their search had found a value",
                failed,
                len(made),
            )
        return made

    def select(
        self,
        ids: int | Sequence[int] | None = None,
        *,
        subject: str | None = None,
        last: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[int]:
        """Ids of the active edits that all of what is given fits; of these the `last` so many, the newest ones.

        Args:
            ids: of active edits, as `history()` lists them.
            subject: as asked for, up to white space.
            last: how many, at least 1.
            since: made at this time or after it; local time where it has no time zone.
            until: made at this time or before it.

        Returns:
            Them, ascending, but where ids are given without `last`: then in the order of these.

        Raises:
            InputError: nothing is given, something is given as what it is not, an id is not that of an active edit, or
                no active edit fits.
        """
        return self._session.ledger.select(ids, subject=subject, last=last, since=since, until=until)

    def undo(
        self,
        ids: int | Sequence[int] | None = None,
        *,
        subject: str | None = None,
        last: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[EditRecord]:
        """Takes edits back exactly: the weights become those that the rows of the edits that stay give by themselves.

        A row is an edit's keys and values in a layer as they were found when it was told. Those of later edits were
        found in a model that held the undone ones too, and stay as they are: the weights are those of the remaining
        rows, not of a fresh stream of the remaining edits, whose search may find other values. With no edit left, and
        nothing protected, they are the original ones.

        All of them go in one exact removal a layer. Active edits that shared a value with one of them are told anew
        without it, and keep their ids.

        Args:
            ids: which, as in `select`, like the rest.
            subject: see `select`.
            last: see `select`.
            since: see `select`.
            until: see `select`.

        Returns:
            Their records, now `undone`.

        Raises:
            InputError: no active edit fits, or an id is not that of one.
            RequestError: the edits' keys are not kept.
            ModelError: an edited weight is not where it was, or what it was, after the last batch.
            StoreError: the store cannot be written; nothing was changed.
        """
        gone = self.select(ids, subject=subject, last=last, since=since, until=until)
        with quiet(self.model):
            self._session.undo(gone)
        return self._session.ledger.get(gone)

    @overload
    def replace(self, ids: int, *, target: str) -> EditRecord: ...

    @overload
    def replace(
        self,
        ids: Sequence[int] | None = None,
        *,
        target: str,
        subject: str | None = None,
        last: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[EditRecord]: ...

    def replace(
        self,
        ids: int | Sequence[int] | None = None,
        *,
        target: str,
        subject: str | None = None,
        last: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> EditRecord | list[EditRecord]:
        """Tells the model another target for facts: the old edits are taken back exactly and the new ones made.

        What stays are the other edits' rows, as in `undo`: later edits keep the values that were found beside the old
        ones. The new edits' are searched in the model without the old ones.

        Args:
            ids: which, as in `select`, like the rest.
            target: what the model is to say instead.
            subject: see `select`.
            last: see `select`.
            since: see `select`.
            until: see `select`.

        Returns:
            The new edits' records, or the one record where `ids` is one id; the old ones' state is `replaced`.

        Raises:
            InputError: no active edit fits, or an id is not that of one.
            RequestError: a new edit cannot be made as written, or the old ones' keys are not kept.
            StoreError: the store cannot be written; nothing was changed.
        """
        gone = self.select(ids, subject=subject, last=last, since=since, until=until)
        self._session.check_kept("replace", gone)
        requests = self._context.prepare([replace(edit, target=target) for edit in self._session.ledger.edits(gone)])
        with quiet(self.model):
            records = self._session.apply_batch(requests, replaced=gone)
        return records[0] if isinstance(ids, Integral) else records

    def consolidate(self) -> int:
        """Reads the keys of the active edits again, rebuilds every layer in float64, and makes the store small again.

        Do it when `status` advises it. Later edits change what the deeper edited layers receive, so the keys that
        earlier edits were written at age; they are read again in the present model, and the last layer is given what
        is missing to the state that each edit wanted. Edits that the model does not state then are refined. Accumulated
        rounding is gone, and the store forgets the rows of edits that are no longer active; the history keeps them.

        Returns:
            The bytes by which the store became smaller; below 0 where the snapshot takes more than was forgotten.

        Raises:
            InputError: there are no edits.
            RequestError: the edits' keys are not kept.
            PriorError: a precision is not positive definite in float64.
            StoreError: the store cannot be written; nothing was changed.
        """
        if self._session.layers is None:
            raise InputError("consolidate(): nothing has been edited yet")
        before = sum(self._recorder.store.sizes().values()) if self._recorder else 0
        with quiet(self.model):
            self._session.rebuild()
            self._session.refine(self._session.ledger.active)
        if self._recorder is None:
            return 0
        try:
            self._recorder.store.compact()
            self._recorder.snapshot(self._session.layers, self._session.progress)
        except (StoreError, RuntimeError, MemoryError) as error:
            logger.warning("the layers are rebuilt, which is in the store; it was not made smaller: %s", error)
        return before - sum(self._recorder.store.sizes().values())

    def status(self, *, budget: float = DEFAULT_BUDGET, sample: int = SAMPLED) -> Status:
        """How the stream of edits is doing, and what to do about it; reads each layer's C once.

        Args:
            budget: how far the outputs on the anchors, or the weights where there are none, may move, as a share of
                their norms.
            sample: most active edits that the model is run at again, evenly spaced; 0 runs none.

        Raises:
            InputError: a budget that is not above 0, or a rule that has no objective to tell of.
            ModelError: an edited weight is not where it was, or what it was, after the last batch.
        """
        if self.config.rule != RECURSIVE:
            raise InputError(
                f"status(): rule={self.config.rule!r} minimizes no objective over all edits",
                hint="list the edits with `rlsedit history` (Python: history())",
            )
        self._check_attached()
        looked = None
        if sample and self._session.layers:
            with quiet(self.model):
                looked = self._session.sample(sample)
        layers = []
        for (projection, state), norms in zip(self._edited, self._norms, strict=True):
            health = state.monitor()
            layers.append(
                LayerStatus.of(
                    projection.layer,
                    norms,
                    state.prior.lam,
                    state.prior.mu,
                    state.objective,
                    deviation=state.deviation(),
                    residual=health.residual,
                    advice=health.advice if health.needs_refresh else None,
                )
            )
        return assess(
            self.history(),
            self._session.progress.trace,
            layers,
            batches=self._session.progress.batches,
            adherence=adherence_asked(self.config, anchored=any(prior.mu for prior in self.priors)),
            budget=budget,
            sizes=self._recorder.store.sizes() if self._recorder else {},
            sample=looked,
        )

    def history(self) -> list[EditRecord]:
        """Every edit that was made, oldest first, with what became of it."""
        return self._session.ledger.records

    def deviation(self) -> list[LayerDeviation]:
        """How far each edited layer has gone, and the bound on it; nothing before the first edit.

        Raises:
            ModelError: an edited weight is not where it was, or what it was, after the last batch.
        """
        self._check_attached()
        return [
            LayerDeviation(projection.layer, state.deviation(), bounds.weight, bounds.anchors)
            for projection, state in self._edited
            for bounds in (state.bounds(),)
        ]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the edited model and its tokenizer as an ordinary checkpoint.

        Raises:
            ModelError: see `changes`; nothing is written.
        """
        self._check_attached()
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def changes(self) -> list[WeightChange]:
        """What became of each edited weight; nothing before the first edit.

        Raises:
            ModelError: an edited weight is not where it was, or what it was, after the last batch.
        """
        self._check_attached()
        return [
            WeightChange(
                name=projection.name,
                original=state.original,
                current=state.weight,
                stored=projection.weight,
                transposed=projection.transposed,
            )
            for projection, state in self._edited
        ]

    def save_delta(self, path: str | Path) -> DeltaReport:
        """Writes the change alone, for `rlsedit apply` and `export.apply_delta`; see `export.write_delta`.

        Raises:
            ModelError: see `changes`; nothing is written.
        """
        active = sum(record.state == "active" for record in self.history())
        return write_delta(self.changes(), path, base_fingerprint=self.fingerprint(), edits=active)

    def save_adapter(self, directory: str | Path, *, rank: int | None = None) -> AdapterReport:
        """Writes the change as a LoRA adapter that `peft` loads; see `export.write_adapter`.

        Raises:
            ModelError: see `changes`; nothing is written.
        """
        base = str(getattr(self.model.config, "_name_or_path", ""))
        writes = max(1, self._session.progress.writes)
        return write_adapter(self.changes(), directory, rank=rank, base_model=base, updates=writes)

    @property
    def _edited(self) -> list[tuple[Projection, LayerState]]:
        """The projections with their states; nothing before calibration or the first edit."""
        layers = self._session.layers
        return list(zip(self._context.projections, layers.states, strict=True)) if layers else []

    def _check_attached(self) -> None:
        """Raises ModelError where an edited weight is not what the states say."""
        if self._session.layers:
            self._session.layers.check_attached()

    def _start(self, pilot: Sequence[Request]) -> None:
        """Fresh states under priors chosen on the pilot."""
        memory.check(self.memory())
        moments = self._moments_held()
        if moments is None:
            logger.warning("no anchors: only the weights themselves are held; name what is to stay with anchor(texts)")
        needed = needs_pilot(self.config, anchored=moments is not None)
        tried = self._pilot(pilot) if needed else None
        priors = choose_priors(self.config, self._moments, len(self.layers), tried)
        del tried  # the factors that it holds would crowd the states
        layers = EditedLayers(
            self._context.site,
            self._context.projections,
            priors,
            delay=self.config.delay,
            bare_weight=self.config.bare_weight,
            keys=self.config.keys,
            rule=self.config.rule,
            rule_options=self.config.rule_options,
        )
        held = []
        for _, keys_of, weight in self._to_protect:
            with layers.transaction():
                held.append(layers.protect(keys_of, weight))
        prompts = self.protected
        self._norms = [Norms.of(state.original, state.prior) for state in layers.states]
        if self._recorder:
            self._recorder.begin(priors, held, prompts, [asdict(norms) for norms in self._norms])
        self._session.layers, self._session.progress.protected = layers, prompts

    def _moments_held(self) -> list[Tensor] | None:
        """The anchors' moments, where they hold anything."""
        return None if self.config.mu == 0 else self._moments

    def _pilot(self, requests: Sequence[Request]) -> Pilot:
        """A pilot of requests, with their values searched in the unedited model."""
        pilot = _one_per_subject(requests)
        return Pilot(self._context, self._moments_held(), pilot, self._session.search_pilot(pilot))

    def _forget_start(self) -> None:
        self._session.layers, self._norms, self._session.progress.protected = None, [], []
        if self._recorder:
            self._recorder.forget_start()


def _one_per_subject(requests: Sequence[Request]) -> list[Request]:
    """Several of one subject, or of one prompt, have nearly one key, and would make a pilot look hard to realise."""
    return list({request.about or request.asks: request for request in requests}.values())


def _check_store(store: Store, model: PreTrainedModel, config: EditConfig | None) -> EditConfig:
    """The settings to go on with, once the model is found to be the store's."""
    about = store.about
    settings = settings_of(about, config)
    if (found := fingerprint(model)) != about["fingerprint"]:
        raise StoreError(
            f"the store {str(store.directory)!r} was made with the model {about['fingerprint'][:16]} "
            f"({about['model'] or 'without a path'}), this one is {found[:16]}: its weights, dtype or settings are "
            "others, or it is edited already. Nothing was changed; load the model as it was before any edit"
        )
    return settings
