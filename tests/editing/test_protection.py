"""Protected prompts with wanted continuations, and with given values."""

from __future__ import annotations

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.errors import InputError
from rlsedit_fast.models import generate_answers
from rlsedit_fast.world import load_demo_model

PROMPTS, WANTED = ["Toze Lado Rekuno plays the", "Fado Veta Voluvu speaks"], ["harp", "Nafiish"]
CONFIG = rf.EditConfig(layers=[0, 1], prior={"lam": 0.05}, contexts={"prefixes": ("", "In short:")})
EDIT = rf.Edit("{} lives in", "Voluvu Fado", "Port Alder")


def answers(editor):
    return generate_answers(editor.model, editor.tokenizer, list(zip(PROMPTS, WANTED, strict=True)))


@pytest.fixture
def editor(tokenizer):
    return rf.Editor(load_demo_model()[0], tokenizer, config=CONFIG)


def weights(editor):
    return {name: value.clone() for name, value in editor.model.state_dict().items()}


def unchanged(editor, before):
    return all(torch.equal(value, editor.model.state_dict()[name]) for name, value in before.items())


def test_the_model_continues_protected_prompts_as_wanted(editor):
    before, original = answers(editor), weights(editor)
    assert before != WANTED
    assert editor.protect(PROMPTS, continuations=WANTED, weight=2.0) == 2
    assert editor.protected == PROMPTS
    assert unchanged(editor, original)  # added when the priors are set
    editor.edit([EDIT])
    assert answers(editor) == WANTED
    for layer in editor.deviation():
        assert 0 < layer.protected <= layer.edits * (1 + 1e-6)
        assert layer.edits <= editor._session.layers.states[0].objective ** 0.5 * 10
    editor.undo(1)
    assert answers(editor) == WANTED  # part of the prior: not undone with the edits
    editor.protect(["Rekuno Voluvu Toze plays the"], continuations=["organ"])
    assert answers(editor) == WANTED
    assert len(editor.protected) == 3


def test_a_failed_first_batch_gives_the_original_model_back(editor, monkeypatch):
    original = weights(editor)
    editor.protect(PROMPTS, continuations=WANTED)
    with pytest.raises(rf.UnstatedError):
        editor.edit([rf.Edit("{} lives in", "Voluvu Fado", "zzz " * 8)], require_stated=True)
    assert unchanged(editor, original)
    assert editor.priors == []
    editor.edit([EDIT])
    assert answers(editor) == WANTED


def test_given_values_are_reached_and_bounded(tokenizer):
    editor = rf.Editor(load_demo_model()[0], tokenizer, config=CONFIG.replace(layers=[0], prior={"lam": 0.02}))
    (keys,) = editor.context.text_keys(PROMPTS)
    (weight,) = editor.context.projections[0].blocks
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) / 10
    wanted = keys @ (weight + change).T
    assert editor.protect(PROMPTS, values=[wanted]) == len(keys)
    editor.calibrate([EDIT])
    state = editor._session.layers.states[0]
    misfit = float((state.outputs(keys) - wanted).norm())
    assert misfit < 0.1 * float((keys @ state.original.T - wanted).norm())
    assert editor.deviation()[0].protected == pytest.approx(misfit, rel=1e-4)
    assert misfit <= state.objective**0.5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"continuations": ["harp"]}, "2 prompts and 1 continuations"),
        ({"continuations": ["harp", " "]}, "continuations"),
        ({"continuations": "harp"}, "list"),
        ({"continuations": WANTED, "values": []}, "exclude each other"),
        ({"values": [torch.zeros(3, 4)]}, "one tensor"),
        ({"values": "abc"}, "one tensor"),
    ],
)
def test_invalid_arguments_change_nothing(editor, options, text):
    original = weights(editor)
    with pytest.raises(InputError, match=text):
        editor.protect(PROMPTS, **options)
    assert unchanged(editor, original)
    assert editor.protected == []


def test_values_that_are_not_finite_and_baselines_are_rejected(tokenizer):
    editor = rf.Editor(load_demo_model()[0], tokenizer, config=CONFIG.for_rule("memit"))
    with pytest.raises(InputError, match="rule='memit'"):
        editor.protect(PROMPTS, continuations=WANTED)
    editor = rf.Editor(load_demo_model()[0], tokenizer, config=CONFIG)
    tokens = len(editor.context.text_keys(PROMPTS)[0])
    shapes = [(tokens, projection.value_width) for projection in editor.context.projections]
    with pytest.raises(InputError, match="finite"):
        editor.protect(PROMPTS, values=[torch.full(shape, torch.nan) for shape in shapes])


def test_continuations_survive_replay_and_consolidation(tokenizer, tmp_path):
    with rf.Editor(load_demo_model()[0], tokenizer, config=CONFIG, store=tmp_path) as editor:
        editor.protect(PROMPTS[:1], continuations=WANTED[:1])
        editor.edit([EDIT])
        editor.protect(PROMPTS[1:], continuations=WANTED[1:])
        live = weights(editor)
    with rf.Editor(load_demo_model()[0], tokenizer, store=tmp_path) as editor:
        assert unchanged(editor, live)
        assert editor.protected == PROMPTS
        editor.consolidate()
        assert answers(editor) == WANTED
