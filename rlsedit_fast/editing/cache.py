"""Key statistics that were collected before, found by the model's fingerprint: many models share a folder's name."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlsedit_fast.editing.matrices import read_matrices
from rlsedit_fast.editing.statistics import STATISTICS, KeyStatistics
from rlsedit_fast.errors import InputError

logger = logging.getLogger(__name__)


def folder() -> Path:
    """`RLSEDIT_CACHE`, else `rlsedit` in `XDG_CACHE_HOME`, else `~/.cache/rlsedit`."""
    if named := os.environ.get("RLSEDIT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlsedit"


def place(
    identity: str, layers: Sequence[int], source: str, tokens: int | None, *, directory: str | Path | None = None
) -> Path:
    """Where the cache has, or would have, one collection's statistics.

    Args:
        identity: the model's fingerprint.
        layers: that are collected.
        source: the text's name.
        tokens: how many were asked for.
        directory: the cache's; by default `folder()`.
    """
    what = hashlib.sha256(repr((source, sorted(layers), tokens)).encode()).hexdigest()
    return (folder() if directory is None else Path(directory)) / f"{identity}-{what[:12]}.safetensors"


def find(identity: str, layers: Sequence[int], *, directory: str | Path | None = None) -> KeyStatistics | None:
    """A model's statistics, from whatever text: those of most tokens, of these the newest.

    Args:
        identity: the model's fingerprint.
        layers: all of them must be there; only they are read.
        directory: the cache's; by default `folder()`.

    Returns:
        None where there are none. A damaged file is passed over with a warning in the log.
    """
    fitting = []
    for path in (folder() if directory is None else Path(directory)).glob(f"{identity}-*.safetensors"):
        with _damage_told():
            _, about = read_matrices(path, STATISTICS, ())
            if set(layers) <= set(about["layers"]):
                fitting.append((about["tokens"], path.stat().st_mtime, path))
    for _, _, path in sorted(fitting, reverse=True):
        with _damage_told():
            found = KeyStatistics.load(path, layers=layers)
            found.check(identity, layers)
            logger.info("key statistics over %d tokens of %s, from %s", found.tokens, found.source, path)
            return found
    return None


@contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        logger.warning("a file of the cache is passed over: %s", error)
