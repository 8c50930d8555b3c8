"""The terms of the objective, changed weights and used shares, against direct computation."""

from __future__ import annotations

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.errors import InputError, RemovalError
from rlsedit_fast.rls import (
    BlockLayout,
    BlockMoment,
    BlockPrior,
    BlockState,
    Prior,
    RLSState,
    SeparateState,
    used_share,
)
from rlsedit_fast.rls.reference import solve_all

KINDS = ("weight", "keys", "moment", "custom keys", "custom moment")


def direct(case, state, rows):
    """`||W - W0||`, `||K0 W^T - V0||` and the misfit of rows `(K, V, w)`, from the weight of the state."""
    original, weight, prior = case.weight.double(), state.weight.double(), case.prior
    anchors = None
    if prior.mu:
        anchors = max(prior.anchor_misfit(original, weight - original), 0.0) ** 0.5
    keys, values, weights = (torch.cat([row[at] for row in rows]).double() for at in range(3))
    misfit = float(((keys @ weight.T - values).square().sum(1) * weights).sum()) ** 0.5
    return float((weight - original).norm()), anchors, misfit


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("moment", torch.float64),
        ("moment", torch.float32),
        ("custom moment", torch.float64),
        ("keys", torch.float32),
        ("weight", torch.float32),
    ],
)
def test_terms_equal_direct_computation_after_a_long_stream(problem, kind, dtype):
    """1,000 updates, 200 removals, 50 replacements and 100 halved weights; read at irregular times."""
    case = problem(kind=kind, dtype=dtype, sizes=[1] * 1000, d_k=29, d_v=11, condition=1e3, weighted=True)
    state = case.state(delay=37)
    rows = [(k, v, w) for k, v, w in case.batches()]
    reads = torch.randint(0, 7, (1400,), generator=torch.Generator().manual_seed(3)).tolist()
    for at, row in enumerate(rows):
        state.update(*row)
        if not reads[at]:
            state.terms()
    for at in range(200):
        state.remove(*rows.pop(at))
        if not reads[1000 + at]:
            state.terms()
    for at in range(50):
        keys, values, weights = rows[at]
        state.replace(keys, values, values + 1, weights)
        rows[at] = keys, values + 1, weights
    for at in range(100, 200):
        keys, values, weights = rows[at]
        state.reweigh(keys, values, weights, weights / 2)
        rows[at] = keys, values, weights / 2
    found, (moved, anchors, misfit) = state.terms(), direct(case, state, rows)
    # The misfit is the rest of J: its error is that of the recursion of J.
    lost = 1e-10 if dtype == torch.float64 else case.allowed()
    assert found.weight == pytest.approx(moved, rel=lost)
    assert found.anchors == (None if anchors is None else pytest.approx(anchors, rel=lost))
    assert found.edits == pytest.approx(misfit, rel=lost * case.spread() / misfit**2)
    assert found.weight <= state.bounds().weight
    assert anchors is None or found.anchors <= state.bounds().anchors
    assert state.edits == 800


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tracked_term_is_measured_again_where_it_cancels(problem, dtype):
    """Without that, removing everything leaves the rounding errors of large terms."""
    case = problem(kind="moment", dtype=dtype, sizes=[3, 2], strength=2.0)
    state = case.state()
    for batch in case.batches():
        state.update(*batch)
        state.terms()
    largest = state.terms().anchors
    for batch in reversed(case.batches()):
        state.remove(*batch)
    found = state.terms()
    moved = (state.weight - state.original).double()
    assert found.anchors == pytest.approx(case.prior.anchor_change(moved) ** 0.5, rel=1e-4)
    assert found.anchors < 1e-3 * largest


def test_terms_are_restored_and_follow_a_refresh(problem):
    case = problem(kind="moment", dtype=torch.float32, sizes=[2, 2, 2])
    state = case.state()
    first, second, third = case.batches()
    state.update(*first)
    before = state.terms()
    snapshot = state.snapshot()
    state.update(*second)
    assert state.terms() != before
    state.restore(snapshot)
    assert state.terms() == before
    del snapshot
    state.refresh(*third)
    weight, _, _ = solve_all(case.weight, case.prior, *third)
    assert state.terms().weight == pytest.approx(float((weight - case.weight.double()).norm()), rel=1e-5)
    again = RLSState(case.weight, case.prior, saved=state.saved(), dtype=torch.float32)
    assert again.terms() == state.terms()


def test_terms_are_not_computed_by_a_step(problem, monkeypatch):
    case = problem(kind="moment", sizes=[2, 3])
    monkeypatch.setattr(Prior, "times_moment", lambda *_args: pytest.fail("a step computed a term"))
    state = case.state()
    for batch in case.batches():
        state.update(*batch)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_weights_equal_the_solution_with_these_weights(problem, kind, weighted):
    case = problem(kind=kind, weighted=weighted, sizes=[3, 4, 2])
    state = case.state(delay=2)
    for batch in case.batches():
        state.update(*batch)
    keys, values, weights = case.all()
    old = torch.ones(9, dtype=torch.float64) if weights is None else weights
    new = old.clone()
    for some, factor in (([1, 5], 0.5), ([1], 0.25), ([1, 2], 3.0)):
        after = new.clone()
        after[some] *= factor
        state.reweigh(keys[some], values[some], new[some], after[some])
        new = after
        case.check(state, (keys, values, new), factor=4)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ([1.0, 1.0], [0.5, 2.0], "all be smaller"),
        ([1.0, 1.0], [0.5, 1.0], "all be smaller"),
        ([1.0, 1.0], [0.5, 0.0], "must be positive"),
        ([1.0, 1.0], [0.5], "shape"),
        ([1.0], [0.5], "shape"),
    ],
)
def test_invalid_weights_change_nothing(problem, record, same, old, new, text):
    case = problem(sizes=[2])
    state = case.state()
    state.update(*case.all())
    before = record(state)
    with pytest.raises(InputError, match=text):
        state.reweigh(case.keys, case.values, *(torch.tensor(one, dtype=torch.float64) for one in (old, new)))
    assert same(before, record(state))


