"""The change on held-out anchor tokens is measured exactly, also from a store."""

from __future__ import annotations

import math

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing.storage.recovery import read_status
from rlsedit_fast.statistics import GivenTexts, KeyStatistics

WORDS = "Toze Lado Rekuno lives in Port Garnet and speaks Nafiish".split()
TEXTS = [" ".join(WORDS[(at * step) % len(WORDS)] for step in range(1, 8)) for at in range(1, 60)]
FACTS = [rf.Edit("{} lives in", f"{first} {last}", "Port Alder") for first in WORDS[:3] for last in WORDS[:2]]
CONFIG = rf.EditConfig(layers=(1, 2), batch_size=3, search={"steps": 4}, refine=0)


def expected(found: KeyStatistics, editor: rf.Editor, originals: dict[str, torch.Tensor]) -> list[float]:
    changes = []
    for projection in editor.context.projections:
        moment, weight = found.held_out[projection.layer].double(), originals[projection.name].double()
        delta = projection.module.weight.detach().double() - weight
        changed, whole = (float(((one @ moment) * one).sum()) for one in (delta, weight))
        changes.append(math.sqrt(changed / whole))
    return changes


def test_the_change_on_held_out_tokens_is_exact_and_survives_in_a_store(make_model, tokenizer, tmp_path):
    editor = rf.Editor(make_model("llama"), tokenizer, config=CONFIG, store=tmp_path / "store")
    originals = {p.name: p.module.weight.detach().clone() for p in editor.context.projections}
    found = editor.statistics(GivenTexts(TEXTS))
    assert editor.anchor(TEXTS) == found.tokens + found.held_out_tokens
    assert f"{found.held_out_tokens} held out" in editor.anchors
    editor.edit(FACTS)
    layers = editor.status(sample=0).layers
    assert [one.held_out for one in layers] == pytest.approx(expected(found, editor, originals), rel=1e-4)
    assert all(one.held_out != one.anchors for one in layers)
    editor.consolidate()  # writes a snapshot
    now = [one.held_out for one in editor.status(sample=0).layers]
    editor.close()
    assert [one.held_out for one in read_status(tmp_path / "store").layers] == pytest.approx(now, rel=1e-6)
    with rf.Editor(make_model("llama"), tokenizer, store=tmp_path / "store") as again:
        assert [one.held_out for one in again.status(sample=0).layers] == pytest.approx(now, rel=1e-6)


def test_without_held_out_tokens_nothing_is_measured_on_them(make_model, tokenizer, caplog):
    editor = rf.Editor(make_model("llama"), tokenizer, config=CONFIG)
    editor.anchor(TEXTS, held_out=0.0)
    editor.edit(FACTS[:2])
    assert [one.held_out for one in editor.status(sample=0).layers] == [None, None]
    assert "held out" not in caplog.text
    rf.Editor(make_model("llama"), tokenizer, config=CONFIG).anchor(TEXTS[:1])
    assert "no anchor tokens are held out" in caplog.text
