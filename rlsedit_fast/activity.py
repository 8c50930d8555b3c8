"""What a long operation is doing at present, for the progress bar of its caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_INTERVAL = 0.1  # seconds between two updates of a bar

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("activity", default=None)


def report_activity(text: str) -> None:
    """Reports the present step, such as "value search, step 3 of 25"; no effect unless a caller listens."""
    if (listener := _listener.get()) is not None:
        listener(text)


@contextmanager
def activity_shown(bar: Any) -> Iterator[None]:
    """Shows the reported steps after a tqdm bar."""
    last = 0.0

    def show(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _INTERVAL:
            last = time.monotonic()
            bar.set_postfix_str(text)

    token = _listener.set(show)
    try:
        yield
    finally:
        _listener.reset(token)
        bar.set_postfix_str("", refresh=False)
