"""One writer at a time, and who it is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from datetime import datetime, timezone
from pathlib import Path

from rlsedit_fast.errors import StoreError


class Lock:
    """Held from its making until `close`, or until the process is gone, in whatever way: the system keeps it.

    Args:
        path: a file, made if it is not there; who holds the lock stands in it.

    Raises:
        StoreError: somebody else holds it, with who that is; or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a+")
        except OSError as error:
            raise StoreError(
                f"{str(path)!r} cannot be written ({error.strerror}), so the store cannot be changed; nothing was. "
                "Make the folder writable, or copy it to a place that is"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = _described(self._file.read())
            self._file.close()
            raise StoreError(
                f"the store {str(path.parent)!r} is being written by {holder}; nothing was changed. Close that editor "
                "first: a store has one writer at a time"
            ) from error
        own = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv)[:200],
        }
        self._file.truncate(0)
        self._file.write(json.dumps(own))
        self._file.flush()

    def close(self) -> None:
        """Lets go of it."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()


def _described(text: str) -> str:
    try:
        holder = json.loads(text)
        return "process {pid} on {host} since {since} ({command})".format_map(holder)
    except (ValueError, KeyError, TypeError):
        return "another process"
