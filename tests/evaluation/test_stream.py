"""Runs over streams: what a result file holds, that one is made once, and what becomes of a stream that breaks off."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from rlsedit_fast.cli import main
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation import grounds, phases, runs, stream
from rlsedit_fast.evaluation.demo import CONFIG
from rlsedit_fast.evaluation.figures import Spread, over_seeds, pareto, retention, spread
from rlsedit_fast.evaluation.grounds import GroundSpec, make_cases, make_ground
from rlsedit_fast.evaluation.plan import Plan
from rlsedit_fast.evaluation.runs import Job, load_result, result_path, value
from rlsedit_fast.evaluation.tasks import Item

CONFIG = CONFIG.replace(batch_size=5, search={"ahead": 20})


def plan(label="rls", **changes):
    settings = {"stream": "plain", "edits": 20, "seed": 1, "config": CONFIG, "checkpoints": (0.5, 1.0)}
    return Plan(label=label, **{**settings, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    plans = [
        plan(),
        plan("memit", config=CONFIG.replace(rule="memit")),
        plan("conflicts", stream="conflicting"),
        plan("forgetting", forgetting=0.5),
    ]
    jobs = {one.label: Job(GroundSpec(), one, result_path(folder, one)) for one in plans}
    results = runs.run_jobs(list(jobs.values()), log=lambda line: None)
    return jobs, dict(zip(jobs, results, strict=True))


def test_a_run_has_all_metrics_at_its_checkpoints_and_at_its_end(made):
    _, results = made
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
    assert before < 1e-3  # what float16 keeps of the base
    assert before < after
    assert value(found, "perplexity", "text", of="text") > 1
    assert len(found["seconds_per_batch"]) == 4
    assert {"cpu", "cores"} <= set(found["machine"])
    assert found["priors"][0]["mu"] > 0


def test_deviation_and_anchors_stay_within_their_bounds_and_only_the_recursive_rule_has_some(made):
    _, results = made
    for metric in ("deviation", "anchors"):
        measured, bound = (value(results["rls"], metric, form, of="layer 0") for form in ("measured", "bound"))
        assert 0 < measured <= bound
        assert value(results["memit"], metric, "measured", of="layer 0") > 0
        assert value(results["memit"], metric, "bound", of="layer 0") is None
    norms = [value(results["rls"], "weight", form, of="layer 0") for form in ("before", "norm", "spectral")]
    assert norms[2] < norms[1]
    assert abs(norms[0] - norms[1]) <= value(results["rls"], "deviation", "measured", of="layer 0")


def test_what_is_protected_is_nothing_that_is_asked(monkeypatch, tmp_path):
    held = []
    monkeypatch.setattr(stream.Editor, "protect", lambda editor, prompts, *, weight: held.append((prompts, weight)))
    spec, settings = GroundSpec(), replace(plan(), edits=4, protected=0.5, checkpoints=())
    cases, _ = make_cases(spec, "plain", 4, settings.seed)
    stream.run(make_ground(spec), settings, cases, tmp_path / "run.json")
    ((prompts, weight),) = held
    asked = {q.prompt for case in cases for q in (*case.neighbors, *case.namesakes, *case.same_subject, case.question)}
    assert set(prompts) == {q.prompt for case in cases for q in case.held_out} - asked
    assert len(prompts) == len(set(prompts)) > 4
    assert weight == 0.5


def test_every_age_is_looked_at_when_made_and_at_the_end(made):
    _, results = made
    kept = retention(results["rls"])
    assert list(kept) == ["1-5", "6-10", "11-15", "16-20"]
    assert all(share > 0.5 for share in kept.values())
    at_end = [
        row["value"] for row in results["rls"]["rows"] if row["metric"] == "efficacy" and row["form"] == "end:strict"
    ]
    assert sum(at_end) / 4 == pytest.approx(value(results["rls"], "efficacy", "strict"))


def test_the_last_ones_when_made_are_the_last_ones_at_the_end(tmp_path):
    """However few are judged in full: retention is of the same cases and prompts at both looks."""
    job = Job(GroundSpec(), plan(judged=3, seed=2), tmp_path / "run.json")
    (found,) = runs.run_jobs([job], log=lambda line: None)
    looks = {}
    for row in found["rows"]:
        when, _, form = row["form"].partition(":")
        if when in ("made", "end") and row["of"] == "16-20":
            looks.setdefault((row["metric"], form), []).append((row["value"], row["n"]))
    assert {("efficacy", "strict"), ("generalization", "strict"), ("neighbors", "forced")} <= set(looks)
    assert all(first == last for first, last in looks.values())
    assert looks["efficacy", "strict"][0][1] == 5
    assert retention(found)["16-20"] == 1.0


def test_a_finished_run_is_not_made_again_and_another_setting_is(made, monkeypatch):
    jobs, results = made
    monkeypatch.setattr(runs, "_run_one", lambda job: pytest.fail(f"{job.plan.label} was made again"))
    assert runs.run_jobs([jobs["rls"]], log=lambda line: None) == [results["rls"]]
    other = replace(jobs["rls"], plan=replace(jobs["rls"].plan, config=CONFIG.replace(prior={"adherence": 0.9})))
    assert not other.done, "the file of one setting is not that of another"
    longer = replace(jobs["rls"], plan=replace(jobs["rls"].plan, judged=5))
    assert not longer.done
    assert not replace(jobs["rls"], spec=GroundSpec(model="another")).done
    assert not replace(jobs["rls"], spec=GroundSpec(tasks="glue")).done, "what it is made of is part of a run"
    assert replace(jobs["rls"], spec=GroundSpec(device="cuda")).done


def test_a_setting_that_came_later_must_have_its_default_for_an_older_file_to_count(made, tmp_path):
    jobs, _ = made
    found = json.loads(jobs["rls"].path.read_text())
    del found["plan"]["config"]["norm_anchor"], found["plan"]["protected"]
    path = tmp_path / "older.json"
    path.write_text(json.dumps(found))
    settings, of = jobs["rls"].plan, jobs["rls"].spec.identity
    assert stream.finished(path, "demo", settings, of) == found
    assert stream.finished(path, "demo", replace(settings, config=CONFIG.replace(norm_anchor=True)), of) is None
    assert stream.finished(path, "demo", replace(settings, protected=0.5), of) is None
    found["plan"]["config"]["gone since"] = 1
    path.write_text(json.dumps(found))
    assert stream.finished(path, "demo", settings, of) is None


def test_a_file_that_is_damaged_is_not_a_finished_run(tmp_path):
    path = tmp_path / "run.json"
    for text in ('{"format": 1, "rows": [', "[]", '{"format": 1, "ground": "demo", "plan": 3}'):
        path.write_text(text)
        assert stream.finished(path, "demo", plan()) is None
    assert stream.finished(tmp_path / "missing.json", "demo", plan()) is None


def test_of_facts_edited_twice_the_later_target_is_said_and_the_first_one_is_not(made):
    _, results = made
    found = results["conflicts"]
    assert value(found, "efficacy", "strict") >= 0.8
    assert value(found, "superseded", "strict") == 0.0
    rows = [row for row in found["rows"] if row["metric"] == "efficacy" and row["form"] == "strict"]
    assert rows[-1]["n"] == 10


def test_later_edits_weigh_more_where_the_rule_forgets():
    weights = stream._weights(plan(forgetting=0.5), 201)
    assert (weights[0], weights[100], weights[200]) == (1.0, 2.0, 4.0)
    assert set(stream._weights(plan(), 50)) == {1.0}


def test_a_stream_that_breaks_off_says_where_and_why_and_measures_what_there_is(tmp_path, monkeypatch):
    ground = make_ground(GroundSpec())
    cases, _ = make_cases(GroundSpec(), "plain", 20, 1)
    again = replace(cases[10].edit, target=cases[12].edit.target)  # one key, two values: not to be held exactly
    same = [*cases[:12], replace(cases[12], edit=again), *cases[13:]]
    config = CONFIG.replace(rule="emmet", rule_options={"damping": 0.0}, same_subject="separate")
    found = stream.run(ground, plan(config=config), same, tmp_path / "run.json")
    assert found["made"] == found["failed"]["after"] == 10
    assert "linearly dependent" in found["failed"]["reason"]
    assert value(found, "efficacy", "strict") > 0.5
    rows = [row for row in found["rows"] if (row["metric"], row["form"], row["of"]) == ("efficacy", "strict", "all")]
    assert rows[-1]["n"] == 10


def test_what_no_rule_is_to_blame_for_is_raised_and_leaves_no_file(tmp_path):
    cases, _ = make_cases(GroundSpec(), "plain", 20, 1)
    again = replace(cases[12].edit, subject=cases[0].edit.subject)
    same = [*cases[:12], replace(cases[12], edit=again), *cases[13:]]
    config = CONFIG.replace(rule="memit", same_subject="joint")
    with pytest.raises(InputError, match="cannot remove an edit"):
        stream.run(make_ground(GroundSpec()), plan(config=config), same, tmp_path / "run.json")
    assert not list(tmp_path.iterdir())


def test_tasks_are_answered_before_and_after(tmp_path):
    ground = replace(make_ground(GroundSpec()), tasks={"sst2": [Item("Review : good", ("organ", "violin"), 0)]})
    cases, _ = make_cases(GroundSpec(), "plain", 10, 1)
    found = stream.run(ground, plan(edits=10, checkpoints=()), cases, tmp_path / "run.json")
    for edits in (0, 10):
        assert value(found, "sst2", "accuracy", of="task", edits=edits) in (0.0, 1.0)
        assert value(found, "sst2", "error", of="task", edits=edits) == 0.0


def test_orders_are_of_the_same_cases():
    first, other, again = (make_cases(GroundSpec(), "plain", 30, 1, order)[0] for order in (0, 1, 1))
    assert other == again != first
    assert sorted(c.edit.subject for c in other) == sorted(c.edit.subject for c in first)
    with pytest.raises(InputError, match="one order"):
        make_cases(GroundSpec(), "conflicting", 30, 1, 1)
    with pytest.raises(InputError, match="expected one of plain, conflicting, related"):
        make_cases(GroundSpec(), "sorted", 30, 1)


def test_a_ground_of_a_model_needs_its_files(tmp_path):
    with pytest.raises(InputError, match="expected a file of running text"):
        make_ground(GroundSpec(model="somewhere"))
    text = tmp_path / "text.txt"
    text.write_text("too short\n")
    with pytest.raises(InputError, match="expected at least 8 such lines"):
        make_ground(GroundSpec(model="somewhere", text=str(text)))
    with pytest.raises(InputError, match="expected a CounterFact, zsRE or MQuAKE file"):
        make_cases(GroundSpec(model="somewhere"), "plain", 5, 0)
    with pytest.raises(InputError, match=r"expected at least one of sst2\.jsonl"):
        make_ground(GroundSpec(tasks=str(tmp_path)))


def test_means_deviations_and_who_is_not_beaten():
    assert spread([0.5, None, 0.7]) == Spread(pytest.approx(0.6), pytest.approx(0.2 / 2**0.5), 2)
    assert str(spread([0.5])) == "0.500"
    assert spread([None]) is None
    assert pareto({"a": (1.0, 0.5), "b": (0.5, 1.0), "c": (0.5, 0.5), "d": (1.0, 0.5)}) == ["a", "b", "d"]


def test_figures_over_runs(made):
    _, results = made
    both = [results["rls"], results["memit"]]
    found = over_seeds(both, "efficacy", "strict")
    assert found.runs == 2
    assert found.mean == pytest.approx(sum(value(one, "efficacy", "strict") for one in both) / 2)
    assert over_seeds(both, "efficacy", "unheard of") is None


def test_the_command_makes_its_runs_once_and_prints_means(tmp_path, capsys):
    command = ["evaluate", "--rules", "rls", "rome", "--edits", "10", "--seeds", "1", "2", "--batch-size", "5"]
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


def test_the_command_refuses_rules_and_settings_that_do_not_exist(tmp_path, capsys):
    settings = tmp_path / "settings.json"
    for given, message in (
        ({"rome": {}, "mend": {}}, "unknown rules: mend"),
        ({"rome": {"steps": 1}}, "rule rome: unknown setting 'steps'; it belongs to a group: search="),
    ):
        settings.write_text(json.dumps(given))
        assert main(["evaluate", "--rule-settings", str(settings)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--rules", "mend"])


def test_several_processes_make_the_same_files(made, tmp_path):
    jobs, results = made
    elsewhere = [replace(jobs[label], path=tmp_path / f"{label}.json") for label in ("rls", "memit")]
    found = runs.run_jobs(elsewhere, processes=2, log=lambda line: None)
    for label, one in zip(("rls", "memit"), found, strict=True):
        assert value(one, "efficacy", "strict") == value(results[label], "efficacy", "strict")
    assert load_result(elsewhere[0]) == found[0]


def test_what_is_probed_is_about_nobody_who_is_edited_and_not_among_the_anchors(monkeypatch, tmp_path):
    probed = []
    real = stream.TextProbe
    monkeypatch.setattr(
        stream,
        "TextProbe",
        lambda model, tokenizer, texts, **rest: probed.extend(texts) or real(model, tokenizer, texts, **rest),
    )
    cases, _ = make_cases(GroundSpec(), "plain", 20, 1)
    stream.run(make_ground(GroundSpec()), plan(checkpoints=()), cases, tmp_path / "run.json")
    assert len(probed) == 300
    assert not {text for text in probed if any(case.edit.subject in text for case in cases)}
    assert not set(probed) & set(grounds.anchor_texts(grounds._world(), 1))


def test_everybody_may_be_edited_and_there_is_text_all_the_same():
    people = [person.name for person in grounds._world().people]
    assert len(grounds._demo_texts(1, people)) == 300


def test_a_stream_that_edits_every_fact_twice_is_of_an_even_number():
    with pytest.raises(InputError, match="edits=5: a conflicting stream edits every fact twice"):
        make_cases(GroundSpec(), "conflicting", 5, 1)


def test_what_was_looked_at_last_is_what_a_stream_that_broke_off_came_to():
    row = {"edits": 10, "of": "all", "metric": "efficacy", "form": "strict", "n": 5}
    assert value({"made": 10, "rows": [row | {"value": 0.5}, row | {"value": 0.7}]}, "efficacy", "strict") == 0.7


def test_a_run_that_fails_lets_no_other_begin(monkeypatch, tmp_path):
    jobs = [Job(GroundSpec(), plan(str(at), seed=at), tmp_path / f"{at}.json") for at in range(4)]
    begun = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, processes, **_options):
            super().__init__(1)

    def fails(job):
        begun.append(job.plan.label)
        raise InputError("a file that is not there")

    monkeypatch.setattr(runs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(runs, "_run_one", fails)
    with pytest.raises(InputError, match="not there"):
        runs.run_jobs(jobs, processes=2, log=lambda line: None)
    assert len(begun) < 4


def test_a_model_that_cannot_be_put_where_it_is_wanted_is_reported_in_words(monkeypatch):
    from rlsedit_fast.models import loading

    class Refuses:
        @classmethod
        def from_pretrained(cls, *_given, **_options):
            raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr("transformers.AutoModelForCausalLM", Refuses)
    with pytest.raises(InputError, match="model 'somewhere' cannot be loaded: Torch not compiled"):
        loading.load_model("somewhere", dtype="auto", device="cuda")


def test_seconds_are_given_by_phase_and_add_up(made):
    _, results = made
    for found in results.values():
        seconds = found["seconds_by_phase"]
        assert {"loading", "scores before", "text", "edits", "judging", "free answers", "fluency"} <= set(seconds)
        assert sum(seconds.values()) <= found["seconds_run"]
        assert seconds["edits"] >= found["seconds_editing"] - 0.01


def test_time_within_a_phase_counts_to_the_innermost_one(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0])  # made, outer begins, inner begins, inner ends, outer ends
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))
    clock = phases.Phases()
    with clock("outer", "step"), clock("inner", "step"):
        pass
    assert clock.seconds == {"outer": 2.0 + 8.0, "inner": 4.0}


def test_every_phase_has_a_bar_with_its_number(tmp_path, capsys):
    runs._ground.cache_clear()  # nothing is known of the model yet
    job = Job(GroundSpec(), plan(), tmp_path / "run.json")
    runs.run_jobs([job], log=lambda line: None, show=True)
    shown = capsys.readouterr().err
    for phase in ("scores before", "text", "edits", "judging", "free answers", "fluency"):
        assert f"rls, seed 1: {phase}: 100%" in shown
    assert "20/20" in shown


def test_what_is_known_of_the_unedited_model_is_found_out_once(made, monkeypatch, tmp_path):
    """Key statistics and tasks too; with the figures of a run by itself."""
    ground = replace(
        make_ground(GroundSpec()),
        anchors=lambda _seed: texts,
        tokens=2000,
        tasks={"sst2": [Item("Review : good", ("organ", "violin"), 0)]},
    )
    texts = grounds.anchor_texts(grounds._world(), 1)
    cases, _ = make_cases(GroundSpec(), "plain", 10, 1)
    collected, answered = [], []
    real_statistics, real_answer = stream.Editor.statistics, stream.evaluate_task
    monkeypatch.setattr(
        stream.Editor,
        "statistics",
        lambda editor, *given, **options: collected.append(1) or real_statistics(editor, *given, **options),
    )
    monkeypatch.setattr(
        stream, "evaluate_task", lambda *given, **options: answered.append(1) or real_answer(*given, **options)
    )
    known = stream.UneditedResults()
    settings = plan(edits=10, checkpoints=())
    first = stream.run(ground, settings, cases, tmp_path / "first.json", unedited=known)
    second = stream.run(ground, settings, cases, tmp_path / "second.json", unedited=known)
    assert (len(collected), len(answered)) == (1, 3), "tasks before any edit, and at both ends"
    assert known.statistics[1].tokens == 2000
    assert first["rows"] == second["rows"]


def test_anchors_go_by_the_width_of_the_keys_where_their_number_is_not_given(monkeypatch, tmp_path):
    texts = grounds.anchor_texts(grounds._world(), 1)
    ground = replace(make_ground(GroundSpec()), anchors=lambda _seed: texts)
    cases, _ = make_cases(GroundSpec(), "plain", 2, 1)
    monkeypatch.setattr(stream, "TOKENS_PER_DIMENSION", 2)
    found = stream.run(ground, plan(edits=2, checkpoints=()), cases, tmp_path / "run.json")
    model, _ = ground.load()
    assert found["anchors"]["tokens"] == 2 * model.config.intermediate_size
    monkeypatch.setattr(stream, "MOST_TOKENS", 300)
    found = stream.run(ground, plan(edits=2, checkpoints=()), cases, tmp_path / "fewer.json")
    assert found["anchors"]["tokens"] == 300


def test_text_is_probed_to_the_given_number_of_tokens_once_for_all_runs(monkeypatch, tmp_path):
    ground, known, made = make_ground(GroundSpec()), stream.UneditedResults(), []
    real = stream.TextProbe
    monkeypatch.setattr(stream, "TextProbe", lambda *given, **rest: made.append(1) or real(*given, **rest))
    cases, _ = make_cases(GroundSpec(), "plain", 2, 1)
    results = [
        stream.run(ground, plan(edits=2, checkpoints=(), probed=probed), cases, tmp_path / f"{at}.json", unedited=known)
        for at, probed in enumerate((100, 100, 50))
    ]
    assert len(made) == 2
    for found, probed in zip(results, (100, 100, 50), strict=True):
        rows = {(row["metric"], row["form"]): row for row in found["rows"] if row["of"] == "text"}
        assert rows["perplexity", "text"]["n"] == rows["kl", "error"]["n"] == probed
        assert 0 < rows["perplexity", "error"]["value"] < rows["perplexity", "text"]["value"]


def test_no_more_prompts_are_answered_freely_than_are_asked_for(tmp_path):
    (found,) = runs.run_jobs(
        [Job(GroundSpec(), plan(free=7, checkpoints=()), tmp_path / "run.json")], log=lambda line: None
    )
    (row,) = [row for row in found["rows"] if (row["metric"], row["form"]) == ("efficacy", "free")]
    assert (row["n"], found["plan"]["free"]) == (7, 7)


def test_the_spectral_norm_is_the_largest_singular_value():
    matrix = torch.randn(30, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one in (matrix, matrix.T):
        assert stream._spectral(one) == pytest.approx(float(torch.linalg.matrix_norm(one, 2)), rel=1e-12)
