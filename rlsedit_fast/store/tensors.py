"""Synced safetensors files with checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rlsedit_fast.errors import StoreError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class File:
    """Description of a file, by which damage is detected.

    Attributes:
        name: path relative to the store.
        size: size in bytes.
        sum: SHA-256 of the contents.
    """

    name: str
    size: int
    sum: str


def write(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> File:
    """Writes a safetensors file and syncs the file and its folder to disk.

    Args:
        directory: folder of the store.
        name: path of the file relative to the store.
        tensors: tensors by name.

    Returns:
        The description of the file.

    Raises:
        StoreError: the file cannot be written; it is removed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = directory / name
    try:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(path.parent)
        return File(name, path.stat().st_size, _sum(path))
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            path.unlink()
        raise StoreError(
            f"{str(path)!r} cannot be written ({error}); nothing was modified. Check the free disk space and that the "
            "folder is writable"
        ) from error


def read(directory: Path, file: File) -> dict[str, Tensor]:
    """Reads and verifies a file.

    Args:
        directory: folder of the store.
        file: description of the file.

    Returns:
        The tensors by name, on the CPU and not memory-mapped.

    Raises:
        StoreError: the file does not exist or differs from what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / file.name
    try:
        size = path.stat().st_size
        if size != file.size:
            raise damaged(path, f"its size is {size} bytes, expected {file.size}")
        if _sum(path) != file.sum:
            raise damaged(path, "its checksum does not match")
        # Clone: the alignment of a mapped file varies, and matrix products may round differently.
        return {key: tensor.clone() for key, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> StoreError:
    """Returns the error for a damaged or missing file."""
    return StoreError(
        f"{str(path)!r} is damaged or missing: {why}. Nothing was modified; restore the file from a backup"
    )


def sync_folder(folder: Path) -> None:
    """Syncs the entries of a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sum(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
