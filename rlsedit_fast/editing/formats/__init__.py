"""Reads edits from files and lists in the formats of published data sets."""

from rlsedit_fast.editing.formats.layouts import FORMATS, Format, ZsreTarget
from rlsedit_fast.editing.formats.lists import edits_from_lists
from rlsedit_fast.editing.formats.read import EditFile, Skipped, read_edits

__all__ = ["FORMATS", "EditFile", "Format", "Skipped", "ZsreTarget", "edits_from_lists", "read_edits"]
