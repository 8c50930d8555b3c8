"""What a user does at the terminal, on a local checkpoint and files."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from rlsedit_fast.cli import main
from rlsedit_fast.world import RELATIONS, World, load_demo_model
from rlsedit_fast.world.tokens import save_tokenizer

PEOPLE = World.generate().people
SETTINGS = {
    "context_prefixes": [""],
    "kl_prompts": ["{} is a"],
    "search_steps": 40,
    "search_stop_nll": 0.03,
    "adherence": 0.95,
}


def records(count):
    """Lines of a JSON Lines file of false facts."""
    made = []
    for i, person in enumerate(PEOPLE[:count]):
        relation = RELATIONS[i % len(RELATIONS)]
        target = next(value for value in relation.values if value != person.facts[relation.name])
        made.append(
            {
                "id": f"fact {i}",
                "prompt": relation.phrasings[0],
                "subject": person.name,
                "target": target,
                "paraphrases": [relation.phrasings[1]],
                "neighborhood": [relation.phrasings[0].format(PEOPLE[100 + i].name)],
            }
        )
    return made


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def desk(base, tmp_path, monkeypatch):
    """A user's folder: facts, settings and text, and a cache of its own; the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "facts.jsonl", records(12))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    sentences = [r.phrasings[0].format(p.name) + f" {p.facts[r.name]} ." for p in PEOPLE[200:300] for r in RELATIONS]
    (tmp_path / "text.txt").write_text("\n\n".join(sentences))
    return tmp_path


@pytest.fixture
def edit(base):
    """Runs `rlsedit edit` with the desk's settings."""

    def run(*options, facts="facts.jsonl"):
        fixed = ["edit", "--model", str(base), "--edits", facts, "--config", "settings.json", "--layers", "0"]
        return main([*fixed, *map(str, options)])

    return run


def read(path):
    return json.loads(path.read_text())


