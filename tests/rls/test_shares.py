"""MEMIT's share is MEMIT's, and what is raised reaches the share that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlsedit_fast.errors import UpdateError
from rlsedit_fast.rls import RLSState, amplify_innovation, amplify_values, memit_share, realized_fraction
from rlsedit_fast.rls.shares import MOST_PASSES


def test_memit_spreads_the_residual_evenly_when_each_share_is_realised() -> None:
    residual, shares = torch.full((2, 3), 6.0), []
    for index in (1, 2, 3):
        share = memit_share(residual, index, 3)
        shares.append(share)
        residual = residual - share
    assert all(torch.equal(share, torch.full((2, 3), 2.0)) for share in shares)
    assert torch.equal(residual, torch.zeros(2, 3))


BISECTED = 2**-20  # of a term, at which the search for its part ends


def crowded(problem: Callable, rows: int = 6) -> tuple[RLSState, Tensor, Tensor, Tensor, Tensor]:
    """A state that holds edits like those to come, their keys, weights, what they want and its norms."""
    case = problem(d_k=16, d_v=7, sizes=[12, rows], strength=3.0, weighted=True)
    state = case.state()
    (keys, values, weights), (later, _, w) = case.batches()
    state.update(keys, values, weights)
    wanted = torch.randn(rows, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return state, later, w, wanted, wanted.norm(dim=1)


def arrived(state: RLSState, keys: Tensor, before: Tensor, wanted: Tensor, judged: Tensor) -> float:
    """Mean share of the wanted change of the judged rows that is in the state's outputs."""
    left = (wanted - (state.outputs(keys) - before)).norm(dim=1) / wanted.norm(dim=1)
    return 1 - float(left[judged].mean())


@pytest.mark.parametrize("judged", [[0, 1, 2, 3, 4, 5], [0, 3]])
@pytest.mark.parametrize("gain", [0.1, 0.5, 0.9])
def test_a_raised_innovation_makes_the_share_arrive_in_the_state(
    problem: Callable, judged: list[int], gain: float
) -> None:
    state, keys, weights, wanted, norms = crowded(problem)
    rows = torch.tensor(judged)
    panel = state.project(keys, weights)
    shrunk = torch.diag(panel.noise) @ torch.linalg.inv(torch.diag(panel.noise) + panel.gram)
    plain, most = (
        1 - float(((torch.linalg.matrix_power(shrunk, power) @ wanted).norm(dim=1) / norms)[rows].mean())
        for power in (1, 1 + MOST_PASSES)
    )
    assert plain < most - 0.05, "the state shrinks what it is asked for, or this shows nothing"
    share = plain + gain * (most - plain)
    before = state.outputs(keys)
    asked = amplify_innovation(panel, wanted, norms[rows], rows, share)
    state.update_projected(panel, asked)
    assert arrived(state, keys, before, wanted, rows) == pytest.approx(share, abs=BISECTED)


def test_what_arrives_anyway_is_asked_for_as_it_is(problem: Callable) -> None:
    state, keys, weights, wanted, norms = crowded(problem)
    panel, rows = state.project(keys, weights), torch.arange(6)
    assert torch.equal(amplify_innovation(panel, wanted, norms, rows, 0.01), wanted)
    assert torch.equal(amplify_innovation(panel, wanted.float(), norms, rows, 0.01), wanted.float())
    # The norms are those of the whole change, of which the innovation may be a small part that is still missing.
    assert torch.equal(amplify_innovation(panel, wanted, 1e4 * norms, rows, 0.99), wanted)


def test_a_share_out_of_reach_ends_after_so_many_terms(problem: Callable) -> None:
    state, keys, weights, wanted, norms = crowded(problem)
    panel, rows = state.project(keys, weights), torch.arange(6)
    shrunk = torch.diag(panel.noise) @ torch.linalg.inv(torch.diag(panel.noise) + panel.gram)
    terms = [torch.linalg.matrix_power(shrunk, power) @ wanted for power in range(MOST_PASSES + 1)]
    asked = amplify_innovation(panel, wanted, norms, rows, 1.0)
    torch.testing.assert_close(asked, sum(terms), rtol=0, atol=1e-12)


@pytest.mark.parametrize("moved", [0.0, 0.1])
def test_raised_values_make_the_share_arrive_at_the_keys_as_they_are_now(problem: Callable, moved: float) -> None:
    state, keys, weights, wanted, _ = crowded(problem)
    rows = torch.arange(6)
    values = state.outputs(keys) + wanted
    state.update(keys, values, weights)
    generator = torch.Generator().manual_seed(8)
    further = torch.randn(6, 7, dtype=torch.float64, generator=generator)
    now = keys + moved * torch.randn(keys.shape, dtype=torch.float64, generator=generator)
    panel = state.project(keys, weights)
    left = torch.eye(6, dtype=torch.float64) - now @ state.precision_inverse() @ keys.T * weights
    plain, most = (
        1 - float(((torch.linalg.matrix_power(left, power) @ further).norm(dim=1) / further.norm(dim=1)).mean())
        for power in (1, 1 + MOST_PASSES)
    )
    assert plain < most - 0.05, "the state shrinks what it is asked for, or this shows nothing"
    share = 0.5 * (plain + most)
    before, inverse = state.outputs(now), state.precision_inverse()
    change = amplify_values(panel, now, further, further.norm(dim=1), rows, share)
    state.replace(keys, values, values + change, weights)
    assert arrived(state, now, before, further, rows) == pytest.approx(share, abs=BISECTED)
    assert torch.equal(state.precision_inverse(), inverse), "the rows' keys and weights are the same"


def test_what_wants_no_change_has_arrived_and_raises_nothing(problem: Callable) -> None:
    left = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    assert realized_fraction(left, torch.tensor([10.0, 2.0, 0.0])).tolist() == [0.5, 1.0, 1.0]
    assert realized_fraction(left, torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.0, 1.0, 0.0]
    state, keys, weights, wanted, norms = crowded(problem)
    rows = torch.arange(6)
    panel = state.project(keys, weights)
    plain = wanted - torch.diag(panel.noise) @ torch.linalg.solve(torch.diag(panel.noise) + panel.gram, wanted)
    share = 1 - float(((wanted - plain).norm(dim=1) / norms)[1:].mean())
    still = torch.cat((torch.zeros(1, dtype=norms.dtype), norms[1:]))
    assert torch.equal(amplify_innovation(panel, wanted, still, rows, share - 1e-6), wanted)


def test_a_batch_that_cannot_be_factored_cannot_be_raised(problem: Callable) -> None:
    state, keys, weights, wanted, norms = crowded(problem)
    panel = state.project(keys, weights)
    flawed = replace(panel, gram=-2 * panel.noise.diag())
    with pytest.raises(UpdateError, match="pivot 1 is not positive"):
        amplify_innovation(flawed, wanted, norms, torch.arange(6), 0.9)
