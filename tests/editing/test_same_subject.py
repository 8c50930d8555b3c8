"""Edits of one subject share one value, and a later edit of the same prompt replaces the earlier one."""

from __future__ import annotations

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.world import RELATIONS, World, load_demo_model

CONFIG = {
    "layers": (0,),
    "contexts": {"prefixes": ("",)},
    "search": {"kl_prompts": ("{} is a",), "steps": 40, "stop_nll": 0.03},
    "prior": {"adherence": 0.975},
}


def facts(person, count):
    """False facts about one person, in their first phrasing."""
    return [
        rf.Edit(
            relation.phrasings[0], person.name, next(v for v in relation.values if v != person.facts[relation.name])
        )
        for relation in RELATIONS[:count]
    ]


@pytest.fixture(scope="module")
def people():
    return World.generate().people


@pytest.fixture
def demo():
    return load_demo_model()


def make_editor(demo, people, **changes):
    editor = rf.Editor(*demo, config=rf.EditConfig(**CONFIG).replace(**changes))
    editor.anchor([r.phrasings[0].format(p.name) + " " + p.facts[r.name] for p in people[100:160] for r in RELATIONS])
    return editor


def exact_count(demo, edits):
    """Returns the number of edits whose target tokens are all ranked first."""
    return sum(s.exact for s in score(*demo, [(e.prompt.format(e.subject), e.target) for e in edits]))


def test_facts_of_one_subject_in_one_batch_are_all_stated(demo, people):
    edits = [edit for person in people[:4] for edit in facts(person, 3)]
    records = make_editor(demo, people).edit(edits)
    assert exact_count(demo, edits) == len(edits)
    assert records[0].joint_with == (2, 3)
    assert records[4].joint_with == (4, 6)


def test_facts_of_one_subject_in_successive_batches_are_all_stated(demo, people):
    edits = [facts(person, 3)[i] for i in range(3) for person in people[:4]]
    editor = make_editor(demo, people, batch_size=4)
    records = editor.edit(edits)
    assert exact_count(demo, edits) == len(edits)
    assert {r.joint_with for r in records if r.subject == people[0].name} == {(5, 9), (1, 9), (1, 5)}
    assert [r.batch for r in records] == [1] * 4 + [2] * 4 + [3] * 4
    assert editor.history() == records


def test_separate_edits_of_one_subject_interfere(demo, people):
    """Without the shared value the same stream loses facts."""
    edits = [facts(person, 3)[i] for i in range(3) for person in people[:4]]
    records = make_editor(demo, people, batch_size=4, same_subject="separate", refine=0).edit(edits)
    assert exact_count(demo, edits) < len(edits)
    assert all(record.joint_with == () for record in records)


def test_undo_of_one_edit_rewrites_the_others_of_its_subject(demo, people):
    edits = facts(people[0], 3)
    editor = make_editor(demo, people)
    start = editor.model.state_dict()["model.layers.0.mlp.down_proj.weight"].clone()
    editor.edit([*edits, *facts(people[1], 1)])
    (undone,) = editor.undo(2)
    assert undone.state == "undone"
    assert [r.joint_with for r in editor.history()] == [(3,), (), (1,), ()]
    assert exact_count(demo, [edits[0], edits[2]]) == 2
    old = people[0].facts[RELATIONS[1].name]
    assert score(*demo, [(edits[1].prompt.format(people[0].name), old)])[0].exact

    without = make_editor(load_demo_model(), people)
    without.edit([edits[0], edits[2], *facts(people[1], 1)])
    after, other = (e._session.layers.states[0].weight for e in (editor, without))
    # The same rows in another order, and each search starts from a slightly different model.
    assert (after - other).norm() < 0.1 * (after - start).norm()
    editor.undo([1, 3, 4])
    assert torch.equal(editor.model.state_dict()["model.layers.0.mlp.down_proj.weight"], start)


def test_a_later_edit_of_the_same_prompt_replaces_the_first(demo, people):
    first = facts(people[0], 1)[0]
    later = rf.Edit(f"{first.prompt} ", first.subject, RELATIONS[0].values[-1])
    editor = make_editor(demo, people)
    records = editor.edit([first, *facts(people[1], 1), later])
    assert [r.state for r in records] == ["replaced", "active", "active"]
    assert [r.batch for r in records] == [1, 1, 2]
    assert exact_count(demo, [later]) == 1
    assert [r.state for r in editor.edit([first])] == ["active"]
    assert [r.state for r in editor.history()] == ["replaced", "active", "replaced", "active"]
    assert exact_count(demo, [first]) == 1


def test_a_failed_rewrite_changes_nothing(demo, people, monkeypatch):
    editor = make_editor(demo, people)
    edits = facts(people[0], 3)
    editor.edit(edits[:2])
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}
    history = editor.history()
    monkeypatch.setattr("rlsedit_fast.editing.search.value_search.search_within_memory", lambda *_: 1 / 0)
    for failing in (lambda: editor.edit(edits[2:]), lambda: editor.undo(1), lambda: editor.edit(edits[:1])):
        with pytest.raises(ZeroDivisionError):
            failing()
        assert all(torch.equal(value, before[name]) for name, value in editor.model.state_dict().items())
        assert editor.history() == history
    monkeypatch.undo()
    assert [r.state for r in editor.edit(edits[2:])] == ["active"]
