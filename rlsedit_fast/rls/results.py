"""Result types of the solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.rls.columns import WHOLE, Columns
from rlsedit_fast.rls.monitor import Sketch
from rlsedit_fast.rls.pending import Pending

if TYPE_CHECKING:
    from rlsedit_fast.rls.terms import AnchorChange


@dataclass(frozen=True, eq=False)
class Panel:
    """A batch of keys projected with the current state (`RLSState.project`).

    Attributes:
        keys: `K [n, d_k]` in the dtype of the state.
        noise: `1/w [n]`.
        projected: `F = K C [n, d_k]`.
        version: version of the state; any change of the state makes the panel stale.
        columns: the columns that keys and projected keys have.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> state = RLSState(torch.zeros(2, 3), Prior(lam=1.0))
        >>> panel = state.project(torch.tensor([[0.0, 2.0, 0.0]]))
        >>> panel.projected.tolist(), panel.gram.tolist()
        ([[0.0, 2.0, 0.0]], [[4.0]])
    """

    keys: Tensor
    noise: Tensor
    projected: Tensor
    version: int
    columns: Columns = WHOLE

    @cached_property
    def gram(self) -> Tensor:
        """`G = F K^T [n, n]`, symmetric; computed when it is first read."""
        return self.exact_gram.to(self.keys.dtype)

    @cached_property
    @full_float32()
    def exact_gram(self) -> Tensor:
        """`gram` in the dtype in which it was summed."""
        gram = self.columns.gram(self.projected, self.keys)
        return 0.5 * (gram + gram.T)

    def cross(self, keys: Tensor) -> Tensor:
        """Returns `K' C K^T [m, n]`, float64, for other keys `K' [m, d_k]`."""
        return self.columns.total(self.columns.part(keys).double() @ self.projected.double().T, "gram")


@dataclass(frozen=True, eq=False)
class Step:
    """Result of one change of a state.

    Attributes:
        residual: `V - K W_new^T [n, d_v]`, in the dtype of the state.
        innovation: `V - K W_old^T [n, d_v]`, in the dtype of the state.
        objective: `J` after the step.
        change: `||W_new - W_old||_F`.
        whitened: `A [n, d_v]`; None for a replacement, and for a rule without an objective.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> state = RLSState(torch.zeros(1, 3), Prior(lam=1.0))
        >>> step = state.update(torch.ones(1, 3), torch.tensor([[4.0]]))
        >>> step.realized, step.residual
        (tensor([0.7500]), tensor([[1.]]))
    """

    residual: Tensor
    innovation: Tensor
    objective: float
    change: float
    whitened: Tensor | None = None

    @cached_property
    def energy(self) -> Tensor | None:
        """What each row added to `J`, or a removal subtracted, in their order: `||A_i||^2 [n]`, float64.

        For an update it is `||e||^2 / (1/w + k C k^T)` with the innovation e and C after the rows before it.
        """
        return None if self.whitened is None else self.whitened.double().square().sum(1)

    @cached_property
    def realized(self) -> Tensor:
        """The realized fraction of each change, `1 - ||residual_i|| / ||innovation_i|| [n]`; computed when it is read.

        1 if no change was requested, negative if a removal moved the output away from its value.
        """
        return realized(self.innovation, self.residual)


@dataclass(frozen=True)
class Bounds:
    """Upper bounds on the current weight that follow from the objective, up to rounding.

    Attributes:
        weight: bound on `||W - W0||_F`, `sqrt(J) / lam` (infinite if lam = 0).
        anchors: bound on `||K0 W^T - V0||_F`, `sqrt(J) / mu` (infinite if mu = 0).
        edits: bound on `sqrt(sum_i w_i ||K_i W^T - V_i||^2)` over all applied edits, `sqrt(J)`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> RLSState(torch.zeros(2, 3), Prior(lam=1.0)).bounds()
        Bounds(weight=0.0, anchors=inf, edits=0.0)
    """

    weight: float
    anchors: float
    edits: float


@dataclass(frozen=True)
class Terms:
    """The square roots of the terms of the objective at the current weight, up to rounding.

    `J = lam^2 weight^2 + mu^2 anchors^2 + edits^2`.

    Attributes:
        weight: `||W - W0||_F`.
        anchors: `||K0 W^T - V0||_F`; None without anchors. For a mixture of experts, whose moments do not contain the
            products of different experts, an upper bound.
        edits: `sqrt(sum_i w_i ||K_i W^T - V_i||^2)` over all applied edits; None for a `SeparateState`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> weight, anchors = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, 1.0]])
        >>> state = RLSState(weight, Prior(lam=1.0, mu=1.0, anchor_keys=anchors))
        >>> _ = state.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0]]))
        >>> terms = state.terms()
        >>> round(terms.weight, 9), terms.anchors, round(terms.edits, 9)
        (2.0, 0.0, 2.0)
    """

    weight: float
    anchors: float | None
    edits: float | None


@dataclass(frozen=True, eq=False)
class Saved:
    """Contents of a state without its original weight and prior; a state restored from it continues bit for bit.

    Where several processes hold a state, these are the contents of one of them, with w columns in place of `d_k` (C has
    all `d_k` columns and w rows). `joined` puts them together, for a state in any number of processes.

    Attributes:
        weight: `W [d_v, d_k]` in the dtype of the state.
        base: `C_base [d_k, d_k]`.
        pending: `U_p [r, d_k]`.
        signs: `D [r]`.
        image: `S x [d_k]`, float64.
        floor: residual of the monitor after the last build or refresh.
        objective: `J`.
        edits: number of applied rows.
        first: the first column.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> weight, prior = torch.zeros(1, 2), Prior(lam=1.0)
        >>> state = RLSState(weight, prior)
        >>> _ = state.update(torch.ones(1, 2), torch.ones(1, 1))
        >>> restored = RLSState(weight, prior, saved=state.saved())
        >>> torch.equal(restored.weight, state.weight), restored.edits
        (True, 1)
    """

    weight: Tensor
    base: Tensor
    pending: Tensor
    signs: Tensor
    image: Tensor
    floor: float
    objective: float
    edits: int
    first: int = 0

    def part(self, columns: slice) -> Saved:
        """Returns the given columns of contents with all columns, as views."""
        return replace(
            self,
            weight=self.weight[:, columns],
            base=self.base[columns],
            pending=self.pending[:, columns],
            image=self.image[columns],
            first=columns.start,
        )

    @classmethod
    def joined(cls, parts: Sequence[Saved]) -> Saved:
        """Returns the contents of a state that several processes held, with all columns.

        Args:
            parts: the contents of all processes, in any order.

        Raises:
            InputError: the parts are not those of one state at one time, or some are missing.
        """
        parts = sorted(parts, key=lambda part: part.first)
        if not parts:
            raise InputError("parts is empty; pass the contents of every process.")
        ends = [0, *accumulate(part.weight.shape[1] for part in parts)]
        one = parts[0]
        covered = [part.first for part in parts] == ends[:-1] and one.base.shape[1] == ends[-1]
        same = all(
            (part.objective, part.edits, part.floor) == (one.objective, one.edits, one.floor)
            and torch.equal(part.signs, one.signs)
            for part in parts
        )
        if not (covered and same):
            raise InputError(
                f"the parts begin at columns {[part.first for part in parts]}, end at {ends[-1]} of "
                f"{one.base.shape[1]}, and have {[part.edits for part in parts]} edits; expected all parts of one "
                "state, saved at the same time."
            )
        return replace(
            one,
            weight=torch.cat([part.weight for part in parts], 1),
            base=torch.cat([part.base for part in parts]),
            pending=torch.cat([part.pending for part in parts], 1),
            image=torch.cat([part.image for part in parts]),
        )


@dataclass(eq=False)
class Snapshot:
    """A point to which `RLSState.restore` can return. While a snapshot exists, the state does not flush rows into C.

    Only the weight is copied, before it is first written.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> state = RLSState(torch.zeros(1, 2), Prior(lam=1.0))
        >>> snapshot = state.snapshot()
        >>> _ = state.update(torch.ones(1, 2), torch.ones(1, 1))
        >>> state.restore(snapshot)
        >>> state.weight.tolist(), state.edits
        ([[0.0, 0.0]], 0)
    """

    base: Tensor
    pending: Pending
    count: int
    weight: tuple[Tensor, ...] | None
    sketch: Sketch
    anchor_change: AnchorChange
    objective: float
    edits: int
    version: int
    order: int


def realized(before: Tensor, after: Tensor) -> Tensor:
    """Returns the realized fraction `1 - ||after_i|| / ||before_i||` of each row.

    Args:
        before: innovations `[n, d_v]`.
        after: residuals `[n, d_v]`.

    Returns:
        `[n]`, 1 where the innovation is zero.
    """
    start = torch.linalg.vector_norm(before, dim=1)
    left = torch.linalg.vector_norm(after, dim=1)
    return torch.where(start > 0, 1 - left / start.clamp_min(torch.finfo(start.dtype).tiny), 1.0)
