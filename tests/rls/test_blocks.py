"""A layer of experts: the dual form equals the normal equations of the stacked problem, and its bounds hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlsedit_fast.errors import InputError, PriorError, RemovalError, UpdateError
from rlsedit_fast.rls import (
    BlockLayout,
    BlockMoment,
    BlockPrior,
    BlockState,
    SeparateState,
    amplify_innovation,
    amplify_values,
)

SHARED = BlockLayout(experts=16, width=6, active=2, shared=5)
PLAIN = BlockLayout(experts=8, width=5, active=3)


def draw(layout, count, generator, scale=1.0):
    """Rows of keys with random experts, some of which are chosen more often."""
    chances = torch.linspace(1.0, 3.0, layout.experts, dtype=torch.float64).expand(count, -1)
    experts = torch.multinomial(chances, layout.active, generator=generator)
    features = torch.randn(count, layout.active, layout.width, dtype=torch.float64, generator=generator) * scale
    shared = None
    if layout.shared:
        shared = torch.randn(count, layout.shared, dtype=torch.float64, generator=generator) * scale
    return layout.pack(features, experts, shared)


class Problem:
    """A layer, anchors and edits, and the dense solution of the stacked problem in NumPy."""

    def __init__(self, layout, *, seed=0, edits=40, anchors=400, d_v=7, dtype=torch.float64, overlap=None, lam=0.3):
        generator = torch.Generator().manual_seed(seed)
        self.layout, self.dtype, self.generator = layout, dtype, generator
        widths = [layout.block_width(block) for block in range(layout.blocks)]
        self.start = [torch.randn(d_v, w, dtype=torch.float64, generator=generator).to(dtype) for w in widths]
        self.anchors = draw(layout, anchors, generator)
        moment = BlockMoment.empty(layout, torch.device("cpu"))
        moment = BlockMoment(
            moment.routed.double(), None if moment.shared is None else moment.shared.double(), moment.reached, 0
        )
        moment = moment.added(layout, self.anchors).mean()
        self.prior = BlockPrior(layout=layout, lam=lam, mu=2.0, moment=moment, overlap=overlap)
        self.keys = draw(layout, edits, generator).to(dtype)
        self.values = torch.randn(edits, d_v, dtype=torch.float64, generator=generator).to(dtype)
        self.weights = (torch.rand(edits, dtype=torch.float64, generator=generator) + 0.5).to(dtype)

    def state(self):
        self.model = [weight.clone() for weight in self.start]
        return BlockState(self.model, self.prior)

    def rows(self, chosen):
        at = list(chosen)
        return self.keys[at], self.values[at], self.weights[at]

    def solve(self, chosen):
        """Returns W, C and J of the normal equations for some edits."""
        keys, values, weights = self.rows(chosen)
        k, v = self.layout.stacked(keys).double().numpy(), values.double().numpy()
        w, start = weights.double().numpy(), torch.cat(self.start, 1).double().numpy()
        sizes = [len(self.prior.precision(block)) for block in range(self.layout.blocks)]
        precision = np.zeros((sum(sizes), sum(sizes)))
        for block, at in enumerate(np.cumsum([0, *sizes[:-1]])):
            precision[at : at + sizes[block], at : at + sizes[block]] = self.prior.precision(block).numpy()
        whole = precision + (k * w[:, None]).T @ k
        delta = np.linalg.solve(whole, (k * w[:, None]).T @ (v - k @ start.T)).T
        weight = start + delta
        objective = (w[:, None] * (k @ weight.T - v) ** 2).sum() + np.trace(delta @ precision @ delta.T)
        return weight, np.linalg.inv(whole), objective

    def check(self, state, chosen, tolerance):
        weight, inverse, objective = self.solve(chosen)
        now = torch.cat(self.model, 1).double().numpy()
        assert np.linalg.norm(now - weight) <= tolerance * np.linalg.norm(weight)
        assert abs(state.objective - objective) <= tolerance * max(objective, 1.0)
        assert state.edits == len(chosen)
        probes = self.keys[:5]
        k = self.layout.stacked(probes).double().numpy()
        found = state.cross(probes, state.project(probes)).numpy()
        assert np.linalg.norm(found - k @ inverse @ k.T) <= tolerance * np.linalg.norm(k @ k.T) / 0.09


@pytest.mark.parametrize("layout", [SHARED, PLAIN], ids=["shared", "plain"])
def test_200_updates_and_50_removals_equal_the_normal_equations(layout):
    problem = Problem(layout, edits=400, anchors=300)
    state, applied, generator = problem.state(), list[list[int]](), np.random.default_rng(1)
    for at in range(200):
        batch = [2 * at, 2 * at + 1]
        state.update(*problem.rows(batch))
        applied.append(batch)
        if at % 4 == 3:
            state.remove(*problem.rows(applied.pop(int(generator.integers(len(applied))))))
        if at % 40 == 39:
            problem.check(state, [i for batch in applied for i in batch], 1e-10)
    assert state.edits == 300
    assert state.monitor().residual < 1e-12


def test_float32_is_as_accurate_as_its_arithmetic():
    problem = Problem(SHARED, edits=120, dtype=torch.float32)
    state = problem.state()
    for at in range(0, 120, 4):
        state.update(*problem.rows(range(at, at + 4)))
    state.remove(*problem.rows(range(40, 60)))
    # Condition numbers of the precisions are below 1e3; the number of roundings is that of rows and features.
    problem.check(state, [*range(40), *range(60, 120)], 2 * (120 + 17) ** 0.5 * 6e-8 * 1e3**0.5)
    assert not state.monitor().needs_refresh


def test_a_removed_batch_leaves_no_trace():
    problem = Problem(SHARED)
    state = problem.state()
    state.update(*problem.rows(range(10)))
    before, objective = [block.clone() for block in problem.model], state.objective
    step = state.update(*problem.rows(range(10, 15)))
    assert step.change > 0
    state.remove(*problem.rows(range(10, 15)))
    assert all(torch.equal(one, other) for one, other in zip(before, problem.model, strict=True))
    assert state.objective == objective
    state.remove(*problem.rows(range(10)))
    assert all(torch.equal(one, other) for one, other in zip(problem.start, problem.model, strict=True))
    assert state.objective == state.edits == state.deviation() == 0


def test_replaced_values_equal_values_from_the_start():
    problem, other = Problem(SHARED), Problem(SHARED)
    old = problem.values.clone()
    problem.values[5:8] += 1.0
    state = problem.state()
    state.update(problem.keys[:12], old[:12], problem.weights[:12])
    step = state.replace(problem.keys[5:8], old[5:8], problem.values[5:8], problem.weights[5:8])
    problem.check(state, range(12), 1e-12)
    expected = problem.values[5:8] - state.outputs(problem.keys[5:8])
    torch.testing.assert_close(step.residual, expected)
    assert not torch.equal(other.values, problem.values)


def test_steps_describe_the_new_weight():
    problem = Problem(SHARED)
    state = problem.state()
    state.update(*problem.rows(range(6)))
    before = torch.cat(problem.model, 1).clone()
    keys, values, weights = problem.rows(range(6, 10))
    panel = state.project(keys, weights)
    innovation = values - state.outputs(keys)
    torch.testing.assert_close(panel.cross(keys), panel.gram)
    step = state.update_projected(panel, innovation)
    torch.testing.assert_close(step.residual, values - state.outputs(keys))
    torch.testing.assert_close(step.innovation, innovation)
    assert step.change == pytest.approx(float((torch.cat(problem.model, 1) - before).norm()))
    torch.testing.assert_close(state.outputs(keys), problem.layout.stacked(keys) @ torch.cat(problem.model, 1).T)
    assert state.deviation() == pytest.approx(float((torch.cat(problem.model, 1) - torch.cat(problem.start, 1)).norm()))


def test_amplified_requests_realize_their_share():
    problem = Problem(SHARED)
    state = problem.state()
    state.update(*problem.rows(range(20)))
    panel = state.project(problem.keys[20:24])
    wanted, rows = torch.randn(4, 7, dtype=torch.float64), torch.arange(4)
    before = state.outputs(panel.keys)
    state.update_projected(panel, amplify_innovation(panel, wanted, wanted.norm(dim=1), rows, 0.9))
    reached = state.outputs(panel.keys) - before
    assert float((1 - (wanted - reached).norm(dim=1) / wanted.norm(dim=1)).mean()) >= 0.899
    panel = state.project(problem.keys[20:24])
    change = amplify_values(panel, panel.keys, wanted, wanted.norm(dim=1), rows, 0.97)
    assert change.norm() > wanted.norm()


def test_the_bounds_hold_and_fail_with_kappa_one():
    """The bounds follow from `prior terms + misfit <= J` with the true anchors; with kappa 1 this fails."""
    violated = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        layout = [SHARED, PLAIN][seed % 2]
        problem = Problem(layout, seed=seed, edits=20, anchors=60, lam=0.01)
        for overlap in (None, 1):
            moment = problem.prior.moment
            prior = BlockPrior(layout=layout, lam=0.01, mu=3.0, moment=moment, overlap=overlap)
            model = [weight.clone() for weight in problem.start]
            state = BlockState(model, prior)
            # Edits at the keys of anchors, which ask for a large change there.
            keys = problem.anchors[torch.randperm(60, generator=generator)[:20]]
            state.update(keys[:10], 5 * problem.values[:10])
            state.update(keys[10:], 5 * problem.values[10:])
            state.remove(keys[:5], 5 * problem.values[:5])
            change = torch.cat(model, 1) - torch.cat(problem.start, 1)
            moved = layout.stacked(problem.anchors) @ change.T / 60**0.5
            bounds = state.bounds()
            holds = moved.norm() <= bounds.anchors and change.norm() <= bounds.weight
            if overlap is None:
                assert holds
                energy = 0.01**2 * change.square().sum() + 3.0**2 * moved.square().sum()
                assert energy <= state.objective
            else:
                # The bound on the anchors follows from this inequality, which needs kappa.
                terms = 0.01**2 * change.square().sum() + 3.0**2 * moved.square().sum()
                misfit = (state.outputs(keys[5:]) - 5 * problem.values[5:20]).square().sum()
                violated += bool(terms + misfit > state.objective * (1 + 1e-9))
    assert violated > 50


def test_the_bound_on_the_anchors_fails_without_kappa():
    """One anchor that reaches two experts with equal features; an edit moves its output through both."""
    layout = BlockLayout(experts=2, width=1, active=2)
    anchor = layout.pack(torch.ones(1, 2, 1, dtype=torch.float64), torch.tensor([[0, 1]]))
    moment = BlockMoment(torch.ones(2, 1, 1, dtype=torch.float64), None, torch.ones(2).long(), 1)
    for overlap, holds in ((2, True), (1, False)):
        weight = torch.zeros(2, 1, 1, dtype=torch.float64)
        state = BlockState(list(weight), BlockPrior(layout=layout, lam=1e-3, mu=0.1, moment=moment, overlap=overlap))
        state.update(anchor, torch.ones(1, 1, dtype=torch.float64))
        moved = float(state.outputs(anchor).norm())
        assert moved > 0.9
        assert (moved <= state.bounds().anchors) == holds


def test_experts_that_no_key_reaches_are_not_touched():
    problem = Problem(PLAIN)
    keys = problem.keys[:4].clone()
    keys[:, -PLAIN.active :] = torch.tensor([1.0, 4.0, 6.0], dtype=keys.dtype)
    state = problem.state()
    state.update(keys, problem.values[:4])
    changed = [not torch.equal(one, other) for one, other in zip(problem.start, problem.model, strict=True)]
    assert changed == [block in (1, 4, 6) for block in range(PLAIN.blocks)]
    assert [pair is not None for pair in state.weights()] == changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_any_dtype_are_kept_exactly(dtype):
    problem = Problem(SHARED)
    start = [weight.to(dtype) for weight in problem.start]
    model = [weight.clone() for weight in start]
    state = BlockState(model, problem.prior, dtype=torch.float32)
    for at in range(0, 40, 4):
        state.update(*problem.rows(range(at, at + 4)))
    exact = [pair[1] for pair in state.weights() if pair is not None]
    assert len(exact) == SHARED.blocks
    assert all(torch.equal(one.to(dtype), other) for one, other in zip(exact, model, strict=True))
    state.remove(*problem.rows(range(40)))
    assert all(torch.equal(one, other) for one, other in zip(start, model, strict=True))


def test_a_snapshot_is_restored_bit_for_bit():
    problem = Problem(SHARED)
    state = problem.state()
    state.update(*problem.rows(range(8)))
    taken, kept = state.snapshot(), [block.clone() for block in problem.model]
    objective, version = state.objective, state.version
    state.remove(*problem.rows(range(3)))
    state.update(*problem.rows(range(8, 20)))
    later = state.snapshot()
    state.restore(taken)
    assert all(torch.equal(one, other) for one, other in zip(kept, problem.model, strict=True))
    assert (state.objective, state.version, state.edits) == (objective, version, 8)
    with pytest.raises(InputError, match="earlier snapshot"):
        state.restore(later)
    state.update(*problem.rows(range(8, 12)))
    problem.check(state, range(12), 1e-12)


def test_failures_leave_the_state_as_it_was():
    problem = Problem(SHARED, dtype=torch.float32)
    state = problem.state()
    state.update(*problem.rows(range(8)))
    kept, version = [block.clone() for block in problem.model], state.version
    keys, values, weights = problem.rows(range(8, 10))
    with pytest.raises(UpdateError, match="overflow"):
        state.update(torch.cat([keys[:, : -SHARED.active] * 1e30, keys[:, -SHARED.active :]], 1), values, weights)
    with pytest.raises(InputError, match="1 of 2 rows are not applied"):
        state.remove(torch.cat([problem.keys[:1], keys[:1]]), values, torch.cat([problem.weights[:1], weights[:1]]))
    with pytest.raises(InputError, match="NaN"):
        state.update(keys, values * torch.nan, weights)
    wrong = keys.clone()
    wrong[0, -1] = 16
    with pytest.raises(InputError, match="indices of 16 experts"):
        state.update(wrong, values, weights)
    panel = state.project(keys)
    state.update(keys, values)
    with pytest.raises(InputError, match="call project again"):
        state.update_projected(panel, values)
    state.remove(keys, values)
    assert all(torch.equal(one, other) for one, other in zip(kept, problem.model, strict=True))
    assert state.version != version


def test_equal_keys_are_told_apart_by_their_values():
    problem = Problem(SHARED)
    state = problem.state()
    problem.keys[1], problem.weights[1] = problem.keys[0], problem.weights[0]
    state.update(*problem.rows([0]))
    state.update(*problem.rows([1, 2]))
    state.remove(*problem.rows([0]))
    problem.check(state, [1, 2], 1e-12)
    state.refresh(*problem.rows([0, 2]))
    problem.check(state, [0, 2], 1e-12)
    state.refresh(*problem.rows([]))
    assert all(torch.equal(one, other) for one, other in zip(problem.start, problem.model, strict=True))


def test_experts_with_few_anchors_are_held_by_more_lam():
    layout = BlockLayout(experts=4, width=6, active=1)
    generator = torch.Generator().manual_seed(0)
    keys = draw(layout, 40, generator)
    keys[:, -1] = torch.tensor([0.0] * 20 + [1.0] * 18 + [2.0] * 2, dtype=keys.dtype)
    moment = BlockMoment.empty(layout, torch.device("cpu")).added(layout, keys.float()).mean()
    prior = BlockPrior(layout=layout, lam=0.1, mu=1.0, moment=moment)
    assert moment.reached.tolist() == [20, 18, 2, 0]
    assert prior.raised() == [2, 3]
    ridges = prior.ridges().tolist()
    assert ridges[0] == ridges[1] == pytest.approx(0.01)
    assert ridges[3] - 0.01 == pytest.approx(1.5 * (ridges[2] - 0.01))
    # An expert without anchors is held like one that `width` average anchors reached.
    assert ridges[3] - 0.01 == pytest.approx(float(moment.routed.diagonal(dim1=1, dim2=2).sum()) / 40)


def test_invalid_priors_and_layouts_raise():
    with pytest.raises(PriorError, match="lam is 0"):
        BlockPrior(layout=PLAIN, lam=0.0)
    with pytest.raises(PriorError, match="pass both or none"):
        BlockPrior(layout=PLAIN, lam=1.0, mu=1.0)
    with pytest.raises(InputError, match="do not match"):
        BlockPrior(layout=PLAIN, lam=1.0, mu=1.0, moment=BlockMoment.empty(SHARED, torch.device("cpu")))
    with pytest.raises(InputError, match="at most as many active"):
        BlockLayout(experts=2, width=3, active=3)
    with pytest.raises(InputError, match="expected those of"):
        BlockState([torch.zeros(2, 5)] * 7, BlockPrior(layout=PLAIN, lam=1.0))


def test_distances_of_rows_with_different_experts():
    generator = torch.Generator().manual_seed(3)
    one, other = draw(SHARED, 6, generator), draw(SHARED, 6, generator)
    other[0] = one[0]
    expected = (SHARED.stacked(one) - SHARED.stacked(other)).norm(dim=1)
    torch.testing.assert_close(SHARED.distance(one, other), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(SHARED.norm(one), SHARED.stacked(one).norm(dim=1))


def separate(problem, blocks=None):
    problem.model = [weight.clone() for weight in problem.start] if blocks is None else blocks
    return SeparateState(problem.model, problem.prior)


def test_one_batch_with_separate_covariances_is_exact():
    problem = Problem(SHARED)
    state = separate(problem)
    step = state.update(*problem.rows(range(12)))
    weight, _, objective = problem.solve(range(12))
    assert np.linalg.norm(torch.cat(problem.model, 1).numpy() - weight) <= 1e-12 * np.linalg.norm(weight)
    misfit = (problem.weights[:12, None] * step.residual.square()).sum()
    assert state.objective + float(misfit) == pytest.approx(objective)
    before = problem.values[:12] - problem.layout.stacked(problem.keys[:12]) @ torch.cat(problem.start, 1).T
    torch.testing.assert_close(step.innovation, before)
    torch.testing.assert_close(step.realized, 1 - step.residual.norm(dim=1) / before.norm(dim=1))


def test_separate_covariances_are_between_the_exact_form_and_none():
    """The true objective after 30 batches, with the true anchors."""
    problem = Problem(BlockLayout(experts=16, width=32, active=2), edits=300, anchors=300, lam=0.05)
    keys, moved = problem.layout.stacked(problem.keys), problem.layout.stacked(problem.anchors) / 300**0.5

    def true_objective(step):
        model = problem.model
        for at in range(0, 300, 10):
            step(*problem.rows(range(at, at + 10)))
        change = torch.cat(model, 1) - torch.cat(problem.start, 1)
        misfit = problem.values - keys @ torch.cat(model, 1).T
        anchors = 4 * (moved @ change.T).square().sum()
        return float((problem.weights[:, None] * misfit**2).sum() + anchors + 0.05**2 * change.square().sum())

    exact = true_objective(problem.state().update)
    approximate = true_objective(separate(problem).update)
    state = separate(problem)

    def forget(*rows):
        state._present.clear()
        state.update(*rows)

    forgetful = true_objective(forget)
    assert exact < approximate < forgetful
    assert approximate - exact < 0.5 * (forgetful - exact)


def test_bounds_hold_with_separate_covariances():
    for seed in range(10):
        problem = Problem([SHARED, PLAIN][seed % 2], seed=seed, edits=20, anchors=60, lam=0.01)
        state = separate(problem)
        keys = problem.anchors[:20]
        for at in range(0, 20, 5):
            state.update(keys[at : at + 5], 5 * problem.values[at : at + 5])
        change = torch.cat(problem.model, 1) - torch.cat(problem.start, 1)
        moved = problem.layout.stacked(problem.anchors) @ change.T / 60**0.5
        assert moved.norm() <= state.bounds().anchors
        assert change.norm() <= state.bounds().weight


def test_the_cost_with_separate_covariances_does_not_grow():
    problem = Problem(SHARED, edits=300)
    state = separate(problem)

    def held():
        return sum(tensor.numel() for tensor in state._present.values())

    state.update(*problem.rows(range(100)))
    before = held()
    state.update(*problem.rows(range(100, 300)))
    assert held() == before
    assert state.edits == 300


def test_separate_covariances_refresh_restore_and_replace():
    problem = Problem(SHARED)
    state = separate(problem)
    state.update(*problem.rows(range(10)))
    before, version, objective = [block.clone() for block in problem.model], state.version, state.objective
    with pytest.raises(RemovalError, match="remaining edits"):
        state.remove(*problem.rows(range(5)))
    taken = state.snapshot()
    state.update(*problem.rows(range(10, 20)))
    keys, values, weights = problem.rows(range(5))
    panel = state.project(keys, weights)
    expected = state.outputs(keys) + panel.cross(keys) @ (weights[:, None] * torch.ones_like(values))
    state.replace(keys, values, values + 1, weights)
    torch.testing.assert_close(state.outputs(keys), expected)
    state.refresh(*problem.rows(range(10, 20)))
    other = Problem(SHARED)
    separate(other).update(*other.rows(range(10, 20)))
    assert all(torch.equal(one, two) for one, two in zip(problem.model, other.model, strict=True))
    state.restore(taken)
    assert all(torch.equal(one, two) for one, two in zip(problem.model, before, strict=True))
    assert (state.version, state.objective, state.edits) == (version, objective, 10)
    state.refresh(*problem.rows([]))
    assert all(torch.equal(one, two) for one, two in zip(problem.model, problem.start, strict=True))
    assert state.objective == state.edits == 0
