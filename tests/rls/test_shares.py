"""MEMIT's share of a residual, and amplified requests that reach a given realized fraction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlsedit_fast.errors import UpdateError
from rlsedit_fast.rls import RLSState, amplify_innovation, amplify_values, memit_share, realized_fraction
from rlsedit_fast.rls.shares import MAX_TERMS


def test_memit_share_spreads_the_residual_evenly() -> None:
    residual, shares = torch.full((2, 3), 6.0), []
    for index in (1, 2, 3):
        share = memit_share(residual, index, 3)
        shares.append(share)
        residual = residual - share
    assert all(torch.equal(share, torch.full((2, 3), 2.0)) for share in shares)
    assert torch.equal(residual, torch.zeros(2, 3))


BISECTED = 2**-20  # accuracy of the bisection of the last term


def crowded(problem: Callable, rows: int = 6) -> tuple[RLSState, Tensor, Tensor, Tensor, Tensor]:
    """Returns a state with edits, and the keys, weights, requested changes and norms of a similar batch."""
    case = problem(d_k=16, d_v=7, sizes=[12, rows], strength=3.0, weighted=True)
    state = case.state()
    (keys, values, weights), (later, _, w) = case.batches()
    state.update(keys, values, weights)
    requested = torch.randn(rows, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return state, later, w, requested, requested.norm(dim=1)


def realized(state: RLSState, keys: Tensor, before: Tensor, requested: Tensor, selected: Tensor) -> float:
    """Returns the mean realized fraction of the selected rows, measured on the outputs of the state."""
    left = (requested - (state.outputs(keys) - before)).norm(dim=1) / requested.norm(dim=1)
    return 1 - float(left[selected].mean())


@pytest.mark.parametrize("selected", [[0, 1, 2, 3, 4, 5], [0, 3]])
@pytest.mark.parametrize("gain", [0.1, 0.5, 0.9])
def test_amplified_innovation_realizes_the_share(problem: Callable, selected: list[int], gain: float) -> None:
    state, keys, weights, requested, norms = crowded(problem)
    rows = torch.tensor(selected)
    panel = state.project(keys, weights)
    shrunk = torch.diag(panel.noise) @ torch.linalg.inv(torch.diag(panel.noise) + panel.gram)
    plain, most = (
        1 - float(((torch.linalg.matrix_power(shrunk, power) @ requested).norm(dim=1) / norms)[rows].mean())
        for power in (1, 1 + MAX_TERMS)
    )
    assert plain < most - 0.05, "the test needs a state that shrinks requests"
    share = plain + gain * (most - plain)
    before = state.outputs(keys)
    request = amplify_innovation(panel, requested, norms[rows], rows, share)
    state.update_projected(panel, request)
    assert realized(state, keys, before, requested, rows) == pytest.approx(share, abs=BISECTED)


def test_sufficient_innovation_is_unchanged(problem: Callable) -> None:
    state, keys, weights, requested, norms = crowded(problem)
    panel, rows = state.project(keys, weights), torch.arange(6)
    assert torch.equal(amplify_innovation(panel, requested, norms, rows, 0.01), requested)
    assert torch.equal(amplify_innovation(panel, requested.float(), norms, rows, 0.01), requested.float())
    # The norms are those of the whole change; the innovation can be the small part that is still missing.
    assert torch.equal(amplify_innovation(panel, requested, 1e4 * norms, rows, 0.99), requested)


def test_unreachable_share_uses_all_terms(problem: Callable) -> None:
    state, keys, weights, requested, norms = crowded(problem)
    panel, rows = state.project(keys, weights), torch.arange(6)
    shrunk = torch.diag(panel.noise) @ torch.linalg.inv(torch.diag(panel.noise) + panel.gram)
    terms = [torch.linalg.matrix_power(shrunk, power) @ requested for power in range(MAX_TERMS + 1)]
    request = amplify_innovation(panel, requested, norms, rows, 1.0)
    torch.testing.assert_close(request, sum(terms), rtol=0, atol=1e-12)


@pytest.mark.parametrize("moved", [0.0, 0.1])
def test_amplified_values_realize_the_share_at_the_current_keys(problem: Callable, moved: float) -> None:
    state, keys, weights, requested, _ = crowded(problem)
    rows = torch.arange(6)
    values = state.outputs(keys) + requested
    state.update(keys, values, weights)
    generator = torch.Generator().manual_seed(8)
    further = torch.randn(6, 7, dtype=torch.float64, generator=generator)
    now = keys + moved * torch.randn(keys.shape, dtype=torch.float64, generator=generator)
    panel = state.project(keys, weights)
    left = torch.eye(6, dtype=torch.float64) - now @ state.precision_inverse() @ keys.T * weights
    plain, most = (
        1 - float(((torch.linalg.matrix_power(left, power) @ further).norm(dim=1) / further.norm(dim=1)).mean())
        for power in (1, 1 + MAX_TERMS)
    )
    assert plain < most - 0.05, "the test needs a state that shrinks requests"
    share = 0.5 * (plain + most)
    before, inverse = state.outputs(now), state.precision_inverse()
    change = amplify_values(panel, now, further, further.norm(dim=1), rows, share)
    state.replace(keys, values, values + change, weights)
    assert realized(state, now, before, further, rows) == pytest.approx(share, abs=BISECTED)
    assert torch.equal(state.precision_inverse(), inverse), "C depends on keys and weights only"


def test_rows_without_a_requested_change(problem: Callable) -> None:
    left = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    assert realized_fraction(left, torch.tensor([10.0, 2.0, 0.0])).tolist() == [0.5, 1.0, 1.0]
    assert realized_fraction(left, torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.0, 1.0, 0.0]
    state, keys, weights, requested, norms = crowded(problem)
    rows = torch.arange(6)
    panel = state.project(keys, weights)
    plain = requested - torch.diag(panel.noise) @ torch.linalg.solve(torch.diag(panel.noise) + panel.gram, requested)
    share = 1 - float(((requested - plain).norm(dim=1) / norms)[1:].mean())
    still = torch.cat((torch.zeros(1, dtype=norms.dtype), norms[1:]))
    assert torch.equal(amplify_innovation(panel, requested, still, rows, share - 1e-6), requested)


def test_failed_factorization_raises(problem: Callable) -> None:
    state, keys, weights, requested, norms = crowded(problem)
    panel = state.project(keys, weights)
    flawed = replace(panel, projected=-1e4 * panel.keys)
    with pytest.raises(UpdateError, match="pivot 1 is not positive"):
        amplify_innovation(flawed, requested, norms, torch.arange(6), 0.9)
