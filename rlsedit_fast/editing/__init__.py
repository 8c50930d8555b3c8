"""Edits, their keys and values, and the editor that writes them into a model."""

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.conflicts import resolve
from rlsedit_fast.editing.editor import Editor
from rlsedit_fast.editing.edits import Edit, EditRecord
from rlsedit_fast.editing.formats import edits_from_lists, read_edits
from rlsedit_fast.editing.presets import preset
from rlsedit_fast.editing.sources import SelfGenerated, TextFile
from rlsedit_fast.editing.statistics import KeyStatistics

__all__ = [
    "Edit",
    "EditConfig",
    "EditRecord",
    "Editor",
    "KeyStatistics",
    "SelfGenerated",
    "TextFile",
    "edits_from_lists",
    "preset",
    "read_edits",
    "resolve",
]
