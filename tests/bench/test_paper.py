"""The experiments of the comparison on the demo model at small size, and the report."""

import json
import sys

import paper
import pytest
from report_data import OURS, load

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
    brief = {"checkpoints": (), "judged": 4, "free": 4, "probed": 200}
    for name, small in {
        "GRIDS": GRIDS,
        "TUNING_EDITS": 4,
        "TUNING_SEED": 1,
        "FACTORS": {"plain": (1.0, 10.0)},
        "BRIEF": brief,
        "ALONG": brief | {"checkpoints": (0.5, 1.0)},
    }.items():
        monkeypatch.setattr(paper, name, small)
    planned, examples = {}, {}

    def some(jobs, *, processes):
        """Makes the first run of the tuning and of the rules; the other runs have the figures of one of these two."""
        for job in jobs:
            planned[job.path] = job.plan
            kind = "tuning" if job.path.parent.name == "tuning" else "rules"
            if kind not in examples:
                runs.run_jobs([job], processes=processes)
                examples[kind] = runs.load_result(job)
            job.path.parent.mkdir(parents=True, exist_ok=True)
            job.path.write_text(json.dumps(examples[kind] | {"plan": job.plan.as_json()}), encoding="utf-8")

    monkeypatch.setattr(paper, "run_jobs", some)
    monkeypatch.setattr(sys, "argv", ["paper.py", "demo", "--out", str(tmp_path), "--edits", "20", "--seeds", "1"])
    paper.main()
    assert {plan.stream for plan in planned.values()} == {"plain", "conflicting", "related"}
    assert {plan.order for plan in planned.values()} == set(range(5))
    assert "report.html" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(TITLES)
    assert "No runs of" not in text
    assert "no measured deviation exceeds its bound" in text
    assert "alphaedit | null_share 0.9" in text
    found = load(tmp_path).runs
    assert len(found) == len(planned)
    figure = found.loc[(found["experiment"] == "rules") & (found["label"] == OURS), "efficacy strict"].item()
    assert f"| {OURS} | {figure:.3f} |" in text
