"""The durable record of a stream of changes: a journal, the tensors of each change, snapshots.

It knows changes (a description and tensors), nothing of edits: what they mean is for whoever writes and replays them.
"""

from rlsedit_fast.store.directory import Store
from rlsedit_fast.store.journal import Change, Entry

__all__ = ["Change", "Entry", "Store"]
