"""Sparse patches: the changed entries of each weight, in the coordinates of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlsedit_fast._version import __version__
from rlsedit_fast.errors import InputError
from rlsedit_fast.export.changes import WeightChange, bits, check_distinct, check_no_experts
from rlsedit_fast.files import damaged, open_tensors, write_tensors
from rlsedit_fast.models.fingerprint import digest

KIND = "rlsedit-fast patch 1"
"""File type of patch files, with the version of the format."""

_ADVICE = "write it again"
_LARGEST = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class WeightPatch:
    """New values of the changed entries of one weight.

    The fields are those of vLLM's `SparseWeightPatch` (`vllm.distributed.weight_transfer.sparse_nccl_engine`), so
    `SparseWeightPatch(**vars(patch))` converts a patch.

    Attributes:
        name: name of the weight in the checkpoint, such as `model.layers.0.mlp.down_proj.weight`.
        indices: positions in the flattened weight, `[e]`, int32, ascending.
        values: new values at these positions, `[e]`, in the dtype of the model.
        full_shape: shape of the weight in the checkpoint.

    Example:
        >>> import torch
        >>> from rlsedit_fast.export import WeightPatch
        >>> indices = torch.tensor([2], dtype=torch.int32)
        >>> WeightPatch("down_proj.weight", indices, torch.tensor([0.5]), (2, 3)).full_shape
        (2, 3)
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def patches_of(changes: Sequence[WeightChange]) -> list[WeightPatch]:
    """Returns the changed entries of each weight.

    Args:
        changes: weight changes.

    Returns:
        One patch per weight in which an entry of the stored weight changed, in the order of the changes.

    Raises:
        InputError: a module occurs twice, a change is that of a routed expert, or a weight has more entries than an
            int32 can count.

    Example:
        >>> import torch
        >>> from rlsedit_fast.export import WeightChange, patches_of
        >>> original, edited = torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> (patch,) = patches_of([WeightChange("layers.0.down_proj", original, edited, edited, transposed=False)])
        >>> patch.name, patch.indices.tolist(), patch.values.tolist()
        ('layers.0.down_proj.weight', [1], [1.0])
    """
    check_distinct(changes)
    check_no_experts(changes, "a patch")
    patches = []
    for change in changes:
        before, after = (change.original.T, change.stored.T) if change.transposed else (change.original, change.stored)
        if after.numel() > _LARGEST:
            raise InputError(
                f"{change.name} has {after.numel():,} entries, and the indices of a patch are int32; write a "
                "checkpoint or a delta instead"
            )
        before, after = before.contiguous(), after.contiguous()
        index = (bits(before) != bits(after)).flatten().nonzero().flatten()
        if len(index):
            values = after.flatten()[index].cpu()
            patches.append(WeightPatch(f"{change.name}.weight", index.int().cpu(), values, tuple(after.shape)))
    return patches


def write_patch(changes: Sequence[WeightChange], path: str | Path, *, base_fingerprint: str) -> list[WeightPatch]:
    """Writes the changed entries of each weight to a safetensors file.

    Each weight has `NAME.indices` (int32, into the flattened weight) and `NAME.values` (the model's dtype); the shapes
    are in the metadata. The coordinates are those of the checkpoint, as vLLM's sparse weight transfer expects them.

    Args:
        changes: weight changes.
        path: output file; an existing file is replaced once the new file is complete.
        base_fingerprint: `rlsedit_fast.models.fingerprint` of the model before the first edit.

    Returns:
        The patches of the file.

    Raises:
        InputError: no entry of a weight changed, a module occurs twice, a weight is too large, or the file cannot be
            written.

    Example:
        >>> import os
        >>> import tempfile
        >>> import torch
        >>> from rlsedit_fast.export import WeightChange, read_patch, write_patch
        >>> original, edited = torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> change = WeightChange("layers.0.down_proj", original, edited, edited, transposed=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "patch.safetensors")
        ...     _ = write_patch([change], path, base_fingerprint="0" * 64)
        ...     [(patch.name, patch.full_shape) for patch in read_patch(path)]
        [('layers.0.down_proj.weight', (2, 2))]
    """
    patches = patches_of(changes)
    if not patches:
        raise InputError("no entry of a weight changed, so there is nothing to write; edit the model first")
    tensors = {f"{patch.name}.indices": patch.indices for patch in patches}
    tensors |= {f"{patch.name}.values": patch.values for patch in patches}
    about = {
        "base_fingerprint": base_fingerprint,
        "shapes": {patch.name: list(patch.full_shape) for patch in patches},
        "version": __version__,
    }
    sums = {name: digest(tensor) for name, tensor in tensors.items()}
    write_tensors(Path(path), KIND, tensors, about=about, sums=sums)
    return patches


def read_patch(path: str | Path) -> list[WeightPatch]:
    """Reads a file that `write_patch` wrote.

    Args:
        path: the file.

    Returns:
        One patch per weight, in the order in which they were written.

    Raises:
        InputError: the file does not exist, is damaged, or is not a patch file.

    Example:
        >>> from rlsedit_fast.errors import InputError
        >>> from rlsedit_fast.export import read_patch
        >>> try:
        ...     read_patch("missing.safetensors")
        ... except InputError as error:
        ...     print(error)
        the file 'missing.safetensors' does not exist; pass the path of a file of kind 'rlsedit-fast patch 1'
    """
    patches = []
    with open_tensors(Path(path), KIND, _ADVICE) as opened:
        shapes, names = opened.about.get("shapes"), set(opened.file.keys())
        if not isinstance(shapes, dict) or not shapes:
            raise damaged(path, "its metadata is incomplete", _ADVICE)
        for name, shape in shapes.items():
            found = []
            for part in (f"{name}.indices", f"{name}.values"):
                if part not in names:
                    raise damaged(path, f"it lacks {part}", _ADVICE)
                found.append(opened.file.get_tensor(part))
                if digest(found[-1]) != opened.sums.get(part):
                    raise damaged(path, f"the checksum of {part} does not match", _ADVICE)
            patches.append(WeightPatch(name, found[0], found[1], tuple(shape)))
    return patches
