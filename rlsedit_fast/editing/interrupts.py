"""Ctrl-C waits while what belongs together is being written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back(most: int | None = None) -> Iterator[None]:
    """Within it a Ctrl-C is only noted, or the first `most` of them are; whoever handles it is called behind it.

    Only the main thread can see to that, and only it is interrupted.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    seen: list[tuple[int, object]] = []

    def note(number: int, frame: object) -> None:
        seen.append((number, frame))
        if len(seen) == most:
            signal.signal(signal.SIGINT, handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if seen:
            handler(*seen[0])  # type: ignore[arg-type]
