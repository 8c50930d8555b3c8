"""Control of the package's log messages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_silenced(*loggers: str) -> Iterator[None]:
    """Drops warnings inside the block, for callers that report the same facts themselves; errors are still logged.

    Args:
        *loggers: names of loggers; loggers below them that have no level of their own are silenced as well.
    """
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    for logger, level in levels.items():
        logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
