"""A cache of key statistics, by the fingerprint of the model; different models may have the same folder name."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlsedit_fast.errors import InputError
from rlsedit_fast.files import cache_folder
from rlsedit_fast.statistics.key_statistics import STATISTICS, KeyStatistics, read_matrices

logger = logging.getLogger(__name__)


def cache_path(
    identity: str, layers: Sequence[int], source: str, tokens: int | None, *, directory: str | Path | None = None
) -> Path:
    """Returns the path of the statistics of one collection in the cache.

    Args:
        identity: fingerprint of the model.
        layers: layers of the statistics.
        source: name of the text.
        tokens: requested number of tokens.
        directory: folder of the cache; by default `cache_folder()`.
    """
    what = hashlib.sha256(repr((source, sorted(layers), tokens)).encode()).hexdigest()
    return (cache_folder() if directory is None else Path(directory)) / f"{identity}-{what[:12]}.safetensors"


def find_cached(identity: str, layers: Sequence[int], *, directory: str | Path | None = None) -> KeyStatistics | None:
    """Returns the statistics of a model with the most tokens, from any text; of equal ones the newest.

    Args:
        identity: fingerprint of the model.
        layers: layers that the statistics must contain; only these are read.
        directory: folder of the cache; by default `cache_folder()`.

    Returns:
        The statistics, or None. A damaged file is skipped with a warning.
    """
    fitting = []
    for path in (cache_folder() if directory is None else Path(directory)).glob(f"{identity}-*.safetensors"):
        with _damage_logged():
            _, about = read_matrices(path, STATISTICS, ())
            if set(layers) <= set(about["layers"]):
                fitting.append((about["tokens"], path.stat().st_mtime, path))
    for _, _, path in sorted(fitting, reverse=True):
        with _damage_logged():
            found = KeyStatistics.load(path, layers=layers)
            found.check(identity, layers)
            logger.info("key statistics: %d tokens of %s, from %s", found.tokens, found.source, path)
            return found
    return None


@contextmanager
def _damage_logged() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        logger.warning("skipping a file of the cache: %s", error)
