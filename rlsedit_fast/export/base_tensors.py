"""Writes the changed tensors of a model into a copy of the files of its base checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, ModelError, listed
from rlsedit_fast.export.changes import WeightChange, same_bits
from rlsedit_fast.files import written_whole
from rlsedit_fast.models.checkpoint_files import Checkpoint, StoredTensor, load_torch_file, read_shard
from rlsedit_fast.models.disk_names import TensorGroup, match_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnlikeBaseError(Exception):
    """The model is not one whose tensors can be written into the files of the base; the message is the reason."""


@dataclass
class WrittenTensors:
    """What `write_tensors_like` did.

    Attributes:
        keys: names on disk of the tensors that were written.
        others: names in the model of tensors that differ from the base and are not edited weights.
        offloaded: number of tensors that were not compared, because they are not in memory.
        rounded: dtypes of the model and on disk, if they differ in an edited weight.
        error: error of the edited weights that the dtype on disk causes, relative to their change.
    """

    keys: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    offloaded: int = 0
    rounded: tuple[torch.dtype, torch.dtype] | None = None
    error: float = 0.0


def write_tensors_like(
    model: PreTrainedModel,
    base: Checkpoint,
    folder: Path,
    changes: Sequence[WeightChange],
    read: Callable[[str], Tensor] | None = None,
) -> WrittenTensors:
    """Writes the tensors in which a model differs from its base into copies of the files of the base.

    Every tensor of the model in memory is compared with the one on disk, one at a time. Where the dtype on disk is
    another one than that of the model, an edited weight is the one on disk plus the change.

    Args:
        model: the model.
        base: its base.
        folder: folder with copies of the weights of the base.
        changes: changes of the edited weights, see `Editor.changes`.
        read: returns a whole tensor by name, for a model that several processes hold.

    Raises:
        UnlikeBaseError: a tensor of the model is not in the base, or has another shape.
        InputError: a weight is too large for the dtype on disk.
    """
    state = {name: one for name, one in model.state_dict(keep_vars=True).items() if isinstance(one, Tensor)}
    groups, _ = match_tensors(model, base.file_of)
    _check_complete(model, state, groups)
    edits = _by_parameter(changes)
    written, pending = WrittenTensors(), dict[str, dict[str, Tensor]]()
    change, error = 0.0, 0.0
    for group in groups:
        present = {name: state[name].detach() for name in group.names}
        if any(tensor.is_meta for tensor in present.values()):
            written.offloaded += len(present)
            continue
        if read is not None:
            present = {name: read(name) for name in present}
        held = {key: base.read(key) for key in group.keys}
        found = _Compared.of(group, present, held, edits)
        if not found.differing:
            continue
        if not found.exact:
            written.others += found.differing
        new = found.on_disk(held)
        if found.exact and found.rounded is not None:
            written.rounded = found.rounded
            change, error = change + found.change**2, error + found.error**2
        for key, tensor in new.items():
            if same_bits(tensor, held[key]):
                continue
            written.keys.append(key)
            if base.is_safetensors:
                name = base.file_of[key]
                _overwrite(folder / name, base.shards[name].tensors[key], tensor)
            else:
                pending.setdefault(base.file_of[key], {})[key] = tensor
    for name, tensors in pending.items():
        _rewrite_torch_file(base.folder / name, folder / name, tensors)
    written.error = (error / change) ** 0.5 if change else 0.0
    _check_headers(base, folder)
    return written


@dataclass(frozen=True)
class _Compared:
    """A group of tensors of a model, compared with the base.

    Attributes:
        group: the group.
        present: tensors of the model.
        expected: tensors that transformers loads from the base.
        originals: tensors of the model before the edits.
        currents: tensors of the model with exact edited weights.
        dtype: dtype on disk.
    """

    group: TensorGroup
    present: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    originals: Mapping[str, Tensor]
    currents: Mapping[str, Tensor]
    dtype: torch.dtype
    norms: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        group: TensorGroup,
        present: Mapping[str, Tensor],
        held: Mapping[str, Tensor],
        edits: Mapping[str, Sequence[WeightChange]],
    ) -> _Compared:
        like = next(iter(present.values()))
        try:
            expected = group.convert({key: one.to(like.device, like.dtype) for key, one in held.items()})
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UnlikeBaseError(f"{', '.join(listed(group.keys, 3))} cannot be converted ({error})") from error
        for name, tensor in present.items():
            if name not in expected or expected[name].shape != tensor.shape:
                shape = list(expected[name].shape) if name in expected else "missing"
                raise UnlikeBaseError(f"{name} has the shape {list(tensor.shape)}, and in the base {shape}")
        before = {name: _assembled(one, edits.get(name, ()), "original") for name, one in present.items()}
        after = {name: _assembled(one, edits.get(name, ()), "current") for name, one in present.items()}
        return cls(group, present, expected, before, after, next(iter(held.values())).dtype)

    @property
    def differing(self) -> list[str]:
        """Names of the tensors of the model that differ from those of the base."""
        return [name for name, tensor in self.present.items() if not same_bits(self.expected[name], tensor)]

    @property
    def exact(self) -> bool:
        """Whether the tensors of the model before the edits are those of the base."""
        return all(same_bits(self.expected[name], tensor) for name, tensor in self.originals.items())

    @property
    def rounded(self) -> tuple[torch.dtype, torch.dtype] | None:
        """The dtypes of the model and on disk, if they differ."""
        dtype = next(iter(self.present.values())).dtype
        return None if dtype == self.dtype else (dtype, self.dtype)

    @property
    def change(self) -> float:
        """Norm of the change, once `on_disk` was called."""
        return self.norms[0]

    @property
    def error(self) -> float:
        """Norm of the difference between what was to be written and what the dtype on disk represents."""
        return self.norms[1]

    def on_disk(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors to be written, on the CPU, in the dtype on disk."""
        try:
            if self.rounded is None:
                new = self.group.revert(self.present)
                again = self.group.convert(dict(new))
                if not all(same_bits(again[name], tensor) for name, tensor in self.present.items()):
                    raise ModelError(f"transformers does not convert {self.group.names[0]} back exactly")
                return {key: tensor.to(self.dtype).cpu().contiguous() for key, tensor in new.items()}
            after = self.group.revert(_wide(self.currents))
            before = self.group.revert(_wide(self.originals)) if self.exact else None
        except (ModelError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UnlikeBaseError(str(error)) from error
        new, change, lost = {}, 0.0, 0.0
        for key, tensor in after.items():
            wanted = tensor.cpu()
            if before is not None:
                delta = wanted - before[key].cpu()
                wanted = held[key].double() + delta
                change += float(delta.square().sum())
            new[key] = wanted.to(self.dtype).contiguous()
            if bool(torch.isfinite(wanted).all()) and not bool(torch.isfinite(new[key]).all()):
                raise InputError(
                    f"{key}: a weight is too large for {self.dtype}, the dtype of the base checkpoint",
                    hint="write the change as a delta or an adapter (--delta, --adapter)",
                )
            lost += float((new[key].double() - wanted).square().sum())
        self.norms[:] = [change**0.5, lost**0.5]
        return new


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def _by_parameter(changes: Sequence[WeightChange]) -> dict[str, list[WeightChange]]:
    found: dict[str, list[WeightChange]] = {}
    for change in changes:
        name = change.name.rpartition(".")[0] if change.stack else f"{change.name}.weight"
        found.setdefault(name, []).append(change)
    return found


def _assembled(parameter: Tensor, changes: Sequence[WeightChange], which: str) -> Tensor:
    """Returns a parameter with the original or current weights of its changes."""
    if not changes:
        return parameter
    parts = [(one, getattr(one, which)) for one in changes]
    parts = [(one, tensor.T if one.transposed else tensor) for one, tensor in parts]
    if not changes[0].stack:
        return parts[0][1]
    whole = parameter.to(parts[0][1].dtype, copy=True)
    for one, tensor in parts:
        whole[int(one.name.rpartition(".")[2])] = tensor
    return whole


def _check_complete(model: PreTrainedModel, state: Mapping[str, Tensor], groups: Sequence[TensorGroup]) -> None:
    """Raises UnlikeBaseError if a parameter is not in the base; a tied one may be there under another name."""
    names = {name for group in groups for name in group.names}
    tied = {id(state[name]) for name in names}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = [name for name, one in state.items() if name in parameters - names and id(one) not in tied]
    if missing:
        raise UnlikeBaseError(f"the base does not contain {', '.join(listed(missing, 3))}")


def _overwrite(path: Path, place: StoredTensor, tensor: Tensor) -> None:
    data = tensor_bytes(tensor)
    if len(data) != place.end - place.start:
        raise UnlikeBaseError(
            f"a tensor of {path.name} has {place.end - place.start} bytes, and the new one {len(data)}"
        )
    with path.open("r+b") as file:
        file.seek(place.start)
        file.write(data)


def tensor_bytes(tensor: Tensor) -> Any:
    """Returns the bytes of a tensor as an array, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _rewrite_torch_file(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of torch with some new tensors; the others are read from the memory-mapped source."""
    held = load_torch_file(source)
    for key, tensor in tensors.items():
        held[key] = tensor
    with written_whole(target) as (temporary,):
        torch.save(held, temporary)


def _check_headers(base: Checkpoint, folder: Path) -> None:
    """Raises InputError unless the written files have the headers and sizes of those of the base."""
    for name, shard in base.shards.items():
        written = read_shard(folder / name)
        if (written.header, written.size) != (shard.header, shard.size):
            raise InputError(f"{str(folder / name)!r} does not contain what was written; check the disk")
