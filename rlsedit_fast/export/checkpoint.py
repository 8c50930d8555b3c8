"""Writes an edited model as a checkpoint: a copy of its base checkpoint with the edited weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlsedit_fast.errors import InputError, counted, listed
from rlsedit_fast.export.base_files import copy_files, find_stale, plain_files, weight_files
from rlsedit_fast.export.base_tensors import UnlikeBaseError, WrittenTensors, write_tensors_like
from rlsedit_fast.export.card import CARD
from rlsedit_fast.export.changes import WeightChange
from rlsedit_fast.export.quantized_base import write_projections_like
from rlsedit_fast.files import check_new, written_folder
from rlsedit_fast.models.checkpoint_files import Checkpoint, find_checkpoint
from rlsedit_fast.models.compiled import unwrapped
from rlsedit_fast.models.fingerprint import settings
from rlsedit_fast.models.quantized import dequantized_modules, quantization_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CONFIG = "config.json"


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint that was written.

    Attributes:
        directory: its folder.
        base: folder of the base checkpoint that it is a copy of, or None if transformers wrote it.
        reason: why it is not a copy of the base; empty if it is.
        tensors: names on disk of the tensors that differ from the base; all others are the same bit for bit.
        copied: number of files that are those of the base.
        left_out: files of the base that are not written: other copies of the weights, without the edits.
        notes: what else differs from the base or from the model in memory.

    Example:
        >>> from rlsedit_fast.export import CheckpointReport
        >>> tensors = ("model.layers.0.mlp.down_proj.weight",)
        >>> CheckpointReport("edited", "base", "", tensors, copied=7, left_out=(), notes=()).lines[0]
        'checkpoint: edited'
    """

    directory: str
    base: str | None
    reason: str
    tensors: tuple[str, ...]
    copied: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The folder, and one line for everything that a user should know."""
        lines = [f"checkpoint: {self.directory}"]
        if self.base is not None:
            lines.append(
                f"  a copy of {self.base}: {counted(len(self.tensors), 'tensor')} rewritten, {self.copied} other files "
                "copied"
            )
        if self.left_out:
            lines.append(f"  left out, because they contain the weights without the edits: {', '.join(self.left_out)}")
        return [*lines, *(f"  {note}" for note in self.notes)]


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    changes: Sequence[WeightChange] = (),
    base: Checkpoint | None = None,
    card: str | None = None,
    overwrite: bool = False,
    read: Callable[[str], Tensor] | None = None,
) -> CheckpointReport:
    """Writes a model and its tokenizer into a folder, which gets its name once it is complete.

    If the base checkpoint of the model is on this machine, all of its files are copied, and only the tensors in which
    the model differs from it are written: in their files, under their names on disk, in the dtype on disk. Tensors that
    the class of the model does not use are kept. Every tensor in memory is compared with the base, so that the written
    weights are those of the model, also if other code modified it. Files with other copies of the weights, such as
    `pytorch_model.bin` beside safetensors files, are left out if a weight changed.

    Otherwise, `save_pretrained` of transformers writes the model: if the base is not known, or the model has another
    config or other tensors than the base.

    Args:
        model: the model.
        tokenizer: its tokenizer; its files are those of the base if it is the one of the base.
        directory: folder of the checkpoint.
        changes: changes of the edited weights, which make them exact if the dtype on disk is not that of the model.
        base: the base; by default the checkpoint that the model was loaded from.
        card: text of its model card, which replaces that of the base, see `export.card.make_card`; None for no card.
        overwrite: replace the checkpoint in a folder that contains files.
        read: returns a whole tensor of a model that several processes hold, by name; only the first process calls this
            function. Such a model is written only as a copy of its base.

    Returns:
        What was written.

    Raises:
        InputError: `directory` is a file, is the folder of the base, or contains files and `overwrite` is False; or a
            weight is too large for the dtype on disk.

    Example:
        >>> import tempfile
        >>> from rlsedit_fast.export import write_checkpoint
        >>> from rlsedit_fast.world import load_demo_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = write_checkpoint(*load_demo_model(), f"{folder}/model")
        >>> report.tensors, report.reason
        ((), '')
    """
    model, place, found, reason = unwrapped(model), Path(directory), base, ""
    if base is None:
        try:
            found = base_of(model)
        except InputError as error:
            reason = error.message
    if found is not None:
        _check_other_folder(place, found)
        try:
            return _write_like(model, tokenizer, place, found, changes, card, overwrite=overwrite, read=read)
        except UnlikeBaseError as error:
            reason = f"the model is not like its base {str(found.folder)!r}: {error}"
    if dequantized_modules(model):
        raise InputError(
            f"a quantized model is written only as a copy of its quantized base: {reason}",
            hint="write the change as an adapter or a delta (--adapter, --delta; Python: save_adapter, save_delta)",
        )
    if read is not None:
        raise InputError(
            f"a model that several processes hold is written only as a copy of its base checkpoint: {reason}",
            hint="write the change as an adapter or a delta (--adapter, --delta; Python: save_adapter, save_delta)",
        )
    named = str(getattr(model, "name_or_path", "") or "")
    note = f"written by transformers, not as a copy of the base: {reason}" if named or found else ""
    if note:
        logger.warning("%s: %s", directory, note)
    with written_folder(place) as folder:
        check_new(place, overwrite=overwrite)
        with _generation_config_kept(model):
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copied = 0
        if found is not None:
            rest = [name for name in plain_files(found, (folder, place)) if not (folder / name).exists()]
            copied = copy_files(rest, found.folder, folder)
        _write_card(card, folder)
    return CheckpointReport(str(directory), None, reason, (), copied, (), (note,) if note else ())


def base_of(model: PreTrainedModel, **options: Any) -> Checkpoint:
    """Finds the checkpoint that a model was loaded from.

    Args:
        model: the model.
        **options: options of `find_checkpoint`.

    Raises:
        InputError: it is not known, or not on this machine.
    """
    config: Any = model.config
    name = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or "")
    if not name:
        raise InputError("the model does not name the checkpoint that it was loaded from")
    given: dict[str, Any] = {"revision": getattr(config, "_commit_hash", None)}
    return find_checkpoint(name, **given | {key: one for key, one in options.items() if one})


def _write_like(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    place: Path,
    base: Checkpoint,
    changes: Sequence[WeightChange],
    card: str | None,
    *,
    overwrite: bool,
    read: Callable[[str], Tensor] | None,
) -> CheckpointReport:
    with written_folder(place) as folder:
        check_new(place, overwrite=overwrite)
        method = _check_same_config(model, base)
        skipped = (folder, place)
        copied = copy_files(plain_files(base, skipped), base.folder, folder)
        copy_files(base.weights, base.folder, folder)
        if method is None:
            written = write_tensors_like(model, base, folder, changes, read)
        else:
            written = write_projections_like(model, base, folder, changes, method)
        others = weight_files(base, skipped)
        stale = find_stale(base, others, written.keys)
        copied += copy_files((name for name in others if name not in stale), base.folder, folder)
        notes = _notes(written)
        if method is not None and written.keys:
            notes.append(
                f"the edited projections are no longer quantized, and {CONFIG} lists them; the others stay quantized "
                f"({method})"
            )
        if not _is_tokenizer_of(tokenizer, folder):
            tokenizer.save_pretrained(folder)
            notes.append("the tokenizer is not that of the base: its files were written, too")
        if (base.folder / CARD).is_file():
            if card is None:
                copied += copy_files([CARD], base.folder, folder)
            else:
                notes.append(f"{CARD} of the base was replaced by the model card")
        _write_card(card, folder)
    return CheckpointReport(str(place), str(base.folder), "", tuple(written.keys), copied, tuple(stale), tuple(notes))


def _notes(written: WrittenTensors) -> list[str]:
    notes = []
    if written.rounded:
        memory, disk = (str(dtype).removeprefix("torch.") for dtype in written.rounded)
        notes.append(
            f"the model was loaded in {memory} and the base is {disk}: the edited weights are written as {disk}, with "
            f"an error of {written.error:.2g} of their change"
        )
    if written.others:
        notes.append(
            f"{counted(len(written.others), 'tensor')} that no edit changed differ from the base and were written: "
            f"{', '.join(listed(written.others, 3))}"
        )
    if written.offloaded:
        notes.append(f"{counted(written.offloaded, 'tensor')} not in memory (offloaded) are those of the base")
    return notes


def _write_card(card: str | None, folder: Path) -> None:
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")


def _check_other_folder(place: Path, base: Checkpoint) -> None:
    if place.resolve() == base.folder.resolve():
        raise InputError(
            f"{str(place)!r} is the folder of the base checkpoint; nothing was written", hint="choose another folder"
        )


def _check_same_config(model: PreTrainedModel, base: Checkpoint) -> str | None:
    """Returns the quantization method of the base, or None.

    Raises:
        UnlikeBaseError: the config of the model is not that of the base.
    """
    try:
        own: Any = type(model.config).from_pretrained(base.folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UnlikeBaseError(f"its config cannot be read ({error})") from error
    method = quantization_of(own)
    if method is None and quantization_of(model.config) is not None:
        raise UnlikeBaseError("the model was quantized while it was loaded, and its base is not quantized")
    before, after = settings(own.to_dict()), settings(model.config.to_dict())
    for held in (before, after):
        held.pop("quantization_config", None)
    if differing := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise UnlikeBaseError(f"the configs differ in {', '.join(listed(differing, 5))}")
    return method


def _is_tokenizer_of(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether a folder contains this tokenizer."""
    try:
        own: Any = type(tokenizer).from_pretrained(folder, local_files_only=True)
        return _contents(own) == _contents(tokenizer)
    except Exception:  # no tokenizer in the folder, or one of another class
        return False


def _contents(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    return tokenizer.get_vocab(), tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)


@contextmanager
def _generation_config_kept(model: PreTrainedModel) -> Iterator[None]:
    """Lets `save_pretrained` write a generation config as it is, also one whose values it rejects."""
    held: Any = getattr(model, "generation_config", None)
    try:
        if held is not None:
            held.validate(strict=True)
    except ValueError:
        model.generation_config = _AsItIs(held)  # type: ignore[assignment]
    try:
        yield
    finally:
        if held is not None:
            model.generation_config = held


class _AsItIs:
    """A generation config that is written without validation."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def save_pretrained(self, folder: str | Path, **_options: Any) -> None:
        self._held.to_json_file(Path(folder, "generation_config.json"), use_diff=True)
