"""Lock file that allows one writer at a time and records its process."""

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
    """Exclusive lock from construction until `close` or the end of the process.

    The operating system releases the lock (`flock`) when the process ends, also when it is killed.

    Args:
        path: lock file, created if it does not exist; it describes the process that holds the lock.

    Raises:
        StoreError: another process holds the lock (the message names it), or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a+")
        except OSError as error:
            raise StoreError(
                f"the lock file {str(path)!r} cannot be written ({error.strerror}); nothing was modified. Make the "
                "folder of the store writable or copy it to a writable location"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = _described(self._file.read())
            self._file.close()
            raise StoreError(
                f"the store {str(path.parent)!r} is locked by {holder}; nothing was modified. A store has one writer "
                "at a time: close the other editor first"
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
        """Releases the lock."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()


def _described(text: str) -> str:
    try:
        holder = json.loads(text)
        return "process {pid} on {host} since {since} ({command})".format_map(holder)
    except (ValueError, KeyError, TypeError):
        return "another process"
