"""What Ctrl-C does to a run whose results must not be lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rlsedit_fast.cli.output import say


class Interrupts:
    """Notes every Ctrl-C, and holds it back where work is being written; `patient` says where it may end some.

    Attributes:
        seen: how many there were.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._patience: int | None = None

    @contextmanager
    def patient(self, patience: int) -> Iterator[None]:
        """Within it so many are noted, and the next one ends the block, and only that."""
        try:
            try:
                self._patience = patience
                yield
            finally:
                self._patience = None
        except KeyboardInterrupt:
            self._patience, self.seen = None, max(self.seen, 1)

    def pressed(self, _number: int, _frame: object) -> None:
        """The handler."""
        self.seen += 1
        if self._patience == 0:
            self._patience = None  # from here on held back: what the first one ends is ended in peace
            raise KeyboardInterrupt
        with suppress(RuntimeError):  # it may have come amid another line to stderr
            if self._patience is None:
                say("interrupted: writing what was made")
            else:
                self._patience -= 1
                say("interrupted: finishing this batch; once more to give it up")


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Within it Ctrl-C is `Interrupts`' to handle.

    Where it is ignored (a job in the background) or is not for this thread to see, it stays so.
    """
    found = Interrupts()
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield found
        return
    old = signal.signal(signal.SIGINT, found.pressed)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, old)
