"""The solver's operations and their backends.

Every operation takes `backend=`: a backend name (which runs or raises `BackendError`), `auto` (the backend that was
measured to be the fastest on this machine, see `selection`), or several names separated by commas (the first that can
run it). None reads the environment variable `RLSEDIT_BACKEND`, which defaults to `auto`.
"""

from rlsedit_fast.ops.dispatch import available_backends
from rlsedit_fast.ops.operations import correct_, correct_split_, downdate_, factor, moment_, panel
from rlsedit_fast.ops.split import join, split

__all__ = [
    "available_backends",
    "correct_",
    "correct_split_",
    "downdate_",
    "factor",
    "join",
    "moment_",
    "panel",
    "split",
]
