"""Accuracy over long streams of updates and removals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlsedit_fast.errors import RemovalError
from rlsedit_fast.rls import Prior, RLSState
from rlsedit_fast.rls.reference import solve_all


def test_long_float32_stream_error_below_1e_4(problem: Callable) -> None:
    sizes = [1 + index % 3 for index in range(1000)]
    case = problem(d_k=1024, d_v=64, sizes=sizes, condition=1e4, dtype=torch.float32)
    state = case.state()
    batches = case.batches()
    for batch in batches:
        state.update(*batch)
    removed = list(range(2, 1000, 5))
    assert len(removed) == 200
    for index in removed:
        state.remove(*batches[index])
    weight, inverse, objective = solve_all(
        case.weight, case.prior, *case.rows([i for i in range(1000) if i not in removed])
    )
    assert (state.weight.double() - weight).norm() / weight.norm() < 1e-4
    assert (state.precision_inverse().double() - inverse).norm() / inverse.norm() < 1e-4
    assert state.objective == pytest.approx(objective, rel=1e-4)
    assert not state.monitor().needs_refresh


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_removing_a_thousand_updates_restores_the_start_or_recommends_refresh(
    problem: Callable, dtype: torch.dtype
) -> None:
    case = problem(d_k=1024, d_v=64, sizes=[2] * 1000, condition=1e4, dtype=dtype)
    state = case.state()
    for batch in case.batches():
        state.update(*batch)
    assert float((state.weight - case.weight).norm()) > 1
    for batch in reversed(case.batches()):
        state.remove(*batch)
    seen = state.monitor()
    if dtype == torch.float64:
        assert not seen.needs_refresh
        assert (state.weight - case.weight).abs().max() <= 1e-8
    else:
        assert seen.needs_refresh
        assert (state.weight - case.weight).norm() <= 1.5 * seen.residual * case.weight.norm()
        state.refresh(case.keys[:0], case.values[:0])
        assert torch.equal(state.weight, case.weight)


@pytest.mark.parametrize("kind", ["weight", "moment", "custom keys"])
def test_removing_all_edits_in_float64_restores_the_start(problem: Callable, kind: str) -> None:
    case = problem(d_k=96, d_v=24, sizes=[4, 1, 3, 2] * 15, condition=1e4, kind=kind, weighted=True)
    state, fresh = case.state(delay=16), case.state()
    batches = case.batches()
    for batch in batches:
        state.update(*batch)
    moved = float((state.weight - fresh.weight).norm())
    assert moved > 1
    for index in torch.randperm(len(batches), generator=torch.Generator().manual_seed(3)).tolist():
        state.remove(*batches[index])
    assert (state.weight - fresh.weight).abs().max() <= 1e-8
    start = fresh.precision_inverse()
    assert (state.precision_inverse() - start).norm() <= 1e-8 * start.norm()
    assert abs(state.objective - fresh.objective) <= 1e-8 * case.spread()
    assert state.edits == 0


def test_removing_all_edits_in_float32_matches_the_monitor(problem: Callable) -> None:
    recommended = []
    for strength, condition in ((0.3, 1e1), (1.0, 1e2), (2.0, 1e4), (3.0, 1e6)):
        case = problem(d_k=96, d_v=24, sizes=[3] * 40, condition=condition, dtype=torch.float32, strength=strength)
        state, fresh = case.state(delay=100), case.state()  # includes flushes
        for batch in case.batches():
            state.update(*batch)
        try:
            for batch in case.batches():
                state.remove(*batch)
        except RemovalError:
            recommended.append(None)
            continue
        seen = state.monitor()
        recommended.append(seen.needs_refresh)
        start = fresh.precision_inverse()
        # The residual is at least 0.75 of the relative error of C in all measurements.
        assert (state.precision_inverse() - start).norm() <= 1.5 * seen.residual * start.norm()
        assert (state.weight - fresh.weight).norm() <= 1.5 * seen.residual * (2 * fresh.weight.norm())
        state.refresh(case.keys[:0], case.values[:0])
        assert torch.equal(state.weight, case.weight)
        assert not state.monitor().needs_refresh
    assert recommended[0] is False, "a well-conditioned stream needs no refresh"
    assert recommended[-1] is not False, "condition 1e6 must raise or recommend a refresh"


@pytest.mark.parametrize(("dtype", "strength"), [(torch.float32, 7.0), (torch.float64, 80.0)])
def test_strongest_removable_edits_keep_half_the_digits(dtype: torch.dtype, strength: float) -> None:
    weight = torch.randn(16, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    state = RLSState(weight, Prior(lam=1.0))
    keys = torch.zeros(1, 64, dtype=dtype)
    keys[0, :5] = strength / 5**0.5
    values = torch.ones(1, 16, dtype=dtype)
    state.update(keys, values)
    state.remove(keys, values)
    direction = keys[0].double() / strength
    variance = float(direction @ state.precision_inverse().double() @ direction)
    assert variance == pytest.approx(1.0, abs=torch.finfo(dtype).eps ** 0.5)


@pytest.mark.parametrize(("dtype", "strength"), [(torch.float32, 8.0), (torch.float64, 120.0)])
def test_removal_of_a_stronger_edit_raises_and_refresh_works(
    record: Callable, same: Callable, dtype: torch.dtype, strength: float
) -> None:
    weight = torch.randn(16, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    state = RLSState(weight, Prior(lam=1.0), name="layers.3")
    keys = torch.zeros(1, 64, dtype=dtype)
    keys[0, :5] = strength / 5**0.5
    values = torch.ones(1, 16, dtype=dtype)
    state.update(keys, values)
    before = record(state)
    with pytest.raises(RemovalError, match=r"layers\.3.*refresh"):
        state.remove(keys, values)
    assert same(before, record(state))
    state.refresh(keys[:0], values[:0])
    assert torch.equal(state.weight, weight)
    assert state.objective == 0
