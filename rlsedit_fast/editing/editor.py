"""The editor: edits a transformers model in place, with the solver state of each edited layer and a history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from rlsedit_fast.baselines import RECURSIVE
from rlsedit_fast.data.edits import Edit, invalid_weight
from rlsedit_fast.editing.anchors import Anchors, find_statistics
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.context import ModelContext, check_arguments, inspect_model
from rlsedit_fast.editing.methods.inspection import Inspection
from rlsedit_fast.editing.methods.planning import Planning
from rlsedit_fast.editing.protection import make_protection
from rlsedit_fast.editing.records import EditRecord
from rlsedit_fast.editing.session import EditSession
from rlsedit_fast.editing.status import DEFAULT_BUDGET, SAMPLED, Status
from rlsedit_fast.editing.storage.persistence import Recorder, create_store, open_store
from rlsedit_fast.editing.stream import Gated, apply_stream, bind_gates
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.compiled import unwrapped
from rlsedit_fast.models.loading import load_model
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.repairs import repair_forward
from rlsedit_fast.models.shards import processes_of
from rlsedit_fast.processes import Processes
from rlsedit_fast.statistics.collection import HELD_OUT
from rlsedit_fast.statistics.key_statistics import KeyStatistics
from rlsedit_fast.statistics.sources import Source, each_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Editor(Planning, Inspection):
    """Edits a transformers model in place.

    The model remains an ordinary transformers model, and its weights are the edited ones after every batch. With a
    store, every batch that `edit` has returned, or passed to `on_batch`, survives a crash or a power failure; a batch
    that is being written is then stored completely or not at all.

    Methods that read or write the edited weights raise `ModelError` if a weight was moved or modified by other code.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        context: what was found in the model: the edited projections, validation of edits, memory estimate.

    Example:
        >>> from rlsedit_fast import Edit, EditConfig, Editor
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
        >>> editor = Editor(model, tokenizer, config=config)
        >>> records = editor.edit([Edit("{} speaks", "Toze Lado Rekuno", "Kubeish")])
        >>> [record.state for record in editor.undo([1])]
        ['undone']
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: EditConfig | None = None,
        store: str | Path | None = None,
        data_parallel: bool = False,
    ) -> None:
        """Inspects the model with a forward pass over two tokens. The model is modified only if a store has edits.

        Args:
            model: causal language model, also compiled (`torch.compile`) or multimodal; for a store with edits, the
                same model without them.
            tokenizer: its tokenizer.
            config: settings; by default those of the store, or `EditConfig()`.
            store: folder of the edits. If it contains edits, they are applied without forward passes.
            data_parallel: each process of `torch.distributed` holds the whole model and searches values of a part of
                each batch. All call the same methods with the same arguments, see `docs/devices.md`.

        Raises:
            ModelError: the model has no language model head, or the layers or their projections are not found or cannot
                be edited (together).
            InputError: an argument has the wrong type, a weight to be edited contains NaN/Inf, the tokenizer is that of
                another model, `config` changes settings that are fixed for all edits of the store, or a store
                does not support the rule.
            StoreError: the store belongs to another model, is damaged, has another version, or is in use; nothing was
                modified.
        """
        model = unwrapped(model)
        check_arguments(model, tokenizer, config)
        repair_forward(model)
        processes = processes_of(model, replicas=data_parallel)
        with processes.operation():
            self._open(model, tokenizer, config, store, processes)

    def _open(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EditConfig | None,
        store: str | Path | None,
        processes: Processes,
    ) -> None:
        held, given = open_store(store, model, config, processes)
        try:
            self.context: ModelContext = inspect_model(model, tokenizer, given, processes)
            self.model, self.tokenizer = model, tokenizer
            if store is not None and held is None:
                held = create_store(store, self.context, given)
            self._anchors: str | None = None
            self._recorder = None
            if held:
                self._recorder = Recorder(held, self.config, self.context.projections, processes)
            self._session = EditSession(self.context, self._recorder)
            if self._recorder:
                if config is not None:
                    self._recorder.update_settings(self.config)
                with quiet(model):
                    self._session.recover()
        except BaseException:
            if held:
                held.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: EditConfig | None = None,
        store: str | Path | None = None,
        data_parallel: bool = False,
        **model_options: Any,
    ) -> Editor:
        """Loads a model and its tokenizer with transformers and creates an editor.

        Args:
            path: folder or Hub name, as for `AutoModelForCausalLM.from_pretrained`.
            config: see `Editor`.
            store: see `Editor`.
            data_parallel: see `Editor`.
            **model_options: options of `models.load_model`, such as `dtype` and `device_map`.

        Raises:
            InputError: the model cannot be loaded. Other errors are those of `Editor`.
        """
        model, tokenizer = load_model(path, **model_options)
        editor = cls(model, tokenizer, config=config, store=store, data_parallel=data_parallel)
        editor._find_base(model_options)
        return editor

    def close(self) -> None:
        """Closes the store, so that other processes can open it; the model stays edited. No effect without a store."""
        if self._recorder:
            self._recorder.store.close()

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        path = str(getattr(self.model.config, "_name_or_path", "") or "")
        name = type(self.model).__name__ + f" {path!r}" * bool(path)
        ledger, layers = self._session.ledger, ", ".join(map(str, self.layers))
        store = f"store {str(self._recorder.store.directory)!r}" if self._recorder else "no store"
        return f"Editor({name}, layers {layers}, {len(ledger.active)} of {len(ledger)} edits active, {store})"

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the edited layers, ascending."""
        return self.context.layers

    @property
    def protected(self) -> list[str]:
        """The protected prompts, including those of a store."""
        return self._session.protected

    @property
    def anchors(self) -> str | None:
        """The anchors set by `anchor`: number of tokens and source. None without them, and for anchors of a store."""
        return self._anchors

    def anchor(self, texts: Anchors | None = None, *, tokens: int | None = None, held_out: float = HELD_OUT) -> int:
        """Sets the anchors: text on which the outputs of the edited layers are preserved, at every token.

        Args:
            texts: path of a text file, texts, or a `Source`, with thousands of tokens, ideally more than d_k; or key
                statistics, or the path of their file. By default the statistics that `rlsedit statistics` collected
                for this model and these layers, from the cache.
            tokens: number of tokens to read; by default all of the text. Required for `SelfGenerated`.
            held_out: fraction of the tokens that is not preserved, on which `status` measures the change, because the
                change on preserved tokens is smaller than on other text; 0 for none. Key statistics have held-out
                tokens of their own.

        Returns:
            The number of tokens, including the held-out ones; 0 if the cache has no statistics of this model, in which
            case nothing is set.

        Raises:
            InputError: the priors are already set, by `calibrate` or the first edit; there are no texts, or they are
                names of files; a file does not exist; or the statistics belong to another model or lack a layer.
        """
        self._check_not_started("anchor")
        with self.context.processes.operation():
            found = find_statistics(self.context, texts, tokens=tokens, held_out=held_out, identity=self.fingerprint)
        if found is None:
            return 0
        # The moments are read in parts when the states are built, so they stay in host memory.
        self._session.moments = [found.moments[layer].cpu() for layer in self.layers]
        self._session.held_out_moments = None
        about = f"{found.tokens} tokens"
        if found.held_out_tokens:
            about += f" and {found.held_out_tokens} held out"
            moments = [found.held_out[layer].cpu() for layer in self.layers]
            self._session.held_out_moments = found.held_out_tokens, moments
        self._anchors = f"{about}: {found.source}"
        return found.tokens + found.held_out_tokens

    def statistics(
        self,
        source: Source,
        *,
        tokens: int | None = None,
        held_out: float = HELD_OUT,
        progress: Callable[[int, int | None], None] | None = None,
        checkpoint: str | Path | None = None,
    ) -> KeyStatistics:
        """Collects key statistics of the edited layers, for `anchor` and for saving; see `statistics.collect`.

        Raises:
            InputError: the model is already edited; or see `statistics.collect`.
        """
        if len(self._session.ledger):
            raise InputError("statistics(): the model is already edited; collect them from the unedited model")
        with self.context.processes.operation():
            return self.context.collect(
                source, tokens=tokens, held_out=held_out, progress=progress, checkpoint=checkpoint
            )

    def protect(
        self,
        prompts: Iterable[str],
        *,
        weight: float = 1.0,
        continuations: Iterable[str] | None = None,
        values: Sequence[Tensor] | None = None,
    ) -> int:
        """Preserves outputs of the edited layers on prompts, in addition to the anchors and against all edits.

        By default the present outputs on every token are preserved. With `continuations`, the model is changed such
        that it continues each prompt with its continuation: the value at the last token is searched like that of an
        edit. Like anchors, and unlike edits, such values are never undone or aged. This is the paper's anchor mapping
        with values other than the present outputs; `deviation` lists how well it is met.

        Args:
            prompts: texts whose continuations should not change.
            weight: weight of each token, compared to an edit with weight 1. Many tokens with a large weight leave less
                freedom for edits.
            continuations: wanted continuation of each prompt.
            values: instead of continuations, the wanted output on every token of the prompts, one after another:
                `V0 [tokens, d_v]` per edited layer, any floating dtype.

        Returns:
            The number of protected tokens.

        Raises:
            InputError: `prompts` is not a list of strings, a prompt is blank or too long for the model, the weight is
                invalid, continuations or values do not match the prompts, or the rule does not support them.
            UpdateError: the values of the continuations could not be found.
        """
        if reason := invalid_weight(weight):
            raise InputError(f"weight: {reason}")
        self._check_attached()
        texts = list(each_text(prompts))
        with self.context.processes.operation(), quiet(self.model):
            protection = make_protection(self.context, texts, weight, continuations, values)
            self._session.protect(protection)
        return protection.tokens

    def edit(
        self,
        edits: Iterable[Edit | Mapping[str, Any]],
        *,
        on_batch: Callable[[list[EditRecord]], None] | None = None,
        require_stated: bool = False,
        gates: Gated | None = None,
    ) -> list[EditRecord]:
        """Applies edits, `config.batch_size` at a time.

        All edits are validated before the first one is applied. A batch is written completely or not at all. If a batch
        fails, earlier batches stay applied, and the error states how many edits they have.

        An edit with the prompt of an active edit replaces it, and active edits of the same subject are written again
        together with it, with one value (`EditConfig.same_subject`). Edits that the model does not state after their
        batch or at the end of the call are refined, and so are earlier edits, as many as the call applies
        (`EditConfig.refine`).

        Args:
            edits: at least one edit, as `Edit` or as a dict with its fields; or the result of `read_edits`.
            on_batch: called with the records of each batch after it was written. A later refinement may change `rank`
                and `nll`; the returned records are up to date.
            require_stated: take a batch back and raise an error if the model does not state all of its targets; layers,
                history and store are then as before the batch.
            gates: `Gates`, checked after every `gates.every` batches and at the end against the unedited model. With
                `on_violation="undo"`, the batches between two checks are one change, which a violation or an error
                takes back; `on_batch` is called once they have passed.

        Returns:
            One record per edit, in order, with measurements in the edited model. Check `success`: an edit that the
            model does not state stays applied, unless `EditConfig.unconverged` says otherwise.

        Raises:
            RequestError: an edit is invalid; nothing was modified.
            ResourceError: there is not enough memory.
            UnstatedError: see `require_stated`.
            GateError: a gate is violated.
            RLSEditError: a batch failed; it was not applied.
        """
        requests = self.context.prepare(edits)
        with self.context.processes.operation(), quiet(self.model):
            guard = bind_gates(gates, self)
            return apply_stream(self._session, requests, on_batch, require_stated=require_stated, guard=guard)

    def select(
        self,
        ids: int | Sequence[int] | None = None,
        *,
        name: str | None = None,
        subject: str | None = None,
        last: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[int]:
        """Returns the ids of the active edits that match all criteria, for `undo` and `replace`.

        Args:
            ids: ids of active edits.
            name: name of the edits, as given in `Edit.name` or in a file.
            subject: subject of the edits, up to white space.
            last: number of edits; the most recent ones are selected.
            since: earliest time of the edits; local time if it has no time zone.
            until: latest time of the edits.

        Returns:
            The ids, ascending; in the given order if only `ids` is given.

        Raises:
            InputError: no criterion is given, a criterion is invalid, an id is not that of an active edit, or no
                active edit matches.
        """
        return self._session.ledger.select(ids, name=name, subject=subject, last=last, since=since, until=until)

    def undo(self, ids: int | Sequence[int]) -> list[EditRecord]:
        """Removes edits exactly: the weights become those that the stored rows of the remaining edits determine.

        Rows of later edits were found in a model with the undone edits and stay as they are, so the weights are not
        those of a new stream of the remaining edits. If no edit and no protected prompt remains, the weights are the
        original ones. Active edits that shared a value with an undone one are written again and keep their ids.

        Args:
            ids: ids of active edits, such as `select` returns.

        Returns:
            Their records, now `undone`, in the order of `ids`.

        Raises:
            InputError: an id is not that of an active edit.
            RequestError: the rows of the edits are not stored.
            StoreError: the store cannot be written; nothing was modified.
        """
        selected = self.select(ids)
        with self.context.processes.operation(), quiet(self.model):
            self._session.undo(selected)
        return self._session.ledger.get(selected)

    @overload
    def replace(self, ids: int, target: str) -> EditRecord: ...

    @overload
    def replace(self, ids: Sequence[int], target: str) -> list[EditRecord]: ...

    def replace(self, ids: int | Sequence[int], target: str) -> EditRecord | list[EditRecord]:
        """Gives edits a new target: removes the old edits as `undo` does, and applies new ones.

        Args:
            ids: ids of active edits, such as `select` returns.
            target: the new target.

        Returns:
            The records of the new edits, or one record if `ids` is one id. The state of the old ones is `replaced`.

        Raises:
            InputError: an id is not that of an active edit.
            RequestError: a new edit is invalid, or the rows of the old ones are not stored.
            StoreError: the store cannot be written; nothing was modified.
        """
        selected = self.select(ids)
        self._session.check_stored("replace", selected)
        edits = [edit.with_target(target) for edit in self._session.ledger.edits(selected)]
        requests = self.context.prepare(edits)
        with self.context.processes.operation(), quiet(self.model):
            records = self._session.apply_batch(requests, replaced=selected)
        return records[0] if isinstance(ids, Integral) else records

    def consolidate(self) -> int:
        """Rebuilds every layer in float64 at the present keys of the active edits, and compacts the store.

        Do this when `status` advises it. Later edits change the inputs of deeper edited layers, so stored keys become
        outdated; they are read again, and edits that the model then does not state are refined. The store deletes the
        rows of edits that are not active.

        Returns:
            Bytes by which the store became smaller; negative if its new snapshot is larger than what was deleted.

        Raises:
            InputError: there are no edits.
            RequestError: the rows of the edits are not stored.
            PriorError: a precision matrix is not positive definite in float64.
            StoreError: the store cannot be written; nothing was modified.
        """
        if self._session.layers is None:
            raise InputError("consolidate(): there are no edits")
        before = sum(self._recorder.store.sizes().values()) if self._recorder else 0
        with self.context.processes.operation(), quiet(self.model):
            self._session.rebuild()
            if self._recorder:
                # Refinement may add changes; until then the last change is the rebuild, which contains all others.
                self._recorder.compact()
            self._session.refine()
        if self._recorder is None:
            return 0
        self._recorder.try_snapshot(self._session.layers)
        return before - sum(self._recorder.store.sizes().values())

    def status(self, *, budget: float = DEFAULT_BUDGET, sample: int = SAMPLED) -> Status:
        """Returns bounds, objective, remaining capacity and warnings; reads C of each layer once.

        Args:
            budget: allowed relative change of the outputs on the anchors, or of the weights without anchors.
            sample: number of active edits to measure in the model, evenly spaced; 0 for none.

        Raises:
            InputError: the budget is not above 0, or the rule has no objective.
        """
        if self.config.rule != RECURSIVE:
            raise InputError(
                f"status(): rule={self.config.rule!r} minimizes no objective over all edits",
                hint="list the edits with `rlsedit history` (Python: history())",
            )
        self._check_attached()
        with self.context.processes.operation(), quiet(self.model):
            return self._session.status(budget, sample)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Gives the model its original weights inside the block, and the edited ones bit for bit after it.

        The block must not edit.

        Raises:
            ModelError: a weight was modified by other code.

        Example:
            >>> from rlsedit_fast import Edit, EditConfig, Editor
            >>> from rlsedit_fast.models import generate_answers
            >>> from rlsedit_fast.world import load_demo_model
            >>> model, tokenizer = load_demo_model()
            >>> config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
            >>> editor = Editor(model, tokenizer, config=config)
            >>> _ = editor.edit([Edit("{} plays the", "Toze Lado Rekuno", "harp")])
            >>> with editor.unedited():
            ...     generate_answers(model, tokenizer, [("Toze Lado Rekuno plays the", "harp")])
            ['clarinet']
            >>> generate_answers(model, tokenizer, [("Toze Lado Rekuno plays the", "harp")])
            ['harp']
        """
        self._check_attached()
        with self._session.layers.unedited() if self._session.layers else nullcontext():
            yield
