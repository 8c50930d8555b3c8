"""Files of tensors that lie whole on the disk before they are spoken of, and tell when they are damaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rlsedit_fast.errors import StoreError

_READ_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class File:
    """What is remembered of a file.

    Attributes:
        name: within the store.
        size: bytes.
        sum: SHA-256 of its content.
    """

    name: str
    size: int
    sum: str


def write(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> File:
    """Writes a safetensors file and waits until it, and its name, are on the disk.

    Raises:
        StoreError: the disk refuses; nothing is left of the file.
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
            f"{str(path)!r} cannot be written ({error}); nothing was changed. See that there is room and that the "
            "folder can be written to"
        ) from error


def read(directory: Path, file: File) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, in memory of their own.

    Raises:
        StoreError: the file is not there or is not what was written, down to the last bit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / file.name
    try:
        size = path.stat().st_size
        if size != file.size:
            raise damaged(path, f"it has {size} bytes, {file.size} were written")
        if _sum(path) != file.sum:
            raise damaged(path, "it is not what was written")
        # A copy: a mapped file may lie at any address, and products may round otherwise there.
        return {key: tensor.clone() for key, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> StoreError:
    """The error that names a damaged file."""
    return StoreError(f"{str(path)!r} is damaged or gone: {why}. Nothing was changed; bring it back from a copy")


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sum(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_AT_ONCE):
            found.update(part)
    return found.hexdigest()
