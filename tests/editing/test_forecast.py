"""The forecast of planned edits describes what these edits do, and changes nothing."""

from __future__ import annotations

import math

import pytest

import rlsedit_fast as rf
from rlsedit_fast.data.drawn import draw_edits
from rlsedit_fast.editing.capacity.forecast import ForecastPoint, LayerForecast, SettingForecast, propose
from rlsedit_fast.editing.priors import Tradeoff
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.world import World, load_demo_model

from .demo_anchors import demo_statistics

FACTS = [case.edit for case in world_cases(World.generate(), 40, 0)]
SETTINGS = {"batch_size": 20, "refine": 0, "search": {"steps": 15}, "contexts": {"prefixes": ["", "People say :"]}}


def make_editor(layers: tuple[int, ...] = (0, 1)) -> rf.Editor:
    editor = rf.Editor(*load_demo_model(), config=rf.EditConfig(layers=layers, **SETTINGS))
    editor.anchor(demo_statistics(1000))
    return editor


def test_the_forecast_agrees_with_the_edits_and_changes_nothing() -> None:
    editor = make_editor()
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}
    reported = []
    forecast = editor.forecast(
        FACTS, adherences=[0.8], pilot=20, progress=lambda about, done, of: reported.append((about, done, of))
    )
    assert all(value.equal(before[name]) for name, value in editor.model.state_dict().items())
    assert ("reading keys", 40, 40) in reported
    assert reported[-1] == ("adherence 0.8", 40, 40)
    assert (forecast.keys, forecast.searched, forecast.rows) == (40, 20, 2)
    (setting,) = forecast.settings
    point = setting.points[-1]
    assert not point.extrapolated
    records = editor.edit(FACTS)
    assert editor.priors[0].mu == pytest.approx(setting.tradeoff.mu[0], rel=0.05)
    last = sum(record.realized for record in records[-20:]) / 20
    assert point.realized_newest == pytest.approx(last, abs=0.03)
    for layer, status in zip(point.layers, editor.status(sample=0).layers, strict=True):
        assert layer.layer == status.layer
        assert layer.weight == pytest.approx(status.weight, rel=0.15)
        assert layer.anchors == pytest.approx(status.anchors, rel=0.15)
    with pytest.raises(InputError, match=r"forecast\(\): the priors are already set"):
        editor.forecast(FACTS)


def test_more_edits_than_keys_are_marked_as_extrapolated() -> None:
    forecast = make_editor((0,)).forecast(FACTS[:20], adherences=[0.9], pilot=5, count=130)
    points = forecast.settings[0].points
    assert [(point.edits, point.extrapolated) for point in points] == [(100, True), (130, True)]
    assert points[-1].drift > points[0].drift
    assert any("20 keys do not determine" in note for note in forecast.notes)
    assert any("beyond 20 edits" in note for note in forecast.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adherences": []}, "adherences="),
        ({"adherences": [1.5]}, r"adherences=\[1.5\]"),
        ({"count": 0}, "count=0"),
        ({"pilot": 0}, "pilot=0"),
        ({"max_drift": math.inf}, "max_drift=inf"),
        ({"min_realized": 1}, "min_realized=1"),
    ],
)
def test_invalid_arguments_raise(options: dict[str, object], message: str) -> None:
    editor = rf.Editor(*load_demo_model(), config=rf.EditConfig(layers=(0,), search={"steps": 1}))
    with pytest.raises(InputError, match=message):
        editor.forecast(FACTS[:2], **options)  # type: ignore[arg-type]


def test_other_rules_are_not_forecast() -> None:
    editor = rf.Editor(*load_demo_model(), config=rf.EditConfig(layers=(0,)).for_rule("memit"))
    with pytest.raises(InputError, match="rule='memit' is not forecast"):
        editor.forecast(FACTS[:2])


def setting(adherence: float, drifts: list[float], kept: list[float], capacity: int | None) -> SettingForecast:
    points = [
        ForecastPoint(
            100 * at, 0.1 * at, False, one, one, one, drift, [LayerForecast(3, 0.1, 1.0, drift, None, 1.0, one, one)]
        )
        for at, (drift, one) in enumerate(zip(drifts, kept, strict=True), start=1)
    ]
    return SettingForecast(Tradeoff(adherence, [0.5], [2.0], adherence, [0.1]), points, capacity)


def test_the_largest_adherence_within_the_limits_is_proposed() -> None:
    low = setting(0.8, [0.05, 0.1], [0.8, 0.7], None)
    middle = setting(0.9, [0.1, 0.2], [0.9, 0.8], None)
    high = setting(0.99, [0.2, 0.4], [0.99, 0.95], 125)
    proposal = propose([low, middle, high], 0.25, 0.5, 30)
    assert (proposal.adherence, proposal.mu, proposal.lam, proposal.edits, proposal.layers) == (
        0.9,
        2.0,
        [0.5],
        None,
        1,
    )
    proposal = propose([high], 0.25, 0.5, 30)
    assert (proposal.adherence, proposal.edits, proposal.layers) == (None, 125, 2)
    assert "up to about 125" in proposal.reason
    assert proposal.rows_per_dimension == pytest.approx(0.125)


def test_edits_are_drawn_from_names_in_text() -> None:
    text = "yesterday Miles Davis plays the trumpet in Paris on a stage of wood . " * 2
    edits = draw_edits([text], 2)
    assert {(edit.subject, edit.prompt, edit.target) for edit in edits} == {
        ("Miles Davis", "{} plays the trumpet", "in"),
        ("Paris", "{} on a stage", "of"),
    }
    assert len(draw_edits([text], 4)) == 4, "other words are used if there are too few names"
    assert len(draw_edits([text], 100)) < 15
    assert draw_edits(["{} { Braces in a text"], 3) == []
    assert draw_edits([], 3) == []
