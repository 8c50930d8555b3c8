"""A file takes its name once it lies whole on the disk: whatever was there is kept until then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlsedit_fast.errors import InputError


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
