"""Validation of priors; equivalent anchors give the same initial state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlsedit_fast.errors import InputError, PriorError
from rlsedit_fast.rls import Prior, RLSState
from rlsedit_fast.rls.reference import evaluate_objective, solve_all

KEYS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
VALUES = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
MOMENT = KEYS.T @ KEYS
CROSS = VALUES.T @ KEYS
ENERGY = float(VALUES.square().sum())
ASYMMETRIC = MOMENT + torch.triu(torch.full_like(MOMENT, 1e-6), 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lam": 0.0}, PriorError, "both 0"),
        ({"lam": 0.0, "mu": 0.0}, PriorError, "both 0"),
        ({"lam": 1e-200, "mu": 0.0}, PriorError, "both 0"),
        ({"lam": -1.0}, InputError, "lam is -1"),
        ({"lam": float("nan")}, InputError, "lam is nan"),
        ({"lam": float("inf")}, InputError, "lam is inf"),
        ({"lam": 1e200}, InputError, "lam"),
        ({"lam": 1.0, "mu": -0.5, "anchor_keys": KEYS}, InputError, "mu is -0.5"),
        ({"lam": 1.0, "mu": float("nan"), "anchor_keys": KEYS}, InputError, "mu is nan"),
        ({"lam": 1.0, "mu": 1.0}, PriorError, "no anchors"),
        ({"lam": 1.0, "anchor_keys": KEYS}, PriorError, "mu is 0"),
        ({"lam": 1.0, "anchor_moment": MOMENT}, PriorError, "mu is 0"),
        ({"lam": 1.0, "mu": 1.0, "anchor_keys": KEYS, "anchor_moment": MOMENT}, PriorError, "only one of them"),
        ({"lam": 1.0, "anchor_values": VALUES}, PriorError, "requires anchor_keys"),
        ({"lam": 1.0, "mu": 1.0, "anchor_moment": MOMENT, "anchor_values": VALUES}, PriorError, "requires anchor_keys"),
        ({"lam": 1.0, "mu": 1.0, "anchor_keys": KEYS, "anchor_cross": CROSS}, PriorError, "requires anchor_moment"),
        ({"lam": 1.0, "mu": 1.0, "anchor_moment": MOMENT, "anchor_cross": CROSS}, PriorError, "anchor_energy"),
        ({"lam": 1.0, "mu": 1.0, "anchor_moment": MOMENT, "anchor_energy": 1.0}, PriorError, "anchor_energy"),
        ({"lam": 1.0, "mu": 1.0, "anchor_keys": KEYS[0]}, InputError, "anchor_keys"),
        ({"lam": 1.0, "mu": 1.0, "anchor_keys": KEYS[:0]}, InputError, "no rows"),
        ({"lam": 1.0, "mu": 1.0, "anchor_keys": KEYS.long()}, InputError, "int64"),
        (
            {"lam": 1.0, "mu": 1.0, "anchor_keys": KEYS * torch.nan},
            InputError,
            "anchor_keys contains NaN or Inf in row 0",
        ),
        ({"lam": 1.0, "mu": 1.0, "anchor_keys": KEYS, "anchor_values": VALUES[:4]}, InputError, "anchor_values"),
        ({"lam": 1.0, "mu": 1.0, "anchor_keys": KEYS, "anchor_values": VALUES / 0}, InputError, "anchor_values"),
        ({"lam": 1.0, "mu": 1.0, "anchor_moment": KEYS}, InputError, "anchor_moment"),
        ({"lam": 1.0, "mu": 1.0, "anchor_moment": MOMENT.bfloat16()}, InputError, "bfloat16"),
        ({"lam": 1.0, "mu": 1.0, "anchor_moment": MOMENT * torch.inf}, InputError, "anchor_moment contains NaN or Inf"),
        ({"lam": 1.0, "mu": 1.0, "anchor_moment": ASYMMETRIC}, InputError, "not symmetric"),
        (
            {"lam": 1.0, "mu": 1.0, "anchor_moment": MOMENT, "anchor_cross": CROSS[:, :4], "anchor_energy": ENERGY},
            InputError,
            "anchor_cross",
        ),
        (
            {"lam": 1.0, "mu": 1.0, "anchor_moment": MOMENT, "anchor_cross": CROSS, "anchor_energy": -1.0},
            InputError,
            "anchor_energy is -1",
        ),
    ],
)
def test_invalid_priors_raise(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Prior(**options)


def test_moment_may_be_asymmetric_up_to_rounding() -> None:
    Prior(lam=1.0, mu=1.0, anchor_moment=ASYMMETRIC.float())


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (Prior(lam=1.0, mu=1.0, anchor_keys=KEYS), "anchor_keys of mlp"),
        (Prior(lam=1.0, mu=1.0, anchor_moment=MOMENT), "anchor_moment of mlp"),
    ],
)
def test_anchor_width_mismatch_raises(prior: Prior, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RLSState(torch.ones(3, 6), prior, name="mlp")


def test_anchor_value_width_mismatch_raises() -> None:
    rows = Prior(lam=1.0, mu=1.0, anchor_keys=KEYS, anchor_values=VALUES)
    sums = Prior(lam=1.0, mu=1.0, anchor_moment=MOMENT, anchor_cross=CROSS, anchor_energy=ENERGY)
    for prior, message in ((rows, "anchor_values of mlp"), (sums, "anchor_cross of mlp")):
        with pytest.raises(InputError, match=message):
            RLSState(torch.ones(4, 5), prior, name="mlp")


@pytest.mark.parametrize(
    "prior",
    [
        Prior(lam=0.0, mu=2.0, anchor_keys=KEYS[:3]),
        Prior(lam=0.0, mu=2.0, anchor_moment=KEYS[:3].T @ KEYS[:3]),
        Prior(lam=1e-12, mu=2.0, anchor_keys=KEYS[:3]),
        Prior(lam=0.1, mu=1.0, anchor_moment=MOMENT - 9 * torch.eye(5, dtype=torch.float64)),
        Prior(lam=0.0, mu=1.0, anchor_moment=torch.zeros(5, 5)),
    ],
)
def test_singular_precision_raises(prior: Prior) -> None:
    with pytest.raises(PriorError, match=rf"mlp.*lam={prior.lam:g}, mu={prior.mu:g}, smallest pivot .*increase lam"):
        RLSState(torch.ones(3, 5), prior, name="mlp")


def test_error_names_the_failed_pivot() -> None:
    moment = torch.tensor([[4.0, 2.0, 0.0], [2.0, 1.0 - 0.25, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(PriorError, match=r"smallest pivot -0\.25 at feature 1"):
        RLSState(torch.ones(2, 3), Prior(lam=0.0, mu=1.0, anchor_moment=moment))


def test_positive_pivot_at_the_rounding_level_raises() -> None:
    moment = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]], dtype=torch.float64)
    torch.linalg.cholesky(moment)
    with pytest.raises(PriorError, match=r"smallest pivot 2\.22045e-16 at feature 1"):
        RLSState(torch.ones(2, 2), Prior(lam=0.0, mu=1.0, anchor_moment=moment), dtype=torch.float64)


def test_features_of_very_different_scale() -> None:
    state = RLSState(
        torch.ones(2, 3), Prior(lam=0.0, mu=1.0, anchor_moment=torch.diag(torch.tensor([1e20, 1.0, 1e-10]))),
        dtype=torch.float64,
    )  # fmt: skip
    assert state.precision_inverse().diagonal().tolist() == pytest.approx([1e-20, 1.0, 1e10])


def test_overflowing_inverse_raises() -> None:
    with pytest.raises(PriorError, match=r"overflows torch\.float32"):
        RLSState(torch.ones(2, 3), Prior(lam=1e-20))
    RLSState(torch.ones(2, 3), Prior(lam=1e-20), dtype=torch.float64)


def test_default_anchors_start_at_the_original_weight() -> None:
    weight = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for prior in (
        Prior(lam=2.0),
        Prior(lam=0.5, mu=3.0, anchor_keys=KEYS),
        Prior(lam=0.5, mu=3.0, anchor_moment=MOMENT),
    ):
        state = RLSState(weight, prior)
        assert torch.equal(state.weight, weight)
        assert (state.objective, state.deviation(), state.edits) == (0.0, 0.0, 0)
        _, inverse, _ = solve_all(weight, prior, KEYS[:0], VALUES[:0])
        torch.testing.assert_close(state.precision_inverse(), inverse, rtol=1e-12, atol=0)


def test_custom_anchors_start_at_their_minimizer() -> None:
    weight = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = Prior(lam=0.5, mu=3.0, anchor_keys=KEYS, anchor_values=VALUES)
    sums = Prior(lam=0.5, mu=3.0, anchor_moment=MOMENT, anchor_cross=CROSS, anchor_energy=ENERGY)
    by_rows, by_sums = RLSState(weight, rows), RLSState(weight, sums)
    minimizer, _, objective = solve_all(weight, rows, KEYS[:0], VALUES[:0])
    torch.testing.assert_close(by_rows.weight, minimizer, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_sums.weight, minimizer, rtol=0, atol=1e-12)
    assert by_rows.objective == pytest.approx(objective, rel=1e-12)
    assert by_sums.objective == pytest.approx(objective, rel=1e-10)
    assert objective == pytest.approx(evaluate_objective(minimizer, weight, sums, KEYS[:0], VALUES[:0]), rel=1e-10)
    assert by_rows.deviation() <= by_rows.bounds().weight
    assert float((KEYS @ by_rows.weight.T - VALUES).norm()) <= by_rows.bounds().anchors


def test_custom_anchors_with_the_original_outputs_are_the_default() -> None:
    weight = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = RLSState(weight, Prior(lam=0.5, mu=3.0, anchor_keys=KEYS, anchor_values=KEYS @ weight.T))
    torch.testing.assert_close(state.weight, weight, rtol=0, atol=1e-13)
    assert state.objective == pytest.approx(0.0, abs=1e-25)


def test_too_small_anchor_energy_raises() -> None:
    sums = Prior(lam=0.0, mu=1.0, anchor_moment=MOMENT, anchor_cross=CROSS, anchor_energy=0.1 * ENERGY)
    with pytest.raises(PriorError, match="anchor_energy"):
        RLSState(torch.zeros(3, 5), sums)


def test_anchors_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch, problem: Callable) -> None:
    cases = [problem(kind=kind, weighted=True) for kind in ("keys", "moment", "custom keys", "custom moment")]
    whole = [case.state() for case in cases]
    for module in ("prior", "build"):
        monkeypatch.setattr(f"rlsedit_fast.rls.{module}.CHUNK", 3)
    for case, state in zip(cases, whole, strict=True):
        chunked = case.state()
        torch.testing.assert_close(chunked.precision_inverse(), state.precision_inverse(), rtol=0, atol=1e-11)
        torch.testing.assert_close(chunked.weight, state.weight, rtol=0, atol=1e-11)
        chunked.refresh(*case.all())
        case.check(chunked, case.all())
