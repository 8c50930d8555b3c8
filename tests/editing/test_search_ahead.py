"""The values of several batches are searched together and written batch by batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.layers import EditedLayers
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.editing.search.value_search import requests_within
from rlsedit_fast.errors import UpdateError
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.world import RELATIONS, World, load_demo_model

WORLD = World.generate()
EDITS = [case.edit for case in world_cases(WORLD, 24, 0)]
CONFIG = EditConfig(
    layers=(0,),
    contexts={"prefixes": ("",)},
    search={"steps": 40, "stop_nll": 0.03},
    prior={"lam": 0.1},
    batch_size=6,
    refine=0,
)


def make_editor(**changes):
    return rf.Editor(*load_demo_model(), config=CONFIG.replace(**changes))


def weight(editor):
    return editor.model.state_dict()["model.layers.0.mlp.down_proj.weight"].clone()


@pytest.fixture
def searches(monkeypatch):
    """The sizes of the searches."""
    sizes, real = [], value_search.search_within_memory

    def spy(site, requests, *rest):
        sizes.append(len(requests))
        return real(site, requests, *rest)

    monkeypatch.setattr(value_search, "search_within_memory", spy)
    return sizes


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_batches_searched_together_equal_one_large_batch(searches, layers):
    ahead, large = make_editor(search={"ahead": 24}, layers=layers), make_editor(batch_size=24, layers=layers)
    start = weight(ahead)
    sizes = []
    records = ahead.edit(EDITS, on_batch=lambda made: sizes.append(len(made)))
    large.edit(EDITS)
    assert sizes == [6, 6, 6, 6]
    assert searches == [24, 24]
    assert [record.batch for record in records] == [at // 6 + 1 for at in range(24)]
    if layers == (0,):
        # Keys do not depend on the layer's own weights, so the recursion gives the result of one large batch.
        moved = (weight(large) - start).norm()
        assert float((weight(ahead) - weight(large)).norm() / moved) < 1e-4
    prompts = [(edit.prompt.format(edit.subject), edit.target) for edit in EDITS]
    assert sum(found.exact for found in score(ahead.model, ahead.tokenizer, prompts)) >= 22


def test_windows_contain_whole_batches(searches):
    make_editor(search={"ahead": 15}).edit(EDITS)
    assert searches == [12, 12]
    searches.clear()
    make_editor(search={"ahead": 4}).edit(EDITS)
    assert searches == [6, 6, 6, 6], "a window has at least one batch"


def test_batches_with_the_same_subject_or_prompt_are_searched_separately(searches):
    subject = EDITS[0].subject
    relation = next(r for r in RELATIONS if r.phrasings[0] != EDITS[0].prompt)
    other = rf.Edit(relation.phrasings[0], subject, relation.values[0])
    stream = [*EDITS[:6], other, *EDITS[6:11], *EDITS[12:18]]
    editor = make_editor(search={"ahead": 24})
    records = editor.edit(stream)
    # Only the third batch is independent of the others: the second has a subject of the first.
    assert searches == [6, 7, 6]
    assert records[6].joint_with == (1,)
    searches.clear()
    editor.edit([replace(EDITS[1], target=EDITS[2].target), *EDITS[18:24]])
    assert 6 in searches
    assert editor.history()[1].state == "replaced"


def test_a_failed_batch_keeps_the_batches_before_it(monkeypatch):
    editor = make_editor(search={"ahead": 24})
    real, count = EditedLayers.write, []

    def write(self, *args, **kwargs):
        count.append(0)
        if len(count) == 3:
            raise UpdateError("no")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(EditedLayers, "write", write)
    with pytest.raises(UpdateError, match="first 12 of 24"):
        editor.edit(EDITS)
    assert len(editor.history()) == 12


def test_unconverged_edits_are_skipped_in_their_own_batch():
    unreachable = rf.Edit(RELATIONS[0].phrasings[0], WORLD.people[-1].name, "<pad> <pad> <pad>")
    editor = make_editor(search={"ahead": 24}, unconverged="skip")
    records = editor.edit([*EDITS[:8], unreachable, *EDITS[8:15]])
    assert [record.state for record in records] == ["active"] * 8 + ["skipped"] + ["active"] * 7


def test_a_memory_budget_splits_the_search_without_changing_its_result(searches, caplog):
    whole, tight = make_editor(batch_size=24), make_editor(batch_size=24)
    requests = whole.context.prepare(EDITS)
    each = 10**9 / requests_within(whole.context.site, requests, 10**9)
    tight = make_editor(batch_size=24, search={"memory": int(8.5 * each)})
    assert requests_within(tight.context.site, requests, tight.config.search.memory) == 8
    assert requests_within(tight.context.site, requests, 1) == 1
    whole.edit(EDITS)
    tight.edit(EDITS)
    torch.testing.assert_close(weight(tight), weight(whole), rtol=1e-4, atol=1e-4)


def test_the_memory_of_a_request_grows_with_its_rows(searches):
    few = make_editor()
    many = make_editor(contexts={"prefixes": ("", "People speak .", "Lado speaks", "Veta plays the organ")})
    budget = 10**9
    fit = {
        editor: requests_within(editor.context.site, editor.context.prepare(EDITS), budget) for editor in (few, many)
    }
    assert fit[few] > 1.8 * fit[many]
