"""Calibrated numbers do to a pilot batch what was asked for, measured through the solver itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, PriorError
from rlsedit_fast.rls import Prior, RLSState, calibrate, joint_innovations


def pilot(layers: int = 2, count: int = 6, d_k: int = 20) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    moments, keys = [], []
    for index in range(layers):
        anchors = torch.randn(3 * d_k, d_k + index, dtype=torch.float64, generator=generator)
        moments.append(anchors.T @ anchors)
        keys.append(torch.randn(count, d_k + index, dtype=torch.float64, generator=generator))
    return moments, keys


@pytest.mark.parametrize("adherence", [0.05, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_states_realise_the_adherence_that_was_asked_for(adherence: float, layers: int) -> None:
    moments, keys = pilot(layers)
    chosen = calibrate.choose(moments, keys, adherence, 1e-3)
    states = [
        RLSState(torch.zeros(6, k.shape[1], dtype=torch.float64), Prior(lam=lam, mu=chosen.mu, anchor_moment=moment))
        for moment, k, lam in zip(moments, keys, chosen.lam, strict=True)
    ]
    panels = [state.project(k) for state, k in zip(states, keys, strict=True)]
    residual = torch.eye(6, dtype=torch.float64)  # innovations of equal norms and independent directions
    for state, panel, innovation in zip(states, panels, joint_innovations(panels, residual), strict=True):
        state.update_projected(panel, innovation)
    left = residual - sum(k @ state.weight.T for state, k in zip(states, keys, strict=True))
    assert float(1 - left.norm(dim=1).mean()) == pytest.approx(adherence, abs=1e-9)
    assert chosen.realised == pytest.approx(adherence, abs=1e-9)
    for state, moment, leakage in zip(states, moments, chosen.leakage, strict=True):
        measured = float(((state.weight @ moment) * state.weight).sum()) ** 0.5 / float(residual.norm())
        assert leakage == pytest.approx(measured, rel=1e-8)


def test_lam_is_the_ridge_relative_to_the_moment() -> None:
    moments, keys = pilot()
    chosen = calibrate.choose(moments, keys, 0.9, 1e-2)
    for lam, moment in zip(chosen.lam, moments, strict=True):
        assert lam**2 == pytest.approx(1e-2 * chosen.mu**2 * float(moment.trace()) / len(moment))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_choice_carries_over_between_scales(scale: float) -> None:
    moments, keys = pilot()
    plain = calibrate.choose(moments, keys, 0.9, 1e-2)
    anchors = calibrate.choose([scale * moment for moment in moments], keys, 0.9, 1e-2)
    assert anchors.mu == pytest.approx(plain.mu / math.sqrt(scale))
    assert anchors.lam == pytest.approx(plain.lam)


def test_assessing_what_was_chosen_gives_it_back() -> None:
    moments, keys = pilot()
    chosen = calibrate.choose(moments, keys, 0.8, 1e-2)
    given = calibrate.assess(moments, keys, chosen.lam, chosen.mu)
    assert given.realised == pytest.approx(chosen.realised)
    assert given.leakage == pytest.approx(chosen.leakage)
    assert calibrate.assess(moments, keys, chosen.lam, 2 * chosen.mu).realised < chosen.realised


def test_an_adherence_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    moments, keys = pilot(1)
    twice = [torch.cat((keys[0], keys[0]))]
    with pytest.raises(InputError, match=r"adherence 0\.95.*realises 0\.29"):
        calibrate.choose(moments, twice, 0.95, 1e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adherence": 0.0}, InputError, "adherence"),
        ({"adherence": 1.0}, InputError, "adherence"),
        ({"adherence": math.nan}, InputError, "adherence"),
        ({"ridge": -1.0}, InputError, "ridge"),
        ({"ridge": math.inf}, InputError, "ridge"),
        ({"moments": []}, InputError, "0 moments"),
        ({"pilot_keys": [torch.ones(3, 20)]}, InputError, "1 pilot_keys"),
        ({"pilot_keys": [torch.ones(3, 20), torch.ones(4, 21)]}, InputError, r"pilot_keys\[1\]"),
        ({"pilot_keys": [torch.ones(0, 20), torch.ones(0, 21)]}, InputError, "no rows"),
        ({"pilot_keys": [torch.zeros(3, 20), torch.zeros(3, 21)]}, InputError, "zero"),
        ({"pilot_keys": [torch.ones(3, 20) / 0, torch.ones(3, 21)]}, InputError, r"pilot_keys\[0\] is not finite"),
        ({"moments": [torch.zeros(20, 20), torch.eye(21)]}, PriorError, r"moments\[0\]"),
    ],
)
def test_bad_arguments_are_refused(change: dict, error: type[Exception], message: str) -> None:
    moments, keys = pilot()
    given = {"moments": moments, "pilot_keys": keys, "adherence": 0.9, "ridge": 1e-3, **change}
    with pytest.raises(error, match=message):
        calibrate.choose(**given)


def test_bad_numbers_to_assess_are_refused() -> None:
    moments, keys = pilot()
    for lam, mu, message in (([1.0], 1.0, "lam"), ([1.0, -1.0], 1.0, "lam"), ([1.0, 1.0], 0.0, "mu")):
        with pytest.raises(InputError, match=message):
            calibrate.assess(moments, keys, lam, mu)
