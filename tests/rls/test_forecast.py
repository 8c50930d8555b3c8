"""The forecast of a stream equals the stream, and the asymptotic formulas describe it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import (
    Asymptotics,
    ChangeStatistics,
    Prior,
    RLSState,
    Route,
    amplify_innovation,
    forecast_stream,
)
from rlsedit_fast.rls.continuation import edits_until

D_K = 300
CHANGES = ChangeStatistics(torch.ones(1), common=0.0)


def toy(lam: float = 0.3, mu: float = 0.5) -> tuple[Tensor, Prior]:
    """Returns the second moment of keys and a prior with an anchor moment in other directions."""
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(D_K, D_K, dtype=torch.float64))[0]
    sigma = turned @ torch.diag(torch.logspace(0, -2, D_K, dtype=torch.float64)) @ turned.T
    anchors = 0.55 * torch.randn(800, D_K, dtype=torch.float64)
    return sigma, Prior(lam=lam, mu=mu, anchor_moment=anchors.T @ anchors / 800 if mu else None)


def draw(sigma: Tensor, count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D_K, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(sigma).T


def of_anchors(weight: Tensor, prior: Prior) -> float:
    assert prior.anchor_moment is not None
    return math.sqrt(float(((weight @ prior.anchor_moment) * weight).sum()))


def one_by_one(keys: Tensor, prior: Prior, changes: Tensor) -> tuple[Tensor, float]:
    """Returns `W - W0` and J of a stream of single edits whose values are the present outputs plus their changes."""
    inverse = torch.linalg.inv(prior.precision(D_K, keys.device))
    weight, objective = torch.zeros(changes.shape[1], D_K, dtype=torch.float64), 0.0
    for key, change in zip(keys, changes, strict=True):
        projected = inverse @ key
        sigma = 1 + float(projected @ key)
        weight += torch.outer(change, projected) / sigma
        inverse -= torch.outer(projected, projected) / sigma
        objective += float(change @ change) / sigma
    return weight, objective


def means(rows: list[tuple[float, ...]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("count", [100, 300, 900])
def test_the_formulas_describe_fixed_values_to_three_percent(count: int) -> None:
    sigma, prior = toy()
    found = list[tuple[float, ...]]()
    for seed in range(4):
        state = RLSState(torch.zeros(128, D_K, dtype=torch.float64), prior)
        state.update(draw(sigma, count, seed), CHANGES.draw(count, seed=seed))
        fresh = draw(sigma, 500, seed=seed + 100)
        left = 1 / (1 + float((state.project(fresh).projected * fresh).sum(1).mean()))
        found.append((state.deviation(), of_anchors(state.weight, prior), state.objective, left))
    point = Asymptotics(sigma, prior).fixed(count)
    assert [point.weight, point.anchors, point.objective, point.left] == pytest.approx(means(found), rel=0.03)


@pytest.mark.parametrize("count", [100, 300, 900])
def test_the_formulas_describe_values_relative_to_present_outputs_to_three_percent(count: int) -> None:
    sigma, prior = toy()
    found = list[tuple[float, ...]]()
    for seed in range(3):
        changes = CHANGES.draw(count, seed=seed)
        weight, objective = one_by_one(draw(sigma, count, seed), prior, changes)
        found.append((float(weight.norm()), of_anchors(weight, prior), objective))
    point = Asymptotics(sigma, prior).relative(count)
    assert [point.weight, point.anchors, point.objective] == pytest.approx(means(found), rel=0.03)


def test_drift_of_fixed_values_peaks_where_rows_reach_the_dimension_and_most_without_a_ridge() -> None:
    counts = [100, 200, 280, 290, 300, 310, 320, 400, 800]
    peaks = []
    for lam in (0.3, 0.03, 0.003):
        formulas = Asymptotics(torch.eye(D_K), Prior(lam=lam))
        sizes = [formulas.fixed(count).weight for count in counts]
        peak = max(range(len(counts)), key=sizes.__getitem__)
        peaks.append(sizes[peak])
        assert counts[peak] in (290, 300, 310)
        assert sizes[-1] < 0.5 * sizes[peak]
        relative = [formulas.relative(count).weight for count in counts]
        assert relative == sorted(relative), "values relative to the present outputs do not take drift back"
    assert peaks[0] < 0.5 * peaks[1] < 0.25 * peaks[2]


def test_the_derivatives_of_the_objective_are_the_squared_changes() -> None:
    sigma, prior = toy()
    keys, values = draw(sigma, 80), CHANGES.draw(80)
    step = 1e-5

    def solved(lam2: float, mu2: float) -> RLSState:
        state = RLSState(torch.zeros(128, D_K, dtype=torch.float64), replace(prior, lam=lam2**0.5, mu=mu2**0.5))
        state.update(keys, values)
        return state

    lam2, mu2 = prior.lam**2, prior.mu**2
    state = solved(lam2, mu2)
    by_lam = (solved(lam2 + step, mu2).objective - solved(lam2 - step, mu2).objective) / (2 * step)
    by_mu = (solved(lam2, mu2 + step).objective - solved(lam2, mu2 - step).objective) / (2 * step)
    assert by_lam == pytest.approx(state.deviation() ** 2, rel=1e-6)
    assert by_mu == pytest.approx(of_anchors(state.weight, prior) ** 2, rel=1e-6)


def test_the_forecast_of_a_stream_is_the_stream() -> None:
    """Two layers, two rows per edit, and a last layer that maintains a share."""
    sigma, prior = toy(lam=2.0, mu=4.0)
    keys = [draw(sigma, 60, seed).unflatten(0, (30, 2)) for seed in (5, 6)]
    weights = torch.tensor([[0.7, 0.3]]).repeat(30, 1)
    changes = ChangeStatistics(torch.tensor([1.0, 2.0]), 0.2).draw(30, dimensions=16)
    held_out = torch.eye(D_K, dtype=torch.float64)
    points = forecast_stream(
        keys,
        weights,
        changes,
        [prior, prior],
        batch_size=10,
        share=0.95,
        points=[10],
        held_out=[held_out, held_out],
        dtype=torch.float64,
    )
    states = [RLSState(torch.zeros(16, D_K, dtype=torch.float64), prior) for _ in range(2)]
    targets = []
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        missing = changes[part].repeat_interleave(2, dim=0)
        for at, (state, layer) in enumerate(zip(states, keys, strict=True)):
            panel = state.project(layer[part].flatten(0, 1), weights[part].flatten())
            wanted = missing / (2 - at)
            if at == 1:
                norms, bare = changes[part].norm(dim=1), torch.arange(0, 20, 2)
                wanted = amplify_innovation(panel, wanted, norms, bare, 0.95)
            before = state.outputs(panel.keys)
            step = state.update_projected(panel, wanted)
            missing = missing - (wanted - step.residual)
            targets.append((at, panel.keys[::2], before[::2], wanted[::2]))
    assert [point.edits for point in points] == [10, 30]
    for state, layer in zip(states, points[-1].layers, strict=True):
        assert layer.weight == pytest.approx(state.deviation(), rel=1e-9)
        assert layer.held_out == pytest.approx(state.deviation(), rel=1e-9)
        assert layer.anchors == pytest.approx(of_anchors(state.weight, prior), rel=1e-9)
        assert layer.objective == pytest.approx(state.objective, rel=1e-9)
    kept = [
        float((1 - (before + wanted - states[at].outputs(k)).norm(dim=1) / wanted.norm(dim=1)).clamp_min(0).mean())
        for at, k, before, wanted in targets
    ]
    assert points[-1].layers[0].realized == pytest.approx(kept[0::2], rel=1e-9)
    assert points[-1].layers[1].realized == pytest.approx(kept[1::2], rel=1e-9)
    assert points[-1].realized[-1] == pytest.approx(0.95, abs=1e-3)
    assert points[-1].layers[0].free < points[0].layers[0].free == pytest.approx(1)


def test_drawn_keys_continue_a_stream_beyond_the_given_ones() -> None:
    sigma, prior = toy()
    keys, count = draw(sigma, 900)[:, None], 900
    changes = CHANGES.draw(count)
    (all_keys,) = forecast_stream([keys], torch.ones(count, 1), changes, [prior], batch_size=20)
    (some,) = forecast_stream([keys[:300]], torch.ones(300, 1), changes, [prior], batch_size=20)
    assert some.edits == all_keys.edits == count
    assert some.layers[0].weight == pytest.approx(all_keys.layers[0].weight, rel=0.1)
    assert some.layers[0].anchors == pytest.approx(all_keys.layers[0].anchors, rel=0.1)
    assert some.realized[0] == pytest.approx(all_keys.realized[0], abs=0.05)
    assert some.realized[-1] == pytest.approx(all_keys.realized[-1], abs=0.05)


def test_edits_until_a_growth_are_more_than_a_line_gives_where_the_growth_levels_off() -> None:
    """The stream needs 300 edits; a line underestimates them, and the recursion is off by less than a factor of two."""
    sigma, prior = toy()
    keys, changes = draw(sigma, 900), CHANGES.draw(900)
    state = RLSState(torch.zeros(128, D_K, dtype=torch.float64), prior)

    def square_after(begin: int, end: int) -> float:
        for at in range(begin, end, 20):
            state.update_projected(state.project(keys[at : at + 20]), changes[at : at + 20])
        return prior.anchor_change(state.weight)

    square_after(0, 300)
    taken = state.saved()
    start = RLSState(
        torch.zeros(128, D_K, dtype=torch.float64), prior, saved=replace(taken, weight=taken.weight.clone())
    )
    now = square_after(300, 300)
    rate = (square_after(300, 360) - now) / 60
    growth = (square_after(360, 600) - now) / rate
    assert growth < 200, "precondition: a line would give too few edits"
    assert growth < 300 < edits_until(start, keys[:300, None], torch.ones(1), growth=growth) < 600


def test_drawn_changes_have_the_statistics_of_the_sample() -> None:
    torch.manual_seed(2)
    shared = torch.randn(1, 300)
    sample = torch.randn(100, 300) + 0.5 * shared
    statistics = ChangeStatistics.of(sample)
    assert statistics.common == pytest.approx(0.2, abs=0.03)
    drawn = statistics.draw(4000)
    again = ChangeStatistics.of(drawn)
    assert again.common == pytest.approx(statistics.common, abs=0.01)
    assert float(again.norms.mean()) == pytest.approx(float(statistics.norms.mean()), rel=0.01)
    assert torch.equal(drawn, statistics.draw(4000))
    with pytest.raises(InputError, match="ask for no change"):
        ChangeStatistics.of(torch.zeros(3, 4))


def test_a_route_has_the_part_that_arrives_and_the_size_of_the_rest() -> None:
    torch.manual_seed(3)
    added = torch.randn(500, 200)
    aside = torch.randn(500, 200)
    aside -= added * ((aside * added).sum() / added.square().sum())
    route = Route.of(added, 0.8 * added + 0.3 * aside)
    assert route.gain == pytest.approx(0.8, rel=1e-3)
    assert route.spill == pytest.approx(0.3 * float(aside.norm() / added.norm()), rel=1e-3)
    assert Route.of(torch.zeros(2, 3), torch.zeros(2, 3)) == Route()


def test_what_a_layer_loses_on_the_way_is_left_to_the_next_ones() -> None:
    prior, keys, ones = Prior(lam=1e-3), torch.eye(4)[:, None], torch.ones(4, 1)
    changes = torch.full((4, 1), 2.0)
    routes = [Route(gain=0.5), Route()]
    (point,) = forecast_stream([keys, keys], ones, changes, [prior, prior], routes=routes, dtype=torch.float64)
    # The first layer writes half of 2 per edit, of which half arrives; the second one writes the rest.
    assert [layer.weight for layer in point.layers] == pytest.approx([2.0, 3.0], rel=1e-4)
    assert point.realized[0] == pytest.approx(1.0, abs=1e-4)


def test_layers_whose_outputs_are_turned_on_the_way_are_forecast_within_ten_percent() -> None:
    """The layers between add to what a layer writes a part that is orthogonal to it; a turn by a right angle here."""
    layers, width, batch, count = 5, 64, 40, 160
    sigma, prior = toy(lam=3.0)
    keys = [draw(sigma, count, seed=at)[:, None] for at in range(layers)]
    changes = CHANGES.draw(count, dimensions=width, seed=5)
    routes = [*(Route(gain, spill) for gain, spill in ((0.5, 2.0), (0.4, 1.8), (0.6, 1.3), (0.7, 0.9))), Route()]
    generator = torch.Generator().manual_seed(6)
    turns = []
    for _ in range(layers):
        drawn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
        turn = torch.zeros(width, width, dtype=torch.float64)
        turn[0::2, 1::2], turn[1::2, 0::2] = torch.eye(width // 2), -torch.eye(width // 2)
        turns.append(drawn @ turn @ drawn.T)
    states = [RLSState(torch.zeros(width, D_K, dtype=torch.float64), prior, dtype=torch.float64) for _ in keys]
    for at in range(0, count, batch):
        missing = changes[at : at + batch].clone()
        for layer, (state, route, turn) in enumerate(zip(states, routes, turns, strict=True)):
            panel = state.project(keys[layer][at : at + batch, 0])
            innovation = missing / (layers - layer)
            moved = innovation - state.update_projected(panel, innovation).residual
            gain, spill = (1.0, 0.0) if layer == layers - 1 else (route.gain, route.spill)
            missing = missing - gain * moved - spill * moved @ turn
    (point,) = forecast_stream(
        keys, torch.ones(count, 1), changes, [prior] * layers, routes=routes, batch_size=batch, dtype=torch.float64
    )
    for one, state in zip(point.layers, states, strict=True):
        assert one.weight == pytest.approx(state.deviation(), rel=0.1)


def test_what_earlier_edits_give_of_the_common_part_is_not_asked_for_again() -> None:
    sigma, prior = toy(lam=0.3, mu=0.0)
    keys = draw(sigma, 1, seed=3).repeat(20, 1)[:, None]
    changes = ChangeStatistics(torch.ones(1), common=1.0).draw(20)
    forecast = [
        forecast_stream([keys], torch.ones(20, 1), changes, [prior], batch_size=1, common_first=common)[0].layers[0]
        for common in (False, True)
    ]
    present, once = (one.weight for one in forecast)
    (single,) = forecast_stream([keys[:1]], torch.ones(1, 1), changes[:1], [prior], batch_size=1)
    assert once == pytest.approx(single.layers[0].weight, rel=0.1)
    assert present > 2 * once


def test_invalid_arguments_raise() -> None:
    keys, prior = torch.ones(3, 1, 4), Prior(lam=1.0)
    with pytest.raises(InputError, match=r"keys \[\[3, 1, 4\]\], weights \[2, 1\], changes \[3, 2\], 1 priors"):
        forecast_stream([keys], torch.ones(2, 1), torch.ones(3, 2), [prior])
    with pytest.raises(InputError, match="expected keys"):
        forecast_stream([keys], torch.ones(3, 1), torch.ones(2, 2), [prior])
    with pytest.raises(InputError, match="edits=0"):
        Asymptotics(torch.eye(3), prior).fixed(0)
    with pytest.raises(InputError, match="pass anchor_moment"):
        Asymptotics(torch.eye(3), Prior(lam=1.0, mu=1.0, anchor_keys=torch.eye(3)))
