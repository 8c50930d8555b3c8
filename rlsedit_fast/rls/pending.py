"""The rows of edits that C does not hold yet."""

from __future__ import annotations

from torch import Tensor


class Pending:
    """`U_p [r, d_k]` and `D [r]` of `C = C_base - U_p^T D U_p`, in a buffer that grows.

    Args:
        base: `C_base [d_k, d_k]`, whose dtype and device the rows have.
        room: how many rows fit before the buffer grows.
    """

    def __init__(self, base: Tensor, room: int) -> None:
        self._rows, self._signs = base.new_empty(room, base.shape[0]), base.new_empty(room)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        """`U_p`, live."""
        return self._rows[: self._count]

    @property
    def signs(self) -> Tensor:
        """`D`, live."""
        return self._signs[: self._count]

    @property
    def nbytes(self) -> int:
        """Of the whole buffer."""
        return self._rows.nbytes + self._signs.nbytes

    def reserve(self, more: int) -> None:
        """Makes the buffer hold `more` rows than there are; what has been appended stays."""
        needed = self._count + more
        if needed <= len(self._rows):
            return
        size = max(needed, 2 * len(self._rows))  # doubling keeps the copies of many small steps linear
        rows, signs = self._rows.new_empty(size, self._rows.shape[1]), self._signs.new_empty(size)
        rows[: self._count], signs[: self._count] = self.rows, self.signs
        self._rows, self._signs = rows, signs

    def append(self, rows: Tensor, signs: Tensor | int) -> None:
        """Adds rows `[n, d_k]` with their signs `[n]`, or one sign for all, on any device."""
        self.reserve(len(rows))
        end = self._count + len(rows)
        self._rows[self._count : end] = rows
        self._signs[self._count : end] = signs
        self._count = end

    def clear(self, room: int) -> None:
        """Forgets all rows; a buffer that has grown far beyond `room` is let go."""
        self._count = 0
        if len(self._rows) > 2 * room:
            self._rows, self._signs = self._rows.new_empty(room, self._rows.shape[1]), self._signs.new_empty(room)

    def cut(self, count: int) -> None:
        """Forgets all rows behind the first `count`."""
        self._count = count
