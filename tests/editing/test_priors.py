"""The calibrated prior realizes the adherence in the model, also in later batches."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing import priors as priors_module
from rlsedit_fast.editing.priors import Pilot, choose_priors
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.editing.search.value_search import Values
from rlsedit_fast.errors import InputError, UpdateError
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.rls import TrialPanel
from rlsedit_fast.world import RELATIONS, World, load_demo_model

from .demo_anchors import demo_statistics

NAMES = [" ".join(name) for name in itertools.permutations("Toze Lado Rekuno Fado Veta Voluvu".split(), 3)]
PROMPTS = ["{} lives in", "{} works as a", "{} plays the", "{} speaks", "{} is", "Friends know that {} is"]
TARGETS = ["Port Alder", "mason", "organ", "Kubeish", "Old Corran", "clarinet", "Lake Briar"]
RANDOM = [rf.Edit(PROMPTS[i % 6], NAMES[i], TARGETS[i % 7]) for i in range(60)]
ANCHORS = [f"{a} lives in Port Garnet . {b} speaks Nafiish ." for a in NAMES[60:90] for b in NAMES[90:94]]
WORLD = World.generate()
FACTS = [case.edit for case in world_cases(WORLD, 24, 0)]


@pytest.fixture
def make_editor(make_model, tokenizer):
    """Returns a function that makes editors of a tiny random model or of the demo model."""

    def make(name, **changes):
        if name == "demo":
            settings = {"layers": (0,), "search": {"steps": 40, "stop_nll": 0.03}}
            editor = rf.Editor(*load_demo_model(), config=rf.EditConfig(**settings).replace(**changes))
            editor.anchor(demo_statistics(1000))
            return editor
        settings = {
            "layers": (1,),
            "contexts": {"prefixes": ("", "People speak .")},
            "search": {"clamp": 4.0, "steps": 5},
            "fact_token": "last",
        }
        editor = rf.Editor(make_model(name), tokenizer, config=rf.EditConfig(**settings).replace(**changes))
        editor.anchor(ANCHORS)
        return editor

    return make


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(before, model):
    now = model.state_dict()
    assert [name for name, value in before.items() if not torch.equal(value, now[name])] == []


TINY = [("llama", (1,)), ("llama", (0, 1, 2)), ("gpt2", (1, 2))]


def mean_realized(records):
    return sum(record.realized for record in records) / len(records)


@pytest.mark.parametrize(
    ("name", "layers", "adherence"),
    [
        *((name, layers, share) for name, layers in TINY for share in (0.6, 0.95)),
        *(("demo", (0,), 0.6), pytest.param("demo", (0, 1, 2), 0.95, marks=pytest.mark.soak)),
    ],
)
def test_the_realized_share_equals_the_adherence(make_editor, name, layers, adherence):
    """A second editor gets the calibrated mu as a number, and so does not aim at more than the wanted change."""
    edits = FACTS if name == "demo" else RANDOM[:12]
    settings = {"layers": layers, "refine": 0, "batch_size": len(edits)}
    calibrated = make_editor(name, prior={"adherence": adherence}, **settings)
    priors = calibrated.calibrate(edits)
    (row,) = make_editor(name, prior={"adherence": adherence}, **settings).assess(edits, [adherence])
    given = make_editor(name, prior={"mu": priors[0].mu}, **settings)
    records = given.edit(edits)
    assert [prior.lam for prior in given.priors] == [prior.lam for prior in priors]
    assert abs(mean_realized(records) - adherence) <= 0.02
    # The trial takes the same steps in float64, and the measuring pass runs in float32.
    assert row.realized == pytest.approx(mean_realized(records), abs=2e-3)


@pytest.mark.parametrize("layers", [(1,), (1, 2)])
def test_later_batches_realize_the_adherence(make_editor, layers):
    settings = {"layers": layers, "batch_size": 10, "refine": 0}
    kept = make_editor("llama", prior={"adherence": 0.8}, **settings)
    kept.calibrate(RANDOM[:10])
    fixed = make_editor("llama", prior={"mu": kept.priors[0].mu}, **settings)
    shares = []
    for editor in (kept, fixed):
        records = editor.edit(RANDOM)
        shares.append([mean_realized(records[at : at + 10]) for at in range(0, 60, 10)])
    assert min(shares[0]) >= 0.78
    assert min(shares[1]) < 0.75, "precondition: with fixed mu, later batches realize less"


@pytest.mark.parametrize("layers", [(1,), (1, 2)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_calibration_changes_no_weight(make_editor, name, layers):
    editor = make_editor(name, layers=layers)
    before = weights(editor.model)
    editor.assess(RANDOM[:6], [0.5, 0.9])
    assert_same(before, editor.model)
    editor.calibrate(RANDOM[:6])
    assert_same(before, editor.model)
    editor.edit(RANDOM[:6])  # the editor does not mistake the trial for a change by other code


def test_calibration_changes_no_weight_of_a_bfloat16_model(make_model, tokenizer):
    config = rf.EditConfig(layers=(1, 2), contexts={"prefixes": ("",)}, fact_token="last", search={"steps": 3})
    editor = rf.Editor(make_model("llama", torch.bfloat16), tokenizer, config=config)
    editor.anchor(ANCHORS)
    before = weights(editor.model)
    editor.calibrate(RANDOM[:6])
    assert_same(before, editor.model)


@pytest.mark.parametrize("error", [UpdateError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_failed_trial_changes_no_weight(make_editor, monkeypatch, error):
    editor = make_editor("llama", layers=(1, 2))
    before, calls = weights(editor.model), []
    real = TrialPanel.leakage

    def fails_in_the_second_layer(panel, shared):
        calls.append(panel)
        if len(calls) == 2:
            assert not torch.equal(editor.context.projections[0].weight, before["model.layers.1.mlp.down_proj.weight"])
            raise error("made to fail")
        return real(panel, shared)

    monkeypatch.setattr(TrialPanel, "leakage", fails_in_the_second_layer)
    with pytest.raises(error, match="made to fail"):
        editor.calibrate(RANDOM[:6])
    monkeypatch.undo()
    assert len(calls) == 2
    assert_same(before, editor.model)
    assert editor.priors == []
    editor.calibrate(RANDOM[:6])
    assert len(editor.edit(RANDOM[:6])) == 6


def pilot_of(editor, edits, moments=None):
    requests = editor.context.prepare(edits)
    return Pilot(editor.context, moments or editor._session.moments, requests, editor._session.finder.find(requests))


def test_lam_is_the_ridge_relative_to_the_moment(make_editor):
    editor = make_editor("llama", layers=(1, 2), prior={"ridge": 0.03})
    for prior, moment in zip(editor.calibrate(RANDOM[:6]), editor._session.moments, strict=True):
        assert prior.lam**2 == pytest.approx(0.03 * prior.mu**2 * float(moment.diagonal().double().mean()))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_prior_scales_with_the_anchors(make_editor, scale):
    editor = make_editor("llama")
    plain, scaled = (
        choose_priors(editor.config, moments, [None], pilot_of(editor, RANDOM[:6], moments))[0]
        for moments in (editor._session.moments, [scale * moment for moment in editor._session.moments])
    )
    assert scaled.mu == pytest.approx(plain.mu / math.sqrt(scale), rel=1e-5)  # the scaled moments round in float32
    assert scaled.lam == pytest.approx(plain.lam, rel=1e-5)


def test_a_larger_mu_realizes_less_and_leaks_less(make_editor):
    pilot = pilot_of(make_editor("llama", layers=(1, 2)), RANDOM[:6])
    trials = [pilot.trial(mu) for mu in (0.1, 1.0, 10.0)]
    assert [trial.realized for trial in trials] == sorted((trial.realized for trial in trials), reverse=True)
    assert [sum(trial.leakage) for trial in trials] == sorted((sum(t.leakage) for t in trials), reverse=True)


def contradictory(editor, angle):
    """A pilot of two requests with the same key, whose wanted changes have equal length and the given angle."""
    request = editor.context.prepare(RANDOM[:1])[0]
    values = editor._session.finder.find([request])
    first = values.delta[0]
    side = torch.linalg.qr(torch.stack((first, torch.ones_like(first)), 1)).Q[:, 1]
    second = math.cos(angle) * first + math.sin(angle) * first.norm() * side
    values = replace(Values.joined([values, values], [0, 1]), delta=torch.stack((first, second)))
    return Pilot(editor.context, editor._session.moments, [request, request], values)


def test_an_unreachable_adherence_warns_with_the_largest_reachable_one(make_editor, caplog):
    """Both get the mean of the wanted changes; at a right angle it has half of their squared length."""
    editor = make_editor("llama", contexts={"prefixes": ("",)})
    pilot = contradictory(editor, math.pi / 2)
    mu = pilot.mu_for(0.95)
    assert "adherence=0.95 cannot be reached" in caplog.text
    assert "at most 0.293" in caplog.text
    assert pilot.trial(mu).realized == pytest.approx(1 - math.sqrt(0.5) - 0.01, abs=1e-3)


def test_a_pilot_of_contradicting_edits_raises(make_editor):
    editor = make_editor("llama", contexts={"prefixes": ("",)})
    with pytest.raises(InputError, match=r"adherence=0\.95: edits of the pilot contradict each other"):
        contradictory(editor, math.pi).mu_for(0.95)


def test_a_pilot_whose_keys_are_zero_raises(make_editor, monkeypatch):
    editor = make_editor("llama")
    real = priors_module.request_keys

    def zero(*args, **options):
        keys, states = real(*args, **options)
        return [0 * key for key in keys], states

    monkeypatch.setattr(priors_module, "request_keys", zero)
    with pytest.raises(InputError, match="keys of the pilot edits are all zero"):
        editor.calibrate(RANDOM[:6])


@pytest.mark.parametrize("others", [0, 6])
def test_edits_that_the_model_already_states_do_not_affect_calibration(make_editor, others):
    """Their value search takes no step, so their wanted change is zero."""
    known = [
        rf.Edit(RELATIONS[0].phrasings[0], person.name, person.facts[RELATIONS[0].name]) for person in WORLD.people[-6:]
    ]
    edits = [*known, *FACTS[:others]]
    settings = {"contexts": {"prefixes": ("",)}, "search": {"stop_nll": 5.0}, "batch_size": 12, "refine": 0}
    editor = make_editor("demo", layers=(0, 1), prior={"adherence": 0.9}, **settings)
    (prior, _) = editor.calibrate(edits)
    assert 0 < prior.mu < math.inf
    records = editor.edit(edits)
    assert [record.search_steps for record in records[:6]] == [0] * 6
    assert [record.realized for record in records[:6]] == [1.0] * 6
    assert all(0 < record.realized < 1 for record in records[6:])
    assert editor.status().realized <= 1


def test_assess_raises_once_the_priors_are_set(make_editor):
    editor = make_editor("llama")
    editor.edit(RANDOM[:2])
    before = weights(editor.model)
    with pytest.raises(InputError, match=r"assess\(\): the priors are already set"):
        editor.assess(RANDOM[:2], [0.5])
    assert_same(before, editor.model)
    assert len(editor.edit(RANDOM[2:4])) == 2


def test_the_first_batch_reuses_the_values_of_the_pilot(make_editor, monkeypatch):
    sizes, real = [], value_search.search_within_memory

    def spy(site, requests, *rest):
        sizes.append(len(requests))
        return real(site, requests, *rest)

    monkeypatch.setattr(value_search, "search_within_memory", spy)
    editor = make_editor("llama", batch_size=3, refine=0)
    editor.edit(RANDOM[:6])
    assert sizes == [6, 3], "the pilot, and the second batch in the edited model"
