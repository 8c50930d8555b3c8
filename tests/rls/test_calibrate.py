"""`TrialLayer` matches `RLSState` with the same prior."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, PriorError
from rlsedit_fast.rls import Prior, RLSState, TrialLayer

CPU = torch.device("cpu")


def anchors_and_keys(count: int = 6, d_k: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    anchors = torch.randn(3 * d_k, d_k, dtype=torch.float64, generator=generator)
    return anchors, torch.randn(count, d_k, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("mu", [0.03, 1.0, 40.0])
@pytest.mark.parametrize("ridge", [1e-3, 5.0])
def test_panel_matches_the_state_up_to_mu_squared(mu: float, ridge: float) -> None:
    anchors, keys = anchors_and_keys()
    moment = anchors.T @ anchors
    trial = TrialLayer(moment, ridge, CPU, "layer").project(keys)
    prior = Prior(lam=mu * ridge**0.5, mu=mu, anchor_moment=moment)
    panel = RLSState(torch.zeros(5, 20, dtype=torch.float64), prior).project(keys)
    torch.testing.assert_close(trial.projected, mu**2 * panel.projected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(trial.gram, mu**2 * panel.gram, rtol=1e-10, atol=1e-12)
    assert torch.equal(trial.gram, trial.gram.T)


@pytest.mark.parametrize("mu", [0.5, 8.0])
def test_change_and_leakage_match_the_state(mu: float) -> None:
    anchors, keys = anchors_and_keys()
    moment, ridge = anchors.T @ anchors, 2.0
    requested = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    state = RLSState(torch.zeros(5, 20, dtype=torch.float64), Prior(lam=mu * ridge**0.5, mu=mu, anchor_moment=moment))
    state.update_projected(state.project(keys), requested)
    panel = TrialLayer(moment, ridge, CPU, "layer").project(keys)
    shared = torch.linalg.solve(mu**2 * torch.eye(6, dtype=torch.float64) + panel.gram, requested)
    torch.testing.assert_close(panel.change(shared), state.weight, rtol=1e-10, atol=1e-12)
    measured = float(torch.linalg.matrix_norm(anchors @ state.weight.T))
    assert panel.leakage(shared) == pytest.approx(measured, rel=1e-10)


def test_identity_moment_without_anchors() -> None:
    _, keys = anchors_and_keys()
    lam = 3.0
    requested = torch.ones(6, 5, dtype=torch.float64)
    state = RLSState(torch.zeros(5, 20, dtype=torch.float64), Prior(lam=lam))
    state.update_projected(state.project(keys), requested)
    panel = TrialLayer(torch.eye(20), 0.0, CPU, "layer").project(keys)
    shared = torch.linalg.solve(lam**2 * torch.eye(6, dtype=torch.float64) + panel.gram, requested)
    torch.testing.assert_close(panel.change(shared), state.weight, rtol=1e-10, atol=1e-12)
    assert panel.leakage(shared) == pytest.approx(float(state.weight.norm()), rel=1e-10)


@pytest.mark.parametrize(
    ("moment", "ridge", "error", "message"),
    [
        (torch.ones(4, 3), 1.0, InputError, "layer 7: anchor moment"),
        (torch.eye(4) / 0, 1.0, InputError, "layer 7: anchor moment contains NaN or Inf"),
        (torch.zeros(4, 4), 0.0, PriorError, "layer 7: .*not positive definite. Increase ridge or lam"),
        (-torch.eye(4), 0.5, PriorError, "with ridge 0.5 is not positive definite"),
    ],
)
def test_bad_moments_raise(moment: Tensor, ridge: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrialLayer(moment, ridge, CPU, "layer 7")
