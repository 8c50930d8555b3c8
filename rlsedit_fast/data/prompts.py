"""Files of prompts, one per line."""

from __future__ import annotations

from pathlib import Path

from rlsedit_fast.errors import InputError


def read_prompts(path: str | Path, named: str | None = None) -> list[str]:
    r"""Reads prompts from a UTF-8 text file, one per line, without blank lines and duplicates.

    Args:
        path: the file.
        named: name of the file in error messages; by default its path.

    Raises:
        InputError: the file cannot be read or contains no prompt.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from rlsedit_fast.data.prompts import read_prompts
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "prompts.txt")
        ...     _ = file.write_text("The Eiffel Tower stands in\n\n")
        ...     read_prompts(file)
        ['The Eiffel Tower stands in']
    """
    named = named or str(path)
    try:
        # Not splitlines(): prompts may contain U+2028 and similar.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{named}: cannot be read as UTF-8 text ({error}); pass a text file with one prompt per line"
        ) from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise InputError(f"{named}: the file contains no prompt; expected one per line")
    return prompts
