"""Test problems (a weight, a prior, a stream of edits) of any size, dtype and condition, and their error bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlsedit_fast.rls import Prior, RLSState
from rlsedit_fast.rls.reference import evaluate_objective, solve_all

KINDS = ("weight", "keys", "moment", "custom keys", "custom moment")


@dataclass
class Problem:
    """A weight, a prior, and edits in batches of different sizes."""

    weight: Tensor
    prior: Prior
    keys: Tensor
    values: Tensor
    weights: Tensor | None
    sizes: list[int]
    condition: float
    dtype: torch.dtype

    def state(self, **options: object) -> RLSState:
        return RLSState(self.weight, self.prior, dtype=self.dtype, **options)  # type: ignore[arg-type]

    def batches(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        weights = [None] * len(self.sizes) if self.weights is None else self.weights.split(self.sizes)
        return list(zip(self.keys.split(self.sizes), self.values.split(self.sizes), weights, strict=True))

    def rows(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the rows of the given batches."""
        number = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        selected = torch.isin(number, torch.tensor(chosen, dtype=torch.long))
        return self.keys[selected], self.values[selected], None if self.weights is None else self.weights[selected]

    def all(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.keys, self.values, self.weights

    def allowed(self) -> float:
        """Returns the relative error of C and W that rounding allows.

        Rounding causes errors of `eps sqrt(c_i c_j)` between the eigendirections of C, hence `sqrt(condition)`. They
        accumulate randomly, hence the square root of the number of roundings (rows of edits and terms of a dot
        product). The initial state and the reference are factored in float64, which loses `eps condition` of float64.
        """
        eps, wide = torch.finfo(self.dtype).eps, torch.finfo(torch.float64).eps
        roundings = (len(self.keys) + self.keys.shape[1]) ** 0.5
        return 2 * roundings * (eps * self.condition**0.5 + wide * self.condition)

    def spread(self, seen: Tensor | None = None) -> float:
        """Returns the magnitude of the terms of J, to which its absolute error is relative.

        Args:
            seen: intermediate values of the state; default: the values of the problem.
        """
        values = self.values if seen is None else seen
        w = 1.0 if self.weights is None else self.weights.double()[:, None]
        start = evaluate_objective(self.weight, self.weight, self.prior, self.keys[:0], self.values[:0])
        keys, weight = self.keys.double(), self.weight.double()
        misfit = values.double() - keys @ weight.T
        summed = (keys**2 @ weight.T**2).sqrt()  # terms of the dot products, which round before they cancel
        start += self.prior.mu**2 * (self.prior.anchor_energy or 0.0)  # J is a difference of terms of this size
        return start + float((w * (misfit**2 + values.double() ** 2 + misfit.abs() * summed)).sum())

    def check(
        self,
        state: RLSState,
        rows: tuple[Tensor, Tensor, Tensor | None],
        factor: float = 1.0,
        seen: Tensor | None = None,
    ) -> None:
        """Asserts that the state equals the solution for these rows; `seen` as for `spread`.

        Errors are relative to the initial C and to the terms that W is summed from: with more edits than d_k, both
        end up much smaller.
        """
        weight, inverse, objective = solve_all(self.weight, self.prior, *rows)
        start = solve_all(self.weight, self.prior, self.keys[:0], self.values[:0])[1]
        keys, values, weights = (None if part is None else part.double() for part in rows)
        assert keys is not None
        assert values is not None
        gain = inverse @ (keys if weights is None else keys * weights[:, None]).T
        summed = torch.linalg.matrix_norm(gain, 2) * values.norm() if len(keys) else 0.0
        allowed = factor * self.allowed()
        scale = weight.norm() + self.weight.double().norm() + summed
        assert (state.weight.double() - weight).norm() <= allowed * scale
        assert (state.precision_inverse().double() - inverse).norm() <= allowed * start.norm()
        assert abs(state.objective - objective) <= allowed * max(self.spread(), self.spread(seen))
        assert state.edits == len(rows[0])


def make_problem(
    *,
    seed: int = 0,
    d_k: int = 24,
    d_v: int = 10,
    sizes: list[int] | None = None,
    kind: str = "moment",
    condition: float = 1e2,
    dtype: torch.dtype = torch.float64,
    given: torch.dtype | None = None,
    weighted: bool = False,
    strength: float = 1.0,
) -> Problem:
    """Returns a problem whose prior has eigenvalues from `condition ** -0.5` to `condition ** 0.5`.

    Args:
        seed: random seed.
        d_k: width of keys.
        d_v: width of values.
        sizes: rows per batch.
        kind: kind of the prior, one of `KINDS`.
        condition: condition number of S0; 1 for the kind "weight".
        dtype: dtype of the state.
        given: dtype of the weight, keys, values and weights; default: `dtype`.
        weighted: whether the edits have weights other than 1.
        strength: norm of the keys.
    """
    sizes = [1, 3, 2, 5] if sizes is None else sizes
    given = given or dtype
    anchor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight = normal(d_v, d_k).to(given)
    count = sum(sizes)
    keys = (torch.nn.functional.normalize(normal(count, d_k), dim=1) * strength).to(given)
    values = normal(count, d_v).to(given)
    weights = (torch.rand(count, dtype=torch.float64, generator=generator) + 0.5).to(given) if weighted else None
    if kind == "weight":
        prior, condition = Prior(lam=1.0), 1.0
    else:
        basis, _ = torch.linalg.qr(normal(d_k, d_k))
        spread = torch.logspace(-0.25, 0.25, d_k, base=condition, dtype=torch.float64)
        lam, mu = 0.1 * condition**-0.25, 0.5
        anchors = ((basis * spread).T / mu).to(anchor_dtype)
        targets = normal(d_k, d_v).to(anchor_dtype)
        if kind == "keys":
            prior = Prior(lam=lam, mu=mu, anchor_keys=anchors)
        elif kind == "moment":
            prior = Prior(lam=lam, mu=mu, anchor_moment=anchors.T @ anchors)
        elif kind == "custom keys":
            prior = Prior(lam=lam, mu=mu, anchor_keys=anchors, anchor_values=targets)
        else:
            wide, wide_targets = anchors.double(), targets.double()  # J needs three consistent sums
            prior = Prior(
                lam=lam,
                mu=mu,
                anchor_moment=wide.T @ wide,
                anchor_cross=wide_targets.T @ wide,
                anchor_energy=float(wide_targets.square().sum()),
            )
    return Problem(weight, prior, keys, values, weights, sizes, condition, dtype)


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    return make_problem


@pytest.fixture(scope="session")
def kinds() -> tuple[str, ...]:
    return KINDS


def contents(state: RLSState) -> dict[str, object]:
    """Returns copies of everything that a state stores."""
    return {
        "base": state._base.clone(),
        "pending": state._pending.rows.clone(),
        "signs": state._pending.signs.clone(),
        "weight": state.weight.clone(),
        "original": state._original.clone(),
        "image": state._sketch.image.clone(),
        "objective": state.objective,
        "edits": state.edits,
        "version": state.version,
        "storage": state.weight.data_ptr(),
    }


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, object], dict[str, object]], bool]:
    """Returns a function that compares two results of `contents` bit by bit."""

    def agree(one: dict[str, object], other: dict[str, object]) -> bool:
        def equal(a: object, b: object) -> bool:
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                return a.dtype == b.dtype and torch.equal(a, b)
            return a == b

        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)

    return agree


@pytest.fixture(scope="session")
def record() -> Callable[[RLSState], dict[str, object]]:
    return contents


@contextmanager
def _restored(state: RLSState) -> Iterator[None]:
    taken = state.snapshot()
    try:
        yield
    except BaseException:
        state.restore(taken)
        raise


@pytest.fixture
def transaction() -> Callable[[RLSState], AbstractContextManager[None]]:
    """`transaction(state)` restores the state if the block raises."""
    return _restored
