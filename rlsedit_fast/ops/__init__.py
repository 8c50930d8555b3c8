"""The operations that the solver is made of, and the choice of who computes them.

Every operation takes `backend=`: the name of one backend, which then runs or raises `BackendError`, or `auto`,
which picks the best one that can run, or several with commas between, of which the first that can runs. None means the
environment's `RLSEDIT_BACKEND`, and `auto` without it.
"""

from rlsedit_fast.ops.dispatch import available_backends
from rlsedit_fast.ops.schemas import correct_, correct_split_, downdate_, factor, moment_, panel
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
