"""An editor that is opened again is the one that was closed, bit for bit, and goes on as if nothing had been."""

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.errors import InputError, RequestError, StoreError
from rlsedit_fast.store import Store

from .conftest import ANCHORS, assert_same, assert_same_weights, make_edits, make_tiny, tiny_config, weights


def at_work(editor: rf.Editor, part: int) -> None:
    """A stream with all that there is: protection before and after, undo, replacement, several batches."""
    if part == 0:
        editor.anchor(ANCHORS)
        editor.protect(["Lado speaks Kubeish ."] * 2, weight=3.0)
        editor.edit(make_edits(9))
    elif part == 1:
        editor.undo([2, 5])
        editor.protect(["Veta plays the organ ."])
        editor.edit(make_edits(5, start=9))
    elif part == 2:
        editor.replace(4, target="mason")
        editor.undo(editor._ledger.active[3])
    else:
        editor.edit(make_edits(3, start=30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"share": "memit"}, {"values": "gradient"}, {"keys": "fp16"}], ids=str)
def test_an_editor_opened_again_is_the_one_that_was_closed(tiny, tokenizer, tmp_path, dtype, changes):
    config = tiny_config(**changes)
    whole = rf.Editor(tiny(dtype), tokenizer, config=config)
    for part in range(4):
        at_work(whole, part)
        editor = rf.Editor(tiny(dtype), tokenizer, config=config, store=tmp_path / "store")
        at_work(editor, part)
        editor.close()
        assert_same(editor, whole)
    opened = rf.Editor.open(tmp_path / "store", tiny(dtype), tokenizer)
    assert_same(opened, whole)
    assert opened.config == config
    assert [r.time for r in opened.history()] == [r.time for r in editor.history()]


def test_edits_of_one_subject_are_taken_up_with_their_partners(tiny, tokenizer, tmp_path):
    config = tiny_config(fact_token="subject_last")
    edits = [rf.Edit(prompt, "Toze Lado", target) for prompt, target in zip(("{} is", "{} has"), "ab", strict=True)]
    editors = [rf.Editor(tiny(), tokenizer, config=config, store=store) for store in (None, tmp_path)]
    for editor in editors:
        editor.edit([*make_edits(3), edits[0]])
        editor.edit([edits[1]])
    editors[1].close()
    editors[1] = rf.Editor.open(tmp_path, tiny(), tokenizer)
    assert [r.joint_with for r in editors[1].history()] == [(), (), (), (5,), (4,)]
    for editor in editors:
        editor.edit([rf.Edit("{} is", "Toze Lado", "mason")])
        editor.undo([5])
    assert_same(*editors)
    assert [r.state for r in editors[1].history()][3:] == ["replaced", "undone", "active"]
