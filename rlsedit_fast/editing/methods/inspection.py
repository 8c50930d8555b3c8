"""The methods of the editor that report on its edits and on planned ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.editing.capacity.overlap import Overlap
from rlsedit_fast.editing.methods.exports import Exports
from rlsedit_fast.editing.records import EditRecord, History
from rlsedit_fast.editing.routing import TOKENS, routing_change
from rlsedit_fast.editing.status import LayerDeviation, layer_deviations
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.passes import quiet


class Inspection(Exports):
    """Reports of an editor; see `Editor`."""

    def overlaps(self, edits: Iterable[Edit | Mapping[str, Any]]) -> list[Overlap]:
        """Returns how much of the key of each edit the active edits already use; nothing is searched or modified.

        Args:
            edits: planned edits, in the order in which they would be made.

        Raises:
            RequestError: an edit is invalid.
            InputError: the rule, or `experts="separate"`, does not know used shares.
        """
        self._check_attached()
        with self.context.processes.operation(), quiet(self.model):
            found = self._session.overlaps(self.context.prepare(edits))
        if found is None:
            config = self._session.config
            raise InputError(
                f"overlaps(): rule={config.rule!r} with experts={config.experts!r} does not know used shares; use "
                "rule='rls' and experts='exact'"
            )
        return found

    def history(self) -> list[EditRecord]:
        """Returns the records of all edits, oldest first, in a list that prints as a table."""
        return History(self._session.ledger.records)

    def deviation(self) -> list[LayerDeviation]:
        """Returns the deviation of each edited layer and its bounds; empty before the first edit."""
        self._check_attached()
        return layer_deviations(self._session.edited, self._session.layers)

    def routing_change(self, texts: Iterable[str], *, tokens: int = TOKENS) -> dict[int, float]:
        """Returns per mixture of experts the fraction of tokens that reach other experts; see `routing`."""
        self._check_attached()
        return routing_change(self.context, self._session.layers, texts, tokens)
