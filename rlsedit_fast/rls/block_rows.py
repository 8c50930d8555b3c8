"""The applied rows of a layer of experts, with the factor of their dual system, in growing buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rlsedit_fast.rls.blocks import BlockLayout


class AppliedRows:
    """Rows with `S = diag(1/w) + K C0 K^T = L L^T` and `A = L^-1 E0`.

    Appending writes only after the existing rows, so an earlier number of rows stays valid until rows are appended to
    it. Every other change returns new rows.

    Args:
        layout: layout of the keys.
        d_v: width of values.
        dtype: dtype of keys and weights.
        device: device of the rows.
    """

    def __init__(self, layout: BlockLayout, d_v: int, dtype: torch.dtype, device: torch.device) -> None:
        self._layout, self._count = layout, 0
        features = layout.key_width - layout.active

        def empty(columns: int, kind: torch.dtype) -> Tensor:
            return torch.empty(0, columns, dtype=kind, device=device)

        self._buffers = {
            "keys": empty(layout.key_width, dtype),
            "projected": empty(features, dtype),
            "weights": empty(1, dtype),
            "start": empty(d_v, torch.float64),
            "whitened": empty(d_v, torch.float64),
        }
        self._lower = torch.empty(0, 0, dtype=torch.float64, device=device)
        self._marks: list[bytes] = []

    def __len__(self) -> int:
        return self._count

    @property
    def keys(self) -> Tensor:
        """Rows of keys `[N, key_width]`."""
        return self._buffers["keys"][: self._count]

    @property
    def projected(self) -> Tensor:
        """Features of `K C0 [N, features]`."""
        return self._buffers["projected"][: self._count]

    @property
    def weights(self) -> Tensor:
        """`w [N]`."""
        return self._buffers["weights"][: self._count, 0]

    @property
    def start(self) -> Tensor:
        """`E0 = V - K W0^T [N, d_v]`, float64."""
        return self._buffers["start"][: self._count]

    @property
    def whitened(self) -> Tensor:
        """`A = L^-1 E0 [N, d_v]`, float64."""
        return self._buffers["whitened"][: self._count]

    @property
    def lower(self) -> Tensor:
        """`L [N, N]`, float64."""
        return self._lower[: self._count, : self._count]

    def dual(self) -> Tensor:
        """Returns `X = S^-1 E0 [N, d_v]`, float64."""
        return torch.linalg.solve_triangular(self.lower.T, self.whitened, upper=True)

    def append(
        self, keys: Tensor, projected: Tensor, weights: Tensor, start: Tensor, lower: Tensor, coupling: Tensor
    ) -> None:
        """Appends n rows.

        Args:
            keys: rows of keys `[n, key_width]`.
            projected: features of `K C0 [n, features]`.
            weights: `w [n]`.
            start: `E0 [n, d_v]`, float64.
            lower: factor of their Schur complement `[n, n]`, float64.
            coupling: `L^-1 K_old C0 K^T [N, n]`, float64.
        """
        whitened = torch.linalg.solve_triangular(lower, start - coupling.T @ self.whitened, upper=False)
        marks = _marks(keys, weights)
        begin, end = self._count, self._count + len(keys)
        self._reserve(end)
        named = {"keys": keys, "projected": projected, "weights": weights[:, None]}
        for name, rows in (named | {"start": start, "whitened": whitened}).items():
            self._buffers[name][begin:end] = rows
        self._lower[:begin, begin:end] = 0
        self._lower[begin:end, :begin] = coupling.T
        self._lower[begin:end, begin:end] = lower
        self._marks[begin:] = marks
        self._count = end

    def truncate(self, count: int) -> None:
        """Removes all rows after the first `count`."""
        self._count = count

    def head(self, count: int) -> AppliedRows:
        """Returns a copy of the first `count` rows."""
        copied = object.__new__(AppliedRows)
        copied._layout, copied._count = self._layout, count
        copied._buffers = {name: buffer[:count].clone() for name, buffer in self._buffers.items()}
        copied._lower = self._lower[:count, :count].clone()
        copied._marks = self._marks[:count]
        return copied

    def moved(self, places: Sequence[int], change: Tensor) -> AppliedRows:
        """Returns a copy with `change [n, d_v]` added to `E0` of the rows at `places`."""
        copied = self.head(self._count)
        at = torch.tensor(list(places), device=change.device)
        copied.start.index_add_(0, at, change.double())
        copied.whitened.copy_(torch.linalg.solve_triangular(copied.lower, copied.start, upper=False))
        return copied

    def find(self, keys: Tensor, weights: Tensor, start: Tensor) -> tuple[list[int], int]:
        """Finds applied rows by their keys and weights.

        Args:
            keys: rows of keys `[n, key_width]`.
            weights: `w [n]`.
            start: `E0 [n, d_v]`; of several rows with equal keys and weights the one with the nearest `E0` is chosen.

        Returns:
            The index of each row that was found, and the number of rows that were not.
        """
        known: dict[bytes, list[int]] = {}
        for at, mark in enumerate(self._marks[: self._count]):
            known.setdefault(mark, []).append(at)
        places, missing = list[int](), 0
        for row, mark in enumerate(_marks(keys, weights)):
            among = known.get(mark, [])
            if not among:
                missing += 1
                continue
            best = among[-1]
            if len(among) > 1:
                distances = (self.start[among] - start[row].double()).norm(dim=1)
                best = among[int(distances.argmin())]
            among.remove(best)
            places.append(best)
        return places, missing

    def _reserve(self, needed: int) -> None:
        """Grows the buffers to `needed` rows, by a quarter at least, which keeps the cost of many small batches low."""
        if needed <= len(self._lower):
            return
        size = max(needed, len(self._lower) + len(self._lower) // 4)
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.new_empty(size, buffer.shape[1])
            self._buffers[name][: self._count] = buffer[: self._count]
        lower = self._lower.new_empty(size, size)
        lower[: self._count, : self._count] = self.lower
        self._lower = lower


def _marks(keys: Tensor, weights: Tensor) -> list[bytes]:
    """Returns a digest of each row of keys and its weight."""
    rows = torch.cat([keys, weights[:, None]], 1).contiguous().cpu().view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
