"""Ctrl-C handling of runs whose results must not be lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rlsedit_fast.cli.output import say


class Interrupts:
    """Counts presses of Ctrl-C and defers them; inside a `patient` block a press may end the block.

    Attributes:
        seen: number of presses.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._patience: int | None = None

    @contextmanager
    def patient(self, patience: int) -> Iterator[None]:
        """Defers `patience` presses inside the block; the next press ends the block, and only the block."""
        try:
            try:
                self._patience = patience
                yield
            finally:
                self._patience = None
        except KeyboardInterrupt:
            self._patience, self.seen = None, max(self.seen, 1)

    def handle(self, _number: int, _frame: object) -> None:
        """The signal handler."""
        self.seen += 1
        if self._patience == 0:
            self._patience = None  # defer further presses while the block ends
            raise KeyboardInterrupt
        with suppress(RuntimeError):  # the signal may arrive while another line is being printed to stderr
            if self._patience is None:
                say("interrupted: writing the results so far")
            else:
                self._patience -= 1
                say("interrupted: finishing the current batch; press Ctrl-C again to discard it")


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handles Ctrl-C with an `Interrupts` inside the block.

    Where SIGINT is ignored (a background job), or outside the main thread, the handler is not replaced.
    """
    found = Interrupts()
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield found
        return
    old = signal.signal(signal.SIGINT, found.handle)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, old)
