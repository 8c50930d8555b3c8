"""Handling of Ctrl-C (SIGINT): critical sections that it must not interrupt, and runs that finish their batch first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def interrupts_deferred(limit: int | None = None) -> Iterator[None]:
    """Defers Ctrl-C until the end of the block. Outside of the main thread it does nothing.

    Args:
        limit: number of presses that are deferred; the next press interrupts the block. None defers all.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[tuple[int, object]] = []

    def defer(number: int, frame: object) -> None:
        pressed.append((number, frame))
        if len(pressed) == limit:
            signal.signal(signal.SIGINT, handler)

    signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[0])  # type: ignore[arg-type]


class Interrupts:
    """Counts presses of Ctrl-C and defers them; inside a `patient` block a press may end the block.

    Args:
        notify: called with a message at each press.

    Attributes:
        pressed: number of presses.
    """

    def __init__(self, notify: Callable[[str], object]) -> None:
        self.pressed = 0
        self._notify = notify
        self._patience: int | None = None

    @contextmanager
    def patient(self, patience: int | None) -> Iterator[None]:
        """Defers `patience` presses inside the block; the next press ends the block, and only the block.

        None defers all presses.
        """
        try:
            try:
                self._patience = patience
                yield
            finally:
                self._patience = None
        except KeyboardInterrupt:
            self._patience, self.pressed = None, max(self.pressed, 1)

    def handle(self, _number: int, _frame: object) -> None:
        """The signal handler."""
        self.pressed += 1
        if self._patience == 0:
            self._patience = None  # defer further presses while the block ends
            raise KeyboardInterrupt
        with suppress(RuntimeError):  # the signal may arrive while another line is being printed to stderr
            if self._patience is None:
                self._notify("interrupted: writing the results so far")
            else:
                self._patience -= 1
                self._notify("interrupted: finishing the current batch; press Ctrl-C again to discard it")


@contextmanager
def interrupts_counted(notify: Callable[[str], object]) -> Iterator[Interrupts]:
    """Handles Ctrl-C with an `Interrupts` inside the block.

    If SIGINT is ignored (a background job), or outside of the main thread, the handler is not replaced.
    """
    found = Interrupts(notify)
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield found
        return
    old = signal.signal(signal.SIGINT, found.handle)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, old)
