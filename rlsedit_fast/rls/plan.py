"""What a state that several processes share needs and sends, computed from shapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rlsedit_fast.rls.prior import CHUNK
from rlsedit_fast.rls.sharded import STATUS

_DOUBLE = 8
_AGREEMENTS = 2
_NUMBERS = 6


@dataclass(frozen=True)
class ShardMemory:
    """Bytes of one layer in the process that holds most columns, in addition to the model.

    Attributes:
        covariance: the rows of C.
        pending: the buffer of pending rows, which doubles once if a batch finds it full.
        original: the copy of the original weight.
        master: the part of the exact weight that the model does not hold.
        writing: copy of the exact weight while a batch is written.
        building: float64 precision and the whole C, while the first process builds the state.
        anchors: the anchor moment in host memory.

    Example:
        >>> from rlsedit_fast.rls.plan import shard_memory
        >>> memory = shard_memory(8192, 28672, 8, delay=512)
        >>> round(5 * memory.covariance / 1e9, 2)
        2.06
    """

    covariance: int
    pending: int
    original: int
    master: int
    writing: int
    building: int
    anchors: int

    @property
    def state(self) -> int:
        """Bytes on the device during the lifetime of the state."""
        return self.covariance + self.pending + self.original + self.master


def held_width(d_k: int, ranks: int) -> int:
    """Returns the columns of the process that holds most, if they are divided as evenly as possible."""
    return -(-d_k // ranks)


def shard_memory(
    d_v: int, d_k: int, ranks: int, *, delay: int, item: int = 4, weight: int = 2, beside: int = 2
) -> ShardMemory:
    """Returns the memory of a layer whose columns several processes share.

    Args:
        d_v: width of values.
        d_k: width of keys.
        ranks: number of processes.
        delay: see `RLSState`.
        item: bytes per number of the state.
        weight: bytes per number of the weight.
        beside: bytes per number of the exact weight that the model does not hold: 2 for bfloat16, 0 for float32.

    Example:
        >>> from rlsedit_fast.rls.plan import shard_memory
        >>> shard_memory(1, 4, 2, delay=0).covariance
        32
    """
    held = held_width(d_k, ranks)
    return ShardMemory(
        covariance=item * held * d_k,
        pending=item * 2 * delay * (held + 1),
        original=weight * d_v * held,
        master=beside * d_v * held,
        writing=item * d_v * held,
        building=_DOUBLE * (d_k + 2 * max(CHUNK, d_k // 16)) * d_k + item * d_k * d_k * (ranks > 1),
        anchors=4 * d_k * d_k,
    )


def batch_traffic(
    rows: int, d_v: int, d_k: int, ranks: int, *, pending: int, item: int = 4, weighted: bool = True
) -> dict[str, int]:
    """Returns the bytes that a process sends for `RLSState.update`, by kind as in `ShardedColumns.sent`.

    A sum counts as its size twice (it is reduced and broadcast), a gathering as the own part for each other process.

    Args:
        rows: rows of the batch.
        d_v: width of values.
        d_k: width of keys.
        ranks: number of processes.
        pending: pending rows before the batch.
        item: bytes per number of the state.
        weighted: whether weights are passed.

    Example:
        >>> from rlsedit_fast.rls.plan import batch_traffic
        >>> sum(batch_traffic(100, 16384, 53248, 8, pending=0).values()) < 40e6
        True
    """
    if ranks == 1:
        return {}
    given = 3 if weighted else 2
    sent = {
        "keys": (ranks - 1) * rows * held_width(d_k, ranks) * item,
        "gram": 2 * rows * rows * _DOUBLE,
        "values": 2 * rows * d_v * item + weighted * rows * item,
        "sketch": 2 * rows * _DOUBLE,
        "decisions": (ranks - 1) * _DOUBLE * (_AGREEMENTS * STATUS + _NUMBERS + 2 * given),
    }
    if pending:
        sent["pending"] = 2 * rows * pending * item
    return sent


def edit_traffic(
    edits: int,
    rows: int,
    d_v: int,
    d_k: int,
    ranks: int,
    *,
    pending: int,
    first: bool,
    item: int = 4,
    read: int = 4,
) -> dict[str, int]:
    """Returns the bytes that a process sends when an editor writes a batch into one layer, by kind.

    In addition to `batch_traffic` the keys are read, and in the first layer the used shares of the edits are measured.
    The forward pass of the model, value search, refinement, and edits that overlap with others are not included.

    Args:
        edits: edits of the batch.
        rows: rows of the batch.
        d_v: width of values.
        d_k: width of keys.
        ranks: number of processes.
        pending: pending rows before the batch.
        first: whether this is the first edited layer.
        item: bytes per number of the state.
        read: bytes per number of the model.

    Example:
        >>> from rlsedit_fast.rls.plan import edit_traffic
        >>> edit_traffic(100, 300, 8192, 28672, 8, pending=0, first=False)["read"]
        30105600
    """
    if ranks == 1:
        return {}
    sent = Counter(batch_traffic(rows, d_v, d_k, ranks, pending=pending, item=item))
    width = (ranks - 1) * held_width(d_k, ranks)
    sent["read"] = rows * width * read
    sent["values"] += rows * d_v * item  # the change
    sent["decisions"] += (ranks - 1) * _DOUBLE * (STATUS + 1)  # agreement on the change, norm of the weight
    if first:
        sent["read"] += edits * width * read
        sent["keys"] += 2 * edits * width * item  # with C, and with C of the start
        sent["gram"] += 2 * edits * edits * _DOUBLE
        sent["values"] += edits * item
        sent["terms"] += 2 * edits * _DOUBLE
        sent["decisions"] += (ranks - 1) * _DOUBLE * (2 * STATUS + 4)
        if pending:
            sent["pending"] += 2 * edits * pending * item
    return dict(sent)


def flush_traffic(pending: int, d_k: int, ranks: int, *, item: int = 4) -> int:
    """Returns the bytes that a process sends when pending rows are folded into C.

    Example:
        >>> from rlsedit_fast.rls.plan import flush_traffic
        >>> flush_traffic(512, 28672, 8)
        51380224
    """
    return (ranks - 1) * pending * held_width(d_k, ranks) * item
