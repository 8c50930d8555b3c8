"""The figures of a record equal those of an independent forward pass of the model after the write."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing.search import objective, value_search
from rlsedit_fast.editing.search.objective import measure
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.models.passes import hidden_of, quiet
from rlsedit_fast.world import World, load_demo_model

EDITS = [
    rf.Edit("{} lives in", "Toze Lado Rekuno", "Port Alder"),
    rf.Edit("The native language of {} is", "Fado Veta Voluvu", "Kubeish"),
    rf.Edit("Friends love to hear {} play the", "Lado", "clarinet"),
    rf.Edit("{} plays the", "Veta Fado", "organ", weight=2.0),
]


def plain(model, module, row):
    """Runs one row through the whole model; returns the module's output at the lookup token, the NLL and the rank."""
    seen = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(hidden_of(output)))
    with torch.no_grad():
        scores = model(torch.tensor([row.ids])).logits[0, row.prompt_length - 1 : -1].float().log_softmax(-1)
    handle.remove()
    (hidden,) = seen
    state = hidden.reshape(-1, hidden.shape[-1])[row.lookup].float()  # OPT's blocks flatten rows and tokens
    target = torch.tensor(row.target)[:, None]
    target_scores = scores.gather(1, target)
    return state, float(-target_scores.mean()), int((scores > target_scores).sum(1).max()) + 1


@pytest.fixture
def goals(monkeypatch):
    """Maps each edit to the state at its bare prompt that its last search aims at."""
    found, real = {}, value_search.search_within_memory

    def spy(site, requests, *rest):
        values, at_once = real(site, requests, *rest)
        found.update((request.edit, goal) for request, goal in zip(requests, values.goal[:, 0], strict=True))
        return values, at_once

    monkeypatch.setattr(value_search, "search_within_memory", spy)
    return found


def check(records, editor, before, goals):
    """Compares the records of a first batch with the model now and before; without goals, only its outputs."""
    module = editor.context.site.module
    edits = [rf.Edit(record.prompt, record.subject, record.target, record.weight) for record in records]
    rows = [request.contexts[0] for request in editor.context.prepare(edits)]
    name = next(name for name, one in editor.model.named_modules() if one is module)
    for record, row, edit in zip(records, rows, edits, strict=True):
        with quiet(editor.model):
            state, nll, rank = plain(editor.model, module, row)
        if goals is not None:
            with quiet(before):
                start, _, _ = plain(before, before.get_submodule(name), row)
            realized = 1 - float((goals[edit] - state).norm() / (goals[edit] - start).norm())
            assert record.realized == pytest.approx(realized, abs=1e-4)
        assert record.nll == pytest.approx(nll, rel=1e-4, abs=1e-4)
        assert record.rank == rank
        assert record.success == (rank == 1)


def test_figures_match_the_model_in_every_family(make_model, tokenizer, family, goals):
    config = rf.EditConfig(
        layers=(2,),
        batch_size=len(EDITS),
        contexts={"prefixes": ("", "People speak .")},
        fact_token="last",
        search={"clamp": 4.0, "steps": 8},
        prior={"lam": 1.0},
        refine=0,
    )
    editor = rf.Editor(make_model(family), tokenizer, config=config)
    records = editor.edit(EDITS)
    assert len({record.realized for record in records}) == len(records)
    check(records, editor, make_model(family), goals)


def test_figures_match_the_demo_model_with_and_without_a_refinement_round(goals):
    cases = world_cases(World.generate(), 12, 0)
    edits = [rf.Edit(case.edit.prompt, case.edit.subject, case.edit.target) for case in cases]
    config = rf.EditConfig(layers=(0, 1), search={"steps": 40, "stop_nll": 0.03}, prior={"adherence": 0.5}, refine=0)
    plain = rf.Editor(*load_demo_model(), config=config)
    records = plain.edit(edits)
    check(records, plain, load_demo_model()[0], goals)
    refined = rf.Editor(*load_demo_model(), config=config.replace(refine=1))
    pairs = list(zip(records, refined.edit(edits), strict=True))
    again = [new for old, new in pairs if not old.success and old.search_rank == 1]
    assert 0 < len(again) < 12
    check(again, refined, load_demo_model()[0], None)
    assert [new.realized for _, new in pairs] == [old.realized for old, _ in pairs], "measured after the write"
    assert all(replace(new, time=old.time) == old for old, new in pairs if new not in again)


def test_figures_and_their_order_do_not_depend_on_the_rows_per_pass(make_model, tokenizer, monkeypatch):
    editor = rf.Editor(make_model("llama"), tokenizer, config=rf.EditConfig(layers=(1,), contexts={"prefixes": ("",)}))
    requests = editor.context.prepare([*EDITS, *(rf.Edit("{} speaks", edit.subject, edit.target) for edit in EDITS)])
    goal = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    distances = 100 * torch.arange(1.0, 9.0)
    with quiet(editor.model):
        together = measure(editor.context.site, [one.contexts[0] for one in requests], goal, distances)
        monkeypatch.setattr(objective, "_ROWS_AT_ONCE", 1)
        alone = measure(editor.context.site, [one.contexts[0] for one in requests], goal, distances)
    torch.testing.assert_close(alone.realized, together.realized, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.nll, together.nll, rtol=1e-4, atol=1e-4)
    assert torch.equal(alone.rank, together.rank)
    for at, request in enumerate(requests):
        with quiet(editor.model):
            state, nll, rank = plain(editor.model, editor.context.site.module, request.contexts[0])
        assert float(together.realized[at]) == pytest.approx(
            1 - float((goal[at] - state).norm()) / (100 * at + 100), abs=1e-5
        )
        assert float(together.nll[at]) == pytest.approx(nll, rel=1e-4)
        assert int(together.rank[at]) == rank
