"""The editor: a transformers model, the solver state of each edited layer, and the record of what was told."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast.editing import memory
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import Edit, EditRecord, EditState
from rlsedit_fast.editing.gradient import GradientScale, gradient_values
from rlsedit_fast.editing.keys import request_keys, text_keys
from rlsedit_fast.editing.layers import EditedLayers, Told
from rlsedit_fast.editing.ledger import Ledger
from rlsedit_fast.editing.parts import fitting
from rlsedit_fast.editing.presets import recognise
from rlsedit_fast.editing.priors import Tradeoff, choose_priors, tabulate
from rlsedit_fast.editing.requests import Request, prepare, troubles
from rlsedit_fast.editing.sources import GivenTexts, Source
from rlsedit_fast.editing.statistics import KeyStatistics, collect
from rlsedit_fast.editing.values import Values, search_within_memory
from rlsedit_fast.errors import InputError, ModelError, ResourceError, RLSEditError, UpdateError
from rlsedit_fast.export import AdapterReport, DeltaReport, WeightChange, write_adapter, write_delta
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.generation import sample
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import with_prefixes
from rlsedit_fast.models.projections import Projection, find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.rls import Prior
from rlsedit_fast.rules import LayerState

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
class _Written:
    """What was written of a batch, by place in it."""

    told: dict[int, Told]  # the rows of those that were written
    said: list[dict[str, Any]]  # of each, in the fields of its record
    groups: list[list[int]]  # those that share a value


class Editor:
    """Edits a transformers model in place.

    The model that is handed in stays an ordinary model: after every batch its weights are the edited ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: EditConfig | None = None,
    ) -> None:
        """Looks the model over, with a forward over two tokens; nothing of it is changed.

        Args:
            model: a causal language model.
            tokenizer: its tokenizer.
            config: which layers, and how; by default `EditConfig()`.

        Raises:
            ModelError: the layers or their projections are not there, or cannot be edited (together).
            InputError: a weight to be edited is not finite, or the tokenizer has more tokens than the model.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.config = config = config or EditConfig()
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
        self._sample_contexts()
        self._moments: list[Tensor] | None = None
        self._layers: EditedLayers | None = None
        self._ledger = Ledger()
        self._to_protect: list[tuple[list[Tensor], float]] = []
        self._at_once = config.search_at_once
        self._scale = GradientScale()
        self._norm: float | None = None  # of values searched on the unedited model, where others are scaled to it
        self._batches = 0
        self._writes = 0  # batches and removals, each a rounding of the weights

    @classmethod
    def from_pretrained(cls, path: str | Path, *, config: EditConfig | None = None, **model_options: Any) -> Editor:
        """Loads model and tokenizer with transformers and makes an editor of them.

        Args:
            path: whatever `AutoModelForCausalLM.from_pretrained` takes.
            config: which layers, and how; by default `EditConfig()`.
            **model_options: handed on to it, `dtype` and `device_map` for example.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, **model_options)
        return cls(model.eval(), AutoTokenizer.from_pretrained(path), config=config)

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
        return memory.plan(self._projections, delay=self.config.delay, anchored=self._moments is not None)

    def anchor(self, what: Iterable[str] | KeyStatistics) -> int:
        """Names what the model is to go on doing: the edited layers' outputs on every token of some text.

        Args:
            what: running text of the kind that matters, some thousands of tokens, more than d_k if that can be; or
                what `statistics` collected from it.

        Returns:
            The number of tokens seen.

        Raises:
            InputError: the priors are set already, by `calibrate` or the first edit; no text was given; or the
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

    def protect(self, prompts: Sequence[str], *, weight: float = 1.0) -> int:
        """Holds the edited layers to what they do now on every token of `prompts`, beside the anchors.

        Args:
            prompts: texts whose continuations are to stay.
            weight: how firmly, against an edit of weight 1.

        Returns:
            The number of tokens that are held.

        Raises:
            InputError: no prompt, one without tokens or too long for the model, or a weight that is not positive.
        """
        if not 0 < weight < float("inf"):
            raise InputError(f"weight={weight}: expected a finite number above 0")
        if self._layers:
            self._layers.check_attached()
        with quiet(self.model):
            keys = text_keys(self._decoder, self.tokenizer, self._projections, prompts, longest=self._longest)
            if self._layers is None:
                self._to_protect.append((keys, weight))
            else:
                with self._layers.transaction():
                    self._layers.protect(keys, weight)
        return len(keys[0])

    def calibrate(self, edits: Sequence[Edit]) -> list[Prior]:
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
            self._layers = self._start(requests)
        return self.priors

    def assess(self, edits: Sequence[Edit], adherences: Sequence[float]) -> list[Tradeoff]:
        """What `calibrate` would choose for each of some adherences, and what that would do to the pilot.

        Nothing is set. The arguments and errors are those of `calibrate`; with `share="memit"` the measures are those
        of each layer realising its own share.
        """
        pilot = self._pilot(self._prepare(edits))
        with quiet(self.model):
            keys, _ = request_keys(self._decoder, self._projections, pilot)
        return tabulate(self.config, self._moments, keys, adherences)

    def check(self, edits: Sequence[Edit]) -> dict[int, str]:
        """Which edits cannot be made, by their place in `edits`, and why; `edit` would refuse the whole call."""
        return troubles(self.tokenizer, edits, self.config, longest=self._longest)

    def requests(self, edits: Sequence[Edit]) -> list[Request]:
        """Edits as tokens, with the token at which the model would be edited.

        Raises:
            RequestError: an edit that cannot be made as written.
        """
        return self._prepare(edits)

    def edit(
        self, edits: Sequence[Edit], *, on_batch: Callable[[list[EditRecord]], None] | None = None
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
            calibrated = self._layers
            self._layers = calibrated or self._start(requests[:PILOT])
            try:
                for batch, found in self._searched_ahead(requests):
                    records = self._edit_batch(batch, found=found)
                    made += records
                    if on_batch is not None:
                        on_batch(records)
            except BaseException as error:
                if not made:
                    self._layers = calibrated
                elif isinstance(error, RLSEditError):
                    raise type(error)(f"{error}\nThe first {len(made)} of {len(edits)} edits are made.") from error
                raise
        made = self._ledger.get([record.id for record in made])
        if short := sum(not record.converged for record in made):
            logger.warning("%d of %d edits were made though their search fell short; see `converged`", short, len(made))
        return made

    def undo(self, ids: int | Sequence[int]) -> list[EditRecord]:
        """Takes edits back exactly: the weights become those of a model that was never told them.

        Active edits that shared a value with one of them are told anew without it, and keep their ids.

        Args:
            ids: of active edits, as `history()` lists them.

        Returns:
            Their records, now `undone`.

        Raises:
            InputError: an id that is not that of an active edit.
            ModelError: an edited weight is not where it was, or what it was, after the last batch.
        """
        gone = [ids] if isinstance(ids, int) else list(ids)
        self._ledger.check(gone)
        partners = {partner for record in self._ledger.get(gone) for partner in record.joint_with}
        with quiet(self.model):
            self._tell([], gone=gone, outcome="undone", again=sorted(partners - set(gone)))
        return self._ledger.get(gone)

    def replace(self, edit_id: int, *, target: str) -> EditRecord:
        """Tells the model another target for a fact: the old edit is taken back exactly and the new one made.

        Args:
            edit_id: an active edit's, as `history()` lists it.
            target: what the model is to say instead.

        Returns:
            The new edit's record; the old one's state is `replaced`.

        Raises:
            InputError: the id is not that of an active edit.
            RequestError: the new edit cannot be made as written.
        """
        self._ledger.check([edit_id])
        requests = self._prepare([replace(self._ledger.request(edit_id).edit, target=target)])
        with quiet(self.model):
            (record,) = self._edit_batch(requests, replaced=[edit_id])
        return record

    def history(self) -> list[EditRecord]:
        """Every edit that was made, oldest first, with what became of it."""
        return self._ledger.records

    def deviation(self) -> list[LayerDeviation]:
        """How far each edited layer has gone, and the bound on it; nothing before the first edit."""
        return [
            LayerDeviation(projection.layer, state.deviation(), bounds.weight, bounds.anchors)
            for projection, state in self._edited
            for bounds in (state.bounds(),)
        ]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the edited model and its tokenizer as an ordinary checkpoint."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def changes(self) -> list[WeightChange]:
        """What became of each edited weight; nothing before the first edit."""
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
        """Writes the change alone, for `rlsedit apply` and `export.apply_delta`; see `export.write_delta`."""
        active = sum(record.state == "active" for record in self.history())
        return write_delta(self.changes(), path, base_fingerprint=self.fingerprint(), edits=active)

    def save_adapter(self, directory: str | Path, *, rank: int | None = None) -> AdapterReport:
        """Writes the change as a LoRA adapter that `peft` loads; see `export.write_adapter`."""
        base = str(getattr(self.model.config, "_name_or_path", ""))
        writes = max(1, self._writes)
        return write_adapter(self.changes(), directory, rank=rank, base_model=base, updates=writes)

    @property
    def _edited(self) -> list[tuple[Projection, LayerState]]:
        """The projections with their states; nothing before calibration or the first edit."""
        return list(zip(self._projections, self._layers.states, strict=True)) if self._layers else []

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

    def _prepare(self, edits: Sequence[Edit]) -> list[Request]:
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
            rule=self.config.rule,
            rule_options=self.config.rule_options,
        )
        for protected, weight in self._to_protect:
            with layers.transaction():
                layers.protect(protected, weight)
        return layers

    def _batches_of(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Batches in order; one ends early before a request that asks what another one in it asks."""
        batch: list[Request] = []
        asked: set[str] = set()
        for request in requests:
            repeats = self.config.same_subject == "joint" and request.asks in asked
            if repeats or len(batch) == self.config.batch_size:
                yield batch
                batch, asked = [], set()
            batch.append(request)
            asked.add(request.asks)
        yield batch

    def _searched_ahead(self, requests: Sequence[Request]) -> Iterator[tuple[list[Request], Values | None]]:
        """Batches in order, with their values where these are found for several at once."""
        window: list[list[Request]] = []
        for batch in self._batches_of(requests):
            held = sum(map(len, window))
            if window and held + len(batch) > (self.config.search_ahead or 0):
                yield from self._with_values(window)
                window = []
            window.append(batch)
        yield from self._with_values(window)

    def _with_values(self, batches: Sequence[list[Request]]) -> Iterator[tuple[list[Request], Values | None]]:
        """A batch that bears upon active edits or on another of the batches has its values found when it comes."""
        alone = range(len(batches)) if self.config.same_subject == "separate" else self._unrelated(batches)
        found: dict[int, Values] = {}
        if len(batches) > 1 and len(alone) > 1:
            values = self._searched([request for at in alone for request in batches[at]])
            first = 0
            for at in alone:
                found[at] = values.taken(range(first, first + len(batches[at])))
                first += len(batches[at])
        for at, batch in enumerate(batches):
            yield batch, found.get(at)

    def _unrelated(self, batches: Sequence[Sequence[Request]]) -> list[int]:
        """Which batches share no subject and no question with an active edit or with another one of them."""
        met = Counter(mark for batch in batches for mark in {m for r in batch for m in (r.about, r.asks) if m})
        return [
            at
            for at, batch in enumerate(batches)
            if not self._ledger.asking(batch)
            and not self._ledger.about(batch)
            and all(met[mark] == 1 for request in batch for mark in (request.about, request.asks) if mark)
        ]

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
        self._batches += 1
        try:
            return self._tell(requests, gone=sorted(gone), outcome="replaced", again=again, found=found)
        except BaseException:
            self._batches -= 1
            raise

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
        written = _Written({}, [], [])
        stay: list[int] = []
        scale = self._scale
        try:
            with self._layers.transaction():
                if gone or again:
                    self._layers.remove(self._ledger.told([*gone, *again]), self._ledger.but({*gone, *again}))
                if everything:
                    values, short = self._search(everything, len(requests), found)
                    asked = {everything[at].asks for at in short}
                    if stay := [i for i in gone if self._ledger.request(i).asks in asked]:
                        self._layers.restore(self._ledger.told(stay))
                    written = self._write(everything, values, short, since_then=found is not None)
        except BaseException as error:
            self._scale = scale
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise ResourceError(
                f"memory ran out in a batch of {len(everything)} edits; nothing of it was changed. Lower batch_size "
                f"or take fewer context_prefixes. ({error})"
            ) from error
        self._writes += bool(gone or again) + bool(everything)
        self._ledger.mark([i for i in gone if i not in stay], outcome)
        return self._enter(requests, again, written)

    def _enter(self, requests: Sequence[Request], again: Sequence[int], written: _Written) -> list[EditRecord]:
        """Enters a batch that was written: `requests`, then the edits `again`; returns the records of the former."""
        first = len(self._ledger) + 1
        ids = [*range(first, first + len(requests)), *again]
        partners = {
            at: tuple(sorted(ids[other] for other in group if other != at)) for group in written.groups for at in group
        }
        now = datetime.now(timezone.utc)
        for at, request in enumerate(requests):
            edit = request.edit
            record = EditRecord(
                id=ids[at],
                time=now,
                prompt=edit.prompt,
                subject=edit.subject,
                target=edit.target,
                weight=edit.weight,
                state="active" if at in written.told else "skipped",
                batch=self._batches,
                name=edit.name,
                joint_with=partners.get(at, ()),
                **written.said[at],
            )
            self._ledger.add(record, request, written.told.get(at))
        for at, record in enumerate(self._ledger.get(again), start=len(requests)):
            self._ledger.retell(replace(record, joint_with=partners[at], **written.said[at]), written.told[at])
        return self._ledger.get(ids[: len(requests)])

    def _search(self, requests: Sequence[Request], new: int, found: Values | None) -> tuple[Values, set[int]]:
        """The values of a batch, and which of its first `new` requests are to be left out since they fell short.

        Args:
            requests: the batch.
            new: how many of them are not told yet.
            found: their values, if these are known.

        Raises:
            UpdateError: numbers that are not finite, or an edit that fell short where that is to be an error.
        """
        values = self._searched(requests) if found is None else found
        short = {at for at in range(new) if not values.converged[at]} if self.config.unconverged != "keep" else set()
        if short and self.config.unconverged == "raise":
            named = [
                f"{requests[at].edit.subject!r} -> {requests[at].edit.target!r} (rank {int(values.rank[at])}, NLL "
                f"{float(values.nll[at]):.2f})"
                for at in sorted(short)
            ]
            raise UpdateError(
                f"{len(short)} of {new} edits did not reach their target in {self.config.search_steps} steps, so their "
                f"batch is not made: {', '.join(named[:5])}{' and others' if len(named) > 5 else ''}. Raise "
                "search_steps or clamp, or let unconverged='keep' or 'skip' them"
            )
        # Edits that shared a value with one that is left out are searched again without it.
        again = [at for group in self._groups(requests) if short.intersection(group) for at in group if at not in short]
        if again:
            others = [at for at in range(len(requests)) if at not in again]
            anew = self._searched([requests[at] for at in again])
            order = torch.tensor([*others, *again]).argsort().tolist()
            values = Values.joined([values.taken(others), anew]).taken(order)
        return values, short

    def _searched(self, requests: Sequence[Request]) -> Values:
        at_once = self._at_once or len(requests)
        try:
            if self.config.search_memory is not None:
                at_once = min(at_once, fitting(self._site, requests, self.config.search_memory))
            if self.config.values == "gradient":
                values, fitted, self._scale = gradient_values(
                    self._site, requests, self.config, self._groups(requests), at_once, self._scale
                )
            else:
                values, fitted = search_within_memory(
                    self._site, requests, self.config, self._groups(requests), at_once
                )
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                "memory ran out while the value of a single subject was searched; nothing was changed. Take fewer "
                f"context_prefixes and kl_prompts, or shorter prompts. ({error})"
            ) from error
        if fitted < at_once:
            self._at_once = fitted
        if not bool(values.nll.isfinite().all()):
            raise UpdateError("the value search met numbers that are not finite; check the model's weights and dtype")
        if not self.config.norm_anchor:
            return values
        # The first values of an editor are searched on the unedited model.
        self._norm = self._norm or float((values.start + values.delta).norm(dim=1).mean())
        return values.scaled_to(self._norm)

    def _write(
        self, requests: Sequence[Request], values: Values, short: Collection[int], *, since_then: bool
    ) -> _Written:
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
            weights = torch.tensor([requests[at].edit.weight for at in chosen])
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
        groups = self._groups([requests[at] for at in chosen])
        return _Written(told, said, [[chosen[at] for at in group] for group in groups])

    def _groups(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of requests that share a value."""
        groups: dict[object, list[int]] = {}
        for i, request in enumerate(requests):
            shared = self.config.same_subject == "joint" and request.about is not None
            groups.setdefault(request.about if shared else i, []).append(i)
        return list(groups.values())
