"""The report of `bench/report.py`: its figures, verdicts and charts."""

import base64
import json
import re
from xml.etree import ElementTree

import pytest
import report
from report_chart import draw
from report_data import load, tabulate
from report_sections import capability, costs, rules, sweep

from rlsedit_fast.editing import EditConfig

PRIOR = EditConfig().prior.model_dump() | {"lam": 0.0}


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
    fields = {"rule": label, "rule_options": {}, "batch_size": 10, "search": {"ahead": None}}
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


def text(folder):
    return report.render(report.contents(load(folder)))


def row(table, rule):
    """Returns the row of a rule by title."""
    return table.set_index("rule").loc[rule]


def test_undominated_rules_are_on_the_pareto_front(folder):
    runs = [run("rls", s) for s in (1, 2)] + [run("memit", s, efficacy=0.8, neighbors=0.95) for s in (1, 2)]
    found = text(folder(rules=runs))
    assert "`rls` has 0.915 and 0.915. It is on the Pareto front (rls, memit)" in found
    assert "| rls | 0.915 ± 0.007 | 0.915 ± 0.007 | 0.915 ± 0.007 | 0.900 ± 0.000 |" in found
    assert "No runs of: batches, hard, orders, sweep, tuning." in found
    assert "no measured deviation exceeds its bound (4 measurements)" in found
    assert "**Missing runs**: ft, ft-bounded, rome, memit-history," in found
    assert "Fewer than three seeds of: rls 2, memit 2." in found


def test_scores_are_ranked():
    scores = {"rls": 0.7, "memit": 0.9, "rome": 0.5}
    runs = [run(rule, 1, efficacy=score, neighbors=score) | {"experiment": "rules"} for rule, score in scores.items()]
    found = report.contents(tabulate(runs))
    assert list(found["summary"]["ranked"].items()) == [("memit", 0.9), ("rls", 0.7), ("rome", 0.5)]
    made = report.render(found)
    assert "memit 0.900, rls 0.700, rome 0.500. `rls` is ranked 2 of 3." in made


def test_multi_hop_is_shown_if_measured(folder):
    runs = [run("rls", 1), run("memit", 1)]
    assert "MQuAKE" not in text(folder(rules=runs))
    runs[0]["rows"].append({"edits": 200, "of": "all", "metric": "multihop", "form": "free", "value": 0.25, "n": 8})
    table = rules(tabulate(runs))["table"]
    assert "multi-hop" not in table, "the strict form was not measured"
    assert list(table["multi-hop, free"]) == ["0.250", "–"]


def test_consistency_is_shown_if_measured():
    runs = [run("rls", 1), run("memit", 1)]
    assert "consistency" not in capability(tabulate(runs))["table"]
    runs[0]["rows"].append({"edits": 200, "of": "all", "metric": "consistency", "form": "cosine", "value": 0.4, "n": 8})
    assert list(capability(tabulate(runs))["table"]["consistency"]) == ["0.400", "–"]


def test_truncated_and_skipped_task_items_are_reported(folder):
    runs = [run("rls", 1)]
    for form, number in (("accuracy", 0.5), ("error", 0.1), ("cut", 3), ("left out", 0)):
        runs[0]["rows"].append({"edits": 200, "of": "task", "metric": "mmlu", "form": form, "value": number, "n": 25})
    assert row(capability(tabulate(runs))["table"], "rls")["mmlu"] == "0.500 ± 0.100"
    found = text(folder(rules=runs))
    assert "Too long for the model, truncated prompts: mmlu 3." in found
    assert "skipped items" not in found


def test_dominated_rule_is_reported_and_retention_is_shown(folder):
    runs = [run("rls", 1, first=(0.9, 0.45)), run("memit", 1, efficacy=0.95, neighbors=0.95, first=(0.9, 0.9))]
    found = text(folder(rules=runs))
    assert "It is dominated by memit. The Pareto front is memit." in found
    assert "`rls` has 0.500. The best is memit with 1.000. The difference is not within one standard deviation" in found
    assert "`rls` has 0.900 right after the edits and 0.450 at the end. `memit` has 0.900 right after" in found
    assert "`memit` has the highest efficacy at the end" in found


