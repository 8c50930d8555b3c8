"""A transaction: one change of the layers, the store and the ledger that is applied completely or not at all."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from rlsedit_fast.editing.layers import EditedLayers, LayersSnapshot
from rlsedit_fast.errors import ResourceError
from rlsedit_fast.interrupts import interrupts_deferred
from rlsedit_fast.store import Change

if TYPE_CHECKING:
    from rlsedit_fast.editing.storage.persistence import Recorder


class Transaction:
    """A change of the layers that is committed, or rolled back when the block ends without a commit.

    `with Transaction(layers, recorder, ...) as transaction:` changes the layers in the block and calls `commit` last.

    Args:
        layers: the edited layers.
        recorder: writes into the store; None without a store.
        action: what is done, for the error message: "writing 100 edits".
        hint: what to do if memory runs out.

    Raises:
        ModelError: a weight was modified by other code.
        ResourceError: out of memory; nothing was modified.
    """

    def __init__(
        self, layers: EditedLayers, recorder: Recorder | None = None, action: str = "editing", hint: str | None = None
    ) -> None:
        self._layers, self._recorder = layers, recorder
        self._action, self._hint = action, hint
        self._snapshot: LayersSnapshot | None = None

    def __enter__(self) -> Transaction:
        try:
            self._snapshot = self._layers.snapshot()
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(error) from error
        return self

    def commit(
        self, change: Callable[[Recorder], Change] | None = None, then: Callable[[], object] | None = None
    ) -> None:
        """Makes the change permanent.

        Ctrl-C is deferred from the commit to the store until the change is applied in memory.

        Args:
            change: returns the change for the store; not called without a store, or if a weight contains NaN/Inf.
            then: called after the commit; enters the change in memory and must not fail.

        Raises:
            UpdateError: a written weight contains NaN/Inf.
            StoreError: the store cannot be written.
        """
        self._layers.check_finite()  # all processes have come so far, or none commits
        if self._recorder and change is not None:
            self._recorder.prepare(change(self._recorder))
        with interrupts_deferred():
            if self._recorder and change is not None:
                self._recorder.commit()
            self._snapshot = None
            self._layers.settle()
            if then is not None:
                then()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._snapshot is not None:
            with interrupts_deferred():
                try:
                    self._layers.restore(self._snapshot)
                finally:
                    self._snapshot = None
                    if self._recorder:
                        self._recorder.abort()
        if isinstance(error, torch.OutOfMemoryError):
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> ResourceError:
        return ResourceError(f"out of memory while {self._action}; nothing was modified. ({error})", self._hint)
