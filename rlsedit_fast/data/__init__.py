"""Edits, and the file formats of published data sets that they are read from."""

from rlsedit_fast.data.conflicts import Conflicts, Resolved, resolve
from rlsedit_fast.data.edits import Edit
from rlsedit_fast.data.layouts import FORMATS, Format, ZsreTarget
from rlsedit_fast.data.lists import edits_from_lists
from rlsedit_fast.data.read import EditFile, Skipped, load_edits, read_edits

__all__ = [
    "FORMATS",
    "Conflicts",
    "Edit",
    "EditFile",
    "Format",
    "Resolved",
    "Skipped",
    "ZsreTarget",
    "edits_from_lists",
    "load_edits",
    "read_edits",
    "resolve",
]
