"""Delta files: the change of a model's weights, from which the edited weights are restored bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast._version import __version__
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.export.changes import WeightChange, bits, check_distinct, linear_weight
from rlsedit_fast.files import Described, damaged, open_tensors, write_tensors
from rlsedit_fast.models.compiled import unwrapped
from rlsedit_fast.models.fingerprint import digest, fingerprint, identify
from rlsedit_fast.models.linear import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KIND = "rlsedit-fast delta 1"
"""File type of delta files, with the version of the format."""

_ADVICE = "copy or write it again"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModuleDelta:
    """Change of one module in a delta file.

    Attributes:
        name: dotted name in the model.
        shape: `(d_v, d_k)`.
        changed: number of entries of the weight that differ.
        by_value: number of these entries that original + delta does not reproduce; the file stores their values.
        norm: `||edited - original||_F`.

    Example:
        >>> from rlsedit_fast.export import ModuleDelta
        >>> ModuleDelta("model.layers.0.mlp.down_proj", (128, 1536), changed=10, by_value=0, norm=0.5).changed
        10
    """

    name: str
    shape: tuple[int, int]
    changed: int
    by_value: int
    norm: float


@dataclass(frozen=True)
class DeltaReport:
    """Contents of a delta file that was written or applied.

    Attributes:
        path: path of the file.
        base_fingerprint: fingerprint of the base model, see `rlsedit_fast.models.fingerprint`.
        dtype: dtype of the weights of the base model: float32, bfloat16 or float16.
        edits: number of edits; None if unknown.
        version: version of the package that wrote the file.
        modules: changes per module, in model order.

    Example:
        >>> from rlsedit_fast.export import DeltaReport
        >>> DeltaReport("edits.safetensors", "0" * 64, "float32", edits=1, version="0.1", modules=()).dtype
        'float32'
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
    """Writes a safetensors file that, applied to the base model, gives exactly the weights of the edited model.

    Each module has `NAME.delta [d_v, d_k]`, float32. The edited weight is original + delta, computed in float32 and
    rounded to the model's dtype. Entries that this does not reproduce exactly, such as entries that became many orders
    of magnitude smaller or zeros that became negative, are stored by value in `NAME.index` (int64, into the flattened
    weight) and `NAME.value` (the model's dtype).

    Args:
        changes: weight changes of one dtype, at least one.
        path: output file; an existing file is replaced once the new file is complete.
        base_fingerprint: `rlsedit_fast.models.fingerprint` of the model before the first edit.
        edits: number of edits, for information.

    Returns:
        The contents of the file.

    Raises:
        InputError: there are no changes, a module occurs twice, the dtypes differ or are not supported, or the file
            cannot be written.

    Example:
        >>> import os
        >>> import tempfile
        >>> import torch
        >>> from rlsedit_fast.export import WeightChange, write_delta
        >>> original, edited = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
        >>> change = WeightChange("layers.0.down_proj", original, edited, edited, transposed=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "delta.safetensors")
        ...     report = write_delta([change], path, base_fingerprint="0" * 64, edits=1)
        >>> report.modules[0].changed, report.modules[0].norm
        (1, 1.0)
    """
    dtype = _dtype_of(changes)
    if not base_fingerprint:
        raise InputError("base_fingerprint is empty; pass rlsedit_fast.models.fingerprint(model) of the unedited model")
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
    """Applies a delta file to its base model, in place and bit for bit.

    All new weights are computed and verified before the first one is written; until then they are kept in CPU memory.

    Args:
        model: the base model, unedited.
        path: delta file.

    Returns:
        The contents of the file.

    Raises:
        InputError: the file does not exist, is damaged, is not a delta file, or belongs to another model. The model
            was not modified.
        ModelError: the model lacks a module of the file. The model was not modified.

    Example:
        >>> import os
        >>> import tempfile
        >>> import torch
        >>> from rlsedit_fast.export import apply_delta, changes_between, write_delta
        >>> from rlsedit_fast.models import fingerprint
        >>> from rlsedit_fast.world import load_demo_model
        >>> (base, _), (edited, _) = load_demo_model(), load_demo_model()
        >>> with torch.no_grad():
        ...     _ = edited.model.layers[0].mlp.down_proj.weight[0, 0].add_(1.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "delta.safetensors")
        ...     _ = write_delta(changes_between(base, edited), path, base_fingerprint=fingerprint(base))
        ...     _ = apply_delta(base, path)
        >>> changes_between(base, edited)
        []
    """
    return apply_and_compare(model, path)[0]


