"""Compares two checkpoints on disk byte by byte."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlsedit_fast.export.changes import same_bits
from rlsedit_fast.models.checkpoint_files import Checkpoint, find_checkpoint

_PART = 1 << 26  # bytes that are compared at once


@dataclass(frozen=True)
class CheckpointDifference:
    """How a checkpoint differs from another one; everything that is not listed is the same byte by byte.

    Attributes:
        tensors: names of the tensors of both that differ, by name.
        lacking: tensors that only the first one has.
        added: tensors that only the second one has.
        headers: files of weights of both whose metadata, or the order or place of whose tensors, differs.
        files: other files of both that differ.
        lacking_files: files that only the first one has.
        added_files: files that only the second one has.

    Example:
        >>> from rlsedit_fast.export.compare import CheckpointDifference
        >>> CheckpointDifference(("a",), (), (), (), (), (), ()).tensors
        ('a',)
    """

    tensors: tuple[str, ...]
    lacking: tuple[str, ...]
    added: tuple[str, ...]
    headers: tuple[str, ...]
    files: tuple[str, ...]
    lacking_files: tuple[str, ...]
    added_files: tuple[str, ...]


def compare_checkpoints(base: str | Path, edited: str | Path) -> CheckpointDifference:
    """Compares the tensors and files of two checkpoints, in constant memory for safetensors files.

    Args:
        base: folder of a checkpoint, or a model in the cache of the Hub.
        edited: folder of another one.

    Raises:
        InputError: one of them is not a checkpoint on this machine.

    Example:
        >>> from rlsedit_fast.export import compare_checkpoints
        >>> from rlsedit_fast.world import MODEL_DIR
        >>> compare_checkpoints(MODEL_DIR, MODEL_DIR).tensors
        ()
    """
    one, other = find_checkpoint(base), find_checkpoint(edited)
    before, after = one.file_of, other.file_of
    both = [name for name in before if name in after]
    files, files_after = ({*held.files()} - {*held.weights} for held in (one, other))
    shared = [name for name in one.weights if name in other.weights]
    return CheckpointDifference(
        tensors=tuple(name for name in both if not _same(one, other, name)),
        lacking=tuple(name for name in before if name not in after),
        added=tuple(name for name in after if name not in before),
        headers=tuple(name for name in shared if _header(one, name) != _header(other, name)),
        files=tuple(
            name
            for name in sorted(files & files_after)
            if not filecmp.cmp(one.folder / name, other.folder / name, shallow=False)
        ),
        lacking_files=tuple(sorted((files | {*one.weights}) - (files_after | {*other.weights}))),
        added_files=tuple(sorted((files_after | {*other.weights}) - (files | {*one.weights}))),
    )


def _header(held: Checkpoint, name: str) -> bytes:
    return held.shards[name].header if held.is_safetensors else b""


def _same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    if not (one.is_safetensors and other.is_safetensors):
        before, after = one.read(name), other.read(name)
        return (before.dtype, before.shape) == (after.dtype, after.shape) and same_bits(before, after)
    places = [
        (held.folder / held.file_of[name], held.shards[held.file_of[name]].tensors[name]) for held in (one, other)
    ]
    (path, first), (path_after, second) = places
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    for at in range(0, first.end - first.start, _PART):
        size = min(_PART, first.end - first.start - at)
        part = np.fromfile(path, np.uint8, size, offset=first.start + at)
        if not np.array_equal(part, np.fromfile(path_after, np.uint8, size, offset=second.start + at)):
            return False
    return True