def test_energies_of_rows_add_up_to_the_objective(problem):
    case = problem(kind="moment", sizes=[4, 3], weighted=True)
    state, one_by_one = case.state(), case.state()
    total = 0.0
    for keys, values, weights in case.batches():
        energies = state.update(keys, values, weights).energy
        total += float(energies.sum())
        for at, energy in enumerate(energies.tolist()):
            alone = one_by_one.update(keys[at : at + 1], values[at : at + 1], weights[at : at + 1])
            assert float(alone.energy) == pytest.approx(energy, rel=1e-9)
    assert state.objective == pytest.approx(total, rel=1e-9)


def test_used_share_is_that_of_the_covariances(problem):
    case = problem(kind="moment", sizes=[5, 4], weighted=True)
    state = case.state(delay=3)
    (first, second) = case.batches()
    state.update(*first)
    keys, _, weights = second
    found = used_share(state, keys, weights)
    start = case.state().precision_inverse()
    twin = case.state()
    twin.update(*first)
    for at in range(4):
        key = keys[at]
        expected = 1 - float(key @ twin.precision_inverse() @ key) / float(key @ start @ key)
        assert float(found[at]) == pytest.approx(expected, abs=1e-9)
        twin.update(keys[at : at + 1], torch.zeros(1, 10, dtype=torch.float64), weights[at : at + 1])
    assert float(used_share(case.state(), keys[:1])) < 1e-12


def mixture(dtype=torch.float64, tokens=40):
    layout = BlockLayout(experts=4, width=5, active=2)
    generator = torch.Generator().manual_seed(1)

    def keys(n):
        features = torch.randn(n, 10, generator=generator, dtype=dtype)
        chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(n)])
        return torch.cat([features, chosen.to(dtype)], 1)

    anchors = keys(tokens)
    dense = torch.zeros(tokens, 20, dtype=dtype)
    for row, key in enumerate(anchors):
        for slot, expert in enumerate(key[10:].long().tolist()):
            dense[row, 5 * expert : 5 * expert + 5] = key[5 * slot : 5 * slot + 5]
    routed = torch.stack([dense[:, 5 * e : 5 * e + 5].T @ dense[:, 5 * e : 5 * e + 5] for e in range(4)]) / tokens
    reached = torch.stack([(dense[:, 5 * e : 5 * e + 5] != 0).any(1).sum() for e in range(4)])
    moment = BlockMoment(routed=routed.float(), shared=None, reached=reached, tokens=tokens, energy=1.0)
    prior = BlockPrior(layout=layout, lam=0.3, mu=0.8, moment=moment)
    weight = torch.randn(4, 3, 5, generator=generator, dtype=dtype)
    return prior, weight, keys(12), torch.randn(12, 3, generator=generator, dtype=dtype), dense / tokens**0.5


@pytest.mark.parametrize("kind", [BlockState, SeparateState])
def test_terms_of_a_mixture_are_exact_or_upper_bounds(kind):
    prior, weight, keys, values, anchors = mixture()
    original = weight.clone()
    state = kind(list(weight), prior)
    state.update(keys[:7], values[:7])
    state.update(keys[7:], values[7:])
    moved = torch.cat(list(weight - original), 1)
    found, bounds = state.terms(), state.bounds()
    assert found.weight == pytest.approx(float(moved.norm()), rel=1e-12)
    leaked = float((anchors @ moved.T).norm())
    assert 0 < leaked <= found.anchors <= bounds.anchors * (1 + 1e-12)
    assert found.weight <= bounds.weight
    if kind is BlockState:
        misfit = float((state.outputs(keys) - values).norm())
        assert found.edits == pytest.approx(misfit, rel=1e-10)
        assert bounds.weight < state.objective**0.5 / prior.lam  # tighter than from all of J
    else:
        assert found.edits is None


def test_changed_weights_of_a_mixture_equal_a_refresh_with_these_weights():
    prior, weight, keys, values, _ = mixture()
    model = weight.clone()
    state, fresh = BlockState(list(model), prior), BlockState(list(weight), prior)
    ones = torch.ones(12, dtype=torch.float64)
    state.update(keys, values)
    new = ones.clone()
    new[[2, 9]] = 0.5
    state.reweigh(keys[[2, 9]], values[[2, 9]], ones[:2], new[[2, 9]])
    fresh.refresh(keys, values, new)
    torch.testing.assert_close(model, weight, rtol=1e-10, atol=1e-12)
    assert state.objective == pytest.approx(fresh.objective, rel=1e-10)
    assert state.edits == 12
    assert used_share(state, keys[2:3]) < used_share(state, keys[3:4])
    with pytest.raises(InputError, match="not applied"):  # the weight was halved
        state.remove(keys[2:3], values[2:3])
    with pytest.raises(RemovalError):
        SeparateState(list(weight), prior).reweigh(keys[:1], values[:1], ones[:1], ones[:1] / 2)


def test_a_bfloat16_weight_in_place_has_exact_terms():
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    original = weight.double()
    state = rf.RLSState(weight, Prior(lam=1.0), in_place=True)
    state.update(torch.randn(3, 20), torch.randn(3, 6))
    assert state.terms().weight == pytest.approx(float((state.weight.double() - original).norm()), rel=1e-6)
