"""Checks of the edited weights: whether other code modified them, and whether they are finite."""

from __future__ import annotations

from collections.abc import Sequence

from rlsedit_fast.errors import UpdateError
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.processes import ALONE, Processes
from rlsedit_fast.rls.checks import all_finite


def check_finite_weights(projections: Sequence[Projection], processes: Processes = ALONE) -> None:
    """Raises UpdateError in all processes if a weight contains NaN/Inf in the dtype of the model."""
    processes.agree(lambda: _check_finite(projections))


def _check_finite(projections: Sequence[Projection]) -> None:
    for projection in projections:
        if not all_finite(*projection.tensors):
            raise UpdateError(
                f"{projection.name}: a weight exceeds the range of {projection.dtype}; nothing was modified",
                hint="load the model in bfloat16 or float32",
            )


def mark(projection: Projection) -> tuple[object, ...]:
    """Returns a value that changes if the weight is moved, cast or modified.

    Changes through `.data`, such as merging a LoRA adapter, do not count a version. A sample of the entries reveals
    them, unless they change few entries.
    """
    marks: list[object] = []
    for weight in projection.tensors:
        places = tuple(slice(None, None, max(1, size // 16)) for size in weight.shape)
        sample = tuple(weight[places].flatten().tolist())
        marks += [weight.data_ptr(), weight.device, weight.dtype, weight._version, sample]
    return tuple(marks)
