"""Buffer of rows that have not been folded into C yet."""

from __future__ import annotations

from torch import Tensor


class Pending:
    """`U_p [r, d_k]` and `D [r]` of `C = C_base - U_p^T D U_p`, in a growing buffer.

    Args:
        base: `C_base [d_k, d_k]`; the rows have its dtype and device.
        capacity: number of rows that fit before the buffer grows.
    """

    def __init__(self, base: Tensor, capacity: int) -> None:
        self._rows, self._signs = base.new_empty(capacity, base.shape[0]), base.new_empty(capacity)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        """`U_p [r, d_k]`, a view."""
        return self._rows[: self._count]

    @property
    def signs(self) -> Tensor:
        """`D [r]`, a view."""
        return self._signs[: self._count]

    def reserve(self, more: int) -> None:
        """Grows the buffer so that `more` rows can be appended."""
        needed = self._count + more
        if needed <= len(self._rows):
            return
        size = max(needed, 2 * len(self._rows))  # doubling keeps the total cost of many small steps linear
        rows, signs = self._rows.new_empty(size, self._rows.shape[1]), self._signs.new_empty(size)
        rows[: self._count], signs[: self._count] = self.rows, self.signs
        self._rows, self._signs = rows, signs

    def append(self, rows: Tensor, signs: Tensor | int) -> None:
        """Appends rows `[n, d_k]` with signs `[n]` (or one sign for all rows), from any device."""
        self.reserve(len(rows))
        end = self._count + len(rows)
        self._rows[self._count : end] = rows
        now = self._signs[self._count : end]
        now.copy_(signs) if isinstance(signs, Tensor) else now.fill_(signs)
        self._count = end

    def clear(self, capacity: int) -> None:
        """Removes all rows; a buffer of more than twice `capacity` shrinks to `capacity`."""
        self._count = 0
        if len(self._rows) > 2 * capacity:
            width = self._rows.shape[1]
            self._rows, self._signs = self._rows.new_empty(capacity, width), self._signs.new_empty(capacity)

    def truncate(self, count: int) -> None:
        """Removes all rows after the first `count`."""
        self._count = count
