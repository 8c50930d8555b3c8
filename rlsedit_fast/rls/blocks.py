"""Block-sparse keys of a layer of experts, and second moments of its blocks.

With the routing fixed, a layer of experts computes `sum_e g_e W_e a_e + W_s a_s`, which is linear in the stacked weight
`[W_1 ... W_E, W_s]`. The key of a token is `[g_e a_e]`, zero in the blocks of experts that the token does not reach.
Keys are stored without these zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsedit_fast import ops
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import checks

_MOST_EXPERTS = 2048  # float16 holds integers up to this number exactly


@dataclass(frozen=True, eq=False)
class Group:
    """The rows of a batch of keys that have a nonzero block in common.

    Attributes:
        block: index of the block; the shared expert has the last one.
        rows: indices of the rows, `[m]`, ascending.
        slots: position of the block among the stored blocks of each row, `[m]`; None for the shared expert.
    """

    block: int
    rows: Tensor
    slots: Tensor | None


@dataclass(frozen=True)
class BlockLayout:
    """Shape of the keys of a layer of experts.

    A row of keys is one floating-point row `[active * width + shared + active]`: the nonzero blocks of the routed
    experts, the block of the shared expert, and the indices of the routed experts.

    Attributes:
        experts: number of routed experts.
        width: key features of a routed expert.
        active: number of routed experts that a token reaches.
        shared: key features of the shared expert; 0 without one.

    Raises:
        InputError: a number is out of range.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import BlockLayout
        >>> layout = BlockLayout(experts=4, width=2, active=1, shared=1)
        >>> layout.pack(torch.tensor([[[5.0, 6.0]]]), torch.tensor([[3]]), torch.tensor([[7.0]]))
        tensor([[5., 6., 7., 3.]])
        >>> layout.key_width, layout.blocks, layout.overlap
        (4, 5, 2)
    """

    experts: int
    width: int
    active: int
    shared: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for numbers out of range."""
        if min(self.experts, self.width, self.active) < 1 or self.shared < 0 or self.active > self.experts:
            raise InputError(f"{self}: expected positive sizes and at most as many active experts as there are experts")
        if self.experts > _MOST_EXPERTS:
            raise InputError(f"{self}: at most {_MOST_EXPERTS} experts are supported")

    @property
    def key_width(self) -> int:
        """Width of a row of keys, including the indices of its experts."""
        return self.active * self.width + self.shared + self.active

    @property
    def routed(self) -> int:
        """Number of key features of the routed experts in a row."""
        return self.active * self.width

    @property
    def blocks(self) -> int:
        """Number of blocks of the stacked weight."""
        return self.experts + bool(self.shared)

    @property
    def overlap(self) -> int:
        """Number of nonzero blocks of a row, `kappa`."""
        return self.active + bool(self.shared)

    def block_width(self, block: int) -> int:
        """Returns the number of key features of a block."""
        return self.width if block < self.experts else self.shared

    def pack(self, activations: Tensor, experts: Tensor, shared: Tensor | None = None) -> Tensor:
        """Returns rows of keys.

        Args:
            activations: `[n, active, width]`, already multiplied by the weights of the router.
            experts: indices of the experts, `[n, active]`.
            shared: `[n, shared]`; required if and only if there is a shared expert.
        """
        parts = [activations.flatten(1), *([] if shared is None else [shared]), experts.to(activations.dtype)]
        return torch.cat(parts, 1)

    def features(self, keys: Tensor) -> Tensor:
        """Returns the features of rows of keys, `[n, active * width + shared]`, a view."""
        return keys[:, : -self.active]

    def routing(self, keys: Tensor) -> Tensor:
        """Returns the indices of the experts of rows of keys, `[n, active]`, int64."""
        return keys[:, -self.active :].long()

    def check(self, keys: Tensor) -> None:
        """Raises InputError unless rows of keys have this layout."""
        checks.matrix("keys", keys, columns=self.key_width)
        found = keys[:, -self.active :]
        if bool(((found < 0) | (found >= self.experts) | (found != found.floor())).any()):
            raise InputError(
                f"keys: the last {self.active} columns contain other numbers than indices of {self.experts} experts; "
                "pass rows of BlockLayout.pack"
            )

    def groups(self, keys: Tensor) -> list[Group]:
        """Returns the rows of each block that occurs, by ascending block."""
        flat = self.routing(keys).flatten()
        order, counts = flat.argsort(stable=True), torch.bincount(flat, minlength=self.experts).tolist()
        found, at = list[Group](), 0
        for block, count in enumerate(counts):
            if count:
                chosen = order[at : at + count]
                found.append(Group(block, chosen // self.active, chosen % self.active))
            at += count
        if self.shared and len(keys):
            found.append(Group(self.experts, torch.arange(len(keys), device=keys.device), None))
        return found

    def part(self, features: Tensor, group: Group) -> Tensor:
        """Returns the features of a group `[m, block width]`, from those of all rows."""
        if group.slots is None:
            return features[:, self.routed :]
        return features[:, : self.routed].unflatten(1, (self.active, self.width))[group.rows, group.slots]

    def put(self, features: Tensor, group: Group, part: Tensor) -> None:
        """Writes the features of a group into those of all rows."""
        if group.slots is None:
            features[:, self.routed :] = part
        else:
            features[:, : self.routed].unflatten(1, (self.active, self.width))[group.rows, group.slots] = part

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Returns `||one_i - other_i||` of rows of keys `[n]`; rows may have different experts."""
        same = self.routing(one)[:, :, None] == self.routing(other)[:, None, :]
        a, b = (self.features(keys).double() for keys in (one, other))
        routed = [x[:, : self.routed].unflatten(1, (self.active, self.width)) for x in (a, b)]
        product = ((routed[0] @ routed[1].mT) * same).sum((1, 2)) + (a[:, self.routed :] * b[:, self.routed :]).sum(1)
        return (a.square().sum(1) + b.square().sum(1) - 2 * product).clamp_min(0).sqrt()

    def norm(self, keys: Tensor) -> Tensor:
        """Returns `||k_i||` of rows of keys `[n]`, float64."""
        return self.features(keys).double().norm(dim=1)

    def stacked(self, keys: Tensor) -> Tensor:
        """Returns rows of keys with all zeros, `[n, experts * width + shared]`; for small layers and tests."""
        features = self.features(keys)
        whole = features.new_zeros(len(keys), self.experts * self.width + self.shared)
        for group in self.groups(keys):
            start = group.block * self.width
            whole[group.rows, start : start + self.block_width(group.block)] = self.part(features, group)
        return whole


@dataclass(frozen=True, eq=False)
class BlockMoment:
    """Second moments `E[k k^T]` of the keys of a layer of experts, without the products of different blocks.

    The mean is over all tokens. A token that does not reach an expert counts as a key of zeros there.

    Attributes:
        routed: `[experts, width, width]`, float32 or float64, symmetric.
        shared: `[shared, shared]`; None without a shared expert.
        reached: number of tokens that reached each expert, `[experts]`, int64.
        tokens: number of tokens.
        energy: `||K0 W0^T||^2`, the energy of the outputs; 0 if it is unknown.

    Raises:
        InputError: shapes or dtypes do not match, or an entry is not finite.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import BlockLayout, BlockMoment
        >>> layout = BlockLayout(experts=2, width=1, active=1)
        >>> keys = layout.pack(torch.tensor([[[2.0]], [[4.0]]]), torch.tensor([[0], [1]]))
        >>> moment = BlockMoment.empty(layout, torch.device("cpu")).added(layout, keys)
        >>> moment.mean().routed.flatten().tolist(), moment.reached.tolist()
        ([2.0, 8.0], [1, 1])
    """

    routed: Tensor
    shared: Tensor | None
    reached: Tensor
    tokens: int
    energy: float = 0.0

    def __post_init__(self) -> None:
        """Raises InputError if shapes or dtypes do not match."""
        experts, width = len(self.routed), self.routed.shape[-1]
        shapes: Sequence[int] = self.routed.shape
        if self.routed.ndim != 3 or tuple(shapes) != (experts, width, width) or self.reached.shape != (experts,):
            raise InputError(
                f"the moment has shape {list(shapes)} and counts {list(self.reached.shape)}; expected "
                "[experts, width, width] and [experts]"
            )
        for tensor in (self.routed, *([] if self.shared is None else [self.shared])):
            if tensor.dtype not in (torch.float32, torch.float64):
                raise InputError(f"the moment has dtype {tensor.dtype}; expected float32 or float64")
        if self.shared is not None:
            checks.matrix("moment of the shared expert", self.shared, columns=len(self.shared))

    @classmethod
    def empty(cls, layout: BlockLayout, device: torch.device) -> BlockMoment:
        """Returns sums over no tokens, float32."""
        routed = torch.zeros(layout.experts, layout.width, layout.width, device=device)
        shared = torch.zeros(layout.shared, layout.shared, device=device) if layout.shared else None
        return cls(routed, shared, torch.zeros(layout.experts, dtype=torch.long), 0)

    def added(self, layout: BlockLayout, keys: Tensor, weights: Sequence[Tensor] | None = None) -> BlockMoment:
        """Adds the products of keys to sums, in place, and returns the sums with their new counts.

        Args:
            layout: layout of the keys.
            keys: rows of keys.
            weights: the blocks of `W0`, for the energy; None leaves it as it is.
        """
        features = layout.features(keys)
        reached = torch.bincount(layout.routing(keys).flatten().cpu(), minlength=layout.experts)
        outputs = None if weights is None else keys.new_zeros(len(keys), weights[0].shape[0])
        for group in layout.groups(keys):
            part = layout.part(features, group).contiguous()
            ops.moment_(self.block(group.block), part)
            if outputs is not None and weights is not None:
                outputs.index_add_(0, group.rows, part @ weights[group.block].to(part.dtype).T)
        energy = self.energy + (0.0 if outputs is None else float(outputs.double().square().sum()))
        return replace(self, reached=self.reached + reached, tokens=self.tokens + len(keys), energy=energy)

    def mean(self) -> BlockMoment:
        """Returns the mean of sums; the moments are divided in place."""
        for tensor in self.tensors().values():
            if tensor.is_floating_point():
                tensor.div_(max(1, self.tokens))
        return replace(self, energy=self.energy / max(1, self.tokens))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name, for files."""
        found = {"routed": self.routed, "shared": self.shared, "reached": self.reached}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], *, tokens: int, energy: float) -> BlockMoment:
        """Returns the moment with the given result of `tensors` and numbers."""
        return cls(tensors["routed"], tensors.get("shared"), tensors["reached"], tokens, energy)

    def block(self, block: int) -> Tensor:
        """Returns the moment of a block, a view."""
        if block < len(self.routed):
            return self.routed[block]
        assert self.shared is not None
        return self.shared

    def to(self, device: torch.device) -> BlockMoment:
        """Returns the moment on a device."""
        shared = None if self.shared is None else self.shared.to(device)
        return replace(self, routed=self.routed.to(device), shared=shared)

    def cpu(self) -> BlockMoment:
        """Returns the moment in host memory."""
        return self.to(torch.device("cpu"))

    def mean_energy(self) -> float:
        """Returns the mean of the diagonal over all features of all blocks."""
        diagonals = [self.routed.diagonal(dim1=1, dim2=2).flatten()]
        if self.shared is not None:
            diagonals.append(self.shared.diagonal())
        return float(torch.cat(diagonals).double().mean())

    def finite(self) -> bool:
        """Returns whether the diagonals, which contain the square of every key, are finite."""
        shared = self.routed[:0, 0, 0] if self.shared is None else self.shared.diagonal()
        return checks.all_finite(self.routed.diagonal(dim1=1, dim2=2), shared)
