"""Files that take their name once they lie whole on the disk, and files of tensors that say what they are."""

from __future__ import annotations

import json
import os
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
    """An open file of `write_tensors`.

    Attributes:
        file: of safetensors, with `keys()` and `get_tensor(name)`.
        about: what it says of itself.
        sums: digests by name, of what its writer chose.
    """

    file: Any
    about: dict[str, Any]
    sums: dict[str, str]


@contextmanager
def written_whole(*paths: Path) -> Iterator[list[Path]]:
    """Yields a temporary path beside each of `paths`; they take their names, in order, when the block has ended.

    Raises:
        InputError: the disk refuses; what was there under the names of files not yet moved is kept.
    """
    from safetensors import SafetensorError

    fresh = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        for temporary in fresh:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(fresh, paths, strict=True):
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{', '.join(map(str, paths))} cannot be written ({error}); name a place where a file can be"
        ) from error
    finally:
        for temporary in fresh:
            with suppress(OSError):
                temporary.unlink()


def write_tensors(
    path: Path, kind: str, tensors: Mapping[str, Tensor], *, about: Mapping[str, Any], sums: Mapping[str, str]
) -> None:
    """Writes a safetensors file that says what it is.

    Args:
        path: of the file; what was there is kept until the new one lies whole on the disk.
        kind: of file, with the version of its format.
        tensors: by name, contiguous.
        about: what there is to say of them, for JSON.
        sums: digests by name.

    Raises:
        InputError: the disk refuses.
    """
    from safetensors.torch import save_file

    told = {"kind": kind, "about": json.dumps(about), "sums": json.dumps(sums)}
    with written_whole(path) as (fresh,):
        save_file(dict(tensors), fresh, metadata=told)


@contextmanager
def open_tensors(path: Path, kind: str, again: str) -> Iterator[Described]:
    """Opens a file of `write_tensors`.

    Args:
        path: of the file.
        kind: what it must say that it is.
        again: how it comes to be, for the errors: "collect it anew", say.

    Raises:
        InputError: the file is not there, cannot be read, is of another kind, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            told = file.metadata() or {}
        except FileNotFoundError as error:
            raise InputError(f"{str(path)!r} is not there; name a file of {kind!r}") from error
        except OSError as error:
            raise InputError(f"{str(path)!r} cannot be read ({error}); name a file of {kind!r}") from error
        except SafetensorError as error:
            raise damaged(path, f"or no file of {kind!r} ({error})", again) from error
        if told.get("kind") != kind:
            raise InputError(
                f"{str(path)!r} is a safetensors file that calls itself {told.get('kind', 'nothing')!r}, not {kind!r}; "
                "name one of this kind and of this version's format"
            )
        try:
            about, sums = json.loads(told["about"]), json.loads(told["sums"])
            if not isinstance(about, dict) or not isinstance(sums, dict):
                raise ValueError("no JSON objects")
        except (KeyError, ValueError) as error:
            raise damaged(path, f"its description cannot be read ({error})", again) from error
        yield Described(file, about, sums)


def damaged(path: str | Path, why: str, again: str) -> InputError:
    """The error of a file that is not what was written."""
    return InputError(f"{str(path)!r} is damaged: {why}; {again}")
