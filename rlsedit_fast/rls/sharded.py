"""The columns of a weight divided over processes, with explicit collectives of `torch.distributed`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.processes import Described, described, raise_first
from rlsedit_fast.rls import checks
from rlsedit_fast.rls.columns import Columns, T
from rlsedit_fast.rls.prior import Prior
from rlsedit_fast.rls.results import Panel, Saved

STATUS = 3
"""Numbers that each process contributes to an agreement: whether it failed, and two sizes."""


class ShardedColumns(Columns):
    """The columns of one weight that this process holds, for `RLSState(weight, prior, columns=...)`.

    The processes of the group hold the columns in the order of their ranks, in parts of any sizes. Each process calls
    every method of the state, in the same order, with its own columns of the keys, and with the same values and
    weights; where they differ, those of the first process count. Keys may also have all `d_k` columns; a process then
    uses its own. An error in the arguments of one process, or in its
    numbers, is raised in every process, and no state is modified. Everything that is summed is reduced to the first
    process and broadcast from there, so that it has the same bits everywhere; all decisions follow from such numbers.

    A batch sends `O(n d_k)` bytes, see `plan.batch_traffic`. A process holds `[w, d_k]` of C, so that p processes need
    1/p of the memory each. The first process builds C: it needs one float64 matrix and C, `[d_k, d_k]`, for that time,
    and sends each process its rows. Products are computed by PyTorch, `backend` applies to the weight only.

    Args:
        weight: the held columns `[d_v, w]`; collectives use its device.
        group: processes that hold the weight; default: all.

    Attributes:
        sent: bytes that this process has sent, by kind.

    Raises:
        InputError: no process group is initialized, or a process has no columns.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from rlsedit_fast.rls import Prior, RLSState, ShardedColumns
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> weight = torch.zeros(1, 2)  # with more processes: its columns of the weight
        >>> state = RLSState(weight, Prior(lam=1.0), columns=ShardedColumns(weight))
        >>> _ = state.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0]]))
        >>> state.weight.round().tolist()
        [[2.0, 0.0]]
        >>> dist.destroy_process_group()
    """

    def __init__(self, weight: Tensor, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError("no process group is initialized; call torch.distributed.init_process_group first.")
        self._group: Any = dist.group.WORLD if group is None else group
        self.ranks, self.rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        if self.rank < 0:
            raise InputError("this process is not in the process group of the columns.")
        self.builds = self.rank == 0
        self.sent: Counter[str] = Counter()
        self._device = weight.device
        self.widths = self._every(torch.tensor([weight.shape[-1]], device=self._device)).flatten().tolist()
        if 0 in self.widths:
            raise InputError(f"the processes hold {self.widths} columns; each must hold at least one.")
        self._first = sum(self.widths[: self.rank])
        self._mine = self.held(self.widths[self.rank])

    def width(self, held: int) -> int:
        """See `Columns`; raises InputError for another number of columns."""
        if held != self.widths[self.rank]:
            raise InputError(f"{held} columns are given, but process {self.rank} holds {self.widths[self.rank]}.")
        return sum(self.widths)

    def held(self, width: int) -> slice:
        """See `Columns`."""
        return slice(self._first, self._first + width)

    def cut(self, whole: Tensor) -> Tensor:
        """See `Columns`."""
        return whole[..., self._mine].contiguous()

    def part(self, keys: Tensor) -> Tensor:
        """See `Columns`; a tensor of another width is returned as it is."""
        divided = self.ranks > 1 and keys.ndim > 0 and keys.shape[-1] == sum(self.widths)
        return self.cut(keys) if divided else keys

    def first_only(self, part: Tensor) -> Tensor | None:
        """See `Columns`."""
        found = part if self.ranks == 1 else self.collect(part, "terms")
        return None if found is None else found.cpu()

    def join(self, saved: Saved) -> Saved | None:
        """See `Columns`."""
        if self.ranks == 1:
            return saved
        parts = (saved.weight, saved.pending, saved.base.T, saved.image[None])  # C is held by rows
        weight, pending, base, image = (self.collect(part, "saved") for part in parts)
        if weight is None or pending is None or base is None or image is None:
            return None
        return replace(saved, weight=weight, pending=pending, base=base.T, image=image[0], first=0)

    def agree(self, attempt: Callable[[], T], sizes: Callable[[T], Sequence[int]] | None = None) -> T:
        """See `Columns`."""
        error: Exception | None = None
        mine: list[int] = []
        try:
            result = attempt()
            mine = list(sizes(result)) if sizes else []
        except Exception as caught:
            error = caught
        status = [int(error is not None), *mine]
        status += [0] * (STATUS - len(status))
        found = self._every(torch.tensor(status, device=self._device)).tolist()
        if any(failed for failed, *_ in found):
            self._raise(error)
        if any(each != found[0] for each in found):
            raise InputError(
                f"the processes were given different arguments, of sizes {[each[1:] for each in found]}. No state was "
                "modified. Pass the same rows and options in every process."
            )
        return result

    def unanimous(self, vote: bool) -> bool:
        """See `Columns`."""
        return bool(self._every(torch.tensor([int(vote)], device=self._device)).all())

    def check(self, found: Sequence[float], given: Mapping[str, Tensor]) -> None:
        """See `Columns`."""
        if not checks.sound(found, given):
            self.agree(lambda: checks.batch(found, given))

    def numbers(
        self,
        given: Mapping[str, Tensor],
        same: Sequence[Tensor] = (),
        summed: Sequence[Tensor] = (),
        largest: Sequence[Tensor] = (),
    ) -> list[float]:
        """See `Columns`."""
        scalars = [*same, *summed, *largest, *checks.ends(*given.values())]
        found = self._every(torch.stack([scalar.double() for scalar in scalars])).cpu()
        first, second = len(same), len(same) + len(summed)
        third = second + len(largest)
        ends = found[:, third:]
        bounds = torch.stack([ends[:, ::2].amin(0), ends[:, 1::2].amax(0)], 1).flatten()  # NaN stays NaN
        parts = found[0, :first], found[:, first:second].sum(0), found[:, second:third].amax(0), bounds
        numbers: list[float] = torch.cat(parts).tolist()
        return numbers

    def norm(self, part: Tensor) -> float:
        """See `Columns`."""
        (squared,) = self.numbers({}, summed=[torch.linalg.vector_norm(part, dtype=torch.float64).square()])
        return math.sqrt(squared)

    def alike(self, tensor: Tensor) -> Tensor:
        """See `Columns`."""
        if self.ranks > 1:
            tensor = tensor.contiguous().clone()
            self._broadcast(tensor, "values")
        return tensor

    def total(self, part: Tensor, kind: str) -> Tensor:
        """See `Columns`."""
        part = part.contiguous()
        if self.ranks > 1:
            dist.reduce(part, dist.get_global_rank(self._group, 0), group=self._group)
            self.sent[kind] += part.nbytes
            self._broadcast(part, kind)
        return part

    def gather(self, part: Tensor, kind: str) -> Tensor:
        """See `Columns`."""
        if self.ranks == 1:
            return part
        widest, lead = max(self.widths), part.shape[:-1]
        part = torch.nn.functional.pad(part, (0, widest - part.shape[-1])).contiguous()
        parts = [part.new_empty(*lead, widest) for _ in self.widths]
        dist.all_gather(parts, part, group=self._group)
        self.sent[kind] += (self.ranks - 1) * part.nbytes
        return torch.cat([each[..., :width] for each, width in zip(parts, self.widths, strict=True)], -1)

    def innovation(self, values: Tensor, outputs: Tensor) -> Tensor:
        """See `Columns`."""
        return self.total(values - outputs if self.rank == 0 else -outputs, "values")

    def gram(self, projected: Tensor, keys: Tensor) -> Tensor:
        """See `Columns`; float64."""
        return self.total(projected.double() @ keys.double().T, "gram")

    @full_float32()
    def times_moment(self, prior: Prior, rows: Tensor) -> Tensor:
        """See `Columns`."""
        return prior.times_moment(self.gather(rows, "terms"), self._mine)

    def measure(self, measure: Callable[..., float], *parts: Tensor) -> float:
        """See `Columns`; the first process computes the number."""
        whole = [self.collect(part, "terms") for part in parts]
        found = self.agree(lambda: measure(*whole) if self.builds else 0.0)
        return self.share(found)[0]

    @full_float32()
    def panel(self, base: Tensor, keys: Tensor, rows: Tensor, signs: Tensor, backend: str | None) -> Tensor:
        """See `Columns`."""
        projected = self.gather(keys, "keys") @ base.T
        if rows.shape[0]:
            projected.addmm_(self.total(keys @ rows.T, "pending") * signs, rows, alpha=-1)
        return projected

    def factor(
        self, panel: Panel, innovation: Tensor, sign: int, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Columns`; in float64, in every process."""
        lower, info = torch.linalg.cholesky_ex(torch.diag(panel.noise.double()) + sign * panel.exact_gram)
        rows, whitened = (
            torch.linalg.solve_triangular(lower, side.double(), upper=False).to(side.dtype).contiguous()
            for side in (panel.projected, innovation)
        )
        return rows, whitened, lower.to(rows.dtype), info

    @full_float32()
    def downdate_(self, base: Tensor, rows: Tensor, signs: Tensor, backend: str | None) -> None:
        """See `Columns`."""
        base.addmm_((rows * signs[:, None]).T, self.gather(rows, "flush"), alpha=-1)

    def collect(self, part: Tensor, kind: str) -> Tensor | None:
        """Returns `[m, d_k]` in the first process and None in the others, for the held columns `[m, w]`."""
        if not self.builds:
            self.agree(lambda: None)
            dist.send(part.contiguous(), dist.get_global_rank(self._group, 0), group=self._group)
            self.sent[kind] += part.nbytes
            return None
        whole = self.agree(lambda: part.new_empty(part.shape[0], sum(self.widths)))
        whole[:, self._mine] = part
        first = self.widths[0]
        for rank, width in enumerate(self.widths[1:], 1):
            received = part.new_empty(part.shape[0], width)
            dist.recv(received, dist.get_global_rank(self._group, rank), group=self._group)
            whole[:, first : first + width] = received
            first += width
        return whole

    def distribute(self, whole: Tensor | None, held: Tensor, dim: int) -> Tensor:
        """Fills `held` with the held part of `whole` along `dim`; `whole` is that of the first process."""
        if not self.builds:
            dist.recv(held, dist.get_global_rank(self._group, 0), group=self._group)
            return held
        assert whole is not None
        for rank, part in enumerate(whole.split(self.widths, dim)):
            if rank == 0:
                held.copy_(part)
            else:
                dist.send(part.contiguous(), dist.get_global_rank(self._group, rank), group=self._group)
                self.sent["start"] += part.nbytes
        return held

    def share(self, *numbers: float) -> list[float]:
        """Returns the numbers of the first process."""
        given = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        if self.ranks > 1:
            self._broadcast(given, "decisions")
        found: list[float] = given.tolist()
        return found

    def _broadcast(self, tensor: Tensor, kind: str) -> None:
        dist.broadcast(tensor, dist.get_global_rank(self._group, 0), group=self._group)
        self.sent[kind] += tensor.nbytes

    def _every(self, numbers: Tensor) -> Tensor:
        """Returns the numbers of every process `[p, k]`, for `[k]`."""
        found = [torch.empty_like(numbers) for _ in range(self.ranks)]
        dist.all_gather(found, numbers, group=self._group)
        self.sent["decisions"] += (self.ranks - 1) * numbers.nbytes
        return torch.stack(found)

    def _raise(self, error: Exception | None) -> None:
        """Raises the error of this process, else that of the first process that has one."""
        found: list[Described | None] = [None] * self.ranks
        dist.all_gather_object(found, described(error), group=self._group)
        raise_first(found, error)
