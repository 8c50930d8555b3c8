"""Where a command's results go: tried before the work, so that it is not lost for want of a place."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import permutations
from pathlib import Path

from rlsedit_fast.errors import InputError

_INPUTS = ("edits", "protect", "text", "statistics", "config", "data", "references", "rule_settings", "delta")
"""Options that name a file to read; --delta of `apply` alone."""


def check_places(options: argparse.Namespace, *, folders: Sequence[str] = (), files: Sequence[str] = ("json",)) -> None:
    """Makes and removes again what there will be, where the options want it; in the end nothing has changed.

    Args:
        options: of a command.
        folders: those of them, by name, that say where a folder goes. What is in it already is not looked at.
        files: those that say where a file goes. One that exists already must be one that can be written.

    Raises:
        InputError: two are the same place, one is within a file that another makes, one is a file that is read, or
            one cannot be made.
    """
    named = {f"--{name}": _path(options, name) for name in (*folders, *files)}
    outputs = {option: path for option, path in named.items() if path is not None}
    made = {option: outputs[option] for option in (f"--{name}" for name in files) if option in outputs}
    for (one, path), (other, second) in permutations(outputs.items(), 2):
        if _resolved(path) == _resolved(second):
            raise InputError(f"{one} {path} and {other} {second} are the same place; name two")
        if one in made and _resolved(path) in _resolved(second).parents:
            raise InputError(f"{other} {second} lies within {one} {path}, which becomes a file; name another place")
    for option, path in made.items():
        for name in _INPUTS:
            other_file = _path(options, name)
            if name not in files and other_file is not None and _resolved(other_file) == _resolved(path):
                raise InputError(f"{option} {path} is the file of --{name.replace('_', '-')} too; name another")
    for option, path in outputs.items():
        try:
            _try(path, folder=option not in made)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{option} {path}: cannot be written ({reason}); name a place where it can be") from error


def _path(options: argparse.Namespace, name: str) -> Path | None:
    given = getattr(options, name, None)
    return Path(given) if isinstance(given, str | Path) and str(given) != "-" else None


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle, which trying the path will tell
        return path.absolute()


def _try(path: Path, *, folder: bool) -> None:
    """Raises OSError where the file or folder cannot be."""
    if not folder and path.exists():
        if path.is_file():
            path.open("ab").close()
        elif path.is_dir() or not os.access(path, os.W_OK):
            raise IsADirectoryError("it is a folder" if path.is_dir() else "it may not be written")
        return
    within = path if folder else path.parent
    missing = [one for one in (within, *within.parents) if not one.exists()]
    made: list[Path] = []
    try:
        for one in reversed(missing):
            one.mkdir()
            made.append(one)
        with tempfile.NamedTemporaryFile(dir=within, prefix=f".{path.name[:100]}."):
            pass
    finally:
        for one in reversed(made):
            with suppress(OSError):
                one.rmdir()
