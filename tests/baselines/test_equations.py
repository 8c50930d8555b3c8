"""Each baseline against its published equation, solved directly in float64."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from rlsedit_fast.baselines import (
    BASELINES,
    EMMET,
    MEMIT,
    NSE,
    PRUNE,
    RECT,
    ROME,
    AlphaEdit,
    Batch,
    BoundedFineTuning,
    FineTuning,
    HistoryMEMIT,
    UltraEdit,
)
from rlsedit_fast.rls import Prior
from rlsedit_fast.rls.reference import solve_all

D_K, D_V = 24, 7
EXACT = 1e-9  # float64 at condition numbers of some thousands


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weight():
    return random(D_V, D_K, seed=1)


@pytest.fixture
def moment():
    anchors = random(200, D_K, seed=2) * torch.logspace(0.5, -1.5, D_K, dtype=torch.float64)
    return anchors.T @ anchors / len(anchors)


@pytest.fixture
def prior(moment):
    return Prior(lam=0.0, mu=3.0, anchor_moment=moment)


def batch(n, seed, weights=None):
    given = torch.ones(n, dtype=torch.float64) if weights is None else weights
    return Batch(random(n, D_K, seed=seed), random(n, D_V, seed=seed + 100), given)


def stream(sizes=(3, 1, 5), first=10):
    return [batch(n, first + i) for i, n in enumerate(sizes)]


def run(rule, weight, prior, batches):
    """Returns the weight after each batch."""
    memory, now, seen = rule.init_memory(weight, prior, "layer"), weight, []
    for one in batches:
        change, memory = rule.step(one, now, memory)
        now = now + change
        seen.append(now)
    return seen


def close(found, expected, tolerance=EXACT):
    assert (found - expected).norm() <= tolerance * max(1.0, float(expected.norm()))


def test_memit_matches_ridge_regression(weight, prior, moment):
    one = batch(4, 3, weights=torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64))
    (after,) = run(MEMIT(), weight, prior, [one])
    weighted = one.keys * one.weights[:, None]
    expected = one.innovation.T @ weighted @ torch.linalg.inv(9 * moment + weighted.T @ one.keys)
    close(after - weight, expected)


def test_memit_has_no_memory_of_earlier_batches(weight, prior):
    first, second = stream((3, 4))
    memory = MEMIT().init_memory(weight, prior, "layer")
    close(MEMIT().step(second, weight, memory)[0], MEMIT().step(second, weight + 1, memory)[0])
    after = run(MEMIT(), weight, prior, [first, second])
    single = run(MEMIT(), weight, prior, [second])
    close(after[1] - after[0], single[0] - weight)


def test_history_memit_matches_its_equation(weight, prior, moment):
    batches = stream()
    after = run(HistoryMEMIT(), weight, prior, batches)
    before = weight
    for i, one in enumerate(batches):
        precision = 9 * moment + sum(earlier.keys.T @ earlier.keys for earlier in batches[: i + 1])
        close(after[i] - before, one.innovation.T @ one.keys @ torch.linalg.inv(precision))
        before = after[i]


def test_history_memit_matches_solving_all_at_once(weight, prior):
    keys, values = random(9, D_K, seed=5), random(9, D_V, seed=6)
    memory, now = HistoryMEMIT().init_memory(weight, prior, "layer"), weight
    for part in (slice(0, 2), slice(2, 3), slice(3, 9)):
        innovation = values[part] - keys[part] @ now.T
        ones = torch.ones(len(innovation), dtype=torch.float64)
        change, memory = HistoryMEMIT().step(Batch(keys[part], innovation, ones), now, memory)
        now = now + change
    together, _, _ = solve_all(weight, prior, keys, values)
    close(now, together)


def test_alphaedit_matches_its_equation(weight, prior, moment):
    rule, batches = AlphaEdit(threshold=0.05, ridge=0.7), stream()
    values, vectors = torch.linalg.eigh(moment)
    low = vectors[:, values < 0.05]
    assert 3 < low.shape[1] < D_K - 3
    projection = low @ low.T
    after, before = run(rule, weight, prior, batches), weight
    past = torch.zeros(D_K, D_K, dtype=torch.float64)
    for one, now in zip(batches, after, strict=True):
        left = projection @ (past + one.keys.T @ one.keys) + 0.7 * torch.eye(D_K, dtype=torch.float64)
        expected = torch.linalg.solve(left, projection @ one.keys.T @ one.innovation).T
        close(now - before, expected)
        close((now - before) @ vectors[:, values >= 0.05], torch.zeros(D_V, int((values >= 0.05).sum())).double())
        past, before = past + one.keys.T @ one.keys, now


def test_alphaedit_batches_match_solving_all_at_once(weight, prior, moment):
    rule = AlphaEdit(null_share=0.5, ridge=0.3)
    keys, values = random(9, D_K, seed=5), random(9, D_V, seed=6)
    memory, now = rule.init_memory(weight, prior, "layer"), weight
    for part in (slice(0, 4), slice(4, 9)):
        ones = torch.ones(part.stop - part.start, dtype=torch.float64)
        change, memory = rule.step(Batch(keys[part], values[part] - keys[part] @ now.T, ones), now, memory)
        now = now + change
    basis = torch.linalg.eigh(moment)[1][:, : D_K // 2]
    inside = keys @ basis
    ridge = 0.3 * torch.eye(D_K // 2, dtype=torch.float64)
    expected = torch.linalg.solve(inside.T @ inside + ridge, inside.T @ (values - keys @ weight.T))
    close(now - weight, (basis @ expected).T)


def test_rome_matches_its_equation(weight, prior, moment):
    one = batch(3, 3)
    (after,) = run(ROME(), weight, prior, [one])
    now, inverse = weight, torch.linalg.inv(moment)
    for key, expected in zip(one.keys, one.keys @ weight.T + one.innovation, strict=True):
        direction = inverse @ key
        now = now + torch.outer(expected - now @ key, direction) / (key @ direction)
        close(now @ key, expected)
    close(after, now)


def test_rome_batch_equals_single_edits(weight, prior):
    one = batch(4, 3)
    expected = one.keys @ weight.T + one.innovation
    now, memory = weight, ROME().init_memory(weight, prior, "layer")
    for i in range(4):
        single = Batch(one.keys[i : i + 1], (expected - one.keys @ now.T)[i : i + 1], one.weights[:1])
        now = now + ROME().step(single, now, memory)[0]
    close(run(ROME(), weight, prior, [one])[0], now)


def test_emmet_matches_its_equation_and_fits_exactly(weight, prior, moment):
    one = batch(5, 3)
    (after,) = run(EMMET(), weight, prior, [one])
    inverse = torch.linalg.inv(9 * moment)
    expected = one.innovation.T @ torch.linalg.inv(one.keys @ inverse @ one.keys.T) @ one.keys @ inverse
    close(after - weight, expected)
    close(one.keys @ (after - weight).T, one.innovation)


def test_emmet_special_cases_are_rome_and_memit(weight, prior):
    single, several = batch(1, 3), batch(4, 4)
    close(run(EMMET(), weight, prior, [single])[0], run(ROME(), weight, prior, [single])[0])
    close(run(EMMET(damping=1.0), weight, prior, [several])[0], run(MEMIT(), weight, prior, [several])[0])


def test_rect_keeps_the_largest_relative_changes(weight, prior):
    one = batch(4, 3)
    full = run(MEMIT(), weight, prior, [one])[0] - weight
    (after,) = run(RECT(share=0.25), weight, prior, [one])
    relative = (full / weight).abs().flatten()
    kept = set(relative.argsort(descending=True)[: round(0.25 * relative.numel())].tolist())
    expected = torch.tensor(
        [v if i in kept else 0.0 for i, v in enumerate(full.flatten().tolist())], dtype=torch.float64
    )
    close((after - weight).flatten(), expected)
    close(run(RECT(share=1.0), weight, prior, [one])[0] - weight, full)


def test_rect_with_zero_weights_and_zero_changes(weight, prior):
    weight = weight.clone()
    weight[2, 3] = 0.0
    one = batch(4, 3)
    still = Batch(one.keys, one.innovation * (torch.arange(D_V) != 1), one.weights)  # row 1 does not change
    change = run(RECT(share=1 / (D_K * D_V)), weight, prior, [still])[0] - weight
    assert change.nonzero().tolist() == [[2, 3]]


def test_prune_restrains_the_sum_of_all_changes(weight, prior):
    rule, batches = PRUNE(base=1.5), stream()
    batches = [Batch(b.keys, 40 * b.innovation, b.weights) for b in batches]
    limit = np.linalg.svd(weight.numpy(), compute_uv=False)[0]
    memory, now = rule.init_memory(weight, prior, "layer"), weight
    base_memory, free, any_reduced = MEMIT().init_memory(weight, prior, "layer"), weight, False
    for one in batches:
        expected = one.keys @ now.T + one.innovation
        change, memory = rule.step(one, now, memory)
        now = now + change
        step, _ = MEMIT().step(Batch(one.keys, expected - one.keys @ free.T, one.weights), free, base_memory)
        free = free + step
        left, values, right = np.linalg.svd((free - weight).numpy(), full_matrices=False)
        any_reduced |= bool((values > limit).any())
        new = [np.log(v) / np.log(1.5) - np.log(limit) / np.log(1.5) + limit if v > limit else v for v in values]
        close(now - weight, torch.from_numpy(left @ np.diag(new) @ right))
    assert any_reduced, "the test needs large singular values"


def test_prune_of_small_changes_equals_memit(weight, prior):
    batches = [Batch(b.keys, 1e-3 * b.innovation, b.weights) for b in stream()]
    close(run(PRUNE(), weight, prior, batches)[-1], run(MEMIT(), weight, prior, batches)[-1])


def test_nse_matches_its_equation(weight, prior, moment):
    before, one = batch(4, 2), batch(2, 3)
    first, after = run(NSE(activation=0.6), weight, prior, [before, one])
    activation = one.keys.abs().sum(0).tolist()
    chosen, total = [], 0.0
    for neuron in sorted(range(D_K), key=lambda j: -activation[j]):
        chosen.append(neuron)
        total += activation[neuron]
        if total >= 0.6 * sum(activation):
            break
    assert 3 < len(chosen) < D_K - 3
    part, expected = one.keys[:, chosen], torch.zeros(D_V, D_K, dtype=torch.float64)
    past = before.keys[:, chosen]
    precision = 9 * moment[chosen][:, chosen] + past.T @ past + part.T @ part
    expected[:, chosen] = one.innovation.T @ part @ torch.linalg.inv(precision)
    close(after - first, expected)
    batches = stream()
    close(run(NSE(activation=1.0), weight, prior, batches)[-1], run(HistoryMEMIT(), weight, prior, batches)[-1])


def test_ultraedit_matches_its_equation(weight, prior):
    rule, batches = UltraEdit(rate=0.2, ridge=1.5), stream((4, 2, 5))
    after, before = run(rule, weight, prior, batches), weight
    for i, (one, now) in enumerate(zip(batches, after, strict=True)):
        rows = np.concatenate([np.concatenate([b.keys.numpy(), -b.innovation.numpy()], 1) for b in batches[: i + 1]])
        mean, deviation = rows.mean(0), rows.std(0, ddof=1)
        k, g = one.keys.numpy(), -one.innovation.numpy()
        k_normal, g_normal = (k - mean[:D_K]) / deviation[:D_K], (g - mean[D_K:]) / deviation[D_K:]
        v = -0.2 * (k_normal**2).sum(1, keepdims=True) * g_normal
        expected = np.linalg.solve(k.T @ k + 1.5 * np.eye(D_K), k.T @ v).T
        close(now - before, torch.from_numpy(expected))
        before = now


def test_ultraedit_of_a_single_row_changes_nothing(weight, prior):
    (after,) = run(UltraEdit(), weight, prior, [batch(1, 3)])
    assert torch.equal(after, weight)


def test_fine_tuning_converges_to_the_minimum_norm_solution(weight, prior):
    one = batch(5, 3)
    (after,) = run(FineTuning(steps=20_000), weight, prior, [one])
    close(after - weight, (torch.linalg.pinv(one.keys) @ one.innovation).T, 1e-8)
    short = run(FineTuning(steps=3), weight, prior, [one])[0]
    assert (one.keys @ (short - after).T).norm() > 0.01 * one.innovation.norm()


@pytest.mark.parametrize("bound", [0.02, 0.2, 5.0])
def test_bounded_fine_tuning_matches_bounded_least_squares(weight, prior, bound):
    one = batch(5, 3)
    (after,) = run(BoundedFineTuning(bound=bound, steps=20_000), weight, prior, [one])
    change = after - weight
    assert float(change.abs().max()) <= bound + 1e-15
    for row, expected in zip(change, one.innovation.T, strict=True):
        found = lsq_linear(one.keys.numpy(), expected.numpy(), bounds=(-bound, bound), tol=1e-14)
        left = 0.5 * float((one.keys @ row - expected).square().sum())
        assert left == pytest.approx(found.cost, rel=1e-6, abs=1e-9)  # only the cost is unique


@pytest.mark.parametrize("name", [n for n in BASELINES if n not in ("memit-history", "alphaedit", "rome")])
def test_other_rules_depend_on_the_batches(weight, prior, name):
    keys, values = random(6, D_K, seed=5), random(6, D_V, seed=6)

    def apply(parts):
        memory, now = BASELINES[name]().init_memory(weight, prior, "layer"), weight
        for part in parts:
            ones = torch.ones(part.stop - part.start, dtype=torch.float64)
            change, memory = BASELINES[name]().step(
                Batch(keys[part], values[part] - keys[part] @ now.T, ones), now, memory
            )
            now = now + change
        return now

    together, separate = apply([slice(0, 6)]), apply([slice(0, 3), slice(3, 6)])
    assert (together - separate).norm() > 1e-6 * (together - weight).norm()
