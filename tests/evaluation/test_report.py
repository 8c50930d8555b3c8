"""The report of `bench/report.py`: its statements about runs, and that the page is self-contained."""

import json
import re

import pytest
import report

from rlsedit_fast.editing import EditConfig


def run(
    label, seed, *, stream="plain", efficacy=0.9, neighbors=0.9, first=(0.9, 0.8), failed=None, bound=3.0, **config
):
    rows = []

    def enter(edits, of, metric, form, value, n=100):
        rows.append({"edits": edits, "of": of, "metric": metric, "form": form, "value": value, "n": n})

    for metric, share in (("efficacy", efficacy), ("generalization", efficacy), ("neighbors", neighbors)):
        for form in ("strict", "forced"):
            enter(200, "all", metric, form, share + 0.01 * seed)
    enter(200, "all", "score", "strict", (efficacy + neighbors) / 2)
    for age, (was, now) in {"1-100": first, "101-200": (0.9, 0.9)}.items():
        enter(200, age, "efficacy", "made:strict", was)
        enter(200, age, "efficacy", "end:strict", now)
    for edits in (100, 200):
        enter(edits, "layer 0", "deviation", "measured", 2.0)
        enter(edits, "text", "kl", "text", 0.1)
        enter(edits, "text", "perplexity", "text", 9.0)
        if label.startswith("rls"):
            enter(edits, "layer 0", "deviation", "bound", bound)
    settings = {"label": label, "stream": stream, "edits": 200, "seed": seed, "order": 0, "judged": None}
    fields = {"rule": label, "rule_options": {}, "batch_size": 10, "layers": [0]}
    fields |= {"prior": EditConfig().prior.model_dump()} | config
    return {
        "plan": settings | {"config": fields},
        "rows": rows,
        "failed": failed,
        "made": 200,
        "ground": "demo",
        "seconds_per_batch": [0.1 + 0.01 * at for at in range(20)],
        "seconds_editing": 4.0,
        "seconds_run": 5.0,
        "peak_bytes": 5e8,
        "date": "2026-11-26",
        "machine": {"system": "Linux", "cpu": "a CPU"},
        "versions": {"torch": "2"},
    }


@pytest.fixture
def folder(tmp_path):
    def fill(**experiments):
        for name, runs in experiments.items():
            (tmp_path / name).mkdir()
            for at, one in enumerate(runs):
                (tmp_path / name / f"{at}.json").write_text(json.dumps(one))
        return tmp_path

    return fill


def written(folder):
    paths = report.write(folder)
    return [path.read_text(encoding="utf-8") for path in paths]


def test_undominated_rules_are_on_the_pareto_front(folder):
    runs = [run("rls", s) for s in (1, 2)] + [run("memit", s, efficacy=0.8, neighbors=0.95) for s in (1, 2)]
    page, text = written(folder(rules=runs))
    assert "`rls` at 0.915 and 0.915 is on the Pareto front (rls, memit)" in text
    assert "0.915 ± 0.007" in text
    assert "No runs of: batches, hard, orders, sweep, tuning." in text
    assert "no measured deviation exceeds its bound" in text
    assert "**Missing runs**: ft, ft-bounded, rome, memit-history," in text
    assert "Fewer than three seeds of: rls 2, memit 2." in text
    assert '<tr class="mark"><td class="text">rls</td>' in page


def test_multi_hop_is_shown_if_measured(folder):
    runs = [run("rls", 1), run("memit", 1)]
    runs[0]["rows"].append({"edits": 200, "of": "all", "metric": "multihop", "form": "free", "value": 0.25, "n": 8})
    _, text = written(folder(rules=runs))
    assert "| multi-hop |" not in text, "the strict form was not measured"
    assert "| multi-hop, free |" in text
    assert "as defined by MQuAKE" in text


def test_consistency_is_shown_if_measured(folder):
    runs = [run("rls", 1), run("memit", 1)]
    assert "consistency" not in written(folder(rules=runs))[1].lower()
    runs[0]["rows"].append({"edits": 200, "of": "all", "metric": "consistency", "form": "cosine", "value": 0.4, "n": 8})
    capability = report.capability(runs)
    table = capability.parts[-1]
    assert table.head[3:5] == ["fluency", "consistency"]
    assert [row[4] for row in table.rows] == ["0.400", "–"]
    assert "Consistency: cosine" in table.note


def test_truncated_and_skipped_task_items_are_reported(folder):
    runs = [run("rls", 1)]
    for form, number in (("accuracy", 0.5), ("error", 0.1), ("cut", 3), ("left out", 0)):
        runs[0]["rows"].append({"edits": 200, "of": "task", "metric": "mmlu", "form": form, "value": number, "n": 25})
    _, text = written(folder(rules=runs))
    assert "Too long for the model, truncated prompts: mmlu 3." in text
    assert "skipped items" not in text


