"""The joint share is the minimiser that it says it is, and MEMIT's share is MEMIT's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rlsedit_fast.errors import InputError, UpdateError
from rlsedit_fast.rls import joint_innovations, memit_share


def layers(problem: Callable, count: int = 3, **options: object) -> list:
    return [problem(seed=seed, d_k=14 + 3 * seed, d_v=5, sizes=[4, 3], **options) for seed in range(count)]


def test_the_joint_share_makes_each_layer_take_its_step_of_the_joint_minimiser(problem: Callable) -> None:
    cases = layers(problem)
    states = [case.state() for case in cases]
    for case, state in zip(cases, states, strict=True):
        state.update(*case.batches()[0])  # so that no layer is at its start
    w = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    residual = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    keys = [case.batches()[1][0] for case in cases]
    panels = [state.project(k, w) for state, k in zip(states, keys, strict=True)]
    before = [state.weight.clone() for state in states]
    inverses = [state.precision_inverse() for state in states]
    for state, panel, innovation in zip(states, panels, joint_innovations(panels, residual), strict=True):
        state.update_projected(panel, innovation)

    # The minimiser of sum_i w_i ||(sum_l K_l dW_l^T - R)_i||^2 + sum_l tr(dW_l S_l dW_l^T), all layers as one wide one.
    wide = torch.cat(keys, 1)
    precision = torch.block_diag(*(torch.linalg.inv(inverse) for inverse in inverses))
    whole = torch.linalg.solve(precision + wide.T @ (w[:, None] * wide), wide.T @ (w[:, None] * residual)).T
    steps = torch.cat([state.weight - old for state, old in zip(states, before, strict=True)], 1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-11)

    shared = torch.linalg.solve(torch.diag(1 / w) + sum(panel.gram for panel in panels), residual)
    for state, old, panel in zip(states, before, panels, strict=True):
        torch.testing.assert_close(state.weight - old, shared.T @ panel.projected, rtol=0, atol=1e-12)


def test_the_joint_share_of_one_layer_is_the_whole_residual(problem: Callable) -> None:
    case = problem(dtype=torch.float32, weighted=True)
    panel = case.state().project(case.keys, case.weights)
    (innovation,) = joint_innovations([panel], case.values)
    assert innovation.dtype == torch.float32
    torch.testing.assert_close(innovation, case.values)


def test_memit_spreads_the_residual_evenly_when_each_share_is_realised() -> None:
    residual, shares = torch.full((2, 3), 6.0), []
    for index in (1, 2, 3):
        share = memit_share(residual, index, 3)
        shares.append(share)
        residual = residual - share
    assert all(torch.equal(share, torch.full((2, 3), 2.0)) for share in shares)
    assert torch.equal(residual, torch.zeros(2, 3))


def test_bad_panels_and_residuals_are_refused(problem: Callable) -> None:
    one, two, _ = layers(problem)
    panel, other = one.state().project(one.keys), two.state().project(two.keys)
    residual = torch.ones(7, 5)
    with pytest.raises(InputError, match="empty"):
        joint_innovations([], residual)
    with pytest.raises(InputError, match=r"panels\[1\]"):
        joint_innovations([panel, two.state().project(two.keys[:3])], residual)
    with pytest.raises(InputError, match=r"panels\[1\]"):
        joint_innovations([panel, two.state().project(two.keys, torch.full((7,), 2.0))], residual)
    with pytest.raises(InputError, match="residual"):
        joint_innovations([panel, other], residual[:3])
    residual[2, 0] = torch.nan
    with pytest.raises(InputError, match="residual is not finite in row 2"):
        joint_innovations([panel, other], residual)


def test_a_batch_that_cannot_be_factored_over_its_layers_is_an_error_of_the_package(problem: Callable) -> None:
    panel = problem(sizes=[2]).state().project(problem(sizes=[2]).keys)
    flawed = replace(panel, gram=-2 * panel.noise.diag())
    with pytest.raises(UpdateError, match="pivot 1 is not positive"):
        joint_innovations([flawed], torch.ones(2, 3, dtype=torch.float64))
