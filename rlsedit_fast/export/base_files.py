"""Copies the files of a base checkpoint, and finds files with other copies of its weights, which edits make stale."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.export.card import CARD
from rlsedit_fast.files import read_json
from rlsedit_fast.models.checkpoint_files import SAFETENSORS, Checkpoint, load_torch_file, read_shard

_TORCH = (".bin", ".pth", ".pt")
_OTHER_FORMATS = (
    *("*.gguf", "*.onnx", "*.onnx_data*", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.ckpt", "*.ckpt.*", "*.npz"),
    *("*.nemo", "*.llamafile", "*.pdparams", "*.mlmodel", "*.engine", "openvino_*", "consolidated*", "pytorch_model*"),
)
"""Names of files that are taken as copies of the weights without reading them."""

_INDEX = ".index.json"
_ROWS = 8
"""Rows of an edited weight that are compared with the tensors of other files."""
_NEAR = 0.1
"""Relative distance up to which weights are copies of each other, in other dtypes or from other training steps."""


def copy_files(names: Iterable[str], base: Path, folder: Path) -> int:
    """Copies files, as a reference to the same data where the file system can; links become files.

    Args:
        names: paths relative to `base`.
        base: the folder.
        folder: the folder of the copies.

    Returns:
        The number of files.
    """
    count = 0
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(base / name, target)
        count += 1
    return count


def copy_file(source: Path, target: Path) -> None:
    """Copies the contents of a file; copy_file_range shares the data on file systems that can."""
    with suppress(OSError, AttributeError), source.open("rb") as old, target.open("wb") as new:
        remaining = os.fstat(old.fileno()).st_size
        while remaining:
            copied = os.copy_file_range(old.fileno(), new.fileno(), remaining)
            if not copied:
                break
            remaining -= copied
        else:
            return
    shutil.copyfile(source, target)


def plain_files(base: Checkpoint, skipped: Collection[Path]) -> Iterator[str]:
    """Yields the files of a checkpoint that do not contain weights, except those in the folders `skipped`."""
    for name in _files(base, skipped):
        if not _may_hold_weights(name):
            yield name


def weight_files(base: Checkpoint, skipped: Collection[Path]) -> list[str]:
    """Returns the files that may contain weights and are not those that transformers loads, indexes last."""
    found = [name for name in _files(base, skipped) if _may_hold_weights(name) and name not in base.weights]
    return sorted(found, key=lambda name: name.endswith(_INDEX))


def find_stale(base: Checkpoint, names: Iterable[str], changed: Collection[str]) -> list[str]:
    """Returns the files of `weight_files` that contain another copy of weights that were changed.

    Args:
        base: the checkpoint.
        names: the files, indexes last.
        changed: names of the changed tensors on disk; empty if there are none, and then no file is stale.
    """
    if not changed:
        return []
    held = sorted(name for name in changed if name in base.file_of)  # a quantized base may have other names
    weight = base.read(held[0]) if held else None
    stale: list[str] = []
    for name in names:
        if name.endswith(_INDEX):
            is_stale = _lists(base.folder / name, {base.folder / one for one in stale})
        else:
            is_stale = _is_copy(base.folder / name, weight)
        if is_stale:
            stale.append(name)
    return stale


def _files(base: Checkpoint, skipped: Collection[Path]) -> Iterator[str]:
    real = [path.resolve() for path in skipped]
    for name in base.files():
        if name != CARD and not any((base.folder / name).absolute().resolve().is_relative_to(one) for one in real):
            yield name


def _may_hold_weights(name: str) -> bool:
    last = name.rpartition("/")[2].lower().removesuffix(_INDEX)
    return last.endswith((SAFETENSORS, *_TORCH)) or any(fnmatch(last, pattern) for pattern in _OTHER_FORMATS)


def _lists(index: Path, files: set[Path]) -> bool:
    """Whether an index names one of the files."""
    try:
        held = read_json(index, "the index of a checkpoint")
        return any(index.parent / str(name) in files for name in held["weight_map"].values())
    except (InputError, KeyError, TypeError, AttributeError):
        return False


def _is_copy(path: Path, weight: Tensor | None) -> bool:
    """Whether a file contains a copy of a weight; without a weight, by its name only."""
    if any(fnmatch(path.name.lower(), pattern) for pattern in _OTHER_FORMATS):
        return True
    if weight is None:
        return False
    try:
        return any(_near(one, weight[:_ROWS]) for one in _first_rows(path, weight))
    except InputError:  # not tensors by name, such as the arguments of a training run
        return False


def _first_rows(path: Path, weight: Tensor) -> Iterator[Tensor]:
    """Yields the first rows of the tensors of a file that have the shape of a weight."""
    from safetensors import safe_open

    if path.suffix == SAFETENSORS:
        names = [name for name, held in read_shard(path).tensors.items() if held.shape == tuple(weight.shape)]
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield file.get_slice(name)[:_ROWS]
        return
    for held in load_torch_file(path).values():
        if isinstance(held, Tensor) and held.shape == weight.shape:
            yield held[:_ROWS]


def _near(one: Tensor, other: Tensor) -> bool:
    one, other = one.to(torch.float64), other.to(torch.float64)
    return bool((one - other).norm() <= _NEAR * other.norm())