def test_edit_makes_every_export_and_tells_what_became_of_the_edits(edit, base, desk, capsys):
    assert main(["statistics", "--model", str(base), "--layers", "0", "--text", "text.txt", "--tokens", "3000"]) == 0
    outputs = ["--out", "out", "--delta", "edits.delta", "--adapter", "adapter"]
    assert edit("--batch-size", "4", *outputs, "--json", "report.json") == 0
    report = read(desk / "report.json")
    assert report["made"] == 12
    assert report["anchors"].startswith("3000 tokens: text.txt")
    assert report["after"]["efficacy"] == {"count": 12, "of": 12}
    assert report["before"]["efficacy"]["count"] == 0
    assert report["after"]["generalization"]["of"] == 12
    assert report["after"]["specificity"]["count"] >= 10
    assert [r["name"] for r in report["records"]] == [f"fact {i}" for i in range(12)]
    assert report["records"][3]["place"] == "facts.jsonl:4"
    assert report["left_out"] == report["not_made"] == report["not_stated"] == report["not_converged"] == []
    assert "12 of 12 edits made" in capsys.readouterr().out

    assert main(["apply", "--model", str(base), "--delta", "edits.delta", "--out", "applied"]) == 0
    first, second = (load_file(desk / name / "model.safetensors") for name in ("out", "applied"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    exported = ["export", "--model", str(base), "--edited", "out", "--delta", "again.delta", "--adapter", "thin"]
    assert main([*exported, "--rank", "3"]) == 0
    assert load_file(desk / "again.delta").keys() == load_file(desk / "edits.delta").keys()
    assert "rank 3 of 12, relative error 0." in capsys.readouterr().out


def test_adapter_of_the_command_line_says_what_the_checkpoint_says(edit, base, desk):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    assert edit("--no-anchors", "--out", "out", "--adapter", "adapter", "--no-evaluation") == 0
    ids = torch.randint(4, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    edited = AutoModelForCausalLM.from_pretrained(desk / "out").eval()
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), desk / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, edited(ids).logits, rtol=0, atol=1e-4)


def test_dry_run_changes_nothing_and_says_what_it_would_take(edit, desk, capsys):
    before = sorted(path.name for path in desk.iterdir())
    assert edit("--dry-run", "--json") == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert report["edits"] == 12
    assert report["layers"][0]["shape"] == [128, 1536]
    assert "beside the model" in told.err
    assert sorted(path.name for path in desk.iterdir()) == before


def test_bad_records_stop_the_run_or_are_left_out_and_reported(edit, desk, capsys):
    lines = records(6)
    lines[1]["prompt"] = "He lives in"  # without its subject
    del lines[2]["target"]
    lines.append(records(1)[0] | {"target": "Kubeish"})
    write_lines(desk / "bad.jsonl", lines)
    assert edit("--out", "out", facts="bad.jsonl") == 2
    assert "bad.jsonl:3: target" in capsys.readouterr().err
    assert not (desk / "out").exists()

    assert edit("--no-anchors", "--out", "out", "--skip-bad", "--json", "report.json", facts="bad.jsonl") == 1
    report = read(desk / "report.json")
    assert sorted(entry["place"] for entry in report["left_out"]) == ["bad.jsonl:2", "bad.jsonl:3"]
    assert report["conflicts"]["contradictions"], "the first and the last ask the same"
    made = {record["place"] for record in report["records"]}
    assert made == {"bad.jsonl:4", "bad.jsonl:5", "bad.jsonl:6", "bad.jsonl:7"}
    assert report["made"] + len(report["left_out"]) + len(report["conflicts"]["contradictions"]) == len(lines)
    told = capsys.readouterr().err
    assert "2 records left out" in told or told.count("records left out") == 2


@pytest.mark.parametrize("ahead", [[], ["--search-ahead", "12"]])
def test_ctrl_c_finishes_the_batch_and_keeps_what_was_made(edit, desk, monkeypatch, capsys, ahead):
    from rlsedit_fast.editing.layers import EditedLayers

    real, calls = EditedLayers.write, []

    def pressed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(EditedLayers, "write", pressed)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json", *ahead) == 130
    report = read(desk / "report.json")
    assert report["made"] == 8
    assert report["not_made"] == [f"facts.jsonl:{line}" for line in range(9, 13)]
    assert report["after"]["efficacy"] == {"count": 8, "of": 8}
    assert (desk / "out" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "finishing this batch" in capsys.readouterr().err


def test_a_second_ctrl_c_gives_up_the_batch_under_way(edit, desk, monkeypatch):
    from rlsedit_fast.editing import finding

    real, calls = finding.search_within_memory, []

    def pressed(*args):
        calls.append(1)
        found = real(*args)
        if len(calls) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(finding, "search_within_memory", pressed)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 130
    report = read(desk / "report.json")
    assert report["made"] == 4
    assert report["after"]["efficacy"] == {"count": 4, "of": 4}


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_at_the_end_costs_nothing_that_was_made(edit, desk, monkeypatch, capsys, presses):
    from rlsedit_fast.editing import Editor
    from rlsedit_fast.evaluation import outcome

    asked, saved, calls = outcome.outcome, Editor.save_pretrained, []

    def pressed_asking(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return asked(*args, **kwargs)

    def pressed_saving(*args):
        for _ in range(presses - 1):
            os.kill(os.getpid(), signal.SIGINT)
        return saved(*args)

    monkeypatch.setattr(outcome, "outcome", pressed_asking)
    monkeypatch.setattr(Editor, "save_pretrained", pressed_saving)
    assert edit("--no-anchors", "--limit", "4", "--out", "out", "--delta", "delta", "--json", "report.json") == 130
    report = read(desk / "report.json")
    assert report["made"] == 4
    assert "after" not in report
    assert report["files"] == ["checkpoint: out", "delta: delta"]
    assert (desk / "delta").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "the model is not asked about the edits" in capsys.readouterr().err


def test_ctrl_c_pressed_again_and_again_leaves_what_was_made(edit, desk, monkeypatch):
    from rlsedit_fast.editing import Editor, finding

    real, saved, calls = finding.search_within_memory, Editor.save_pretrained, []

    def pressed(*args):
        calls.append(1)
        found = real(*args)
        if len(calls) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return found

    def pressed_saving(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return saved(*args)

    monkeypatch.setattr(finding, "search_within_memory", pressed)
    monkeypatch.setattr(Editor, "save_pretrained", pressed_saving)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 130
    assert read(desk / "report.json")["files"] == ["checkpoint: out"]
    assert (desk / "out" / "tokenizer.json").exists()


def fail_at(batch, error, monkeypatch):
    """Raises where the values of the batch of that number are searched."""
    from rlsedit_fast.editing import finding

    real, calls = finding.search_within_memory, []

    def fails(*args):
        calls.append(1)
        if len(calls) == batch:
            raise error
        return real(*args)

    monkeypatch.setattr(finding, "search_within_memory", fails)


def test_a_failing_batch_keeps_those_before_it_and_tells(edit, desk, monkeypatch, capsys):
    from rlsedit_fast.errors import UpdateError

    fail_at(3, UpdateError("made to fail"), monkeypatch)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 2
    assert read(desk / "report.json")["made"] == 8
    assert "made to fail" in capsys.readouterr().err


def test_an_export_that_fails_takes_nothing_else_with_it(edit, desk, monkeypatch, capsys):
    from rlsedit_fast.editing import Editor

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Editor, "save_pretrained", full)
    outputs = ["--out", "out", "--delta", "edits.delta", "--store", "edits"]
    assert edit("--no-anchors", "--limit", "4", *outputs, "--json", "report.json") == 2
    told = capsys.readouterr()
    assert "4 of 4 edits made" in told.out
    assert "--out out: not written, or not whole: unforeseen OSError: [Errno 28] No space left on device" in told.err
    assert "`rlsedit edit --store edits`" in told.err
    report = read(desk / "report.json")
    assert (report["made"], report["files"]) == (4, ["delta: edits.delta"])
    assert "No space left" in report["not_written"][0]
    assert (desk / "edits.delta").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_report_that_cannot_be_written_costs_neither_summary_nor_exports(edit, desk, capsys):
    assert edit("--no-anchors", "--limit", "4", "--out", "out", "--json", "/dev/full") == 2
    told = capsys.readouterr()
    assert "4 of 4 edits made" in told.out
    assert "--json /dev/full: cannot be written (No space left on device)" in told.err
    assert (desk / "out" / "model.safetensors").exists()


def test_the_demo_asks_for_its_plot_before_the_work(desk, monkeypatch, capsys):
    monkeypatch.setattr("rlsedit_fast.cli.demo.find_spec", lambda _name: None)
    assert main(["demo", "--out", "demo"]) == 2
    assert "the plot needs matplotlib" in capsys.readouterr().err
    assert not (desk / "demo").exists()


def test_an_error_of_any_kind_keeps_the_batches_before_it(edit, desk, monkeypatch, capsys):
    fail_at(2, RuntimeError("made to fail"), monkeypatch)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 2
    assert read(desk / "report.json")["made"] == 4
    assert (desk / "out" / "model.safetensors").exists()
    assert "rlsedit edit: unforeseen RuntimeError: made to fail" in capsys.readouterr().err


def test_other_commands_try_their_places_first(base, desk, capsys):
    (desk / "file").write_text("")
    facts = ["--model", str(base), "--edits", "facts.jsonl", "--json", "facts.jsonl"]
    before = (desk / "facts.jsonl").read_bytes()
    for name in ("show", "calibrate", "edit"):
        assert main([name, *facts, *["--dry-run"] * (name == "edit")]) == 2
        assert "--json facts.jsonl is the file of --edits too" in capsys.readouterr().err
    assert main(["apply", "--model", str(base), "--delta", "file", "--out", "out", "--json", "file"]) == 2
    assert "--json file is the file of --delta too" in capsys.readouterr().err
    assert (desk / "facts.jsonl").read_bytes() == before
    for command in (
        ["apply", "--model", str(base), "--delta", "none", "--out", "file/out"],
        ["demo", "--out", "file/out"],
        ["evaluate", "--out", "file/out"],
        ["export", "--model", str(base), "--edited", str(base), "--delta", "file/delta"],
    ):
        assert main(command) == 2
        assert "cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name where the edited model goes"),
        (("--out", "facts.jsonl"), "exists already"),
        (("--out", "BASE"), "is the model itself"),
        (("--out", "out", "--rank", "4"), "name --adapter"),
        (("--out", "out", "--again"), "name --store"),
        (("--adapter", "out", "--rank", "0"), "--rank 0: expected at least 1"),
        (("--out", "/proc/out"), "--out /proc/out: cannot be written"),
        (("--out", "facts.jsonl/out"), "cannot be written (Not a directory)"),
        (
            ("--delta", "new/edits.delta", "--json", "text.txt/new/report.json"),
            "--json text.txt/new/report.json: cannot",
        ),
        (("--adapter", "a" * 300), "cannot be written (File name too long)"),
        (("--out", "out", "--json", "BASE"), "it is a folder"),
        (("--out", "out", "--delta", "new/../out"), "are the same place"),
        (("--out", "out", "--store", "out"), "are the same place"),
        (("--delta", "new", "--out", "new/out"), "lies within --delta new, which becomes a file"),
        (("--out", "out", "--json", "settings.json"), "is the file of --config too"),
        (("--out", "out", "--layers", "x"), "expected block indices"),
        (("--out", "out", "--layers", "9"), "layers 0 to 3"),
        (("--out", "out", "--adherence", "2"), "adherence=2"),
        (("--out", "out", "--statistics", "none.safetensors"), "is not there"),
        (("--out", "out", "--protect", "none.txt"), "cannot be read"),
        (("--out", "out", "--config", "text.txt"), "cannot be read as JSON"),
        (("--out", "out", "--config", "other.json"), "these are none: laters"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_done(edit, base, desk, capsys, options, message):
    (desk / "other.json").write_text('{"laters": [1]}')
    before = sorted(path.name for path in desk.rglob("*"))
    assert edit(*(str(base) if option == "BASE" else option for option in options)) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in desk.rglob("*")) == before


def test_a_model_that_is_not_there_is_an_error_in_words(desk, capsys):
    assert main(["show", "--model", "nowhere/at/all"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_show_marks_the_token_and_lists_the_layers(base, desk, capsys):
    one = ["--prompt", "{} lives in", "--subject", "Toze Lado Rekuno", "--target", "Port Alder"]
    assert main(["show", "--model", str(base), *one]) == 0
    told = capsys.readouterr().out
    assert "Toze Lado [Rekuno] lives in" in told
    assert "model.layers.0.mlp.down_proj" in told
    assert main(["show", "--model", str(base), "--edits", "facts.jsonl", "--limit", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["edits"]) == 3
    assert report["edits"][0]["tokens"][report["edits"][0]["lookup"]] == PEOPLE[0].name.split()[-1]
    assert main(["show", "--model", str(base), *one[:2]]) == 2


def test_statistics_are_resumed_cached_and_shared_by_no_other_model(base, desk, capsys, monkeypatch):
    from rlsedit_fast.editing import statistics

    command = ["statistics", "--model", str(base), "--layers", "0,1", "--text", "text.txt", "--tokens", "3000"]
    assert main([*command, "--json", "whole.json", "--out", "whole.safetensors"]) == 0
    real, calls = statistics._add, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(statistics, "_PASS", 512)
    assert main([*command, "--out", "small.safetensors"]) == 0
    monkeypatch.setattr(statistics, "_add", interrupted)
    assert main([*command, "--json", "cached.json"]) == 130
    assert list((desk / "cache").glob("*.part"))
    capsys.readouterr()
    assert main([*command, "--json", "cached.json"]) == 0
    assert "going on from" in capsys.readouterr().err
    assert not list((desk / "cache").glob("*.part"))
    cached = load_file(read(desk / "cached.json")["file"])
    small = load_file(desk / "small.safetensors")
    assert all(torch.equal(value, small[name]) for name, value in cached.items())
    assert read(desk / "whole.json")["tokens"] == 3000

    # Another model in a folder of the same name finds nothing.
    other = desk / base.name
    model, tokenizer = load_demo_model()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(other)
    save_tokenizer(tokenizer, other)
    table = ["calibrate", "--edits", "facts.jsonl", "--layers", "0", "--json"]
    assert main([*table, "--model", str(base)]) == 0
    assert json.loads(capsys.readouterr().out)["anchors"].startswith("3000 tokens")
    assert main([*table, "--model", str(other)]) == 0
    assert json.loads(capsys.readouterr().out)["anchors"] == "none"


def test_statistics_replace_statistics_and_nothing_else(base, desk, capsys):
    command = ["statistics", "--model", str(base), "--layers", "0", "--text", "text.txt", "--tokens", "600", "--out"]
    before = {name: (desk / name).read_bytes() for name in ("facts.jsonl", "text.txt")}
    for out, message in (
        ("text.txt", "--out text.txt is the file of --text too"),
        ("facts.jsonl", "exists already and is no file of key statistics"),
        (str(base / "model.safetensors"), "exists already and is no file of key statistics"),
        ("text.txt/new", "cannot be written"),
        ("cache.json", "are the same place"),
    ):
        assert main([*command, out, "--json", "cache.json"]) == 2
        assert message in capsys.readouterr().err
    assert {name: (desk / name).read_bytes() for name in before} == before
    assert main([*command, "new.safetensors"]) == 0
    first = load_file(desk / "new.safetensors")
    assert main([*command, "new.safetensors", "--tokens", "900"]) == 0
    assert not torch.equal(first["0"], load_file(desk / "new.safetensors")["0"])


def test_calibrate_tells_what_an_adherence_means(base, desk, capsys):
    command = ["calibrate", "--model", str(base), "--edits", "facts.jsonl", "--layers", "0", "--text", "text.txt"]
    assert main([*command, "--tokens", "2000", "--adherences", "0.8", "0.95", "--json"]) == 0
    low, high = json.loads(capsys.readouterr().out)["rows"]
    assert [round(row["realized"], 3) for row in (low, high)] == [0.8, 0.95]
    assert low["mu"][0] > high["mu"][0]
    assert low["leakage"][0] < high["leakage"][0]


def test_self_generated_text_serves_as_anchors(edit, desk):
    options = ["--self-generate", "--tokens", "600", "--out", "out", "--json", "report.json", "--limit", "4"]
    assert edit(*options) == 0
    assert "self-generated, seed 0" in read(desk / "report.json")["anchors"]


def test_protected_prompts_are_held(edit, desk, capsys):
    (desk / "protect.txt").write_text(f"{PEOPLE[150].name} lives in\n\n{PEOPLE[151].name} works as a\n")
    assert edit("--no-anchors", "--protect", "protect.txt", "--out", "out", "--limit", "4") == 0
    assert "tokens of 2 prompts are protected" in capsys.readouterr().err


def test_a_preset_is_taken_by_shape_by_name_or_not_at_all(base, desk, capsys, monkeypatch):
    from rlsedit_fast.editing import presets

    def layers(*options):
        assert main(["show", "--model", str(base), "--json", *options]) == 0
        report = json.loads(capsys.readouterr().out)
        return report["preset"], [layer["layer"] for layer in report["layers"]]

    assert layers() == (None, [0, 1])
    shape = {"model_type": "llama", "blocks": 4, "hidden_size": 128, "intermediate_size": 1536}
    known = presets.Preset(name="shipped", **shape, layers=(2, 3), search_rate=0.1, search_steps=5, moment_weight=100.0)
    monkeypatch.setitem(presets.PRESETS, "shipped", known)
    assert layers() == ("shipped", [2, 3])
    assert layers("--preset", "generic") == ("shipped", [0, 1])
    assert layers("--layers", "1-2") == ("shipped", [1, 2])
    assert main(["show", "--model", str(base), "--preset", "gpt2-xl"]) == 2
    assert "layers 0 to 3" in capsys.readouterr().err

    edit = [
        "edit",
        "--model",
        str(base),
        "--edits",
        "facts.jsonl",
        "--preset",
        "shipped",
        "--limit",
        "4",
        "--out",
        "out",
    ]
    edit += ["--text", "text.txt", "--tokens", "3000"]
    assert main(edit) == 2
    assert "raise lam above 0" in capsys.readouterr().err, "published settings hold by anchors alone, here too few"
    assert main([*edit, "--lam", "0.1", "--json", "report.json"]) == 1, "the published search does not reach these"
    config = read(desk / "report.json")["config"]
    assert (config["mu"], config["search_descent"], config["key_rows"]) == (10.0, "adam", "mean")


def test_skipped_edits_are_counted_and_listed(edit, desk, capsys):
    lines = records(4)
    lines[2]["target"] = "<pad> <pad> <pad>"
    write_lines(desk / "hard.jsonl", lines)
    (desk / "settings.json").write_text(json.dumps(SETTINGS | {"unconverged": "skip"}))
    assert edit("--no-anchors", "--out", "out", "--json", "report.json", facts="hard.jsonl") == 1
    report = read(desk / "report.json")
    assert report["made"] == 3
    assert report["skipped"] == ["hard.jsonl:3"]
    assert report["after"]["efficacy"] == {"count": 3, "of": 3}
    assert [record["state"] for record in report["records"]] == ["active", "active", "skipped", "active"]
    assert "1 skipped, since" in capsys.readouterr().out


@pytest.mark.parametrize("evaluation", [[], ["--no-evaluation"]])
def test_edits_that_the_model_does_not_state_are_named_and_counted(edit, desk, capsys, evaluation):
    """So low an adherence leaves edits short of their targets, and no second round is made."""
    (desk / "settings.json").write_text(json.dumps(SETTINGS | {"refine": 0, "adherence": 0.7}))
    assert edit("--no-anchors", "--out", "out", "--json", "report.json", *evaluation) == 1
    report, shown = read(desk / "report.json"), capsys.readouterr().out
    failed = [record["place"] for record in report["records"] if record["rank"] > 1]
    assert report["not_stated"] == failed
    assert 0 < len(failed) < 12
    assert report["made"] == 12
    assert f"{12 - len(failed)} of 12 are stated by the model now, {len(failed)} are not: {failed[0]}" in shown
    assert "a higher --adherence" in shown
    assert "after" in report or evaluation
    if not evaluation:
        assert report["after"]["efficacy"] == {"count": 12 - len(failed), "of": 12}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "3000"], "--tokens is how much of a text to read"),
        (["--statistics", "statistics.safetensors", "--tokens", "3000"], "--tokens is how much of a text to read"),
        (["--text", "text.txt", "--seed", "1"], "--seed is of the text that the model writes itself"),
    ],
)
def test_what_no_text_would_read_is_refused(desk, base, capsys, options, said):
    assert main(["edit", "--model", str(base), "--edits", "facts.jsonl", *options]) == 2
    assert said in capsys.readouterr().err


def test_before_and_after_are_of_the_same_edits(edit, desk, monkeypatch):
    """Of a run that ends early, what was not made counts in neither."""
    fail_at(2, RuntimeError("made to fail"), monkeypatch)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 2
    report = read(desk / "report.json")
    for kind in ("efficacy", "generalization", "specificity"):
        assert report["before"][kind]["of"] == report["after"][kind]["of"] == 4


def test_what_is_left_out_is_told_where_nothing_is_left(edit, desk, capsys):
    (desk / "bad.jsonl").write_text('{"prompt": "no place", "subject": "S", "target": "t"}\n')
    assert edit("--no-anchors", "--skip-bad", "--out", "out", facts="bad.jsonl") == 2
    told = capsys.readouterr().err
    assert "bad.jsonl:1" in told
    assert "no record is left to edit" in told


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("paraphrases", "so " * 400, "tokens with the target: the model takes"),
        ("neighborhood", "\ud83d speaks", "holds half a character"),
        ("neighborhood", " ", "expected texts that are not blank"),
    ],
)
def test_what_the_evaluation_could_not_ask_is_found_before_the_work(edit, desk, capsys, field, text, said):
    lines = records(2)
    lines[1][field] = [text]
    write_lines(desk / "odd.jsonl", lines)
    assert edit("--no-anchors", "--out", "out", facts="odd.jsonl") == 2
    told = capsys.readouterr().err
    assert "odd.jsonl:2" in told
    assert said in told
    assert edit("--no-anchors", "--skip-bad", "--out", "out", facts="odd.jsonl") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["show", "--limit", "3", "--skip-bad"], "--limit, --skip-bad: of a file of edits"),
        (
            ["show", "--edits", "facts.jsonl", "--zsre-target", "answers"],
            "--zsre-target is of zsRE, and facts.jsonl is edits",
        ),
    ],
)
def test_options_of_what_is_not_there_are_refused(desk, base, capsys, command, said):
    assert main([*command, "--model", str(base)]) == 2
    assert said in capsys.readouterr().err
