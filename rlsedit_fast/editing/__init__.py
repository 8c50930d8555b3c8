"""The editor: settings, value search, priors, layers, sessions and their persistence."""

from rlsedit_fast.editing.capacity.overlap import Overlap
from rlsedit_fast.editing.config import ContextConfig, EditConfig, LossConfig, PriorConfig, ValueSearchConfig
from rlsedit_fast.editing.editor import Editor
from rlsedit_fast.editing.records import EditRecord
from rlsedit_fast.editing.status import LayerDeviation, Status

__all__ = [
    "ContextConfig",
    "EditConfig",
    "EditRecord",
    "Editor",
    "LayerDeviation",
    "LossConfig",
    "Overlap",
    "PriorConfig",
    "Status",
    "ValueSearchConfig",
]
