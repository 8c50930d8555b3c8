"""The editor: a transformers model, the solver state of each edited layer, and the record of what was told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from rlsedit_fast.editing import memory
from rlsedit_fast.editing.batches import batches_of, unrelated
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import Edit, EditRecord, EditState, weight_trouble
from rlsedit_fast.editing.finding import Finder
from rlsedit_fast.editing.interrupts import held_back
from rlsedit_fast.editing.keys import request_keys, text_keys
from rlsedit_fast.editing.layers import EditedLayers, Told
from rlsedit_fast.editing.ledger import Ledger, Written
from rlsedit_fast.editing.presets import recognise
from rlsedit_fast.editing.priors import Tradeoff, choose_priors, tabulate
from rlsedit_fast.editing.progress import Point, Progress
from rlsedit_fast.editing.recording import Recorder
from rlsedit_fast.editing.recovery import recover
from rlsedit_fast.editing.requests import Request, prepare, troubles
from rlsedit_fast.editing.sources import GivenTexts, Source
from rlsedit_fast.editing.statistics import KeyStatistics, collect
from rlsedit_fast.editing.status import DEFAULT_BUDGET, LayerStatus, Norms, Status, adherence_asked, assess
from rlsedit_fast.editing.values import Values
from rlsedit_fast.editing.written import describe, settings_of
from rlsedit_fast.errors import (
    InputError,
    ModelError,
    RequestError,
    ResourceError,
    RLSEditError,
    StoreError,
)
from rlsedit_fast.export import AdapterReport, DeltaReport, WeightChange, write_adapter, write_delta
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.generation import sample
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import with_prefixes
from rlsedit_fast.models.projections import Projection, find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.rls import Prior
from rlsedit_fast.rules import RECURSIVE, LayerState, check
from rlsedit_fast.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class _Ending:
    """How a change is brought to its end, once all is written and found fit to stay.

    Attributes:
        before: called before the commit, and may still refuse: what prepares the change in the store.
        after: called after it, and cannot fail: what enters it in memory.
    """

    before: list[Callable[[], object]]
    after: list[Callable[[], object]]


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
            StoreError: the store is another model's, is damaged, of a newer version, or being written by another
                editor; nothing was changed.
        """
        given = config or EditConfig()
        held = Store(store) if store is not None and Store.exists(store) else None
        self._recorder: Recorder | None = None
        try:
            if held:
                given = _check_store(held, model, config)
            self._look_over(model, tokenizer, given)
            if store is not None and (given.rule != RECURSIVE or given.norm_anchor):
                raise InputError(
                    f"store={str(store)!r} with rule={given.rule!r}, norm_anchor={given.norm_anchor}: what these go on "
                    f"from batch to batch is not kept. Take rule={RECURSIVE!r} and no norm_anchor, or no store"
                )
            if store is not None and held is None:
                path = str(getattr(model.config, "_name_or_path", ""))
                path = str(Path(path).resolve()) if path and Path(path).is_dir() else path
                about = describe(self.config, given, self._projections, self.fingerprint(), path)
                held = Store.create(store, about)
            if held:
                self._take_up(held, config)
        except BaseException:
            if held:
                held.close()
            raise

    def _look_over(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EditConfig) -> None:
        """Finds in the model what is to be edited, and starts with no edits."""
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self._decoder = find_decoder(
            model, layer_module=config.layer_module, projection_module=config.projection_module
        )
        known = recognise(model.config)
        layers = known.layers if known and config.layers is None else config.layers_of(len(self._decoder.blocks))
        self._projections = self._decoder.select(layers)
        rows = model.get_input_embeddings().get_parameter("weight").shape[0]
        if tokenizer.vocab_size > rows:  # without what a user added, which may well be used by no edit
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model embeds {rows}; give the model's own"
            )
        for projection in self._projections:
            if not bool(projection.weight.isfinite().all()):
                raise InputError(f"{projection.name}: the weight is not finite; load the model anew")
        with quiet(model):
            self._decoder = with_prefixes(self._decoder, longest=self._longest)
            self._site = find_site(self._decoder, self._projections)
        if not self._site.direct and len(self._projections) > 1:
            self._settle_on_one_layer()
        if config.rule != RECURSIVE and config.share == "joint" and len(self._projections) > 1:
            raise InputError(
                f"share='joint' over the layers {self.layers} is worked out for rule={RECURSIVE!r} alone, not for "
                f"{config.rule!r}; take share='memit' or one layer"
            )
        self._sample_contexts()
        self._finder = Finder(self._site, self.config)
        self._moments: list[Tensor] | None = None
        self._layers: EditedLayers | None = None
        self._ledger = Ledger(self.config, self._prepare)
        self._to_protect: list[tuple[list[Tensor], float]] = []
        self._norms: list[Norms] = []
        self._progress = Progress()

    def _take_up(self, store: Store, config: EditConfig | None) -> None:
        """Goes on where a store is."""
        self._recorder = Recorder(store, self.config, self._projections)
        about = store.about
        if config is not None and about["config"] != (now := asdict(self.config)):
            self._recorder.describe(about | {"config": now})
        with quiet(self.model):
            self._layers = recover(store, self.config, self._site, self._projections, self._ledger, self._progress)
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
            raise StoreError(f"{str(store)!r} is no store; name one, or make one with Editor(..., store=DIR)")
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
    def layers(self) -> tuple[int, ...]:
        """The blocks that are edited, ascending."""
        return tuple(projection.layer for projection in self._projections)

    @property
    def projections(self) -> list[Projection]:
        """What is edited in them."""
        return list(self._projections)

    @property
    def priors(self) -> list[Prior]:
        """What holds each edited layer, in the order of `layers`; nothing before calibration or the first edit."""
        return [state.prior for _, state in self._edited]

    def memory(self) -> list[memory.LayerMemory]:
        """What editing takes beside the model, layer by layer, before it is taken."""
        rule = check(self.config.rule, self.config.rule_options)
        return memory.plan(self._projections, delay=self.config.delay, anchored=self._moments is not None, rule=rule)

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
        if self._layers:
            raise InputError("anchor(): the priors are set already, under other anchors; make a new editor")
        if isinstance(what, KeyStatistics):
            what.check(self.fingerprint(), self.layers)
            found = what
        else:
            # They are not kept, so nobody will ask whose they are; a fingerprint would read all of the weights.
            found = self._collect(GivenTexts(what), identity="")
        self._moments = [found.moments[p.layer].to(p.weight.device) for p in self._projections]
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
        if len(self._ledger):
            raise InputError("statistics(): the model is edited already; collect them from the unedited one")
        return self._collect(source, tokens=tokens, progress=progress, checkpoint=checkpoint)

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
            weight: how firmly each token, against an edit of weight 1. Thousands of tokens at 1 leave little room for
                edits; 0.01 is enough for them to stay (bench/results/paper/demo, "rls protecting").

        Returns:
            The number of tokens that are held.

        Raises:
            InputError: prompts that are not several texts, one without tokens or too long for the model, or a weight
                that an edit may not have.
        """
        if trouble := weight_trouble(weight):
            raise InputError(trouble)
        self._check_attached()
        with quiet(self.model):
            keys = text_keys(self._decoder, self.tokenizer, self._projections, prompts, longest=self._longest)
            if self._layers is None:
                self._to_protect.append((keys, weight))
            else:
                with self._change() as ending:
                    rows = self._layers.protect(keys, weight)
                    if self._recorder:
                        ending.before.append(partial(self._recorder.protect, rows))
        return len(keys[0])

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
        if self._layers:
            raise InputError("calibrate(): the priors are set already; make a new editor")
        requests = self._prepare(edits)
        with quiet(self.model):
            layers = self._start(requests)
        if self._recorder:
            self._recorder.write_start()
        self._layers = layers
        return self.priors

    def assess(self, edits: Iterable[Edit], adherences: Sequence[float]) -> list[Tradeoff]:
        """What `calibrate` would choose for each of some adherences, and what that would do to the pilot.

        Nothing is set. The arguments and errors are those of `calibrate`; with `share="memit"` the measures are those
        of each layer realising its own share.
        """
        pilot = self._pilot(self._prepare(edits))
        with quiet(self.model):
            keys, _ = request_keys(self._decoder, self._projections, pilot)
        return tabulate(self.config, self._moments, keys, adherences)

    def check(self, edits: Iterable[Edit]) -> dict[int, str]:
        """Which edits cannot be made, by their place in `edits`, and why; `edit` would refuse the whole call."""
        return troubles(self.tokenizer, edits, self.config, longest=self._longest)

    def requests(self, edits: Iterable[Edit]) -> list[Request]:
        """Edits as tokens, with the token at which the model would be edited.

        Raises:
            RequestError: an edit that cannot be made as written.
        """
        return self._prepare(edits)

    def edit(
        self, edits: Iterable[Edit], *, on_batch: Callable[[list[EditRecord]], None] | None = None
    ) -> list[EditRecord]:
        """Tells the model facts, `config.batch_size` at a time.

        All edits are checked before the first is made. A batch is written whole or not at all; an error in one
        leaves the batches before it in place, and says how many they are.

        An edit that asks what an active one asks takes its place, and active edits of the same subject are told anew
        with it, sharing one value (`EditConfig.same_subject`).

        Args:
            edits: at least one.
            on_batch: called with the records of each batch when it has been written.

        Returns:
            A record per edit, in order. Look at `converged`: an edit whose search fell short is made all the same.

        Raises:
            RequestError: an edit that cannot be made as written; nothing was changed.
            ModelError: an edited weight is not where it was, or what it was, after the last batch.
            ResourceError: there is less memory than the work takes.
            RLSEditError: a batch failed; it changed nothing.
        """
        requests = self._prepare(edits)
        made: list[EditRecord] = []
        with quiet(self.model):
            calibrated, before = self._layers, self._progress.writes
            self._layers = calibrated or self._start(requests[:PILOT])
            try:
                for batch, found in self._searched_ahead(requests):
                    records = self._edit_batch(batch, found=found)
                    made += records
                    if on_batch is not None:
                        on_batch(records)
            except BaseException as error:
                if self._progress.writes == before:
                    self._layers = calibrated
                    self._norms = self._norms if calibrated else []
                    if calibrated is None and self._recorder:
                        self._recorder.forget_start()
                elif isinstance(error, RLSEditError):
                    raise type(error)(f"{error}\nThe first {len(made)} of {len(requests)} edits are made.") from error
                raise
        made = self._ledger.get([record.id for record in made])
        if short := sum(not record.converged for record in made):
            logger.warning("%d of %d edits were made though their search fell short; see `converged`", short, len(made))
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
        return self._ledger.select(ids, subject=subject, last=last, since=since, until=until)

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
        self._check_kept("undo", gone)
        partners = {partner for record in self._ledger.get(gone) for partner in record.joint_with}
        with quiet(self.model):
            self._tell([], gone=gone, outcome="undone", again=sorted(partners - set(gone)))
        return self._ledger.get(gone)

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
        self._check_kept("replace", gone)
        requests = self._prepare([replace(edit, target=target) for edit in self._ledger.edits(gone)])
        with quiet(self.model):
            records = self._edit_batch(requests, replaced=gone)
        return records[0] if isinstance(ids, Integral) else records

    def consolidate(self) -> int:
        """Makes every layer afresh in float64 from its prior and the active edits, and the store small again.

        To be done when `status` advises it: what rounding has added up over a long stream is gone then, and the store
        forgets the rows of edits that are no longer active; the history keeps them.

        Returns:
            The bytes by which the store became smaller.

        Raises:
            InputError: there are no edits.
            RequestError: the edits' keys are not kept.
            PriorError: a precision is not positive definite in float64.
            StoreError: the store cannot be written; nothing was changed.
        """
        if self._layers is None:
            raise InputError("consolidate(): nothing has been edited yet")
        active = self._ledger.active
        self._check_kept("rebuild the layers from", active)
        with self._change() as ending:
            self._layers.rebuild(self._ledger.told(active))
            progress = replace(self._progress, writes=self._progress.writes + 1)
            objective = tuple(state.objective for state in self._layers.states)
            if self._recorder:
                recorded = partial(self._recorder.rebuild, self._ledger, self._layers.protected, progress, objective)
                ending.before.append(recorded)
            ending.after.append(partial(setattr, self, "_progress", progress))
            ending.after.append(partial(progress.reached, Point(len(active), objective)))
        if self._recorder is None:
            return 0
        before = sum(self._recorder.store.sizes().values())
        try:
            self._recorder.store.compact()
            self._recorder.snapshot(self._layers, self._progress)
        except StoreError as error:
            logger.warning("the layers are rebuilt, which is in the store; it was not made smaller: %s", error)
        return before - sum(self._recorder.store.sizes().values())

    def status(self, *, budget: float = DEFAULT_BUDGET) -> Status:
        """How the stream of edits is doing, and what to do about it; reads each layer's C once.

        Args:
            budget: how far the outputs on the anchors, or the weights where there are none, may move, as a share of
                their norms.

        Raises:
            InputError: a budget that is not above 0, or a rule that has no objective to tell of.
            ModelError: an edited weight is not where it was, or what it was, after the last batch.
        """
        if self.config.rule != RECURSIVE:
            raise InputError(
                f"status(): rule={self.config.rule!r} minimises no objective over all edits; see history()"
            )
        self._check_attached()
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
            self._progress.trace,
            layers,
            batches=self._progress.batches,
            adherence=adherence_asked(self.config, anchored=any(prior.mu for prior in self.priors)),
            budget=budget,
            sizes=self._recorder.store.sizes() if self._recorder else {},
        )

    def history(self) -> list[EditRecord]:
        """Every edit that was made, oldest first, with what became of it."""
        return self._ledger.records

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
        writes = max(1, self._progress.writes)
        return write_adapter(self.changes(), directory, rank=rank, base_model=base, updates=writes)

    @property
    def _edited(self) -> list[tuple[Projection, LayerState]]:
        """The projections with their states; nothing before calibration or the first edit."""
        return list(zip(self._projections, self._layers.states, strict=True)) if self._layers else []

    def _check_attached(self) -> None:
        """Raises ModelError where an edited weight is not what the states say."""
        if self._layers:
            self._layers.check_attached()

    def _collect(self, source: Source, **options: Any) -> KeyStatistics:
        return collect(self._decoder, self.tokenizer, self._projections, source, longest=self._longest, **options)

    @property
    def _longest(self) -> int | None:
        """Most tokens that the model takes."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _settle_on_one_layer(self) -> None:
        """What a projection's change does to the stream depends on its layer here, so layers cannot share one."""
        why = (
            f"{type(self.model).__name__} normalises or scales a projection's output before it adds it to the residual "
            "stream, so that a change cannot be divided among layers"
        )
        if self.config.layers is not None:
            raise ModelError(f"layers={self.config.layers}: {why}; name one layer")
        self._projections = self._projections[-1:]
        logger.info("%s; only layer %d is edited", why, self._projections[0].layer)

    def _sample_contexts(self) -> None:
        """Adds what the model writes to the context prefixes, so that they are the editor's own and can be read."""
        config = self.config
        if not config.context_samples:
            return
        made = sample(
            self.model,
            self.tokenizer,
            texts=config.context_samples,
            length=config.context_tokens + 1,
            seed=config.context_seed,
        )
        texts = [str(self.tokenizer.decode(drawn.ids, skip_special_tokens=True)).strip() for drawn in made]
        distinct = [text for text in dict.fromkeys(texts) if text and text not in config.context_prefixes]
        if len(distinct) < len(texts):
            told = "of %d sampled context prefixes %d are left: others are blank or repeat one"
            logger.warning(told, len(texts), len(distinct))
        self.config = replace(config, context_prefixes=(*config.context_prefixes, *distinct), context_samples=0)

    def _prepare(self, edits: Iterable[Edit]) -> list[Request]:
        return prepare(self.tokenizer, edits, self.config, longest=self._longest)

    def _pilot(self, requests: Sequence[Request]) -> list[Request]:
        """One request per subject: several have nearly one key, and would make the pilot look hard to realise."""
        return list({request.about or i: request for i, request in enumerate(requests)}.values())

    def _start(self, pilot: Sequence[Request]) -> EditedLayers:
        """Fresh states under priors chosen on the pilot."""
        memory.check(self.memory())
        keys, _ = request_keys(self._decoder, self._projections, self._pilot(pilot))
        if self._moments is None:
            logger.warning("no anchors: only the weights themselves are held; name what is to stay with anchor(texts)")
        priors = choose_priors(self.config, self._moments, keys)
        layers = EditedLayers(
            self._site,
            self._projections,
            priors,
            delay=self.config.delay,
            keys=self.config.keys,
            rule=self.config.rule,
            rule_options=self.config.rule_options,
        )
        held = []
        for protected, weight in self._to_protect:
            with layers.transaction():
                held.append(layers.protect(protected, weight))
        self._norms = [Norms.of(state.original, state.prior) for state in layers.states]
        if self._recorder:
            self._recorder.begin(priors, held, [asdict(norms) for norms in self._norms])
        return layers

    @contextmanager
    def _change(self) -> Iterator[_Ending]:
        """A transaction of layers, store and ledger: the block's changes are in all of them, or in none if it raises.

        From the commit on until the ledger has it, Ctrl-C waits.
        """
        assert self._layers is not None
        ending = _Ending([], [])
        with ExitStack() as uninterrupted:
            try:
                with self._layers.transaction() as last:
                    yield ending
                    last += ending.before
                    last.append(lambda: uninterrupted.enter_context(held_back()))
                    if self._recorder:
                        last.append(self._recorder.commit)
            except BaseException:
                if self._recorder:
                    self._recorder.abort()
                raise
            for action in ending.after:
                action()

    def _searched_ahead(self, requests: Sequence[Request]) -> Iterator[tuple[list[Request], Values | None]]:
        """Batches in order, with their values where these are found for several at once."""
        window: list[list[Request]] = []
        for batch in batches_of(requests, self.config.batch_size, apart=self.config.same_subject == "joint"):
            held = sum(map(len, window))
            if window and held + len(batch) > (self.config.search_ahead or 0):
                yield from self._with_values(window)
                window = []
            window.append(batch)
        yield from self._with_values(window)

    def _with_values(self, batches: Sequence[list[Request]]) -> Iterator[tuple[list[Request], Values | None]]:
        """A batch that bears upon active edits or on another of the batches has its values found when it comes."""
        alone = range(len(batches)) if self.config.same_subject == "separate" else unrelated(batches, self._ledger)
        found: dict[int, Values] = {}
        if len(batches) > 1 and len(alone) > 1:
            values = self._finder.find([request for at in alone for request in batches[at]], self._progress)
            first = 0
            for at in alone:
                found[at] = values.taken(range(first, first + len(batches[at])))
                first += len(batches[at])
        for at, batch in enumerate(batches):
            yield batch, found.get(at)

    def _edit_batch(
        self, requests: Sequence[Request], *, replaced: Sequence[int] = (), found: Values | None = None
    ) -> list[EditRecord]:
        """One batch, with what becomes of the edits that it replaces or shares a subject with.

        Args:
            requests: the batch.
            replaced: ids of edits that it replaces, whatever they ask.
            found: its values, where they were searched ahead.
        """
        gone, again = set(replaced), list[int]()
        if self.config.same_subject == "joint":
            gone.update(self._ledger.asking(requests))
            again = [i for i in self._ledger.about(requests) if i not in gone]
            self._check_kept("tell another edit about the subject of", sorted({*gone, *again}))
        return self._tell(requests, gone=sorted(gone), outcome="replaced", again=again, found=found)

    def _check_kept(self, what: str, ids: Sequence[int]) -> None:
        """Raises RequestError where active edits are to be taken out and their rows are not kept."""
        if self.config.keys is None and ids:
            some = ", ".join(map(str, ids[:5])) + (" and others" if len(ids) > 5 else "")
            raise RequestError(
                f"cannot {what} edits {some}: their keys and values are not kept (keys=None), so they cannot be taken "
                "back; nothing was changed. Make an editor with keys='full' or 'fp16' for edits that are to be undone"
            )

    def _tell(
        self,
        requests: Sequence[Request],
        *,
        gone: Sequence[int],
        outcome: EditState,
        again: Sequence[int],
        found: Values | None = None,
    ) -> list[EditRecord]:
        """Takes out edits, tells new ones, and some that were there anew; all of it or nothing.

        Args:
            requests: to be told.
            gone: ids of active edits to take out.
            outcome: what becomes of those.
            again: ids of active edits to take out and to tell anew together with `requests`; they keep their ids.
            found: the values of `requests`, searched before the last batches were written; only with no `again`.

        Returns:
            The records of the new edits.
        """
        assert self._layers is not None
        everything = [*requests, *self._ledger.requests(again)]
        written = Written({}, [], [])
        stay: list[int] = []
        rebuilt: tuple[bool, ...] = ()
        before, scale = self._progress, self._progress.scale
        try:
            with self._change() as ending:
                if gone or again:
                    out = {*gone, *again}
                    rebuilt = self._layers.remove(self._ledger.told([*gone, *again]), self._ledger.but(out))
                if everything:
                    values, short = self._finder.reached(everything, len(requests), found, self._progress)
                    asked = {everything[at].asks for at in short}
                    if stay := [i for i in gone if self._ledger.asked(i) in asked]:
                        self._layers.update(self._ledger.told(stay))
                    written = self._write(everything, values, short, since_then=found is not None)
                telling = self._ledger.telling(
                    requests,
                    written,
                    again=again,
                    time=self._progress.now() if requests else self._progress.time,
                    batch=self._progress.batches + 1,
                    gone=tuple(gone),
                    outcome=outcome,
                    stay=tuple(stay),
                    rebuilt=rebuilt,
                )
                progress = replace(
                    self._progress,
                    batches=self._progress.batches + bool(requests),
                    writes=self._progress.writes + bool(gone or again) + bool(everything),
                )
                objective = tuple(state.objective for state in self._layers.states)
                active = len(self._ledger.active) + sum(r.state == "active" for r in telling.records)
                active -= len(gone) - len(stay)
                if self._recorder:
                    ending.before.append(partial(self._recorder.tell, telling, progress, objective, active))
                ending.after.append(partial(setattr, self, "_progress", progress))
                ending.after.append(partial(progress.reached, Point(active, objective)))
                ending.after.append(partial(self._ledger.enter, telling))
        except BaseException as error:
            if self._progress is not before:  # it was made; somebody pressed Ctrl-C in the meantime
                raise
            before.scale = scale
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise ResourceError(
                f"memory ran out in a batch of {len(everything)} edits; nothing of it was changed. Lower batch_size "
                f"or take fewer context_prefixes. ({error})"
            ) from error
        if self._recorder:
            self._recorder.snapshot_if_due(self._layers, self._progress)
        return self._ledger.get([record.id for record in telling.records])

    def _write(
        self, requests: Sequence[Request], values: Values, short: Collection[int], *, since_then: bool
    ) -> Written:
        """Writes a batch into the layers, but for the requests at the places `short`.

        Args:
            requests: the batch.
            values: of all of it.
            short: places in it.
            since_then: whether something was written after the values were found.
        """
        assert self._layers is not None
        chosen = [at for at in range(len(requests)) if at not in short]
        realised, told = torch.zeros(len(requests)), dict[int, Told]()
        if chosen:
            wanted = values.delta[chosen]
            weights = torch.tensor([float(requests[at].edit.weight) for at in chosen])
            start = values.start[chosen] if since_then else None
            rows, left = self._layers.write(
                [requests[at] for at in chosen], wanted, weights, self.config.share, start=start
            )
            share = 1 - left.norm(dim=1) / wanted.norm(dim=1).clamp_min(torch.finfo(left.dtype).tiny)
            realised[chosen] = share.cpu()
            told = dict(zip(chosen, rows, strict=True))
        columns = (values.converged, values.nll, values.rank, values.steps, realised)
        names = ("converged", "nll", "rank", "steps", "realised")
        said = [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]
        groups = self._finder.groups([requests[at] for at in chosen])
        return Written(told, said, [[chosen[at] for at in group] for group in groups])


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