def apply_and_compare(model: PreTrainedModel, path: str | Path) -> tuple[DeltaReport, list[WeightChange]]:
    """Applies a delta file as `apply_delta` does; also returns the weight changes, with copies of the originals."""
    with open_tensors(Path(path), KIND, _ADVICE) as opened:
        about = opened.about
        _check_whole(path, opened)
        model = unwrapped(model)
        if (found := fingerprint(model)) != about["base_fingerprint"]:
            raise InputError(
                f"{str(path)!r} belongs to the base model with the fingerprint {about['base_fingerprint'][:12]}, and "
                f"this model is {identify(model, found)}: weights, dtype or config differ; the model was not modified. "
                "Load the unedited base model"
            )
        results: list[tuple[Tensor, Tensor]] = []
        changes = []
        modules = []
        for name, expected in opened.sums.items():
            weight, transposed, stack = _weight(model, name, _DTYPES[about["dtype"]])
            new, by_value = _apply(Path(path), opened.file, name, weight)
            if digest(new) != expected:
                raise _damaged(path, f"the checksum of {name} does not match")
            modules.append(_module(name, weight, new, by_value))
            results.append((weight, new.cpu()))
            changes.append(WeightChange(name, weight.clone(), new, new, transposed, stack))
    with torch.no_grad():
        for weight, new in results:
            weight.copy_(new)
    report = DeltaReport(str(path), found, about["dtype"], about["edits"], about["version"], tuple(modules))
    return report, changes


def check_delta(path: str | Path) -> None:
    """Raises InputError if a file is not a complete delta file; the tensors are not read."""
    with open_tensors(Path(path), KIND, _ADVICE) as opened:
        _check_whole(path, opened)


def _dtype_of(changes: Sequence[WeightChange]) -> str:
    if not changes:
        raise InputError("there are no changes to write; edit the model first")
    check_distinct(changes)
    found = {change.original.dtype for change in changes}
    for label, dtype in _DTYPES.items():
        if found == {dtype}:
            return label
    raise InputError(
        f"the weights are {', '.join(sorted(map(str, found)))}; expected a single dtype out of {', '.join(_DTYPES)}"
    )


def _difference(original: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `delta [d_v, d_k]` and the indices `[e]` into the flattened weight that original + delta does not give.

    The delta is the difference rounded to float32. Where its sum is inexact, neighboring float32 numbers are no better,
    except for rare ties at powers of two, which are stored by value.
    """
    wide = stored.float() - original.float()
    same = bits(stored) == bits(original)
    # Adding -0.0 keeps every number; adding +0.0 would turn -0.0 into +0.0.
    delta = torch.where(same, -0.0, wide.nan_to_num()).contiguous()
    missed = bits(_added(original, delta)) != bits(stored)
    return delta, missed.flatten().nonzero().flatten()


def _added(original: Tensor, delta: Tensor) -> Tensor:
    return (original.float() + delta).to(original.dtype)


def _module(name: str, original: Tensor, new: Tensor, by_value: int) -> ModuleDelta:
    changed = int((bits(new) != bits(original)).sum())
    norm = float((new.double() - original.double()).contiguous().norm())  # same summation order for every layout
    return ModuleDelta(name, (new.shape[0], new.shape[1]), changed, by_value, norm)


def _check_whole(path: str | Path, opened: Described) -> None:
    about = opened.about
    if about.get("dtype") not in _DTYPES or not {"base_fingerprint", "edits", "version"} <= about.keys():
        raise _damaged(path, "its metadata is incomplete")
    if not opened.sums:
        raise _damaged(path, "it contains no module")


def _weight(model: PreTrainedModel, name: str, dtype: torch.dtype) -> tuple[Tensor, bool, Stack | None]:
    """Returns the weight `[d_v, d_k]`, whether it is stored transposed, and its stack if it is that of an expert."""
    found = linear_weight(model, name)
    if found is None:
        raise ModelError(
            f"the model has no linear module {name!r}; the model was not modified. Load the unedited base model"
        )
    weight, transposed, stack = found
    if weight.dtype != dtype:
        raise InputError(f"{name} is {weight.dtype}, the delta is {dtype}; load the model in {dtype}")
    return weight, transposed, stack


def _apply(path: Path, file: Any, name: str, weight: Tensor) -> tuple[Tensor, int]:
    """Returns the edited weight and the number of entries that are stored by value."""
    names = set(file.keys())
    if f"{name}.delta" not in names:
        raise _damaged(path, f"it lacks {name}.delta")
    delta = file.get_tensor(f"{name}.delta")
    if delta.shape != weight.shape or delta.dtype != torch.float32:
        raise _damaged(
            path, f"{name}.delta is {list(delta.shape)} {delta.dtype}, expected {list(weight.shape)} float32"
        )
    new = _added(weight, delta.to(weight.device)).contiguous()
    if f"{name}.index" not in names:
        return new, 0
    index = file.get_tensor(f"{name}.index")
    value = file.get_tensor(f"{name}.value") if f"{name}.value" in names else index.new_empty(0)
    inside = index.dtype == torch.int64 and bool(((index >= 0) & (index < new.numel())).all())
    if not inside or index.shape != value.shape or value.dtype != new.dtype:
        raise _damaged(path, f"{name}.index and {name}.value do not match")
    new.view(-1)[index.to(new.device)] = value.to(new.device)
    return new, len(index)


def _damaged(path: str | Path, why: str) -> InputError:
    return damaged(path, why, _ADVICE)
