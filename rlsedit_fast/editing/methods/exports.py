"""The methods of an editor that write its model, or the change of its weights, into files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.methods.cards import card_contents
from rlsedit_fast.editing.session import EditSession
from rlsedit_fast.editing.storage.persistence import Recorder
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.export import (
    AdapterReport,
    CheckpointReport,
    DeltaReport,
    WeightChange,
    write_adapter,
    write_checkpoint,
    write_delta,
)
from rlsedit_fast.export.card import CARD, CardContents, hub_name, make_card
from rlsedit_fast.export.changes import same_bits
from rlsedit_fast.export.checkpoint import base_of
from rlsedit_fast.export.engines import Engine, check_engine
from rlsedit_fast.export.gguf import AUTO, TYPES, GgufTarget, find_targets, write_gguf
from rlsedit_fast.files import check_new, written_whole
from rlsedit_fast.models.checkpoint_files import Checkpoint
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.gguf_files import GgufHeader, check_gguf, is_gguf
from rlsedit_fast.models.linear import LinearProjection
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.shards import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GgufTensorReport:
    """A tensor that `Editor.save_gguf` wrote.

    Attributes:
        name: name of the tensor in the file.
        module: dotted name of the module in the model.
        type_before: type of the tensor in the file that the model was loaded from.
        type: type that was written.
        error: `||written - edited|| / ||edited - original||`: the error of quantization, relative to the edits.

    Example:
        >>> from rlsedit_fast.editing.methods.exports import GgufTensorReport
        >>> GgufTensorReport("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj", "Q4_K", "Q8_0", 0.02).type
        'Q8_0'
    """

    name: str
    module: str
    type_before: str
    type: str
    error: float


@dataclass(frozen=True)
class GgufEdit:
    """An active edit in the model, and with the weights that `Editor.save_gguf` wrote.

    Attributes:
        id: number of the edit.
        rank_before: rank of the worst target token in the edited model; 1 is first.
        nll_before: mean NLL of the target tokens in the edited model, nats.
        rank: the same rank with the written weights.
        nll: the same NLL with the written weights.

    Example:
        >>> from rlsedit_fast.editing.methods.exports import GgufEdit
        >>> GgufEdit(1, rank_before=1, nll_before=0.01, rank=2, nll=0.9).lost
        True
    """

    id: int
    rank_before: int
    nll_before: float
    rank: int
    nll: float

    @property
    def lost(self) -> bool:
        """Whether the edited model states the target and the written weights do not."""
        return self.rank_before == 1 and self.rank != 1


@dataclass(frozen=True)
class GgufReport:
    """A GGUF file that `Editor.save_gguf` wrote.

    Attributes:
        path: the file.
        source: the GGUF file that the model was loaded from.
        tensors: the tensors that differ from `source`; all others are the same bit for bit.
        edits: the active edits, measured with the written weights.
        tried: types that `auto` did not use, with the number of edits that are lost with them.

    Example:
        >>> from rlsedit_fast.editing.methods.exports import GgufReport
        >>> GgufReport("edited.gguf", "model.gguf", tensors=(), edits=(), tried={}).lost
        []
    """

    path: str
    source: str
    tensors: tuple[GgufTensorReport, ...]
    edits: tuple[GgufEdit, ...]
    tried: Mapping[str, int]

    @property
    def lost(self) -> list[int]:
        """Ids of the edits whose target the edited model states and the written weights do not."""
        return [edit.id for edit in self.edits if edit.lost]


class Exports:
    """Base class of `Editor`: writes checkpoints, deltas, adapters and GGUF files."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: ModelContext
    _anchors: str | None
    _base: Checkpoint | None = None
    _recorder: Recorder | None
    _session: EditSession

    def fingerprint(self) -> str:
        """Returns the fingerprint of the unedited model; reads all weights once. See `models.fingerprint`."""
        return fingerprint(self.model, instead=self._session.layers.originals() if self._session.layers else None)

    def changes(self) -> list[WeightChange]:
        """Returns the original and the edited weight of each layer; empty before the first edit.

        Of several processes that hold the model together only the first one has whole weights; in the others it is
        empty.
        """
        self._check_attached()
        return self._session.layers.changes() if self._session.layers else []

    def save_pretrained(
        self, directory: str | Path, *, overwrite: bool = False, stability: Mapping[str, Any] | None = None
    ) -> CheckpointReport:
        """Writes the edited model, its tokenizer and a model card as a checkpoint; see `export.write_checkpoint`.

        The checkpoint is a copy of the one that the model was loaded from, in which only the edited tensors differ. If
        that is not possible, transformers writes the model, and `reason` of the report states why.

        Args:
            directory: folder of the checkpoint.
            overwrite: replace the checkpoint and the card in a folder that contains files.
            stability: measurements on other text for the card, as in the output of `rlsedit edit --json`: a dict with
                `text`, a description, and `before` and `after`, fields of an `evaluation.Stability`.

        Returns:
            What was written.
        """
        self._check_attached()
        card, changes = make_card(self._card(stability)), self.changes()
        given: Any = {"changes": changes, "base": self._base, "card": card, "overwrite": overwrite}
        processes = self.context.processes
        if processes.together.count == 1:
            with processes.operation():
                return processes.lead(lambda: write_checkpoint(self.model, self.tokenizer, directory, **given))
        held = self.model.state_dict(keep_vars=True)
        with processes.operation():
            return processes.serve(
                lambda ask: write_checkpoint(self.model, self.tokenizer, directory, **given, read=ask),
                lambda name: whole(held[name].detach()),
            )

    def _find_base(self, options: Mapping[str, Any]) -> None:
        """Finds the checkpoint that the model was loaded from with these options, for `save_pretrained`."""
        with suppress(InputError):  # `save_pretrained` reports why there is none
            self._base = base_of(self.model, **{name: options.get(name) for name in ("subfolder", "cache_dir")})

    def save_delta(self, path: str | Path, *, overwrite: bool = False) -> DeltaReport:
        """Writes the weight change for `rlsedit apply`, see `export.write_delta`; `overwrite` replaces a file."""
        processes, active = self.context.processes, len(self._session.ledger.active)
        with processes.operation():
            processes.lead(lambda: check_new(path, overwrite=overwrite))
            changes, base = self.changes(), self.fingerprint()
            return processes.lead(lambda: write_delta(changes, path, base_fingerprint=base, edits=active))

    def save_adapter(
        self, directory: str | Path, *, rank: int | None = None, engine: Engine | None = None, overwrite: bool = False
    ) -> AdapterReport:
        """Writes the weight change as a LoRA adapter with a model card, see `export.write_adapter`.

        `overwrite` replaces an existing folder.
        """
        check_engine(engine, type(self.model).__name__)
        processes = self.context.processes
        base = str(getattr(self.model.config, "_name_or_path", "") or "")
        base = hub_name(base) or base
        writes = max(1, self._session.progress.writes)

        def write() -> AdapterReport:
            report = write_adapter(changes, directory, rank=rank, base_model=base, updates=writes, engine=engine)
            with written_whole(Path(directory, CARD)) as (temporary,):
                temporary.write_text(card, encoding="utf-8")
            return report

        with processes.operation():
            processes.lead(lambda: check_new(directory, overwrite=overwrite))
            changes, card = self.changes(), make_card(self._card(), library="peft")
            return processes.lead(write)

    def save_gguf(
        self,
        path: str | Path,
        *,
        tensor_type: str = AUTO,
        source: str | Path | None = None,
        overwrite: bool = False,
    ) -> GgufReport:
        """Writes the GGUF file that the model was loaded from, with the edited weights.

        Metadata and all other tensors are copied bit for bit. The edited weights are quantized, and the targets of all
        active edits are measured with the weights as a program reads them from the file.

        Args:
            path: output file, which gets its name once it is complete.
            tensor_type: type of the edited tensors: `own`, the type that they have; one of GGUF, such as `Q8_0` or
                `F16`; or `auto`, the own type if it can be written and no edit is lost with it, and otherwise the first
                of Q8_0, F16 and F32 with which no edit is lost, or F32.
            source: the GGUF file; by default the one that `Editor.from_pretrained` loaded.
            overwrite: replace an existing file.

        Returns:
            The written tensors and the measurement of every active edit. Check `lost`.

        Raises:
            InputError: the model was not loaded from a GGUF file, or `source` is another one; a tensor cannot be
                written with this type; or the output exists or cannot be written.
            ModelError: the file has no tensor for an edited module.
        """
        header = self.check_gguf(source, tensor_type=tensor_type)
        changes = self.changes()
        targets = find_targets(header, changes, layers=self._blocks)
        written = [
            target
            for target, change in zip(targets, changes, strict=True)
            if not same_bits(change.original, change.stored)
        ]
        before = self._ranks(written, {})
        tried = dict[str, int]()
        for label, types in _choices(written, tensor_type):
            packed = {target.module: target.pack(kind) for target, kind in zip(written, types, strict=True)}
            weights = {
                target.module: target.unpack(kind, packed[target.module])
                for target, kind in zip(written, types, strict=True)
            }
            edits = _compared(before, self._ranks(written, weights))
            lost = sum(edit.lost for edit in edits)
            if not lost or tensor_type != AUTO or label == "F32":
                break
            tried[label] = lost
        reports = tuple(
            GgufTensorReport(
                target.tensor.name, target.module, target.tensor.type, kind, _error(target, weights[target.module])
            )
            for target, kind in zip(written, types, strict=True)
        )
        data = {report.name: (report.type, packed[report.module]) for report in reports}
        self.context.processes.lead(lambda: write_gguf(header, path, data, overwrite=overwrite))
        return GgufReport(str(path), str(header.path), reports, tuple(edits), tried)

    def check_gguf(self, source: str | Path | None = None, *, tensor_type: str = AUTO) -> GgufHeader:
        """Checks whether `save_gguf` can write the edited weights, before or after edits.

        Arguments and errors are those of `save_gguf`.

        Returns:
            The header of the GGUF file that the model was loaded from.
        """
        self._check_attached()
        if tensor_type not in TYPES:
            raise InputError(
                f"tensor_type={tensor_type!r}: expected one of {', '.join(TYPES)}",
                hint=f"pass --gguf-type {AUTO} (Python: tensor_type={AUTO!r})",
            )
        place = str(getattr(self.model.config, "_name_or_path", "") or "") if source is None else source
        if source is None and not (place and is_gguf(place)):
            raise InputError(
                f"the model was loaded from {place or 'an unknown path'!r}, which is no GGUF file; a GGUF file is "
                "written as a copy of the one that the model was loaded from",
                hint="load the model from a GGUF file (--model model.gguf), or write a checkpoint (--out DIR) and "
                "convert it with convert_hf_to_gguf.py of llama.cpp",
            )
        if mixtures := [one.name for one in self.context.projections if one.layout is not None]:
            raise ModelError(
                f"{mixtures[0]} is a mixture of experts, which is not written into GGUF files",
                hint="write a checkpoint (--out DIR; Python: save_pretrained) and convert it with "
                "convert_hf_to_gguf.py of llama.cpp",
            )
        if self.context.processes.together.count > 1:
            raise ModelError(
                "a GGUF file is not written by several processes",
                hint="write a checkpoint (--out DIR) and convert it, or start one process",
            )
        header = check_gguf(place)
        if not self._session.layers:
            originals = [
                WeightChange(name, block, block, block, transposed)
                for one in self.context.projections
                for at, block in enumerate(one.blocks)
                for name, transposed in (one.block_name(at),)
            ]
            for target in find_targets(header, originals, layers=self._blocks):
                if tensor_type != AUTO:
                    target.choose(tensor_type)
        return header

    def _card(self, stability: Mapping[str, Any] | None = None) -> CardContents:
        stored = self._recorder is not None
        return card_contents(self.context, self._session, anchors=self._anchors, stability=stability, stored=stored)

    @property
    def _blocks(self) -> int:
        return len(self.context.decoder.blocks)

    def _ranks(self, targets: Sequence[GgufTarget], weights: Mapping[str, Tensor]) -> list[tuple[int, int, float]]:
        """Returns id, rank and NLL of each active edit with other weights of some modules, or those of the model."""
        ids = self._session.ledger.active
        if not ids or not targets:
            return []
        with quiet(self.model), self._instead(weights):
            found = self._session.measurement.ranks(self._session.ledger.requests(ids))
        return list(zip(ids, found.rank.tolist(), found.nll.tolist(), strict=True))

    @contextmanager
    def _instead(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Replaces weights `[d_v, d_k]` of edited modules within the block, without copying the present ones."""
        held = dict[torch.nn.Parameter, Tensor]()
        try:
            for projection in self.context.projections:
                if projection.name in weights and isinstance(projection, LinearProjection):
                    parameter, new = projection.parameter, weights[projection.name]
                    held[parameter] = parameter.data
                    new = (new.T if projection.transposed else new).contiguous()
                    parameter.data = new.to(parameter.device, parameter.dtype)
            yield
        finally:
            for parameter, data in held.items():
                parameter.data = data

    def _check_attached(self) -> None:
        if self._session.layers:
            self._session.layers.check_attached()


def _choices(targets: Sequence[GgufTarget], tensor_type: str) -> Iterator[tuple[str, list[str]]]:
    """Yields a label and the type of each tensor, for each choice of types in the order of `auto`."""
    if tensor_type != AUTO:
        yield tensor_type, [target.choose(tensor_type) for target in targets]
        return
    ladders = [target.ladder() for target in targets]
    for step in range(max(map(len, ladders), default=1)):
        types = [ladder[min(step, len(ladder) - 1)] for ladder in ladders]
        yield "/".join(sorted({*types})), types


def _compared(before: Sequence[tuple[int, int, float]], after: Sequence[tuple[int, int, float]]) -> list[GgufEdit]:
    return [
        GgufEdit(i, rank_before, nll_before, rank, nll)
        for (i, rank_before, nll_before), (_, rank, nll) in zip(before, after, strict=True)
    ]


def _error(target: GgufTarget, written: Tensor) -> float:
    change = float((target.edited - target.original).norm())
    return float((written - target.edited).norm()) / change if change else 0.0
