"""The experiments of the comparison on the demo model at small size, and the report."""

import sys

import paper
import pytest
from report_runs import OURS
from report_sections import capability, costs

from rlsedit_fast.evaluation import grounds, runs, stream

GRIDS = {
    "memit": [{"rule": "memit", "prior": {"lam": 0.0}}],
    "memit-history": [{"rule": "memit-history", "prior": {"lam": 0.0}}],
    "alphaedit": [{"rule": "alphaedit", "rule_options": {"null_share": share, "ridge": 10.0}} for share in (0.9, 0.95)],
}
TITLES = (
    "Summary",
    "Comparison of the rules",
    "Retention of early edits",
    "lam and mu over four decades",
    "Bound against measured deviation",
    "Order of the edits",
    "Conflicting and related edits",
    "Batches of 1 and 100",
    "Capability",
    "Time per batch along the stream",
    "Tuning of the other rules",
    "Machines and versions",
)


@pytest.fixture
def few_texts(monkeypatch):
    """Uses few texts, and clears the caches before and after."""
    cached = (grounds._demo_statistics, runs._ground)
    for function in cached:
        function.cache_clear()
    every = grounds.anchor_texts
    monkeypatch.setattr(grounds, "anchor_texts", lambda world, seed: every(world, seed)[::100])
    monkeypatch.setattr(stream, "_FLUENT", 2)
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("few_texts")
def test_report_contains_every_experiment(tmp_path, monkeypatch, capsys):
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
        """Plans all jobs and runs those of the recursive rule and of one other rule."""
        planned.extend(jobs)
        beside = ("tuning", "rules")
        kept = [job for job in jobs if job.plan.label == OURS or "sweep" in job.path.parts]
        kept += [job for job in jobs if job.path.parent.name in beside and job.plan.config.rule == "alphaedit"]
        runs.run_jobs([job for job in kept if not job.plan.order], processes=processes)

    monkeypatch.setattr(paper, "make", some)
    monkeypatch.setattr(sys, "argv", ["paper.py", "demo", "--out", str(tmp_path), "--edits", "20", "--seeds", "1"])
    paper.main()
    assert {job.plan.stream for job in planned} == {"plain", "conflicting", "related"}
    assert {job.plan.order for job in planned} == set(range(5))
    assert "report.html" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(TITLES)
    assert "No runs of" not in text
    assert "no measured deviation exceeds its bound" in text
    assert "| rls | 0." in text or "| rls | 1." in text


def small_run(layers, batch_size, search_ahead):
    """Returns a run with only the fields that two sections read."""
    rows = [
        {"edits": 200, "of": f"layer {layer}", "metric": "deviation", "form": "measured", "value": norm}
        for layer, norm in layers.items()
    ]
    rows += [{"edits": e, "of": "text", "metric": "kl", "form": "text", "value": 0.1} for e in (100, 200)]
    config = {"layers": None, "batch_size": batch_size, "search": {"ahead": search_ahead}}
    return {
        "plan": {"label": OURS, "config": config},
        "rows": rows,
        "ground": "demo",
        "failed": None,
        "made": 200,
        "seconds_editing": 4.0,
        "seconds_per_batch": [0.1] * 20,
    }


def test_weight_change_covers_default_layers():
    table = capability([small_run({4: 3.0, 10: 4.0}, 10, 100)]).parts[-1]
    assert dict(zip(table.head, table.rows[0], strict=True))["‖W − W0‖"] == "5.0"
    assert "over all edited layers" in table.note


@pytest.mark.parametrize(
    ("batch_size", "search_ahead", "write_only"),
    [(10, 100, True), (10, None, False), (100, 100, False), (100, 1000, False)],
)
def test_note_states_whether_times_include_the_search(batch_size, search_ahead, write_only):
    table = costs([small_run({0: 1.0}, batch_size, search_ahead)]).parts[-1]
    assert ("without the value search" in table.note) == write_only
    assert ("early, ms" in table.head) == write_only
