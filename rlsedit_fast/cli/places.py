"""Checks the paths of input and output files before the work starts."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import permutations
from pathlib import Path

from rlsedit_fast.errors import InputError

_INPUTS = (
    "edits",
    "protect",
    "text",
    "statistics",
    "config",
    "data",
    "references",
    "rule_settings",
    "gate",
    "ask",
    "delta",
)
"""Options that name an input file (--delta only in `apply`)."""


def check_inputs(options: argparse.Namespace) -> None:
    """Checks that every input file exists and is readable.

    Raises:
        InputError: an input file is missing, a folder, empty or not readable.
    """
    for name in _INPUTS:
        path = _path(options, name)
        if path is None or (name == "delta" and options.command != "apply"):
            continue
        option = f"--{name.replace('_', '-')} {path}"
        if path.is_dir():
            raise InputError(f"{option}: this is a folder; pass a file")
        if not path.exists():
            raise InputError(f"{option}: the file does not exist{_similar(path)}")
        if not os.access(path, os.R_OK):
            raise InputError(f"{option}: the file is not readable; change its permissions or pass another file")
    if (tasks := _path(options, "tasks")) is not None and not tasks.is_dir():
        raise InputError(f"--tasks {tasks}: expected a folder that contains NAME.jsonl files")


def _similar(path: Path) -> str:
    """Returns the suggestion of a file in the same folder with a similar name."""
    names: list[str] = []
    with suppress(OSError):
        names = [one.name for one in path.absolute().parent.iterdir() if one.is_file()]
    near = get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"; did you mean {path.with_name(near[0])}?" if near else "; pass an existing file"


def check_places(options: argparse.Namespace, *, folders: Sequence[str] = (), files: Sequence[str] = ("json",)) -> None:
    """Checks that every output path can be created, by creating and removing it; of several processes in one only.

    Args:
        options: options of a command.
        folders: names of the options that hold an output folder; existing contents are not checked.
        files: names of the options that hold an output file; an existing file must be writable.

    Raises:
        InputError: two outputs have the same path, an output lies below another output that is a file, an output is
            also an input, or a path cannot be created.
    """
    named = {f"--{name}": _path(options, name) for name in (*folders, *files)}
    outputs = {option: path for option, path in named.items() if path is not None}
    made = {option: outputs[option] for option in (f"--{name}" for name in files) if option in outputs}
    for (one, path), (other, second) in permutations(outputs.items(), 2):
        if _resolved(path) == _resolved(second):
            raise InputError(f"{one} {path} and {other} {second} are the same path; choose two different ones")
        if one in made and _resolved(path) in _resolved(second).parents:
            raise InputError(f"{other} {second} lies below {one} {path}, which is a file; choose another path")
    for option, path in made.items():
        for name in _INPUTS:
            other_file = _path(options, name)
            if name not in files and other_file is not None and _resolved(other_file) == _resolved(path):
                raise InputError(
                    f"{option} {path} is also the input file --{name.replace('_', '-')}; choose another path"
                )
    for option, path in outputs.items():
        try:
            _check_writable(path, folder=option not in made)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{option} {path}: cannot be written ({reason}); choose another path") from error


def _path(options: argparse.Namespace, name: str) -> Path | None:
    given = getattr(options, name, None)
    return Path(given) if isinstance(given, str | Path) and str(given) != "-" else None


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # circular links; creating the path reports them
        return path.absolute()


def _check_writable(path: Path, *, folder: bool) -> None:
    """Raises OSError if the file or folder cannot be created."""
    if not folder and path.exists():
        if path.is_file():
            path.open("ab").close()
        elif path.is_dir() or not os.access(path, os.W_OK):
            raise IsADirectoryError("it is a folder" if path.is_dir() else "it is not writable")
        return
    within = path if folder else path.parent
    missing = [parent for parent in (within, *within.parents) if not parent.exists()]
    made: list[Path] = []
    try:
        for parent in reversed(missing):
            parent.mkdir()
            made.append(parent)
        with tempfile.NamedTemporaryFile(dir=within, prefix=f".{path.name[:100]}."):
            pass
    finally:
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
