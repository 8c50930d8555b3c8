"""Sequential knowledge editing of language models by recursive least squares (RLSEdit).

`Editor` edits a transformers model in place. `RLSState` is the solver alone and works on plain tensors.
"""

from rlsedit_fast.editing import (
    Edit,
    EditConfig,
    Editor,
    EditRecord,
    KeyStatistics,
    edits_from_lists,
    preset,
    read_edits,
)
from rlsedit_fast.errors import RLSEditError
from rlsedit_fast.rls import Prior, RLSState

__all__ = [
    "Edit",
    "EditConfig",
    "EditRecord",
    "Editor",
    "KeyStatistics",
    "Prior",
    "RLSEditError",
    "RLSState",
    "edits_from_lists",
    "preset",
    "read_edits",
]
