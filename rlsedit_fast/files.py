"""The cache folder, atomic file writes, safetensors files with typed metadata, and JSON files of the user."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Described:
    """An open file that `write_tensors` wrote.

    Attributes:
        file: the safetensors handle, with `keys()` and `get_tensor(name)`.
        about: its metadata.
        sums: checksums by name.
    """

    file: Any
    about: dict[str, Any]
    sums: dict[str, str]


def cache_folder() -> Path:
    """Returns the folder of the cache: `RLSEDIT_CACHE`, else `rlsedit` in `XDG_CACHE_HOME`, else `~/.cache/rlsedit`."""
    if named := os.environ.get("RLSEDIT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlsedit"


@contextmanager
def written_whole(*paths: Path) -> Iterator[list[Path]]:
    """Writes files atomically.

    Yields one temporary path beside each of `paths`. When the block ends without an error, the temporary files are
    synced and renamed to `paths`, in order.

    Raises:
        InputError: a path is a folder, or a file cannot be written; existing files that were not yet replaced are kept.
    """
    from safetensors import SafetensorError

    for path in paths:
        if path.is_dir():
            raise InputError(f"{str(path)!r} is a folder; pass the path of a file")
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{', '.join(map(str, paths))} cannot be written ({error}); choose a writable path") from error
    finally:
        for temporary in temporaries:
            with suppress(OSError):
                temporary.unlink()


_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")
"""Weights of a checkpoint, which may have other names in another one, such as a different number of parts."""


def check_new(path: str | Path, *, overwrite: bool) -> None:
    """Raises InputError if a path exists and `overwrite` is False; a folder without files does not count."""
    place = Path(path)
    if not overwrite and place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise InputError(
            f"{str(path)!r} already exists; nothing was written",
            hint="choose another path, or pass --overwrite (Python: overwrite=True)",
        )


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Writes a checkpoint: yields a temporary folder, whose files are moved to `folder` when the block ends.

    Files of `folder` stay until the new ones are complete. Then files of the same names and other weights of a
    checkpoint are replaced; other files stay.

    Raises:
        InputError: `folder` is a file.
    """
    if folder.is_file():
        raise InputError(f"{str(folder)!r} is a file; pass a folder")
    temporary = folder.absolute().with_name(f".{folder.absolute().name[:100]}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not folder.exists():
            temporary.rename(folder)
            return
        for pattern in _WEIGHTS:
            for old in folder.glob(pattern):
                if not (temporary / old.name).exists():
                    old.unlink()
        for new in temporary.iterdir():
            if new.is_dir():
                shutil.copytree(new, folder / new.name, dirs_exist_ok=True)
            else:
                new.replace(folder / new.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(
    path: Path, kind: str, tensors: Mapping[str, Tensor], *, about: Mapping[str, Any], sums: Mapping[str, str]
) -> None:
    """Writes a safetensors file whose metadata states its kind.

    Args:
        path: destination; an existing file is replaced only once the new file is complete on disk.
        kind: file type, including the format version.
        tensors: tensors by name, contiguous.
        about: metadata, JSON-serializable.
        sums: checksums by name.

    Raises:
        InputError: the file cannot be written.
    """
    from safetensors.torch import save_file

    metadata = {"kind": kind, "about": json.dumps(about), "sums": json.dumps(sums)}
    with written_whole(path) as (temporary,):
        save_file(dict(tensors), temporary, metadata=metadata)


@contextmanager
def open_tensors(path: Path, kind: str, advice: str, *, earlier: str | None = None) -> Iterator[Described]:
    """Opens a file that `write_tensors` wrote.

    Args:
        path: the file.
        kind: expected file type, including the format version.
        advice: how to obtain an intact file, for error messages, such as "collect it again".
        earlier: an earlier version of the type that is accepted as well.

    Raises:
        InputError: the file does not exist, cannot be read, is of another kind, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            metadata = file.metadata() or {}
        except FileNotFoundError as error:
            raise InputError(
                f"the file {str(path)!r} does not exist; pass the path of a file of kind {kind!r}"
            ) from error
        except OSError as error:
            raise InputError(
                f"{str(path)!r} cannot be read ({error}); pass the path of a readable file of kind {kind!r}"
            ) from error
        except SafetensorError as error:
            raise InputError(
                f"{str(path)!r} is damaged, or not a file of kind {kind!r} ({error}); pass another path, or {advice}"
            ) from error
        if metadata.get("kind") not in (kind, earlier or kind):
            raise InputError(
                f"{str(path)!r} is {_named(metadata.get('kind'))}; expected a file of kind {kind!r}: pass another "
                f"path, or {advice}"
            )
        try:
            about, sums = json.loads(metadata["about"]), json.loads(metadata["sums"])
            if not isinstance(about, dict) or not isinstance(sums, dict):
                raise ValueError("expected JSON objects")
        except (KeyError, ValueError) as error:
            raise damaged(path, f"its metadata cannot be read ({error})", advice) from error
        yield Described(file, about, sums)


def read_json(path: Path, expected: str, named: str | None = None) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        expected: what it should contain, for the error message.
        named: name of the file in the error message; by default its path.

    Raises:
        InputError: the file cannot be read or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{named or path}: cannot be read as JSON ({error}); expected {expected}") from error


def _named(kind: str | None) -> str:
    return "a safetensors file of another program" if kind is None else f"a file of kind {kind!r}"


def damaged(path: str | Path, why: str, advice: str) -> InputError:
    """Returns the error for a file that differs from what was written."""
    return InputError(f"{str(path)!r} is damaged: {why}; {advice}")