def test_difference_in_retention_is_compared_with_the_deviation(folder):
    runs = [run("rls", s, first=(1.0, 0.5 + 0.1 * s)) for s in (1, 2)]
    runs += [run("memit", s, first=(1.0, 0.6 + 0.1 * s)) for s in (1, 2)]
    found = text(folder(rules=runs))
    assert "`rls` has 0.650 ± 0.071. The best is memit with 0.750 ± 0.071." in found
    assert "The difference is not within one standard deviation (0.071)" in found


def test_equal_retention_is_reported(folder):
    found = text(folder(rules=[run("rls", 1), run("memit", 1), run("rome", 1, first=(0.9, 0.1))]))
    assert "**Retention of the first hundred edits**: `rls` has 0.889. It is the best, with memit." in found


def test_outliers_are_listed_outside_the_chart():
    found = rules(tabulate([run("rls", 1, efficacy=0.5, neighbors=0.4), run("prune", 1, efficacy=0.1)]))
    assert found["outside"] == ["prune (0.11, 0.91)"]
    assert found["points"][["label", "x", "y"]].values.tolist() == [["rls", pytest.approx(0.51), pytest.approx(0.41)]]
    assert found["front"] == ["rls", "prune"]


def test_failed_stream_is_on_no_front(folder):
    broken = run("rome", 1, efficacy=0.99, neighbors=0.99, failed={"after": 100, "reason": "singular"})
    found = text(folder(rules=[run("rls", 1), broken]))
    assert "is on the Pareto front (rls)" in found
    assert "Failed streams, which are on no Pareto front: rome" in found
    assert "| rome (1 of 1 failed) | 1.000 |" in found


def test_failed_runs_are_not_averaged():
    failed = run("memit", 2, efficacy=0.1, failed={"after": 50, "reason": "x"})
    table = rules(tabulate([run("rls", 1), run("memit", 1, efficacy=0.8), failed]))["table"]
    assert row(table, "memit (1 of 2 failed)")["efficacy"] == "0.810"


def test_sections_without_figures_are_omitted(folder):
    found = text(folder(rules=[run("memit", 1, failed={"after": 200, "reason": "x"})]))
    titles = ["Summary", "Comparison of the rules", "Capability", "Machines and versions"]
    assert re.findall("^## (.*)", found, re.MULTILINE) == titles
    assert "| memit (1 of 1 failed) | 0.910 |" in found


def test_exceeded_bound_is_reported(folder):
    found = text(folder(rules=[run("rls", 1, bound=1.9), run("memit", 1)]))
    assert "**Bounds**: 2 of 2 measured deviations exceed their bounds!" in found


def test_sweep_compares_the_calibrated_values_with_the_best(folder):
    swept = [
        run(f"rls mu x{mu:g} lam x{lam:g}", 1, efficacy=0.9 + shift)
        for mu, lam, shift in ((1, 1, 0.0), (10, 1, 0.08), (0.1, 1, -0.3), (1, 10, 0.01), (1, 0.1, 0.0))
    ]
    swept += [run(f"rls mu x{mu} lam x1", 1, stream="related", efficacy=0.7 - 0.1 * mu) for mu in (1, 10)]
    found = text(folder(rules=[run("rls", 1), run("memit", 1)], sweep=swept))
    plain, related = re.findall("have a score of .*", found)
    assert "0.900 on the plain stream. The best score of the sweep is 0.940 (mu x10, lam x1)" in plain
    assert "not within two points" in plain
    assert "0.750 on the related stream. The best score of the sweep is 0.750 (mu x1, lam x1)" in related
    assert "is within two points" in related
    made = sweep(tabulate(swept))
    table = made["tables"]["plain"].set_index("")
    assert table.loc["mu ×1"].to_dict() == {"lam ×0.1": "0.900", "lam ×1": "[0.900]", "lam ×10": "0.905"}
    assert table.loc["mu ×10", "lam ×10"] == "–"
    scores = made["lines"][made["lines"]["label"] == "score, mu varied"]
    assert scores["x"].tolist() == [0.1, 1.0, 10.0]
    assert scores["y"].tolist() == pytest.approx([0.75, 0.9, 0.94])


