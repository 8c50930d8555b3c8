"""Snapshots, transactions over several layers, and stale panels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch

from rlsedit_fast.errors import InputError, UpdateError


@pytest.mark.parametrize("delay", [0, 4, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restore_is_bitwise(
    problem: Callable, record: Callable, same: Callable, delay: int, dtype: torch.dtype
) -> None:
    case = problem(sizes=[2, 3, 6, 1, 2, 4], dtype=dtype, weighted=True)
    state = case.state(delay=delay)
    batches = case.batches()
    state.update(*batches[0])
    before = record(state)
    taken = state.snapshot()
    for batch in batches[1:4]:
        state.update(*batch)
    state.remove(*batches[1])
    keys, values, weights = batches[2]
    state.replace(keys, values, -values, weights)
    assert not same(before, record(state))
    state.restore(taken)
    assert same(before, record(state))
    del taken

    # The state continues as if nothing had happened in between.
    twin = case.state(delay=delay)
    twin.update(*batches[0])
    for batch in batches[4:]:
        state.update(*batch)
        twin.update(*batch)
    assert torch.equal(state.weight, twin.weight)
    assert torch.equal(state.precision_inverse(), twin.precision_inverse())
    assert state.objective == twin.objective


@pytest.mark.parametrize("operation", ["flush", "refresh"])
def test_snapshot_survives_flush_and_refresh(
    problem: Callable, record: Callable, same: Callable, operation: str
) -> None:
    case = problem(sizes=[2, 3, 1])
    state = case.state(delay=8)
    batches = case.batches()
    state.update(*batches[0])
    before, taken = record(state), state.snapshot()
    state.update(*batches[1])
    if operation == "flush":
        state.flush()
    else:
        state.refresh(*case.rows([0, 1]))
    state.update(*batches[2])
    case.check(state, case.all())
    state.restore(taken)
    assert same(before, record(state))


def test_no_flush_while_a_snapshot_exists(problem: Callable) -> None:
    case = problem(sizes=[3] * 6)
    state = case.state(delay=4)
    batches = case.batches()
    taken = state.snapshot()
    place, base = state._base.data_ptr(), state._base.clone()
    for batch in batches[:5]:
        state.update(*batch)
    assert state._base.data_ptr() == place
    assert torch.equal(state._base, base)
    assert len(state._pending) == 15
    case.check(state, case.rows([0, 1, 2, 3, 4]))
    del taken
    state.update(*batches[5])
    assert len(state._pending) == 3
    case.check(state, case.all())


def test_restoring_a_snapshot_invalidates_later_ones(problem: Callable, record: Callable, same: Callable) -> None:
    case = problem(sizes=[2, 3, 1])
    state = case.state()
    batches = case.batches()
    before, early = record(state), state.snapshot()
    state.update(*batches[0])
    late = state.snapshot()
    state.update(*batches[1])
    state.restore(early)
    with pytest.raises(InputError, match="earlier"):
        state.restore(late)
    state.update(*batches[2])
    state.restore(early)  # again
    assert same(before, record(state))


def test_snapshot_of_another_state_raises(problem: Callable, record: Callable, same: Callable) -> None:
    case = problem()
    state, other = case.state(), case.state()
    before = record(state)
    with pytest.raises(InputError, match="another state"):
        state.restore(other.snapshot())
    assert same(before, record(state))


def test_transaction_over_layers_changes_all_or_none(
    problem: Callable, record: Callable, same: Callable, transaction: Callable
) -> None:
    cases = [problem(seed=seed, sizes=[2, 3], d_k=12 + seed) for seed in range(3)]
    states = [case.state(delay=2) for case in cases]
    for case, state in zip(cases, states, strict=True):
        state.update(*case.batches()[0])
    before = [record(state) for state in states]

    def edit(poison: float) -> None:
        with ExitStack() as stack:
            for state in states:
                stack.enter_context(transaction(state))
            for index, (case, state) in enumerate(zip(cases, states, strict=True)):
                keys, values, _ = case.batches()[1]
                state.update(keys, values * (poison if index == 2 else 1))

    with pytest.raises(UpdateError):
        edit(1e200)
    assert all(same(old, record(state)) for old, state in zip(before, states, strict=True))
    edit(1.0)
    for case, state in zip(cases, states, strict=True):
        case.check(state, case.all())


def test_update_equals_project_and_update_projected(problem: Callable) -> None:
    case = problem(weighted=True, sizes=[2, 4])
    one, two = case.state(), case.state()
    for keys, values, weights in case.batches():
        direct = one.update(keys, values, weights)
        panel = two.project(keys, weights)
        innovation = values - keys @ two.weight.T
        step = two.update_projected(panel, innovation)
        for name in ("residual", "realized"):
            torch.testing.assert_close(getattr(step, name), getattr(direct, name), rtol=0, atol=1e-13)
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-13)


def test_panel_matches_its_definition(problem: Callable) -> None:
    case = problem(weighted=True)
    state = case.state()
    state.update(*case.batches()[0])
    keys, _, weights = case.batches()[1]
    panel = state.project(keys, weights)
    projected = keys @ state.precision_inverse()
    torch.testing.assert_close(panel.projected, projected, rtol=0, atol=1e-13)
    torch.testing.assert_close(panel.gram, projected @ keys.T, rtol=0, atol=1e-13)
    assert torch.equal(panel.gram, panel.gram.T)
    assert torch.equal(panel.noise, 1 / weights)
    assert torch.equal(panel.keys, keys)


def test_project_is_read_only(problem: Callable, record: Callable, same: Callable) -> None:
    case = problem()
    state = case.state(delay=2)
    state.update(*case.batches()[0])
    before = record(state)
    state.project(case.keys)
    assert same(before, record(state))


@pytest.mark.parametrize("between", ["update", "remove", "replace", "refresh"])
def test_stale_panel_raises(problem: Callable, record: Callable, same: Callable, between: str) -> None:
    case = problem(sizes=[2, 3])
    state = case.state()
    (keys, values, _), (later, later_values, _) = case.batches()
    state.update(keys, values)
    panel = state.project(later)
    if between == "update":
        state.update(later, later_values)
    elif between == "remove":
        state.remove(keys, values)
    elif between == "replace":
        state.replace(keys, values, -values)
    else:
        state.refresh(keys, values)
    before = record(state)
    with pytest.raises(InputError, match="project again"):
        state.update_projected(panel, later_values)
    assert same(before, record(state))


def test_panel_of_another_state_raises(problem: Callable) -> None:
    case = problem()
    state, other = case.state(), case.state()
    with pytest.raises(InputError, match="project again"):
        state.update_projected(other.project(case.keys), case.values)


def test_panel_is_valid_again_after_restore(problem: Callable) -> None:
    case = problem(sizes=[2, 3])
    state = case.state()
    (keys, values, _), (later, later_values, _) = case.batches()
    panel, taken = state.project(later), state.snapshot()
    state.update(keys, values)
    state.restore(taken)
    state.update_projected(panel, later_values - later @ state.weight.T)
    case.check(state, case.rows([1]))


def test_updates_allocate_less_than_the_precision_inverse(problem: Callable) -> None:
    case = problem(d_k=512, d_v=8, sizes=[4] * 12, dtype=torch.float32)
    state = case.state(delay=16)
    batches = case.batches()
    state.update(*batches[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for batch in batches[1:]:
            state.update(*batch)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 512 * 512 * 4


def test_memory_of_a_state(problem: Callable, state_bytes: Callable) -> None:
    case = problem(d_k=32, d_v=8, dtype=torch.float32)
    expected = 4 * (32 * 32 + 2 * 8 * 32 + 16 * 32 + 16) + 8 * 2 * 32
    assert state_bytes(case.state(delay=16)) == expected


@pytest.mark.parametrize("delay", [0, 4, 8])
def test_settle_flushes_after_a_transaction(
    problem: Callable, state_bytes: Callable, delay: int, transaction: Callable
) -> None:
    case = problem(sizes=[3] * 12)
    state = case.state(delay=delay)
    sizes = []
    for batch in case.batches():
        with transaction(state):
            state.update(*batch)
            state.settle()
            assert len(state._pending) >= 3, "no flush inside a transaction"
        state.settle()
        assert len(state._pending) <= delay
        sizes.append(state_bytes(state))
    assert len(set(sizes[len(sizes) // 2 :])) == 1
    case.check(state, case.all())


def test_snapshot_copies_the_weight_on_the_first_write(problem: Callable, record: Callable, same: Callable) -> None:
    case = problem()
    state = case.state()
    first, second, *_ = case.batches()
    early = state.snapshot()
    twin = state.snapshot()
    before = record(state)
    assert early.weight is None
    state.update(*first)
    assert early.weight is twin.weight, "shared copy"
    between, late = record(state), state.snapshot()
    state.replace(*first[:2], first[1] + 1, first[2])
    state.update(*second)
    state.restore(late)
    assert same(record(state), between)
    state.update(*second)
    state.restore(late)
    assert same(record(state), between)
    state.restore(early)
    assert same(record(state), before)


def test_buffer_shrinks_after_a_large_transaction(
    problem: Callable, state_bytes: Callable, transaction: Callable
) -> None:
    case = problem(sizes=[3] * 12)
    state = case.state(delay=4)
    usual = state_bytes(state)
    with transaction(state):
        for batch in case.batches():
            state.update(*batch)
    assert state_bytes(state) > usual
    state.settle()
    assert state_bytes(state) == usual
    case.check(state, case.all())


def test_rows_stay_pending_if_the_flush_fails(problem: Callable, monkeypatch, caplog) -> None:
    case = problem(sizes=[3, 3])
    state = case.state(delay=2)

    def fail(_base: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(state, "_downdate", fail)
    state.update(*case.batches()[0])
    assert "the rows stay pending: no more" in caplog.text
    monkeypatch.undo()
    state.update(*case.batches()[1])
    case.check(state, case.all())
