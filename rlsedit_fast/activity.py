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


class Steps:
    """Reports the steps of work that may end early, with the time that is left at most.

    Args:
        what: the work, such as "value search".
        most: maximum number of steps.
    """

    def __init__(self, what: str, most: int) -> None:
        self._what, self._most = what, most
        self._step, self._last = 0, time.monotonic()

    def report(self, detail: str) -> None:
        """Reports that a step begins; the time is that of the previous step for each step that is left."""
        now = time.monotonic()
        left = ""
        if self._step:
            seconds = round((now - self._last) * (self._most - self._step))
            left = f", at most {seconds // 60}:{seconds % 60:02d} left"
        self._step, self._last = self._step + 1, now
        report_activity(f"{self._what}, step {self._step} of at most {self._most}, {detail}{left}")


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
