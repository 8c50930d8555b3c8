"""The editor: a transformers model, the solver state of each edited layer, and the record of what was told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import Edit, EditRecord, EditState
from rlsedit_fast.editing.keys import anchor_moments, request_keys
from rlsedit_fast.editing.priors import choose_priors
from rlsedit_fast.editing.requests import Request, prepare
from rlsedit_fast.editing.values import Values, search_values
from rlsedit_fast.errors import InputError, RemovalError, RLSEditError, UpdateError
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.rls import Prior, RLSState
from rlsedit_fast.rls.shares import joint_innovations, memit_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PILOT = 100
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
class _Told:
    """What removal needs of an edit: its key and value in every edited layer."""

    keys: tuple[Tensor, ...]  # per layer [d_k]
    values: tuple[Tensor, ...]  # per layer [d_v]


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
        """Looks the model over; nothing of it is changed.

        Args:
            model: a causal language model.
            tokenizer: its tokenizer, a fast one.
            config: which layers, and how; by default `EditConfig()`.

        Raises:
            ModelError: the layers or their projections are not there.
            InputError: a weight to be edited is not finite.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.config = config = config or EditConfig()
        self._decoder = find_decoder(
            model, layer_module=config.layer_module, projection_module=config.projection_module
        )
        self._projections = self._decoder.select(config.layers_of(len(self._decoder.blocks)))
        for projection in self._projections:
            if not bool(projection.weight.isfinite().all()):
                raise InputError(f"{projection.name}: the weight is not finite; load the model anew")
        self._moments: list[Tensor] | None = None
        self._states: list[RLSState] = []
        self._records: list[EditRecord] = []
        self._told: dict[int, _Told] = {}
        self._batches = 0

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
    def priors(self) -> list[Prior]:
        """What holds each edited layer, in the order of `layers`; nothing before calibration or the first edit."""
        return [state.prior for state in self._states]

    def anchor(self, texts: Iterable[str]) -> int:
        """Names what the model is to go on doing: the edited layers' outputs on every token of `texts`.

        Args:
            texts: running text of the kind that matters; some thousands of tokens, more than d_k if that can be.

        Returns:
            The number of tokens seen.

        Raises:
            InputError: the priors are set already, by `calibrate` or the first edit, or no text was given.
        """
        if self._states:
            raise InputError("anchor(): the priors are set already, under other anchors; make a new editor")
        with quiet(self.model):
            self._moments, tokens = anchor_moments(
                self._decoder, self.tokenizer, self._projections, texts, longest=self._longest
            )
        return tokens

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
        """
        if self._states:
            raise InputError("calibrate(): the priors are set already; make a new editor")
        with quiet(self.model):
            self._states = self._start(self._prepare(edits))
        return self.priors

    def edit(
        self, edits: Sequence[Edit], *, on_batch: Callable[[list[EditRecord]], None] | None = None
    ) -> list[EditRecord]:
        """Tells the model facts, `config.batch_size` at a time.

        All edits are checked before the first is made. A batch is written whole or not at all; an error in one
        leaves the batches before it in place, and says how many they are.

        Args:
            edits: at least one.
            on_batch: called with the records of each batch when it has been written.

        Returns:
            A record per edit, in order. Look at `converged`: an edit whose search fell short is made all the same.

        Raises:
            RequestError: an edit that cannot be made as written; nothing was changed.
            RLSEditError: a batch failed; it changed nothing.
        """
        requests = self._prepare(edits)
        made: list[EditRecord] = []
        with quiet(self.model):
            calibrated = self._states
            self._states = calibrated or self._start(requests[:_PILOT])
            for at in range(0, len(requests), self.config.batch_size):
                try:
                    records = self._edit_batch(requests[at : at + self.config.batch_size])
                except RLSEditError as error:
                    if made:
                        raise type(error)(f"{error}\nThe first {len(made)} of {len(edits)} edits are made.") from error
                    self._states = calibrated
                    raise
                made += records
                if on_batch is not None:
                    on_batch(records)
        return made

    def undo(self, ids: int | Sequence[int]) -> list[EditRecord]:
        """Takes edits back exactly: the weights become those of a model that was never told them.

        Args:
            ids: of active edits, as `history()` lists them.

        Returns:
            Their records, now `undone`.

        Raises:
            InputError: an id that is not that of an active edit.
        """
        wanted = self._active([ids] if isinstance(ids, int) else list(ids))
        with self._transaction():
            self._remove(wanted)
        return self._mark(wanted, "undone")

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
        (old,) = self._active([edit_id])
        requests = self._prepare([Edit(old.prompt, old.subject, target, old.weight)])
        with quiet(self.model), self._transaction():
            self._remove([old])
            (record,) = self._edit_batch(requests)
        self._mark([old], "replaced")
        return record

    def history(self) -> list[EditRecord]:
        """Every edit that was made, oldest first, with what became of it."""
        return list(self._records)

    def deviation(self) -> list[LayerDeviation]:
        """How far each edited layer has gone, and the bound on it; nothing before the first edit."""
        return [
            LayerDeviation(projection.layer, state.deviation(), bounds.weight, bounds.anchors)
            for projection, state in zip(self._projections, self._states, strict=bool(self._states))
            for bounds in (state.bounds(),)
        ]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the edited model and its tokenizer as an ordinary checkpoint."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    @property
    def _longest(self) -> int | None:
        """Most tokens that the model takes."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _prepare(self, edits: Sequence[Edit]) -> list[Request]:
        return prepare(self.tokenizer, edits, self.config, longest=self._longest)

    def _start(self, pilot: Sequence[Request]) -> list[RLSState]:
        """Fresh states under priors chosen on the pilot."""
        keys, _ = request_keys(self._decoder, self._projections, pilot)
        if self._moments is None:
            logger.warning("no anchors: only the weights themselves are held; name what is to stay with anchor(texts)")
        priors = choose_priors(self.config, self._moments, keys)
        return [
            RLSState(projection.weight, prior, delay=self.config.delay, name=projection.name)
            for projection, prior in zip(self._projections, priors, strict=True)
        ]

    def _edit_batch(self, requests: Sequence[Request]) -> list[EditRecord]:
        """One batch, wholly done or not at all."""
        last = self._projections[-1].layer
        values = search_values(self._decoder, requests, self.config, block=last)
        if not bool(values.nll.isfinite().all()):
            raise UpdateError("the value search met numbers that are not finite; check the model's weights and dtype")
        weights = torch.tensor([request.edit.weight for request in requests])
        write = self._write_jointly if self.config.share == "joint" else self._write_in_turn
        with self._transaction():
            told, written = write(requests, values.delta, weights)
        left = (values.delta - written).norm(dim=1)
        realised = 1 - left / values.delta.norm(dim=1).clamp_min(torch.finfo(left.dtype).tiny)
        return self._record(requests, values, realised, told)

    def _write_jointly(
        self, requests: Sequence[Request], residual: Tensor, weights: Tensor
    ) -> tuple[list[_Told], Tensor]:
        """All layers from one key pass; returns what was told and the change `[n, d_v]` that was realised."""
        keys, _ = request_keys(self._decoder, self._projections, requests)
        panels = [state.project(key, weights.to(key.device)) for state, key in zip(self._states, keys, strict=True)]
        innovations = joint_innovations(panels, residual)
        values, written = [], torch.zeros_like(residual)
        for state, panel, innovation in zip(self._states, panels, innovations, strict=True):
            values.append(panel.keys @ state.weight.T + innovation)
            step = state.update_projected(panel, innovation)
            written += (innovation - step.left_over).to(written)
        self._write_model()
        return _per_edit([panel.keys for panel in panels], values), written

    def _write_in_turn(
        self, requests: Sequence[Request], residual: Tensor, weights: Tensor
    ) -> tuple[list[_Told], Tensor]:
        """MEMIT's share: each layer is written before the next one's keys and residual are read."""
        last = self._projections[-1].layer
        all_keys, values, written = [], [], torch.zeros_like(residual)
        goal: Tensor | None = None
        for i, (projection, state) in enumerate(zip(self._projections, self._states, strict=True), start=1):
            (keys,), now = request_keys(self._decoder, [projection], requests, block=last)
            assert now is not None
            goal = now + residual if goal is None else goal
            innovation = memit_share(goal - now, i, len(self._projections)).to(keys)
            panel = state.project(keys, weights.to(keys.device))
            all_keys.append(panel.keys)
            values.append(panel.keys @ state.weight.T + innovation)
            step = state.update_projected(panel, innovation)
            written += (innovation - step.left_over).to(written)
            projection.write(state.weight)
        return _per_edit(all_keys, values), written

    def _record(
        self, requests: Sequence[Request], values: Values, realised: Tensor, told: Sequence[_Told]
    ) -> list[EditRecord]:
        self._batches += 1
        now = datetime.now(timezone.utc)
        numbers = zip(
            values.converged.tolist(), values.nll.tolist(), values.steps.tolist(), realised.tolist(), strict=True
        )
        records = []
        for request, (converged, nll, steps, share), what in zip(requests, numbers, told, strict=True):
            edit = request.edit
            identity = len(self._records) + 1
            record = EditRecord(
                identity,
                now,
                edit.prompt,
                edit.subject,
                edit.target,
                edit.weight,
                "active",
                self._batches,
                converged,
                nll,
                steps,
                share,
            )
            self._records.append(record)
            self._told[identity] = what
            records.append(record)
        return records

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Puts states and model back if the block raises."""
        try:
            with ExitStack() as stack:
                for state in self._states:
                    stack.enter_context(state.transaction())
                yield
        except BaseException:
            self._write_model()
            raise

    def _write_model(self) -> None:
        for projection, state in zip(self._projections, self._states, strict=True):
            projection.write(state.weight)

    def _active(self, ids: Sequence[int]) -> list[EditRecord]:
        known = {record.id: record for record in self._records if record.state == "active"}
        wrong = [i for i in ids if i not in known]
        if wrong or not ids or len(set(ids)) != len(ids):
            raise InputError(
                f"ids {list(ids)}: {wrong or 'none or repeated ones'} are not those of active edits; see history()"
            )
        return [known[i] for i in ids]

    def _remove(self, records: Sequence[EditRecord]) -> None:
        """Takes edits out of every state and writes the model; a state that cannot let go accurately is rebuilt."""
        gone = {record.id for record in records}
        kept = [record for record in self._records if record.state == "active" and record.id not in gone]
        for layer, state in enumerate(self._states):
            reason = "no edit remains" if not kept else _remove_accurately(state, self._rows(records, layer, state))
            if reason:
                logger.info("%s is rebuilt from the %d edits that remain: %s", state.name, len(kept), reason)
                state.refresh(*self._rows(kept, layer, state))
        self._write_model()

    def _rows(self, records: Sequence[EditRecord], layer: int, state: RLSState) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and weights of edits in one layer."""
        d_v, d_k = state.weight.shape
        told = [self._told[record.id] for record in records]
        keys = [what.keys[layer] for what in told]
        values = [what.values[layer] for what in told]
        return (
            torch.stack(keys) if keys else state.weight.new_zeros(0, d_k),
            torch.stack(values) if values else state.weight.new_zeros(0, d_v),
            state.weight.new_tensor([record.weight for record in records]),
        )

    def _mark(self, records: Sequence[EditRecord], state: EditState) -> list[EditRecord]:
        marked = [replace(record, state=state) for record in records]
        for record in marked:
            self._records[record.id - 1] = record
            del self._told[record.id]
        return marked


def _remove_accurately(state: RLSState, rows: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """Removes rows from a state; says why it must be rebuilt all the same, if it must."""
    try:
        state.remove(*rows)
    except RemovalError as error:
        return str(error)
    health = state.monitor()
    return health.advice if health.needs_refresh else None


def _per_edit(keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[_Told]:
    """From `[n, d]` per layer to the rows of each edit."""
    return [_Told(key, value) for key, value in zip(zip(*keys, strict=True), zip(*values, strict=True), strict=True)]
