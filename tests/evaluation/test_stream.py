"""Runs over streams: result files, reuse of finished runs, and streams that fail."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from rlsedit_fast.cli import main
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation import grounds, phases, runs, stream
from rlsedit_fast.evaluation.demo import CONFIG
from rlsedit_fast.evaluation.figures import Spread, over_seeds, pareto, spread
from rlsedit_fast.evaluation.grounds import GroundSpec, make_cases, make_ground
from rlsedit_fast.evaluation.plan import Plan
from rlsedit_fast.evaluation.runs import Job, load_result, result_path, value
from rlsedit_fast.evaluation.tasks import Item

CONFIG = CONFIG.replace(batch_size=5, search={"ahead": 20})


def plan(label="rls", **changes):
    settings = {"stream": "plain", "edits": 20, "seed": 1, "config": CONFIG, "checkpoints": (0.5, 1.0)}
    settings |= {"probed": 400, "free": 10}
    return Plan(label=label, **{**settings, **changes})


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    plans = [
        plan(),
        plan("memit", config=CONFIG.replace(rule="memit")),
        plan("conflicts", stream="conflicting"),
    ]
    jobs = {one.label: Job(GroundSpec(), one, result_path(folder, one)) for one in plans}
    results = runs.run_jobs(list(jobs.values()), log=lambda line: None)
    return jobs, dict(zip(jobs, results, strict=True))


def test_a_run_has_all_metrics_at_its_checkpoints_and_at_the_end(finished_runs):
    _, results = finished_runs
    found = results["rls"]
    assert (found["made"], found["failed"], found["ground"]) == (20, None, "demo")
    assert value(found, "efficacy", "strict") >= 0.9
    for metric in ("efficacy", "generalization", "neighbors", "same_subject"):
        for form in ("forced", "strict", "said", "tokens"):
            for edits in (10, 20):
                assert 0 <= value(found, metric, form, edits=edits) <= 1
    for form in ("forced", "strict"):
        assert 0 <= value(found, "score", form) <= 1
    assert value(found, "efficacy", "free") >= 0.85
    assert value(found, "fluency", "entropy") > 2
    before, after = (value(found, "kl", "text", of="text", edits=edits) for edits in (0, 20))
    assert before < 1e-3  # rounding to float16
    assert before < after
    assert value(found, "perplexity", "text", of="text") > 1
    assert len(found["seconds_per_batch"]) == 4
    assert {"cpu", "cores"} <= set(found["machine"])
    assert found["priors"][0]["mu"] > 0


def test_only_rls_has_bounds_and_deviation_and_anchors_stay_within_them(finished_runs):
    _, results = finished_runs
    for metric in ("deviation", "anchors"):
        measured, bound = (value(results["rls"], metric, form, of="layer 0") for form in ("measured", "bound"))
        assert 0 < measured <= bound
        assert value(results["memit"], metric, "measured", of="layer 0") > 0
        assert value(results["memit"], metric, "bound", of="layer 0") is None
    norms = [value(results["rls"], "weight", form, of="layer 0") for form in ("before", "norm", "spectral")]
    assert norms[2] < norms[1]
    assert abs(norms[0] - norms[1]) <= value(results["rls"], "deviation", "measured", of="layer 0")


def test_protected_prompts_are_not_evaluation_prompts(monkeypatch, tmp_path):
    protected = []
    monkeypatch.setattr(
        stream.Editor, "protect", lambda editor, prompts, *, weight: protected.append((prompts, weight))
    )
    spec, settings = GroundSpec(), replace(plan(), edits=4, protected=0.5, checkpoints=())
    cases, _ = make_cases(spec, "plain", 4, settings.seed)
    stream.run(make_ground(spec), settings, cases, tmp_path / "run.json")
    ((prompts, weight),) = protected
    evaluated = {
        q.prompt for case in cases for q in (*case.neighbors, *case.namesakes, *case.same_subject, case.question)
    }
    assert set(prompts) == {q.prompt for case in cases for q in case.held_out} - evaluated
    assert len(prompts) == len(set(prompts)) > 4
    assert weight == 0.5


def test_every_age_is_evaluated_after_its_batch_and_at_the_end(finished_runs):
    _, results = finished_runs
    made, at_end = (
        {r["of"]: r["value"] for r in results["rls"]["rows"] if (r["metric"], r["form"]) == ("efficacy", form)}
        for form in ("made:strict", "end:strict")
    )
    assert list(made) == list(at_end) == ["1-5", "6-10", "11-15", "16-20"]
    assert all(at_end[age] > 0.5 * first for age, first in made.items())
    assert sum(at_end.values()) / 4 == pytest.approx(value(results["rls"], "efficacy", "strict"))


def test_retention_compares_the_same_cases_after_their_batch_and_at_the_end(tmp_path):
    """Also if only a few cases are judged in full."""
    job = Job(GroundSpec(), plan(judged=3, seed=2), tmp_path / "run.json")
    (found,) = runs.run_jobs([job], log=lambda line: None)
    evaluations = {}
    for row in found["rows"]:
        when, _, form = row["form"].partition(":")
        if when in ("made", "end") and row["of"] == "16-20":
            evaluations.setdefault((row["metric"], form), []).append((row["value"], row["n"]))
    assert {("efficacy", "strict"), ("generalization", "strict"), ("neighbors", "forced")} <= set(evaluations)
    assert all(first == last for first, last in evaluations.values())
    assert evaluations["efficacy", "strict"][0][1] == 5


def test_a_finished_run_is_reused_only_with_equal_settings(finished_runs, monkeypatch):
    jobs, results = finished_runs
    monkeypatch.setattr(runs, "_run_one", lambda job: pytest.fail(f"{job.plan.label} ran again"))
    assert runs.run_jobs([jobs["rls"]], log=lambda line: None) == [results["rls"]]
    other = replace(jobs["rls"], plan=replace(jobs["rls"].plan, config=CONFIG.replace(prior={"adherence": 0.9})))
    assert not other.done, "the setting is part of the run"
    longer = replace(jobs["rls"], plan=replace(jobs["rls"].plan, judged=5))
    assert not longer.done
    assert not replace(jobs["rls"], spec=GroundSpec(model="another")).done
    assert not replace(jobs["rls"], spec=GroundSpec(tasks="glue")).done, "the data of the ground are part of the run"
    assert replace(jobs["rls"], spec=GroundSpec(device="cuda")).done


def test_an_older_result_is_reused_if_newer_settings_have_their_defaults(finished_runs, tmp_path):
    jobs, _ = finished_runs
    found = json.loads(jobs["rls"].path.read_text())
    del found["plan"]["config"]["norm_anchor"], found["plan"]["protected"]
    path = tmp_path / "older.json"
    path.write_text(json.dumps(found))
    settings, of = jobs["rls"].plan, jobs["rls"].spec.identity
    assert stream.finished(path, "demo", settings, of) == found
    assert stream.finished(path, "demo", replace(settings, config=CONFIG.replace(norm_anchor=True)), of) is None
    assert stream.finished(path, "demo", replace(settings, protected=0.5), of) is None
    found["plan"]["config"]["removed setting"] = 1
    path.write_text(json.dumps(found))
    assert stream.finished(path, "demo", settings, of) is None


def test_a_damaged_result_file_is_not_a_finished_run(tmp_path):
    path = tmp_path / "run.json"
    for text in ('{"format": 1, "rows": [', "[]", '{"format": 1, "ground": "demo", "plan": 3}'):
        path.write_text(text)
        assert stream.finished(path, "demo", plan()) is None
    assert stream.finished(tmp_path / "missing.json", "demo", plan()) is None


def test_the_later_target_of_a_fact_edited_twice_is_stated(finished_runs):
    _, results = finished_runs
    found = results["conflicts"]
    assert value(found, "efficacy", "strict") >= 0.8
    assert value(found, "superseded", "strict") == 0.0
    rows = [row for row in found["rows"] if row["metric"] == "efficacy" and row["form"] == "strict"]
    assert rows[-1]["n"] == 10


def test_a_failed_stream_reports_the_reason_and_evaluates_the_applied_edits(tmp_path, monkeypatch):
    ground = make_ground(GroundSpec())
    cases, _ = make_cases(GroundSpec(), "plain", 20, 1)
    again = replace(cases[10].edit, target=cases[12].edit.target)  # one key with two values has no exact solution
    same = [*cases[:12], replace(cases[12], edit=again), *cases[13:]]
    config = CONFIG.replace(rule="emmet", rule_options={"damping": 0.0}, same_subject="separate")
    found = stream.run(ground, plan(config=config), same, tmp_path / "run.json")
    assert found["made"] == found["failed"]["after"] == 10
    assert "linearly dependent" in found["failed"]["reason"]
    assert value(found, "efficacy", "strict") > 0.5
    rows = [row for row in found["rows"] if (row["metric"], row["form"], row["of"]) == ("efficacy", "strict", "all")]
    assert rows[-1]["n"] == 10


def test_errors_not_caused_by_the_rule_are_raised_without_a_result_file(tmp_path):
    cases, _ = make_cases(GroundSpec(), "plain", 20, 1)
    again = replace(cases[12].edit, subject=cases[0].edit.subject)
    same = [*cases[:12], replace(cases[12], edit=again), *cases[13:]]
    config = CONFIG.replace(rule="memit", same_subject="joint")
    with pytest.raises(InputError, match="cannot remove an edit"):
        stream.run(make_ground(GroundSpec()), plan(config=config), same, tmp_path / "run.json")
    assert not list(tmp_path.iterdir())


def test_tasks_are_evaluated_before_and_after_the_edits(tmp_path):
    ground = replace(make_ground(GroundSpec()), tasks={"sst2": [Item("Review : good", ("organ", "violin"), 0)]})
    cases, _ = make_cases(GroundSpec(), "plain", 10, 1)
    found = stream.run(ground, plan(edits=10, checkpoints=()), cases, tmp_path / "run.json")
    for edits in (0, 10):
        assert value(found, "sst2", "accuracy", of="task", edits=edits) in (0.0, 1.0)
        assert value(found, "sst2", "error", of="task", edits=edits) == 0.0


def test_orders_permute_the_same_cases():
    first, other, again = (make_cases(GroundSpec(), "plain", 30, 1, order)[0] for order in (0, 1, 1))
    assert other == again != first
    assert sorted(c.edit.subject for c in other) == sorted(c.edit.subject for c in first)
    with pytest.raises(InputError, match="one order"):
        make_cases(GroundSpec(), "conflicting", 30, 1, 1)
    with pytest.raises(InputError, match="expected one of plain, conflicting, related"):
        make_cases(GroundSpec(), "sorted", 30, 1)


def test_a_ground_with_a_model_requires_its_files(tmp_path):
    with pytest.raises(InputError, match="expected a file of running text"):
        make_ground(GroundSpec(model="somewhere"))
    text = tmp_path / "text.txt"
    text.write_text("too short\n")
    with pytest.raises(InputError, match="expected at least 8 such lines"):
        make_ground(GroundSpec(model="somewhere", text=str(text)))
    with pytest.raises(InputError, match="expected a CounterFact, zsRE or MQuAKE file"):
        make_cases(GroundSpec(model="somewhere"), "plain", 5, 0)
    with pytest.raises(InputError, match=r"contains none of sst2\.jsonl"):
        make_ground(GroundSpec(tasks=str(tmp_path)))


def test_spread_and_pareto():
    assert spread([0.5, None, 0.7]) == Spread(pytest.approx(0.6), pytest.approx(0.2 / 2**0.5), 2)
    assert str(spread([0.5])) == "0.500"
    assert spread([None]) is None
    assert pareto({"a": (1.0, 0.5), "b": (0.5, 1.0), "c": (0.5, 0.5), "d": (1.0, 0.5)}) == ["a", "b", "d"]


def test_figures_are_averaged_over_runs(finished_runs):
    _, results = finished_runs
    both = [results["rls"], results["memit"]]
    found = over_seeds(both, "efficacy", "strict")
    assert found.runs == 2
    assert found.mean == pytest.approx(sum(value(one, "efficacy", "strict") for one in both) / 2)
    assert over_seeds(both, "efficacy", "unknown") is None


def test_the_command_executes_its_runs_once_and_prints_means(tmp_path, capsys):
    command = ["evaluate", "--rules", "rls", "rome", "--edits", "4", "--seeds", "1", "2", "--batch-size", "2"]
    command += ["--free", "2", "--probed", "50"]
    command += ["--out", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json")]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "0 of 4 runs are complete" in first.err
    assert "±" in first.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rules"]["rome"]["figures"]["efficacy strict"]["runs"] == 2
    assert found["failed"] == []
    assert main(command) == 0
    second = capsys.readouterr()
    assert "4 of 4 runs are complete" in second.err
    assert second.out == first.out


def test_the_command_rejects_unknown_rules_and_settings(tmp_path, capsys):
    settings = tmp_path / "settings.json"
    for settings_of_rules, message in (
        ({"rome": {}, "other": {}}, "unknown rules: other"),
        ({"rome": {"steps": 1}}, "rule rome: unknown setting 'steps'; it belongs to a group: search="),
    ):
        settings.write_text(json.dumps(settings_of_rules))
        assert main(["evaluate", "--rule-settings", str(settings)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--rules", "other"])


@pytest.mark.soak
def test_several_processes_give_the_same_results(tmp_path):
    plans = [plan(label, edits=4, checkpoints=(), free=2, probed=50, seed=seed) for seed, label in enumerate("ab")]
    alone, together = (
        runs.run_jobs(
            [Job(GroundSpec(), one, tmp_path / str(processes) / f"{one.label}.json") for one in plans],
            processes=processes,
            log=lambda line: None,
        )
        for processes in (1, 2)
    )
    assert [one["rows"] for one in together] == [one["rows"] for one in alone]
    assert load_result(Job(GroundSpec(), plans[0], tmp_path / "2" / "a.json")) == together[0]


def test_probed_texts_contain_no_edited_subject_and_no_anchor(monkeypatch, tmp_path):
    probed = []
    real = stream.TextProbe
    monkeypatch.setattr(
        stream,
        "TextProbe",
        lambda model, tokenizer, texts, **rest: probed.extend(texts) or real(model, tokenizer, texts, **rest),
    )
    cases, _ = make_cases(GroundSpec(), "plain", 2, 1)
    stream.run(make_ground(GroundSpec()), plan(edits=2, checkpoints=(), free=2), cases, tmp_path / "run.json")
    assert len(probed) == 300
    assert not {text for text in probed if any(case.edit.subject in text for case in cases)}
    assert not set(probed) & set(grounds.anchor_texts(grounds._world(), 1))


def test_probe_texts_exist_even_if_all_people_are_edited():
    people = [person.name for person in grounds._world().people]
    assert len(grounds._demo_texts(1, people)) == 300


def test_a_conflicting_stream_requires_an_even_number_of_edits():
    with pytest.raises(InputError, match="edits=5: a conflicting stream edits every fact twice"):
        make_cases(GroundSpec(), "conflicting", 5, 1)


def test_the_value_of_a_metric_is_its_last_measurement():
    row = {"edits": 10, "of": "all", "metric": "efficacy", "form": "strict", "n": 5}
    assert value({"made": 10, "rows": [row | {"value": 0.5}, row | {"value": 0.7}]}, "efficacy", "strict") == 0.7


def test_no_run_starts_after_a_failed_one(monkeypatch, tmp_path):
    jobs = [Job(GroundSpec(), plan(str(at), seed=at), tmp_path / f"{at}.json") for at in range(4)]
    started = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, processes, **_options):
            super().__init__(1)

    def fails(job):
        started.append(job.plan.label)
        raise InputError("a missing file")

    monkeypatch.setattr(runs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(runs, "_run_one", fails)
    with pytest.raises(InputError, match="a missing file"):
        runs.run_jobs(jobs, processes=2, log=lambda line: None)
    assert len(started) < 4


def test_a_model_that_cannot_be_loaded_raises(monkeypatch):
    from rlsedit_fast.models import loading
    from rlsedit_fast.world import MODEL_DIR

    class Failing:
        @classmethod
        def from_pretrained(cls, *_given, **_options):
            raise AssertionError("made to fail")

    monkeypatch.setattr(loading, "whole_model_class", lambda *_args, **_options: Failing)
    with pytest.raises(InputError, match=f"model '{MODEL_DIR}' cannot be loaded: made to fail"):
        loading.load_model(MODEL_DIR, dtype="auto")


def test_seconds_by_phase_add_up(finished_runs):
    _, results = finished_runs
    for found in results.values():
        seconds = found["seconds_by_phase"]
        assert {"loading", "scores before", "text", "edits", "judging", "free answers", "fluency"} <= set(seconds)
        assert sum(seconds.values()) <= found["seconds_run"]
        assert seconds["edits"] >= found["seconds_editing"] - 0.01


def test_time_counts_to_the_innermost_phase(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0])  # creation, outer start, inner start, inner end, outer end
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))
    clock = phases.Phases()
    with clock("outer", "step"), clock("inner", "step"):
        pass
    assert clock.seconds == {"outer": 2.0 + 8.0, "inner": 4.0}


def test_every_phase_has_a_progress_bar(tmp_path, capsys):
    runs._ground.cache_clear()  # no results of the unedited model are cached
    job = Job(GroundSpec(), plan(), tmp_path / "run.json")
    runs.run_jobs([job], log=lambda line: None, show=True)
    shown = capsys.readouterr().err
    for phase in ("scores before", "text", "edits", "judging", "free answers", "fluency"):
        assert f"rls, seed 1: {phase}: 100%" in shown
    assert "20/20" in shown


def test_results_of_the_unedited_model_are_computed_once(finished_runs, monkeypatch, tmp_path):
    """Also key statistics and tasks. The figures equal those of a single run."""
    ground = replace(
        make_ground(GroundSpec()),
        anchors=lambda _seed: texts,
        tokens=2000,
        tasks={"sst2": [Item("Review : good", ("organ", "violin"), 0)]},
    )
    texts = grounds.anchor_texts(grounds._world(), 1)
    cases, _ = make_cases(GroundSpec(), "plain", 10, 1)
    collected, evaluated = [], []
    real_statistics, real_evaluate = stream.Editor.statistics, stream.evaluate_task
    monkeypatch.setattr(
        stream.Editor,
        "statistics",
        lambda editor, *args, **options: collected.append(1) or real_statistics(editor, *args, **options),
    )
    monkeypatch.setattr(
        stream, "evaluate_task", lambda *args, **options: evaluated.append(1) or real_evaluate(*args, **options)
    )
    unedited = stream.UneditedResults()
    settings = plan(edits=10, checkpoints=())
    first = stream.run(ground, settings, cases, tmp_path / "first.json", unedited=unedited)
    second = stream.run(ground, settings, cases, tmp_path / "second.json", unedited=unedited)
    assert (len(collected), len(evaluated)) == (1, 3), "tasks once before the edits, and at the end of each run"
    assert unedited.statistics[1].tokens + unedited.statistics[1].held_out_tokens == 2000
    assert first["rows"] == second["rows"]


def test_the_default_number_of_anchor_tokens_depends_on_the_width_of_the_keys(monkeypatch, tmp_path):
    texts = grounds.anchor_texts(grounds._world(), 1)
    ground = replace(make_ground(GroundSpec()), anchors=lambda _seed: texts)
    cases, _ = make_cases(GroundSpec(), "plain", 2, 1)
    monkeypatch.setattr(stream, "TOKENS_PER_DIMENSION", 2)
    found = stream.run(ground, plan(edits=2, checkpoints=()), cases, tmp_path / "run.json")
    model, _ = ground.load()
    read = found["anchors"]["tokens"] + found["anchors"]["held_out_tokens"]
    assert read == 2 * model.config.intermediate_size
    monkeypatch.setattr(stream, "MOST_TOKENS", 300)
    found = stream.run(ground, plan(edits=2, checkpoints=()), cases, tmp_path / "fewer.json")
    assert found["anchors"]["tokens"] + found["anchors"]["held_out_tokens"] == 300


def test_a_text_probe_has_the_given_number_of_tokens_and_is_shared_by_runs(monkeypatch, tmp_path):
    ground, unedited, probes = make_ground(GroundSpec()), stream.UneditedResults(), []
    real = stream.TextProbe
    monkeypatch.setattr(stream, "TextProbe", lambda *args, **rest: probes.append(1) or real(*args, **rest))
    cases, _ = make_cases(GroundSpec(), "plain", 2, 1)
    results = [
        stream.run(
            ground, plan(edits=2, checkpoints=(), probed=probed), cases, tmp_path / f"{at}.json", unedited=unedited
        )
        for at, probed in enumerate((100, 100, 50))
    ]
    assert len(probes) == 2
    for found, probed in zip(results, (100, 100, 50), strict=True):
        rows = {(row["metric"], row["form"]): row for row in found["rows"] if row["of"] == "text"}
        assert rows["perplexity", "text"]["n"] == rows["kl", "error"]["n"] == probed
        assert 0 < rows["perplexity", "error"]["value"] < rows["perplexity", "text"]["value"]


def test_the_number_of_free_answers_is_the_setting(tmp_path):
    (found,) = runs.run_jobs(
        [Job(GroundSpec(), plan(free=7, checkpoints=()), tmp_path / "run.json")], log=lambda line: None
    )
    (row,) = [row for row in found["rows"] if (row["metric"], row["form"]) == ("efficacy", "free")]
    assert (row["n"], found["plan"]["free"]) == (7, 7)


def test_the_spectral_norm_is_the_largest_singular_value():
    matrix = torch.randn(30, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one in (matrix, matrix.T):
        assert stream._spectral(one) == pytest.approx(float(torch.linalg.matrix_norm(one, 2)), rel=1e-12)
