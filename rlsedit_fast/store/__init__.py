"""Crash-safe store of a sequence of changes: a journal, the tensors of each change, and snapshots.

A change consists of metadata and tensors; the store does not interpret them.
"""

from rlsedit_fast.store.directory import Store
from rlsedit_fast.store.journal import Change, Entry

__all__ = ["Change", "Entry", "Store"]