def test_dominated_rule_is_reported_and_retention_is_shown(folder):
    runs = [run("rls", 1, first=(0.9, 0.45)), run("memit", 1, efficacy=0.95, neighbors=0.95, first=(0.9, 0.9))]
    _, text = written(folder(rules=runs))
    assert "is worse in both than memit; the Pareto front is memit" in text
    assert "`rls` 0.500, the best is memit with 1.000: not within one standard deviation" in text
    assert "`rls` states 0.450 at the end and stated 0.900 right after the edits; `memit` states 0.900" in text
    assert "of all of them, `memit` states the most at the end" in text


def test_outliers_are_listed_outside_the_chart(folder):
    runs = [run("rls", 1, efficacy=0.5, neighbors=0.4), run("prune", 1, efficacy=0.1, neighbors=0.9)]
    page, _ = written(folder(rules=runs))
    assert "Outside the chart: prune (0.11, 0.91)." in page
    assert "<title>rls: 0.51, 0.41</title>" in page


def test_failed_stream_is_on_no_front(folder):
    broken = run("rome", 1, efficacy=0.99, neighbors=0.99, failed={"after": 100, "reason": "singular"})
    _, text = written(folder(rules=[run("rls", 1), broken]))
    assert "is on the Pareto front (rls)" in text
    assert "Failed streams, which are on no Pareto front: rome" in text
    assert "| rome (1 of 1 failed) |" in text


def test_exceeded_bound_is_reported(folder):
    _, text = written(folder(rules=[run("rls", 1, bound=1.9), run("memit", 1)]))
    assert "exceeded in 2 measurements!" in text


def test_sweep_compares_the_calibrated_values_with_the_best(folder):
    sweep = [
        run(f"rls mu x{mu:g} lam x{lam:g}", 1, efficacy=0.9 + shift)
        for mu, lam, shift in ((1, 1, 0.0), (10, 1, 0.08), (0.1, 1, -0.3), (1, 10, 0.01), (1, 0.1, 0.0))
    ]
    sweep += [run(f"rls mu x{mu} lam x1", 1, stream="related", efficacy=0.7 - 0.1 * mu) for mu in (1, 10)]
    _, text = written(folder(rules=[run("rls", 1), run("memit", 1)], sweep=sweep))
    assert "0.900 on the plain stream; the best of the sweep (mu x10, lam x1) 0.940: not within two points" in text
    assert "[0.900]" in text
    assert "0.750 on the related stream; the best of the sweep (mu x1, lam x1) 0.750: within two points" in text


def test_page_is_self_contained_and_responsive(folder):
    page, _ = written(folder(rules=[run("rls", 1), run("memit", 1)]))
    assert not re.search(r"<script|<link|src=|url\(|@import", page)
    assert "width=device-width" in page
    assert "prefers-color-scheme" in page
    assert page.count("<svg") == page.count("</svg>") >= 4
    for broken in ("nan", "None", "inf"):
        assert not re.search(rf'[ ",]{broken}[ ",]', page), broken


def test_grid_marks_the_selected_setting(folder):
    tried = [
        run("memit_0", 0, efficacy=0.8, rule="memit", prior={"lam": 0.0, "adherence": EditConfig().prior.adherence}),
        run("memit_1", 0, rule="memit", prior={"lam": 0.0, "adherence": EditConfig().prior.adherence}),
    ]
    tried[1]["plan"]["config"]["prior"]["adherence"] = 0.99
    _, text = written(folder(rules=[run("rls", 1), run("memit", 1)], tuning=tried))
    assert "| memit | lam 0, adherence 0.99 ← |" in text
    assert f"| memit | lam 0, adherence {EditConfig().prior.adherence:g} |" in text


def test_folder_without_results_is_rejected(tmp_path):
    with pytest.raises(SystemExit, match="no result files"):
        report.write(tmp_path)


def test_failed_runs_are_not_averaged(folder):
    runs = [
        run("rls", 1),
        run("memit", 1, efficacy=0.8),
        run("memit", 2, efficacy=0.1, failed={"after": 50, "reason": "x"}),
    ]
    _, text = written(folder(rules=runs))
    assert "| memit (1 of 2 failed) | 0.810 |" in text


def test_shorter_runs_are_omitted_and_reported(folder, capsys):
    short = run("rls", 2, efficacy=0.1)
    short["plan"]["edits"] = 100
    _, text = written(folder(rules=[run("rls", 1), short]))
    assert "| rls | 0.910 |" in text
    assert "1 of 2 runs have fewer than 200 edits and are omitted" in capsys.readouterr().out


def test_oldest_edits_are_named_by_their_number(folder):
    runs = [run("rls", 1), run("memit", 1, first=(0.0, 0.5))]
    for one in runs:
        for row in one["rows"]:
            row["of"] = {"1-100": "1-20", "101-200": "21-200"}.get(row["of"], row["of"])
    _, text = written(folder(rules=runs))
    assert "first 20: efficacy after the edit" in text
    assert "Retention of the first 20 edits**: `rls` 0.889, the best." in text, (
        "no early edit of memit succeeded initially"
    )
