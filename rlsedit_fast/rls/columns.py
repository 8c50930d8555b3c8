"""The columns of a weight that a process holds. Here it holds all of them; `sharded` divides them over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from rlsedit_fast import ops
from rlsedit_fast.rls import checks

if TYPE_CHECKING:
    from rlsedit_fast.rls.prior import Prior
    from rlsedit_fast.rls.results import Panel, Saved

T = TypeVar("T")


class Columns:
    """All columns in one process: sums over the columns are complete, and nothing is sent.

    Shapes of a subclass that holds only the columns `I` of `d_k`, w of them: keys, pending rows and projected keys are
    `[n, w]`, the weight is `[d_v, w]` and C is its rows `C[I, :]`, `[w, d_k]`. Values `[n, d_v]`, weights `[n]` and
    everything `[n, n]` are the same in every process. Every method that sends is called by all processes in the same
    order.

    Attributes:
        ranks: number of processes.
        builds: whether this process builds the state, see `build_part`.
    """

    ranks = 1
    builds = True

    def width(self, held: int) -> int:
        """Returns `d_k`, given the number of columns that are held."""
        return held

    def held(self, width: int) -> slice:
        """Returns the held columns, given their number."""
        return slice(0, width)

    def cut(self, whole: Tensor) -> Tensor:
        """Returns the held entries of the last dimension of `[..., d_k]`."""
        return whole

    def part(self, keys: Tensor) -> Tensor:
        """Returns the held entries of the last dimension of `[..., d_k]`, or of the held ones, which are returned."""
        return keys

    def first_only(self, part: Tensor) -> Tensor | None:
        """Returns `[m, d_k]` in the first process and None in the others, for the held columns; in host memory."""
        return part

    def join(self, saved: Saved) -> Saved | None:
        """Returns saved contents with all columns in the first process, and None in the others."""
        return saved

    def agree(self, attempt: Callable[[], T], sizes: Callable[[T], Sequence[int]] | None = None) -> T:
        """Returns the result of `attempt`; raises in every process if it raises, or if the sizes differ, in one."""
        return attempt()

    def unanimous(self, vote: bool) -> bool:
        """Returns whether the vote is true in every process."""
        return vote

    def check(self, found: Sequence[float], given: Mapping[str, Tensor]) -> None:
        """See `checks.batch`, for numbers returned by `numbers`."""
        checks.batch(found, given)

    def numbers(
        self,
        given: Mapping[str, Tensor],
        same: Sequence[Tensor] = (),
        summed: Sequence[Tensor] = (),
        largest: Sequence[Tensor] = (),
    ) -> list[float]:
        """Returns scalars, and minimum and maximum of each given tensor, with one host synchronization.

        Args:
            given: arguments of a caller.
            same: scalars that are the same in every process.
            summed: scalars of which the sum over all processes is returned.
            largest: scalars of which the maximum over all processes is returned.
        """
        return checks.numbers(*same, *summed, *largest, *checks.ends(*given.values()))

    def norm(self, part: Tensor) -> float:
        """Returns the Frobenius norm, summed in float64."""
        return float(torch.linalg.vector_norm(part, dtype=torch.float64))

    def alike(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the first process."""
        return tensor

    def total(self, part: Tensor, kind: str) -> Tensor:
        """Returns the sum over all processes, bit for bit the same in all of them; may overwrite `part`."""
        return part

    def gather(self, part: Tensor, kind: str) -> Tensor:
        """Returns `[..., d_k]` for the held entries of the last dimension."""
        return part

    def innovation(self, values: Tensor, outputs: Tensor) -> Tensor:
        """Returns `V - K W^T [n, d_v]`, for the held columns' part of `K W^T`."""
        return values - outputs

    def gram(self, projected: Tensor, keys: Tensor) -> Tensor:
        """Returns `F K^T [n, n]`."""
        return projected @ keys.T

    def times_moment(self, prior: Prior, rows: Tensor) -> Tensor:
        """Returns the held columns of `rows @ K0^T K0`."""
        return prior.times_moment(rows)

    def measure(self, measure: Callable[..., float], *parts: Tensor) -> float:
        """Returns a number that is computed from all columns of `parts`, each `[d_v, d_k]`."""
        return measure(*parts)

    def panel(self, base: Tensor, keys: Tensor, rows: Tensor, signs: Tensor, backend: str | None) -> Tensor:
        """See `ops.panel`."""
        return ops.panel(base, keys, rows, signs, backend=backend)

    def factor(
        self, panel: Panel, innovation: Tensor, sign: int, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `ops.factor`."""
        return ops.factor(panel.projected, panel.keys, innovation, panel.noise, sign, backend=backend)

    def downdate_(self, base: Tensor, rows: Tensor, signs: Tensor, backend: str | None) -> None:
        """See `ops.downdate_`."""
        ops.downdate_(base, rows, signs, backend=backend)


WHOLE = Columns()
