"""After any stream of updates, removals and replacements, the state is the minimizer for the applied edits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsedit_fast.rls import Prior, RLSState
from rlsedit_fast.rls.reference import evaluate_objective, solve_all

KINDS = ("weight", "keys", "moment", "custom keys", "custom moment")
FLOATS = (
    (torch.float32, None),
    (torch.float64, None),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.bfloat16),
)

streams = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "d_k": st.integers(1, 40),
        "d_v": st.integers(1, 17),
        "sizes": st.lists(st.integers(1, 9), min_size=1, max_size=7),
        "kind": st.sampled_from(KINDS),
        "condition": st.sampled_from([1.0, 1e2, 1e4, 1e6]),
        "weighted": st.booleans(),
    }
)
floats = st.sampled_from(FLOATS)
delays = st.sampled_from([0, 1, 4, 128])
checked = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pivot(state: RLSState, keys: torch.Tensor, weights: torch.Tensor | None) -> float:
    """Returns the smallest pivot of a removal, relative to the noise, computed in float64."""
    w = torch.ones(len(keys), dtype=torch.float64) if weights is None else weights.double()
    root = keys.double() * w.sqrt()[:, None]
    kept = torch.eye(len(keys), dtype=torch.float64) - root @ state.precision_inverse().double() @ root.T
    lower, info = torch.linalg.cholesky_ex(kept)
    return 0.0 if int(info) else float(lower.diagonal().min() ** 2)


@checked
@given(stream=streams, kind=floats, delay=delays)
def test_updates_match_solving_all_at_once(problem: Callable, stream, kind, delay) -> None:
    case = problem(**stream, dtype=kind[0], given=kind[1])
    state = case.state(delay=delay)
    for keys, values, weights in case.batches():
        state.update(keys, values, weights)
    case.check(state, case.all())


@checked
@given(stream=streams, kind=floats, delay=delays, data=st.data())
def test_removals_match_solving_the_remaining_edits(problem: Callable, stream, kind, delay, data) -> None:
    case = problem(**stream, dtype=kind[0], given=kind[1])
    batches = case.batches()
    removed = data.draw(st.lists(st.integers(0, len(batches) - 1), max_size=4, unique=True))
    state = case.state(delay=delay)
    for batch in batches:
        state.update(*batch)
    amplified = 1.0
    for index in removed:
        smallest = pivot(state, batches[index][0], batches[index][2])
        if smallest < 0.05:  # strong edits have their own tests in test_accuracy
            removed = removed[: removed.index(index)]
            break
        state.remove(*batches[index])
        amplified += smallest**-2
    case.check(state, case.rows([i for i in range(len(batches)) if i not in removed]), factor=amplified)


@checked
@given(stream=streams, kind=floats, delay=delays)
def test_replacements_match_solving_the_new_values(problem: Callable, stream, kind, delay) -> None:
    case = problem(**stream, dtype=kind[0], given=kind[1])
    state = case.state(delay=delay)
    first = torch.roll(case.values, 1, dims=1) + 1
    for (keys, _, weights), old in zip(case.batches(), first.split(case.sizes), strict=True):
        state.update(keys, old, weights)
    inverse = state.precision_inverse()
    for (keys, values, weights), old in zip(case.batches(), first.split(case.sizes), strict=True):
        step = state.replace(keys, old, values, weights)
    case.check(state, case.all(), factor=4, seen=first)  # the old values have twice the scale
    assert torch.equal(state.precision_inverse(), inverse)
    left = values.double() - keys.double() @ state.weight.double().T
    assert (step.residual.double() - left).norm() <= 4 * case.allowed() * (case.spread() + 1) ** 0.5


def test_replace_equals_remove_and_update(problem: Callable) -> None:
    case = problem(dtype=torch.float64, weighted=True, kind="custom keys")
    one, two = case.state(), case.state()
    for batch in case.batches():
        one.update(*batch)
        two.update(*batch)
    keys, values, weights = case.batches()[1]
    new = values.flip(1) - 0.5
    one.replace(keys, values, new, weights)
    two.remove(keys, values, weights)
    two.update(keys, new, weights)
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.precision_inverse(), two.precision_inverse(), rtol=0, atol=1e-12)
    assert one.objective == pytest.approx(two.objective, rel=1e-12)


@checked
@given(stream=streams, kind=floats, delay=delays)
def test_recursive_objective_matches_the_evaluated_objective(problem: Callable, stream, kind, delay) -> None:
    case = problem(**stream, dtype=kind[0], given=kind[1])
    state = case.state(delay=delay)
    seen: list[int] = []
    for index, (keys, values, weights) in enumerate(case.batches()):
        before = state.objective
        step = state.update(keys, values, weights)
        seen.append(index)
        evaluated = evaluate_objective(state.weight, case.weight, case.prior, *case.rows(seen))
        # Rounding of W also changes the evaluated J, along the stiffest direction of the precision.
        stiff = torch.finfo(case.dtype).eps ** 2 * case.condition**0.5 * float(state.weight.double().square().sum())
        assert abs(step.objective - evaluated) <= case.allowed() * case.spread() + stiff
        assert step.objective == state.objective >= before


@checked
@given(stream=streams, kind=floats, delay=delays)
def test_precision_inverse_is_symmetric_positive_definite(problem: Callable, stream, kind, delay) -> None:
    case = problem(**stream, dtype=kind[0], given=kind[1])
    state = case.state(delay=delay)
    for batch in case.batches():
        state.update(*batch)
    inverse = state.precision_inverse()
    assert torch.equal(inverse, inverse.T)
    # At condition 1e6 the smallest eigenvalue is comparable to the float32 rounding error of the largest.
    slack = case.allowed() * float(torch.linalg.matrix_norm(inverse.double(), 2))
    assert float(torch.linalg.eigvalsh(inverse.double()).min()) > (-slack if case.condition > 1e4 else 0)


@checked
@given(stream=streams, kind=floats, delay=st.sampled_from([1, 4, 128]))
def test_deferred_updates_match_eager_updates(problem: Callable, stream, kind, delay) -> None:
    case = problem(**stream, dtype=kind[0], given=kind[1])
    eager, deferred = case.state(delay=0), case.state(delay=delay)
    start = eager.precision_inverse()
    for batch in case.batches():
        eager.update(*batch)
        deferred.update(*batch)
    one, other = eager.precision_inverse(), deferred.precision_inverse()
    # Both can deviate in opposite directions. After strong edits C is a small difference from its initial value, and
    # each subtraction rounds at the size of that value.
    between = 2 * case.allowed()
    subtractions = len(case.keys) ** 0.5 * torch.finfo(case.dtype).eps
    assert (one - other).norm() <= between * one.norm() + 2 * subtractions * start.norm()
    assert (eager.weight - deferred.weight).norm() <= between * (eager.weight.norm() + case.weight.norm())
    deferred.flush()
    assert (deferred.precision_inverse() - other).norm() <= torch.finfo(case.dtype).eps * other.norm()


@checked
@given(stream=streams, kind=floats)
def test_bounds_hold(problem: Callable, stream, kind) -> None:
    case = problem(**stream, dtype=kind[0], given=kind[1])
    state = case.state()
    original = case.weight.double()
    for index, batch in enumerate(case.batches()):
        state.update(*batch)
        bounds, weight = state.bounds(), state.weight.double()
        keys, values, weights = case.rows(list(range(index + 1)))
        w = 1.0 if weights is None else weights.double()[:, None]
        # Rounding of J and W; the bounds hold in exact arithmetic.
        lost = (case.allowed() * case.spread()) ** 0.5 + torch.finfo(case.dtype).eps * float(weight.norm())
        assert state.deviation() == pytest.approx(float((weight - original).norm()), rel=1e-5, abs=lost)
        assert state.deviation() <= bounds.weight + lost / case.prior.lam
        assert float((w * (keys.double() @ weight.T - values.double()) ** 2).sum()) ** 0.5 <= bounds.edits + lost
        if case.prior.anchor_keys is not None:
            anchors = case.prior.anchor_keys.double()
            anchor_values = (
                anchors @ original.T if case.prior.anchor_values is None else case.prior.anchor_values.double()
            )
            drift = float((anchors @ weight.T - anchor_values).norm())
            assert drift <= bounds.anchors + lost * (1 + float(torch.linalg.matrix_norm(anchors, 2))) / case.prior.mu
        else:
            assert bounds.anchors > 0
        assert bounds.edits == math.sqrt(state.objective)


@checked
@given(stream=streams, kind=floats)
def test_step_reports_residual_and_change(problem: Callable, stream, kind) -> None:
    case = problem(**stream, dtype=kind[0], given=kind[1])
    state = case.state()
    for keys, values, weights in case.batches():
        before = state.weight.double().clone()
        missing = values.double() - keys.double() @ before.T
        step = state.update(keys, values, weights)
        left = values.double() - keys.double() @ state.weight.double().T
        lost = case.allowed() * case.spread() ** 0.5
        assert (step.residual.double() - left).norm() <= lost
        realized = 1 - left.norm(dim=1) / missing.norm(dim=1)
        assert ((step.realized.double() - realized).abs() * missing.norm(dim=1)).max() <= 2 * lost
        moved = float((state.weight.double() - before).norm())
        assert step.change == pytest.approx(moved, rel=case.allowed(), abs=case.allowed() * float(before.norm()))


@pytest.mark.parametrize("operation", ["remove", "replace"])
def test_removal_and_replacement_report_residual_and_change(problem: Callable, operation: str) -> None:
    case = problem(dtype=torch.float64, weighted=True)
    state = case.state()
    state.update(*case.all())
    keys, values, weights = case.batches()[3]
    targets = values if operation == "remove" else values.flip(1) + 1
    before = state.weight.clone()
    step = (
        state.remove(keys, values, weights) if operation == "remove" else state.replace(keys, values, targets, weights)
    )
    missing, left = targets - keys @ before.T, targets - keys @ state.weight.T
    torch.testing.assert_close(step.residual, left, rtol=0, atol=1e-12)
    torch.testing.assert_close(step.realized, 1 - left.norm(dim=1) / missing.norm(dim=1), rtol=0, atol=1e-11)
    assert step.change == pytest.approx(float((state.weight - before).norm()), rel=1e-11)
    assert (step.realized < 0).all() if operation == "remove" else (step.realized > 0).all()


def test_edit_without_change_is_realized() -> None:
    weight = torch.eye(3, 5, dtype=torch.float64)
    state = RLSState(weight, Prior(lam=1.0))
    keys = torch.eye(5, dtype=torch.float64)[:2]
    step = state.update(keys, keys @ weight.T)
    assert step.realized.tolist() == [1.0, 1.0]
    assert (step.objective, step.change) == (0.0, 0.0)
    assert torch.equal(state.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_refresh_recovers_from_any_state(problem: Callable, kind: str) -> None:
    case = problem(kind=kind, dtype=torch.float32, condition=1e4, weighted=True)
    state = case.state()
    for batch in case.batches():
        state.update(*batch)
    state._base.mul_(1.5)
    state.weight.add_(3)
    state.refresh(*case.all())
    weight, inverse, objective = solve_all(case.weight, case.prior, *case.all())
    eps = torch.finfo(torch.float32).eps
    assert (state.weight.double() - weight).norm() <= eps * weight.norm()
    assert (state.precision_inverse().double() - inverse).norm() <= eps * inverse.norm()
    assert state.objective == pytest.approx(objective, rel=1e-9)
    assert state.edits == len(case.keys)


@pytest.mark.parametrize("kind", KINDS)
def test_refresh_without_edits_restores_the_start(problem: Callable, kind: str) -> None:
    case = problem(kind=kind, dtype=torch.float64)
    state, fresh = case.state(), case.state()
    for batch in case.batches():
        state.update(*batch)
    state.refresh(case.keys[:0], case.values[:0])
    assert torch.equal(state.weight, fresh.weight)
    assert torch.equal(state.precision_inverse(), fresh.precision_inverse())
    assert (state.objective, state.edits) == (fresh.objective, 0)


def test_weight_two_equals_the_edit_twice(problem: Callable) -> None:
    case = problem(dtype=torch.float64)
    plain, ones, twos, twice = (case.state() for _ in range(4))
    plain.update(case.keys, case.values)
    ones.update(case.keys, case.values, torch.ones(len(case.keys)))
    twos.update(case.keys, case.values, torch.full((len(case.keys),), 2.0))
    twice.update(torch.cat((case.keys, case.keys)), torch.cat((case.values, case.values)))
    assert torch.equal(plain.weight, ones.weight)
    torch.testing.assert_close(twos.weight, twice.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(twos.precision_inverse(), twice.precision_inverse(), rtol=0, atol=1e-12)


def test_given_weight_is_not_modified(problem: Callable) -> None:
    for given_dtype in (torch.bfloat16, torch.float32, torch.float64):
        case = problem(dtype=torch.float32, given=given_dtype)
        before = case.weight.clone()
        state = case.state()
        state.update(case.keys, case.values)
        assert torch.equal(case.weight, before)
        case.weight.zero_()
        assert torch.equal(state.original.double(), before.to(state.original.dtype).double())
        assert state.weight.dtype == torch.float32


def test_weight_keeps_its_storage(problem: Callable) -> None:
    case = problem()
    state = case.state(delay=2)
    weight, place = state.weight, state.weight.data_ptr()
    for batch in case.batches():
        state.update(*batch)
    state.remove(*case.batches()[0])
    state.refresh(*case.rows([1, 2, 3]))
    assert state.weight is weight
    assert weight.data_ptr() == place
