"""The comparison in small: its experiments on the shipped model, and what the report makes of them."""

import sys

import paper
import pytest
from report_runs import OURS
from report_sections import capability, costs

from rlsedit_fast.evaluation import grounds, runs, stream

GRIDS = {
    "memit": [{"rule": "memit", "lam": 0.0}],
    "memit-history": [{"rule": "memit-history", "lam": 0.0}],
    "alphaedit": [{"rule": "alphaedit", "rule_options": {"null_share": share, "ridge": 10.0}} for share in (0.9, 0.95)],
}
TITLES = (
    "In short",
    "Rules side by side",
    "Early edits",
    "lam and mu over four decades",
    "Bound against measured deviation",
    "Orders of one stream",
    "Conflicting and related edits",
    "Batches of 1 and 100",
    "Capability",
    "Cost of a batch against history",
    "How the other rules were set",
    "How it was taken",
)


@pytest.fixture
def few_texts(monkeypatch):
    """Few texts to anchor, to probe and to write; what is remembered of them is forgotten before and after."""
    remembered = (grounds._demo_statistics, runs._ground)
    for one in remembered:
        one.cache_clear()
    every = grounds.anchor_texts
    monkeypatch.setattr(grounds, "anchor_texts", lambda world, seed: every(world, seed)[::100])
    monkeypatch.setattr(stream, "_FLUENT", 2)
    yield
    for one in remembered:
        one.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("few_texts")
def test_every_experiment_is_told_in_the_report(tmp_path, monkeypatch, capsys):
    brief = {"checkpoints": (), "judged": 4}
    for name, small in {
        "GRIDS": GRIDS,
        "TUNING_EDITS": 4,
        "TUNING_SEED": 1,
        "FACTORS": {"plain": (1.0, 10.0)},
        "BRIEF": brief,
        "ALONG": brief | {"checkpoints": (0.5, 1.0)},
    }.items():
        monkeypatch.setattr(paper, name, small)
    planned = []

    def some(jobs, *, processes):
        """All are planned; those that are made are the recursive rule's, and another one's beside it."""
        planned.extend(jobs)
        beside = ("tuning", "rules")
        kept = [job for job in jobs if job.plan.label == OURS or "sweep" in job.path.parts]
        kept += [job for job in jobs if job.path.parent.name in beside and job.plan.config.rule == "alphaedit"]
        runs.make([job for job in kept if not job.plan.order], processes=processes)

    monkeypatch.setattr(paper, "make", some)
    monkeypatch.setattr(sys, "argv", ["paper.py", "demo", "--out", str(tmp_path), "--edits", "20", "--seeds", "1"])
    paper.main()
    assert {job.plan.stream for job in planned} == {"plain", "conflicting", "related"}
    assert {job.plan.order for job in planned} == set(range(5))
    assert "report.html" in capsys.readouterr().out
    told = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert [line[3:] for line in told.splitlines() if line.startswith("## ")] == list(TITLES)
    assert "No runs of" not in told
    assert "no measured deviation exceeds its bound" in told
    assert "| rls | 0." in told or "| rls | 1." in told


def small_run(layers, batch_size, search_ahead):
    """A run of which only what two sections read is there."""
    rows = [
        {"edits": 200, "of": f"layer {layer}", "metric": "deviation", "form": "measured", "value": norm}
        for layer, norm in layers.items()
    ]
    rows += [{"edits": e, "of": "text", "metric": "kl", "form": "text", "value": 0.1} for e in (100, 200)]
    config = {"layers": None, "batch_size": batch_size, "search_ahead": search_ahead}
    return {
        "plan": {"label": OURS, "config": config},
        "rows": rows,
        "ground": "demo",
        "failed": None,
        "made": 200,
        "seconds_editing": 4.0,
        "seconds_per_batch": [0.1] * 20,
    }


def test_the_weights_of_layers_that_nobody_named_are_told():
    table = capability([small_run({4: 3.0, 10: 4.0}, 10, 100)]).parts[-1]
    assert dict(zip(table.head, table.rows[0], strict=True))["‖W − W0‖"] == "5.0"
    assert "of all edited layers together" in table.note


@pytest.mark.parametrize(
    ("batch_size", "search_ahead", "apart"), [(10, 100, True), (10, None, False), (100, 100, False), (100, 1000, False)]
)
def test_a_batch_is_said_to_hold_the_search_of_its_values_where_it_does(batch_size, search_ahead, apart):
    table = costs([small_run({0: 1.0}, batch_size, search_ahead)]).parts[-1]
    assert ("without the search of the values" in table.note) == apart
    assert ("early, ms" in table.head) == apart
