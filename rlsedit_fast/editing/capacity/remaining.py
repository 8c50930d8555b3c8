"""Continues the recursion of edited layers from the keys of the active edits, to estimate how many more edits fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlsedit_fast.activity import report_activity
from rlsedit_fast.baselines import LayerState
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.ledger import Ledger
from rlsedit_fast.editing.rows import row_weights
from rlsedit_fast.editing.status import IDENTIFIED, Continued
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.rls import RLSState
from rlsedit_fast.rls.continuation import edits_until

_LEAST = 20  # edits; with fewer, a line is continued


def continued_by_keys(edited: Sequence[tuple[Projection, LayerState]], ledger: Ledger, config: EditConfig) -> Continued:
    """Returns a function that continues the recursion of a layer with keys like those of the last active edits."""

    def continued(layer: int, growth: float) -> tuple[int, int] | None:
        _, state = edited[layer]
        if not isinstance(state, RLSState) or config.stored_rows is None:
            return None
        rows = ledger.rows(ledger.active[-IDENTIFIED:])
        rows = [one for one in rows if len(one) == len(rows[-1])]
        if len(rows) < _LEAST:
            return None
        keys = torch.stack([one.keys[layer] for one in rows])
        weights = torch.tensor(row_weights(keys.shape[1], config.contexts.bare_weight))
        report_activity("forecasting edits left")
        return edits_until(state, keys, weights, growth=growth), len(rows)

    return continued
