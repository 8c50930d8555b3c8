"""The monitor detects a drift of C without the keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e6])
def test_new_state_has_no_drift(problem: Callable, dtype: torch.dtype, condition: float) -> None:
    seen = problem(dtype=dtype, condition=condition, kind="keys").state().monitor()
    assert not seen.needs_refresh
    assert seen.residual <= torch.finfo(dtype).eps * condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drift_is_detected_and_refresh_removes_it(problem: Callable, dtype: torch.dtype) -> None:
    case = problem(dtype=dtype, weighted=True)
    state = case.state(delay=4)
    for batch in case.batches():
        state.update(*batch)
    assert not state.monitor().needs_refresh
    state._base.mul_(1.01)
    seen = state.monitor()
    assert seen.needs_refresh
    assert seen.residual > 0.005
    assert "refresh" in seen.advice
    state.refresh(*case.all())
    assert not state.monitor().needs_refresh


def test_nan_is_detected(problem: Callable) -> None:
    state = problem().state()
    state._base[0, 0] = torch.nan
    assert state.monitor().needs_refresh


def test_sketch_follows_every_change(problem: Callable) -> None:
    case = problem(sizes=[3, 2, 4, 1], weighted=True, condition=1.0)
    state = case.state(delay=3)
    batches = case.batches()
    for batch in batches:
        state.update(*batch)
    state.remove(*batches[2])
    keys, values, weights = batches[1]
    state.replace(keys, values, -values, weights)
    precision = torch.linalg.inv(state.precision_inverse())
    torch.testing.assert_close(state._sketch.image, precision @ state._sketch.probe, rtol=0, atol=1e-11)
    assert state.monitor().residual < 1e-12


def test_monitor_is_deterministic_and_read_only(problem: Callable, record: Callable, same: Callable) -> None:
    case = problem(dtype=torch.float32)
    state = case.state(delay=4)
    state.update(case.keys, case.values)
    before = record(state)
    assert state.monitor() == state.monitor()
    assert same(before, record(state))
