"""What the solver hands out: the panel of a batch, the step it led to, the bounds, a snapshot to come back to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast.rls.monitor import Sketch
from rlsedit_fast.rls.pending import Pending


@dataclass(frozen=True, eq=False)
class Panel:
    """A batch seen through the state: what an innovation is turned into a step with.

    Attributes:
        keys: `K [n, d_k]` in the state's dtype.
        noise: `1/w [n]`.
        projected: `F = K C [n, d_k]`.
        gram: `G = F K^T [n, n]`, symmetric.
        version: of the state it was taken at; any change of the state makes the panel stale.
    """

    keys: Tensor
    noise: Tensor
    projected: Tensor
    gram: Tensor
    version: int


@dataclass(frozen=True, eq=False)
class Step:
    """What one change of the state did (or, from `preview`, would do) to the rows it was about.

    Attributes:
        residual: `V - K W_new^T [n, d_v]`, what is still missing of each row's value after the step.
        realized: `1 - ||left_over_i|| / ||V_i - K_i W_old^T|| [n]`, the part of the way that was gone; 1 where there
            was none to go, negative where a removal moved away.
        objective: `J` after the step.
        change: `||W_new - W_old||_F`.
    """

    residual: Tensor
    realized: Tensor
    objective: float
    change: float


@dataclass(frozen=True)
class Bounds:
    """What the objective alone promises of the present weight, in Frobenius norms, up to the rounding of its dtype.

    Attributes:
        weight: `||W - W0||_F` is at most `sqrt(J) / lam` (infinite if lam = 0).
        anchors: `||K0 W^T - V0||_F` is at most `sqrt(J) / mu` (infinite if mu = 0).
        edits: `sqrt(sum_i w_i ||K_i W^T - V_i||^2)` over all edits held is at most `sqrt(J)`.
    """

    weight: float
    anchors: float
    edits: float


@dataclass(frozen=True, eq=False)
class Saved:
    """All that a state is beside its original weight and its prior: a state made with it goes on bit for bit.

    Attributes:
        weight: `W [d_v, d_k]` in the state's dtype.
        base: `C_base [d_k, d_k]`.
        pending: `U_p [r, d_k]`.
        signs: `D [r]`.
        image: `S x [d_k]`, float64.
        floor: the monitor's residual when C was last made afresh.
        objective: `J`.
        edits: how many rows the state holds.
    """

    weight: Tensor
    base: Tensor
    pending: Tensor
    signs: Tensor
    image: Tensor
    floor: float
    objective: float
    edits: int


@dataclass(eq=False)
class Snapshot:
    """A point to restore a state to. While it is alive the state flushes nothing into C.

    Only the weight is copied, once it is about to be written.
    """

    base: Tensor
    pending: Pending
    count: int
    weight: tuple[Tensor, ...] | None
    sketch: Sketch
    objective: float
    edits: int
    version: int
    order: int


def realized(before: Tensor, after: Tensor) -> Tensor:
    """`1 - ||after_i|| / ||before_i||` of innovations and what is left over of them, `[n, d_v]` each; 1 where there was
    nothing to realise.
    """
    start = torch.linalg.vector_norm(before, dim=1)
    left = torch.linalg.vector_norm(after, dim=1)
    return torch.where(start > 0, 1 - left / start.clamp_min(torch.finfo(start.dtype).tiny), 1.0)
