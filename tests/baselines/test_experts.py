"""Baselines that edit the experts of a mixture separately."""

from __future__ import annotations

import math

import pytest
import torch

from rlsedit_fast.baselines import BASELINES, ExpertRuleLayer, RuleLayer, make_rule
from rlsedit_fast.errors import InputError, UpdateError
from rlsedit_fast.rls import BlockLayout, BlockMoment, BlockPrior, Prior

LAYOUT = BlockLayout(experts=5, width=6, active=2, shared=4)
ROWS = 3


def draw_keys(count, layout=LAYOUT):
    chosen = torch.stack([torch.randperm(layout.experts)[: layout.active] for _ in range(count)])
    shared = torch.randn(count, layout.shared) if layout.shared else None
    return layout.pack(torch.randn(count, layout.active, layout.width), chosen, shared).double()


def blocks(layout=LAYOUT):
    return [torch.randn(ROWS, layout.block_width(block)).double() for block in range(layout.blocks)]


def make_prior(layout=LAYOUT):
    torch.manual_seed(1)
    moment = BlockMoment.empty(layout, torch.device("cpu")).added(layout, draw_keys(200, layout).float()).mean()
    return BlockPrior(layout=layout, lam=0.7, mu=2.0, moment=moment)


def own_prior(prior, block):
    """Returns the prior of a block as that of an ordinary layer."""
    lam = math.sqrt(float(prior.ridges()[block]))
    return Prior(lam=lam, mu=prior.mu * math.sqrt(prior.kappa), anchor_moment=prior.moment.block(block))


@pytest.mark.parametrize("name", ["memit", "memit-history", "alphaedit", "ft"])
def test_each_expert_is_edited_like_an_ordinary_layer_with_its_part_of_the_change(name):
    prior, rule = make_prior(), make_rule(name, {"null_share": 0.5} if name == "alphaedit" else {})
    weights = blocks()
    plain = [
        RuleLayer(weight.clone(), own_prior(prior, block), rule, in_place=True) for block, weight in enumerate(weights)
    ]
    layer = ExpertRuleLayer(weights, prior, rule, "split")
    for _ in range(2):
        keys, innovation = draw_keys(8), torch.randn(8, ROWS).double()
        row_weights = torch.rand(8).double() + 0.5 if name != "ft" else torch.ones(8).double()
        features = LAYOUT.features(keys)
        for group in LAYOUT.groups(keys):
            one = plain[group.block]
            panel = one.project(LAYOUT.part(features, group), row_weights[group.rows])
            one.update_projected(panel, innovation[group.rows] / 3)
        before = layer.outputs(keys)
        step = layer.update_projected(layer.project(keys, row_weights), innovation)
        torch.testing.assert_close(step.residual, innovation - (layer.outputs(keys) - before))
    for weight, one in zip(weights, plain, strict=True):
        torch.testing.assert_close(weight, one.weight, rtol=1e-10, atol=1e-12)
    assert layer.edits == 16


def test_one_expert_or_the_shared_one_carries_the_whole_change():
    prior, keys, innovation = make_prior(), draw_keys(1), torch.ones(1, ROWS).double()
    for carriers in ("shared", "top"):
        weights = blocks()
        originals = [weight.clone() for weight in weights]
        layer = ExpertRuleLayer(weights, prior, make_rule("memit", {}), carriers)
        step = layer.update_projected(layer.project(keys), innovation)
        changed = [
            at for at, (now, was) in enumerate(zip(weights, originals, strict=True)) if not torch.equal(now, was)
        ]
        norms = LAYOUT.features(keys)[0, : LAYOUT.routed].view(LAYOUT.active, LAYOUT.width).norm(dim=1)
        assert changed == [LAYOUT.experts if carriers == "shared" else int(LAYOUT.routing(keys)[0, norms.argmax()])]
        assert float(step.residual.norm()) < float(innovation.norm())


def test_a_snapshot_restores_weights_and_memory_bit_for_bit():
    prior, rule = make_prior(), make_rule("memit-history", {})
    weights = blocks()
    layer = ExpertRuleLayer(weights, prior, rule, "split")
    first, second = draw_keys(4), draw_keys(4)
    values = torch.randn(8, ROWS).double()
    layer.update_projected(layer.project(first), values[:4])
    taken, kept = layer.snapshot(), [weight.clone() for weight in weights]
    layer.update_projected(layer.project(second), values[4:])
    after = [weight.clone() for weight in weights]
    layer.restore(taken)
    assert all(torch.equal(now, was) for now, was in zip(weights, kept, strict=True))
    layer.update_projected(layer.project(second), values[4:])
    assert all(torch.equal(now, was) for now, was in zip(weights, after, strict=True))


def test_a_change_that_overflows_leaves_the_layer_unchanged():
    layout = BlockLayout(experts=2, width=2, active=1)
    weights = [torch.ones(1, 2), torch.ones(1, 2)]
    layer = ExpertRuleLayer(weights, BlockPrior(layout=layout, lam=1e-6), make_rule("memit", {}), "split")
    keys = layout.pack(torch.full((2, 1, 2), 1e-3), torch.tensor([[0], [1]]))
    with pytest.raises(UpdateError, match="overflows"):
        layer.update_projected(layer.project(keys), torch.tensor([[1.0], [3e38]]))
    assert all(torch.equal(weight, torch.ones(1, 2)) for weight in weights)
    assert layer.edits == 0


def test_what_a_baseline_cannot_do_raises_an_error():
    layout = BlockLayout(experts=2, width=2, active=1)
    prior = BlockPrior(layout=layout, lam=1.0)
    with pytest.raises(InputError, match="no shared expert"):
        ExpertRuleLayer([torch.ones(1, 2)] * 2, prior, make_rule("memit", {}), "shared")
    layer = ExpertRuleLayer([torch.ones(1, 2), torch.ones(1, 2)], prior, make_rule("memit", {}), "top")
    keys = layout.pack(torch.ones(1, 1, 2), torch.tensor([[0]]))
    with pytest.raises(InputError, match="cannot remove"):
        layer.remove(keys, torch.ones(1, 1))
    panel = layer.project(keys)
    layer.update_projected(panel, torch.ones(1, 1))
    with pytest.raises(InputError, match="call project again"):
        layer.update_projected(panel, torch.ones(1, 1))
    assert math.isnan(layer.objective)
    assert layer.bounds().weight == math.inf
    assert layer.deviation() > 0
    assert set(BASELINES) >= {"memit", "alphaedit"}
