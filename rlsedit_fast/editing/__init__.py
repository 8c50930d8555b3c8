"""Edits, their keys and values, and the editor that writes them into a model."""

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.editor import Editor
from rlsedit_fast.editing.edits import Edit, EditRecord

__all__ = ["Edit", "EditConfig", "EditRecord", "Editor"]
