"""Layers with a baseline rule: checks, unsupported operations and transactions."""

import pytest
import torch

from rlsedit_fast.baselines import BASELINES, RULES, HistoryMEMIT, RuleLayer, make_layer, make_rule
from rlsedit_fast.errors import InputError, PriorError, UpdateError
from rlsedit_fast.rls import Prior, RLSState

D_K, D_V = 16, 5


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prior(lam=0.1):
    anchors = random(60, D_K, seed=9)
    return Prior(lam=lam, mu=1.0, anchor_moment=anchors.T @ anchors / 60)


def layer(name, weight=None, **options):
    weight = random(D_V, D_K, seed=1) if weight is None else weight
    if name == "alphaedit":
        options = {"null_share": 0.5, **options}
    if name == "ultraedit":
        options = {"rate": 0.1, **options}
    return make_layer(name, options, weight, prior(), delay=4, label="layer 3")


@pytest.mark.parametrize("name", RULES)
def test_batch_is_written_in_place_and_the_residual_is_reported(name):
    weight = random(D_V, D_K, seed=1)
    state = layer(name, weight)
    start = weight.clone()
    keys, requested = random(3, D_K, seed=2), random(3, D_V, seed=3)
    step = state.update_projected(state.project(keys), requested)
    torch.testing.assert_close(step.residual, requested - keys @ (weight - start).T, rtol=0, atol=1e-4)
    assert torch.equal(state.weight, weight)
    assert torch.equal(state.original, start)
    assert state.deviation() == pytest.approx(float((weight - start).norm()), rel=1e-5)
    assert step.change == pytest.approx(state.deviation(), rel=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_restoring_a_snapshot_restores_weight_and_memory(name):
    state, twin = layer(name), layer(name)
    first, second = ((random(3, D_K, seed=s), random(3, D_V, seed=s + 50)) for s in (2, 4))
    for one in (state, twin):
        one.update_projected(one.project(first[0]), first[1])
    before = state.weight.clone()

    taken = state.snapshot()
    state.update_projected(state.project(second[0]), second[1])
    assert not torch.equal(state.weight, before)
    state.restore(taken)
    del taken
    state.settle()
    assert torch.equal(state.weight, before)
    for one in (state, twin):
        one.update_projected(one.project(second[0]), second[1])
    assert torch.equal(state.weight, twin.weight), "the memory is restored as well"


def test_history_memit_matches_rls_with_the_same_prior():
    weight = random(D_V, D_K, seed=1, dtype=torch.float64)
    one = RuleLayer(weight, prior(), HistoryMEMIT())
    other = RLSState(weight, prior())
    for seed in (2, 3, 4):
        keys, requested = random(4, D_K, seed=seed).double(), random(4, D_V, seed=seed + 50).double()
        weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
        steps = [s.update_projected(s.project(keys, weights), requested) for s in (one, other)]
        torch.testing.assert_close(steps[0].residual, steps[1].residual, rtol=0, atol=1e-10)
    torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_cannot_remove_edits(name):
    state = layer(name)
    keys, values = random(2, D_K, seed=2), random(2, D_V, seed=3)
    for method in (state.remove, state.refresh):
        with pytest.raises(InputError, match=f"rule='{name}' cannot remove an edit.*same_subject='separate'"):
            method(keys, values)
    assert state.bounds().weight == float("inf")


@pytest.mark.parametrize("name", BASELINES)
def test_protecting_keys_requires_a_rule_that_accumulates_keys(name):
    state = layer(name)
    keys = random(2, D_K, seed=2)
    if name in ("memit-history", "alphaedit", "nse"):
        before = state.weight.clone()
        state.update(keys, state.outputs(keys), torch.full((2,), 1e6))
        assert torch.allclose(state.weight, before)
        state.update_projected(state.project(random(2, D_K, seed=4)), random(2, D_V, seed=5))
        assert (keys @ (state.weight - before).T).norm() < 1e-3 * (state.weight - before).norm()
    else:
        with pytest.raises(InputError, match="cannot protect prompts"):
            state.update(keys, state.outputs(keys))


@pytest.mark.parametrize("name", ["rome", "emmet", "ultraedit", "ft", "ft-bounded"])
def test_unsupported_weights_raise(name):
    state = layer(name)
    before = state.weight.clone()
    panel = state.project(random(2, D_K, seed=2), torch.tensor([1.0, 2.0]))
    with pytest.raises(InputError, match="does not support edit weights"):
        state.update_projected(panel, random(2, D_V, seed=3))
    assert torch.equal(state.weight, before)


def test_duplicate_key_cannot_be_fitted_exactly():
    state = layer("emmet")
    key = random(1, D_K, seed=2)
    with pytest.raises(UpdateError, match="linearly dependent"):
        state.update_projected(state.project(torch.cat((key, key))), random(2, D_V, seed=3))


def test_bad_rows_and_stale_panels_raise():
    state = layer("memit")
    before = state.weight.clone()
    panel = state.project(random(2, D_K, seed=2))
    for bad in (random(3, D_V), torch.full((2, D_V), float("nan")), torch.zeros(2, D_V, dtype=torch.int64)):
        with pytest.raises(InputError):
            state.update_projected(panel, bad)
    for bad in (random(2, D_K - 1), torch.zeros(0, D_K), torch.full((2, D_K), float("inf"))):
        with pytest.raises(InputError):
            state.project(bad)
    assert torch.equal(state.weight, before)
    state.update_projected(panel, random(2, D_V, seed=3))
    with pytest.raises(InputError, match="was changed after the panel"):
        state.update_projected(panel, random(2, D_V, seed=3))


def test_overflow_raises():
    state = layer("ft")
    before = state.weight.clone()
    with pytest.raises(UpdateError, match="overflows"):
        state.update_projected(state.project(1e-30 * random(1, D_K, seed=2)), torch.full((1, D_V), 1e30))
    assert torch.equal(state.weight, before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unknown", {}, "expected rls, or a rule that cannot undo edits: ft, ft-bounded, rome"),
        ("memit", {"share": 0.4}, "'memit' has no option share; its options are none"),
        ("rls", {"mu": 1.0}, "'rls' has no option mu"),
        ("rect", {"share": 0.0}, "above 0 and at most 1"),
        ("rect", {"share": "much"}, "share='much', expected a number"),
        ("rect", {"share": True}, "share=True, expected a number"),
        ("rect", {"share": None}, "share=None, expected a number"),
        ("ft", {"steps": None}, "steps=None, expected an integer"),
        ("ft", {"steps": 25.5}, "steps=25.5, expected an integer"),
        ("ft-bounded", {"bound": "5", "steps": "5"}, "bound='5', expected a number; steps='5', expected an integer"),
        ("alphaedit", {"null_share": "all"}, "expected a number or None"),
        ("memit", 3, "rule_options=3"),
        ("memit", {3: 1.0, "share": 1.0}, "has no option 3, share"),
        ("prune", {"base": 1.0}, "above 1"),
        ("nse", {"activation": 1.5}, "at most 1"),
        ("emmet", {"damping": -1.0}, "at least 0"),
        ("alphaedit", {"ridge": 0.0}, "above 0"),
        ("alphaedit", {"null_share": 0.0}, "above 0"),
        ("ultraedit", {"rate": 0.0}, "above 0"),
        ("ft", {"steps": 0}, "at least 1"),
        ("ft-bounded", {"bound": 0.0}, "above 0"),
        ("ft-bounded", {"steps": 0}, "at least 1"),
    ],
)
def test_unknown_rules_and_invalid_options_raise(name, options, message):
    with pytest.raises(InputError, match=message):
        make_rule(name, options)


def test_integers_and_none_are_valid_options():
    assert make_rule("emmet", {"damping": 1}).damping == 1
    assert make_rule("alphaedit", {"null_share": None}).null_share is None
    assert make_rule("rls", {}) is None


def test_unsupported_priors_raise():
    weight, bare = random(D_V, D_K), Prior(lam=1.0)
    with pytest.raises(PriorError, match="requires anchors"):
        make_layer("alphaedit", {}, weight, bare, delay=0, label="layer 3")
    with pytest.raises(PriorError, match="no eigenvalue of the anchor moment is below threshold=1e-09"):
        layer("alphaedit", null_share=None, threshold=1e-9)
    few = random(3, D_K)
    thin = Prior(lam=0.0, mu=1.0, anchor_moment=few.T @ few)
    with pytest.raises(PriorError, match="not positive definite"):
        make_layer("memit", {}, weight, thin, delay=0, label="layer 3")
    custom = Prior(lam=1.0, mu=1.0, anchor_keys=few, anchor_values=random(3, D_V))
    with pytest.raises(InputError, match="does not support custom anchor values"):
        make_layer("memit", {}, weight, custom, delay=0, label="layer 3")
