"""A file of what editing added to a model's weights, from which the edited ones come back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast._version import __version__
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.export.changes import WeightChange, bits, linear_weight
from rlsedit_fast.files import Described, damaged, open_tensors, write_tensors
from rlsedit_fast.models.fingerprint import digest, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KIND = "rlsedit-fast delta 1"
"""What a file of `write_delta` says that it is; the number counts versions of the format."""

_AGAIN = "copy or write it again"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModuleDelta:
    """What a delta file has of one module.

    Attributes:
        name: dotted name in the model.
        shape: `(d_v, d_k)`.
        changed: entries of the weight that differ.
        by_value: of these, entries that original + delta would miss; the file holds their values.
        norm: `||edited - original||_F`.
    """

    name: str
    shape: tuple[int, int]
    changed: int
    by_value: int
    norm: float


@dataclass(frozen=True)
class DeltaReport:
    """What a delta file holds, as it was written or applied.

    Attributes:
        path: of the file.
        base_fingerprint: of the model that it is added to, see `models.fingerprint`.
        dtype: of that model's weights: float32, bfloat16 or float16.
        edits: how many they are; None where that was not known.
        version: of this package, which wrote it.
        modules: in the model's order.
    """

    path: str
    base_fingerprint: str
    dtype: str
    edits: int | None
    version: str
    modules: tuple[ModuleDelta, ...]


def write_delta(
    changes: Sequence[WeightChange], path: str | Path, *, base_fingerprint: str, edits: int | None = None
) -> DeltaReport:
    """Writes one safetensors file; added to the base, it gives exactly the weights that the edited model holds.

    For each module it has `NAME.delta [d_v, d_k]`, float32: original + delta, computed in float32 and rounded to the
    model's dtype, is the edited weight. Where that misses, as for an entry many orders smaller than the original, or a
    zero that became negative, `NAME.delta` has the nearest number, and `NAME.index` (int64, into the flattened
    weight) and `NAME.value` (the model's dtype) have the entry itself.

    Args:
        changes: at least one, of one dtype.
        path: of the file; what is there is replaced once the new file is whole.
        base_fingerprint: `models.fingerprint.fingerprint` of the model before the first edit.
        edits: how many they are, for whoever reads the file.

    Raises:
        InputError: nothing to write, the same module twice, several dtypes, one that is not supported, or a path that
            cannot be written.
    """
    dtype = _dtype_of(changes)
    if not base_fingerprint:
        raise InputError("base_fingerprint is empty; give models.fingerprint.fingerprint(model) of the unedited model")
    tensors: dict[str, Tensor] = {}
    sums: dict[str, str] = {}
    modules = []
    for change in changes:
        delta, index = _difference(change.original, change.stored)
        tensors[f"{change.name}.delta"] = delta.cpu()
        if len(index):
            tensors[f"{change.name}.index"] = index.cpu()
            tensors[f"{change.name}.value"] = change.stored.reshape(-1)[index].cpu()
        sums[change.name] = digest(change.stored)
        modules.append(_module(change.name, change.original, change.stored, len(index)))
    about = {"base_fingerprint": base_fingerprint, "dtype": dtype, "edits": edits, "version": __version__}
    write_tensors(Path(path), KIND, tensors, about=about, sums=sums)
    return DeltaReport(str(path), base_fingerprint, dtype, edits, __version__, tuple(modules))


def apply_delta(model: PreTrainedModel, path: str | Path) -> DeltaReport:
    """Writes the edited weights of a delta file into the base model, in place and bit for bit.

    All is read, computed and checked before the first weight is written; the new weights of all modules lie in the
    CPU's memory until then.

    Raises:
        InputError: the file is not there, is damaged or something else, or belongs to another model. Nothing was
            changed.
        ModelError: the model lacks a module of the file. Nothing was changed.
    """
    with open_tensors(Path(path), KIND, _AGAIN) as opened:
        about = opened.about
        _check_whole(path, opened)
        if (found := fingerprint(model)) != about["base_fingerprint"]:
            raise InputError(
                f"{str(path)!r} is added to the model {about['base_fingerprint']}, this model is {found}: its weights, "
                "dtype or settings are others; load the model that was edited, as it was before"
            )
        results: list[tuple[Tensor, Tensor]] = []
        modules = []
        for name, wanted in opened.sums.items():
            weight = _weight(model, name, _DTYPES[about["dtype"]])
            new, by_value = _sum(Path(path), opened.file, name, weight)
            if digest(new) != wanted:
                raise _damaged(path, f"what it gives for {name} is not what was written")
            modules.append(_module(name, weight, new, by_value))
            results.append((weight, new.cpu()))
    with torch.no_grad():
        for weight, new in results:
            weight.copy_(new)
    return DeltaReport(str(path), found, about["dtype"], about["edits"], about["version"], tuple(modules))


def _dtype_of(changes: Sequence[WeightChange]) -> str:
    if not changes:
        raise InputError("no changes: there is nothing to write; edit the model first")
    names = [change.name for change in changes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several changes of {', '.join(twice)}; give one for each module")
    found = {change.original.dtype for change in changes}
    for label, dtype in _DTYPES.items():
        if found == {dtype}:
            return label
    raise InputError(f"weights of {', '.join(sorted(map(str, found)))}; give one dtype among {', '.join(_DTYPES)}")


def _difference(original: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """`delta [d_v, d_k]`, and the entries `[e]` of the flattened weight that original + delta does not reach.

    The float32 number next to the difference is the one to take: where its sum misses, those beside it miss by more,
    but for ties at a power of two, which are not worth looking for.
    """
    wide = stored.float() - original.float()
    same = bits(stored) == bits(original)
    # -0.0 leaves every number as it is; +0.0 would take the sign of a negative zero.
    delta = torch.where(same, -0.0, wide.nan_to_num()).contiguous()
    missed = bits(_added(original, delta)) != bits(stored)
    return delta, missed.flatten().nonzero().flatten()


def _added(original: Tensor, delta: Tensor) -> Tensor:
    return (original.float() + delta).to(original.dtype)


def _module(name: str, original: Tensor, new: Tensor, by_value: int) -> ModuleDelta:
    changed = int((bits(new) != bits(original)).sum())
    norm = float((new.double() - original.double()).contiguous().norm())  # summed alike however they are stored
    return ModuleDelta(name, (new.shape[0], new.shape[1]), changed, by_value, norm)


def _check_whole(path: str | Path, opened: Described) -> None:
    about = opened.about
    if about.get("dtype") not in _DTYPES or not {"base_fingerprint", "edits", "version"} <= about.keys():
        raise _damaged(path, "its description is not whole")
    if not opened.sums:
        raise _damaged(path, "it names no module")


def _weight(model: PreTrainedModel, name: str, dtype: torch.dtype) -> Tensor:
    found = linear_weight(model, name)
    if found is None:
        raise ModelError(f"the model has no linear module {name!r}; load the model that was edited, as it was before")
    weight, _ = found
    if weight.dtype != dtype:
        raise InputError(f"{name} is {weight.dtype}, the delta is of {dtype}; load the model in that")
    return weight


def _sum(path: Path, file: Any, name: str, weight: Tensor) -> tuple[Tensor, int]:
    """The edited weight, and how many of its entries came by their values."""
    names = set(file.keys())
    if f"{name}.delta" not in names:
        raise _damaged(path, f"it lacks {name}.delta")
    delta = file.get_tensor(f"{name}.delta")
    if delta.shape != weight.shape or delta.dtype != torch.float32:
        raise _damaged(
            path, f"{name}.delta is {list(delta.shape)} {delta.dtype}, the model's weight {list(weight.shape)}"
        )
    new = _added(weight, delta.to(weight.device)).contiguous()
    if f"{name}.index" not in names:
        return new, 0
    index = file.get_tensor(f"{name}.index")
    value = file.get_tensor(f"{name}.value") if f"{name}.value" in names else index.new_empty(0)
    inside = index.dtype == torch.int64 and bool(((index >= 0) & (index < new.numel())).all())
    if not inside or index.shape != value.shape or value.dtype != new.dtype:
        raise _damaged(path, f"{name}.index and {name}.value do not belong together")
    new.view(-1)[index.to(new.device)] = value.to(new.device)
    return new, len(index)


def _damaged(path: str | Path, why: str) -> InputError:
    return damaged(path, why, _AGAIN)
