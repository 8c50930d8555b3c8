"""The prior of a layer of experts: one precision per expert, such that the bounds hold for the layer as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, PriorError
from rlsedit_fast.rls.blocks import BlockLayout, BlockMoment
from rlsedit_fast.rls.build import invert_
from rlsedit_fast.rls.prior import symmetric


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockPrior:
    """The prior term `sum_e tr(D_e S0_e D_e^T)` for the change `D_e` of each block of a layer of experts.

    `S0_e = lam_e^2 I + kappa mu^2 E[k_e k_e^T]`, with the number `kappa` of nonzero blocks of a key. For rows `K0` with
    at most `kappa` nonzero blocks, `K0^T K0 <= kappa blockdiag(K0_e^T K0_e)`, so the term is at least
    `lam^2 ||D||^2 + mu^2 ||K0 D^T||^2`, and the bounds that follow from the objective hold for the whole layer.

    An expert that fewer anchors reached than it has features gets a larger `lam_e`: each missing anchor counts as one
    whose energy is the mean energy of a key of a routed expert, equal in all directions.

    Args:
        layout: layout of the keys.
        lam: weight of the penalty on the change of the weights; above 0, since few anchors reach some experts.
        mu: weight of the penalty on the anchors; positive if and only if there are anchors.
        moment: moments of the anchors, as means.
        overlap: `kappa`; by default that of the layout. A smaller number invalidates the bounds.

    Raises:
        PriorError: lam is 0, or the combination of mu and moment is invalid.
        InputError: a number is not finite, or the moment does not have the layout.

    Example:
        >>> from rlsedit_fast.rls import BlockLayout, BlockPrior
        >>> prior = BlockPrior(layout=BlockLayout(experts=2, width=3, active=1), lam=0.5)
        >>> prior.precision(0)[0].tolist()
        [0.25, 0.0, 0.0]
    """

    layout: BlockLayout
    lam: float
    mu: float = 0.0
    moment: BlockMoment | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        """Raises an error for invalid arguments, see the class."""
        for name, value in (("lam", self.lam), ("mu", self.mu)):
            if not (math.isfinite(value) and value >= 0 and math.isfinite(value * value)):
                raise InputError(f"{name} is {value!r}; expected a finite number that is at least 0.")
        if self.lam * self.lam == 0:
            raise PriorError("lam is 0; a layer of experts requires lam above 0, since few anchors reach some experts.")
        if (self.mu > 0) != (self.moment is not None):
            raise PriorError(
                f"mu is {self.mu} and there are {'no ' * (self.moment is None)}anchors; pass both or none."
            )
        if self.moment is not None:
            layout, shared = self.layout, self.moment.shared
            found = (*self.moment.routed.shape[:2], 0 if shared is None else len(shared))
            if found != (layout.experts, layout.width, layout.shared):
                raise InputError(f"the moment has sizes {found}, which do not match {layout}")
            if not self.moment.finite():
                raise InputError("the anchor moment contains NaN or Inf")

    @property
    def kappa(self) -> int:
        """The number of nonzero blocks of a key that the prior assumes."""
        return self.layout.overlap if self.overlap is None else self.overlap

    @property
    def custom(self) -> bool:
        """False: the anchors have the outputs of the original weight."""
        return False

    def ridges(self) -> Tensor:
        """Returns `lam_e^2` of each block, `[blocks]`, float64."""
        ridges = torch.full((self.layout.blocks,), self.lam**2, dtype=torch.float64)
        if (moment := self.moment) is not None and moment.tokens:
            missing = (self.layout.width - moment.reached.cpu()).clamp_min(0).double()
            energy = float(moment.routed.diagonal(dim1=1, dim2=2).double().sum())
            # Mean energy per feature of one key, over the keys of all routed experts.
            each = energy / max(1, int(moment.reached.sum())) / self.layout.width
            ridges[: self.layout.experts] += self.kappa * self.mu**2 * missing * each
        return ridges

    def raised(self) -> list[int]:
        """Returns the experts with a larger `lam_e`, which fewer anchors reached than they have features."""
        if self.moment is None:
            return []
        few = self.moment.reached.cpu() < self.layout.width
        found: list[int] = few.nonzero()[:, 0].tolist()
        return found

    def precision(self, block: int, device: torch.device | None = None) -> Tensor:
        """Returns `S0_e` of a block in float64."""
        device = device or torch.device("cpu")
        width = self.layout.block_width(block)
        if self.moment is None:
            total = torch.zeros(width, width, dtype=torch.float64, device=device)
        else:
            total = symmetric(self.moment.block(block), device).mul_(self.kappa * self.mu**2)
        total.diagonal().add_(float(self.ridges()[block]))
        return total

    def covariance(self, block: int, device: torch.device, dtype: torch.dtype, name: str) -> Tensor:
        """Returns `C0_e = S0_e^-1` of a block in `dtype`, computed in float64.

        Raises:
            PriorError: the inverse overflows `dtype`, or the precision is not positive definite.
        """
        if self.moment is None:
            eye = torch.eye(self.layout.block_width(block), dtype=dtype, device=device)
            inverse = eye.mul_(1 / float(self.ridges()[block]))
        else:
            inverse = invert_(
                self.precision(block, device), self.lam, self.mu, dtype=dtype, name=f"block {block} of {name}"
            )
        if not bool(inverse.isfinite().all()):
            raise PriorError(
                f"the precision of block {block} of {name} (lam={self.lam:g}, mu={self.mu:g}) has an inverse that "
                f"overflows {dtype}. Increase lam or mu, or use float64."
            )
        return inverse
