"""A cache of key statistics, by the fingerprint of the model; different models may have the same folder name."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlsedit_fast.errors import InputError
from rlsedit_fast.files import cache_folder
from rlsedit_fast.statistics.collection import HELD_OUT
from rlsedit_fast.statistics.key_statistics import (
    EARLIER_STATISTICS,
    STATISTICS,
    KeyStatistics,
    read_matrices,
)

logger = logging.getLogger(__name__)


def cache_path(
    identity: str,
    layers: Sequence[int],
    source: str,
    tokens: int | None,
    *,
    held_out: float = HELD_OUT,
    directory: str | Path | None = None,
) -> Path:
    """Returns the path of the statistics of one collection in the cache.

    Args:
        identity: fingerprint of the model.
        layers: layers of the statistics.
        source: name of the text.
        tokens: requested number of tokens.
        held_out: fraction of the tokens that is held out.
        directory: folder of the cache; by default `cache_folder()`.
    """
    what = hashlib.sha256(repr((source, sorted(layers), tokens, held_out)).encode()).hexdigest()
    return (cache_folder() if directory is None else Path(directory)) / f"{identity}-{what[:12]}.safetensors"


def find_cached(identity: str, layers: Sequence[int], *, directory: str | Path | None = None) -> KeyStatistics | None:
    """Returns the statistics of a model with the most tokens, from any text; of equal ones the newest.

    With as many tokens, statistics with held-out tokens are preferred.

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
            _, _, about = read_matrices(path, STATISTICS, (), earlier=EARLIER_STATISTICS)
            if set(layers) <= set(about["layers"]):
                held_out = about.get("held_out_tokens", 0)
                fitting.append((about["tokens"] + held_out, bool(held_out), path.stat().st_mtime, path))
    for *_, path in sorted(fitting, reverse=True):
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