def test_page_is_self_contained_and_responsive(folder):
    for path in report.write(folder(rules=[run("rls", 1), run("memit", 1)])):
        page = path.read_text(encoding="utf-8")
        for broken in ("nan", "None", "inf"):
            assert not re.search(rf'[ ",]{broken}[ ",]', page), broken
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|url\(|@import", page)
    assert "width=device-width" in page
    sources = re.findall('src="([^"]*)"', page)
    assert len(sources) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert page.count("<table>") == 5
    assert "<code>rls</code>" in page


def test_chart_has_axis_labels_legend_and_error_bars():
    data = rules(tabulate([run(rule, s) for rule in ("rls", "memit") for s in (1, 2)]))["points"]
    chart = draw(data, "efficacy, strict", "specificity", front=["rls", "memit"])
    root = ElementTree.fromstring(base64.b64decode(chart.partition("base64,")[2]))
    words = {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"efficacy, strict", "specificity", "rls", "memit", "Pareto front"} <= words
    assert data["x_std"].tolist() == data["y_std"].tolist() == pytest.approx([0.01 / 2**0.5] * 2)
    ids = {node.get("id", "") for node in root.iter()}
    assert any(name.startswith("LineCollection") for name in ids), "no error bars"


def test_grid_marks_the_selected_setting(folder):
    tried = [run("memit_0", 0, efficacy=0.8, rule="memit", prior=PRIOR), run("memit_1", 0, rule="memit", prior=PRIOR)]
    tried[1]["plan"]["config"]["prior"] = PRIOR | {"adherence": 0.99}
    found = text(folder(rules=[run("rls", 1), run("memit", 1)], tuning=tried))
    assert "| memit | lam 0, adherence 0.99 ← | 0.900 |" in found
    assert f"| memit | lam 0, adherence {PRIOR['adherence']:g} | 0.800 |" in found
    assert "better settings may exist beyond it: memit adherence 0.99." in found


def test_folder_without_results_is_rejected(tmp_path):
    with pytest.raises(SystemExit, match="no result files"):
        report.write(tmp_path)


def test_shorter_runs_are_omitted_and_reported(folder, capsys):
    short = run("rls", 2, efficacy=0.1)
    short["plan"]["edits"] = 100
    assert "| rls | 0.910 |" in text(folder(rules=[run("rls", 1), short]))
    assert "runs with fewer than 200 edits are omitted: rls" in capsys.readouterr().out


def test_oldest_edits_are_named_by_their_number(folder):
    runs = [run("rls", 1), run("memit", 1, first=(0.0, 0.5))]
    for one in runs:
        for entry in one["rows"]:
            entry["of"] = {"1-100": "1-20", "101-200": "21-200"}.get(entry["of"], entry["of"])
    found = text(folder(rules=runs))
    assert "first 20 edits: efficacy after the edit" in found
    assert "Retention of the first 20 edits**: `rls` has 0.889. It is the best." in found, (
        "no early edit of memit succeeded initially"
    )


def test_weight_change_covers_all_layers(folder):
    one = run("rls", 1)
    one["rows"] = [entry for entry in one["rows"] if entry["metric"] != "deviation"]
    for layer, norm in {4: 3.0, 10: 4.0}.items():
        entry = {"edits": 200, "of": f"layer {layer}", "metric": "deviation", "form": "measured", "value": norm}
        one["rows"] += [entry, entry | {"form": "bound", "value": 9.0}]
    assert row(capability(tabulate([one]))["table"], "rls")["‖W − W0‖"] == "5.0"
    found = text(folder(rules=[one]))
    assert "over all edited layers" in found
    assert found.index("| ‖W − W0‖ | 4 | 200 | 3.00 | 9.00 | 0.33 |") < found.index("| ‖W − W0‖ | 10 | 200 | 4.00 |")


@pytest.mark.parametrize(
    ("batch_size", "search_ahead", "with_search"),
    [(10, 100, False), (10, None, True), (100, 100, True), (100, 1000, True)],
)
def test_times_state_whether_they_include_the_search(folder, batch_size, search_ahead, with_search):
    one = run("rls", 1, batch_size=batch_size, search={"ahead": search_ahead})
    found = costs(tabulate([one]))
    assert found["with_search"] == with_search
    early, late = ("early, with search, ms", "late, with search, ms") if with_search else ("early, ms", "late, ms")
    times = row(found["table"], "rls")
    assert (times["edits/s with search"], times[early], times[late], times["late / early"]) == (
        "50.0",
        "115",
        "275",
        "2.39",
    )
    assert ("without the value search" in text(folder(rules=[one]))) != with_search
