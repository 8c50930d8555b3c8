"""Commands of the command line on a local checkpoint and files."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from rlsedit_fast.cli import main, setup
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.statistics import collection
from rlsedit_fast.world import RELATIONS, World, load_demo_model
from rlsedit_fast.world.tokens import save_tokenizer

PEOPLE = World.generate().people
SETTINGS = {
    "contexts": {"prefixes": [""]},
    "search": {"kl_prompts": ["{} is a"], "steps": 40, "stop_nll": 0.03},
    "prior": {"adherence": 0.95},
}


def records(count):
    """Returns records of a JSON Lines file of counterfactual edits."""
    made = []
    for i, person in enumerate(PEOPLE[:count]):
        relation = RELATIONS[i % len(RELATIONS)]
        target = next(value for value in relation.values if value != person.facts[relation.name])
        made.append(
            {
                "name": f"fact {i}",
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
def workdir(base, tmp_path, monkeypatch):
    """Working directory with edits, settings, text and its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "facts.jsonl", records(12))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    sentences = [r.phrasings[0].format(p.name) + f" {p.facts[r.name]} ." for p in PEOPLE[200:300] for r in RELATIONS]
    (tmp_path / "text.txt").write_text("\n\n".join(sentences))
    return tmp_path


@pytest.fixture
def edit(base):
    """Runs `rlsedit edit` with the settings of `workdir`."""

    def run(*options, facts="facts.jsonl"):
        fixed = ["edit", "--model", str(base), "--edits", facts, "--config", "settings.json", "--layers", "0"]
        return main([*fixed, *map(str, options)])

    return run


def read(path):
    return json.loads(path.read_text())


def test_edit_writes_every_export_and_reports_the_edits(edit, base, workdir, capsys):
    assert main(["statistics", "--model", str(base), "--layers", "0", "--text", "text.txt", "--tokens", "3000"]) == 0
    outputs = ["--out", "out", "--delta", "edits.delta", "--adapter", "adapter"]
    assert edit("--batch-size", "4", *outputs, "--json", "report.json") == 0
    report = read(workdir / "report.json")
    assert report["made"] == 12
    assert report["anchors"].startswith("2703 tokens and 297 held out: text.txt")
    assert report["after"]["efficacy"] == {"count": 12, "of": 12}
    assert report["before"]["efficacy"]["count"] == 0
    assert report["after"]["generalization"]["of"] == 12
    assert report["after"]["specificity"]["count"] >= 10
    assert [r["name"] for r in report["records"]] == [f"fact {i}" for i in range(12)]
    assert report["records"][3]["place"] == "facts.jsonl:4"
    assert report["left_out"] == report["not_made"] == report["not_stated"] == report["not_converged"] == []
    assert "12 of 12 edits applied" in capsys.readouterr().out

    assert main(["apply", "--model", str(base), "--delta", "edits.delta", "--out", "applied"]) == 0
    first, second = (load_file(workdir / name / "model.safetensors") for name in ("out", "applied"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    exported = ["export", "--model", str(base), "--edited", "out", "--delta", "again.delta", "--adapter", "thin"]
    assert main([*exported, "--rank", "3"]) == 0
    (workdir / "applied" / "notes.txt").write_text("kept")
    (workdir / "applied" / "model-00001-of-00002.safetensors").write_text("old")
    apply = ["apply", "--model", str(base), "--delta", "again.delta", "--out", "applied"]
    assert main(apply) == 2
    assert main([*apply, "--overwrite"]) == 0
    names = {path.name for path in (workdir / "applied").iterdir()}
    assert {"notes.txt", "model.safetensors"} <= names
    assert not any(name.startswith("model-0") for name in names)
    assert not list(workdir.glob(".*.tmp"))
    assert load_file(workdir / "again.delta").keys() == load_file(workdir / "edits.delta").keys()
    assert "rank 3 of 12, relative error 0." in capsys.readouterr().out


def test_adapter_matches_the_checkpoint(edit, base, workdir):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    assert edit("--no-anchors", "--out", "out", "--adapter", "adapter", "--no-evaluation") == 0
    ids = torch.randint(4, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    edited = AutoModelForCausalLM.from_pretrained(workdir / "out").eval()
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), workdir / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, edited(ids).logits, rtol=0, atol=1e-4)


def test_dry_run_modifies_nothing_and_reports_memory(edit, workdir, capsys):
    before = sorted(path.name for path in workdir.iterdir())
    assert edit("--dry-run", "--json") == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["edits"] == 12
    assert report["layers"][0]["shape"] == [128, 1536]
    assert "host memory" in output.err
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_bad_records_stop_the_run_or_are_skipped_and_reported(edit, workdir, capsys):
    lines = records(6)
    lines[1]["prompt"] = "He lives in"  # does not contain the subject
    del lines[2]["target"]
    lines.append(records(1)[0] | {"target": "Kubeish"})
    write_lines(workdir / "bad.jsonl", lines)
    assert edit("--out", "out", facts="bad.jsonl") == 2
    assert "bad.jsonl:3: target" in capsys.readouterr().err
    assert not (workdir / "out").exists()

    assert edit("--no-anchors", "--out", "out", "--skip-bad", "--json", "report.json", facts="bad.jsonl") == 1
    report = read(workdir / "report.json")
    assert sorted(entry["place"] for entry in report["left_out"]) == ["bad.jsonl:2", "bad.jsonl:3"]
    assert report["conflicts"]["contradictions"], "the first and the last record have the same prompt"
    made = {record["place"] for record in report["records"]}
    assert made == {"bad.jsonl:4", "bad.jsonl:5", "bad.jsonl:6", "bad.jsonl:7"}
    assert report["made"] + len(report["left_out"]) + len(report["conflicts"]["contradictions"]) == len(lines)
    stderr = capsys.readouterr().err
    assert "2 records skipped" in stderr or stderr.count("1 record skipped") == 2


@pytest.mark.parametrize("ahead", [[], ["--search-ahead", "12"]])
def test_ctrl_c_finishes_the_batch_and_keeps_applied_edits(edit, workdir, monkeypatch, capsys, ahead):
    from rlsedit_fast.editing.layers import EditedLayers

    real, calls = EditedLayers.write, []

    def pressed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(EditedLayers, "write", pressed)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json", *ahead) == 130
    report = read(workdir / "report.json")
    assert report["made"] == 8
    assert report["not_made"] == [f"facts.jsonl:{line}" for line in range(9, 13)]
    assert report["after"]["efficacy"] == {"count": 8, "of": 8}
    assert (workdir / "out" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "finishing the current batch" in capsys.readouterr().err


def test_second_ctrl_c_discards_the_current_batch(edit, workdir, monkeypatch):

    real, calls = value_search.search_within_memory, []

    def pressed(*args):
        calls.append(1)
        found = real(*args)
        if len(calls) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(value_search, "search_within_memory", pressed)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 130
    report = read(workdir / "report.json")
    assert report["made"] == 4
    assert report["after"]["efficacy"] == {"count": 4, "of": 4}


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_during_evaluation_keeps_applied_edits(edit, workdir, monkeypatch, capsys, presses):
    from rlsedit_fast.editing import Editor
    from rlsedit_fast.evaluation import outcome

    real_outcome, real_save, calls = outcome.compute_outcome, Editor.save_pretrained, []

    def interrupted_outcome(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real_outcome(*args, **kwargs)

    def pressed_saving(*args, **options):
        for _ in range(presses - 1):
            os.kill(os.getpid(), signal.SIGINT)
        return real_save(*args, **options)

    monkeypatch.setattr(outcome, "compute_outcome", interrupted_outcome)
    monkeypatch.setattr(Editor, "save_pretrained", pressed_saving)
    assert edit("--no-anchors", "--limit", "4", "--out", "out", "--delta", "delta", "--json", "report.json") == 130
    report = read(workdir / "report.json")
    assert report["made"] == 4
    assert "after" not in report
    assert report["files"] == ["checkpoint: out", "delta: delta"]
    assert (workdir / "delta").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "skipping the evaluation" in capsys.readouterr().err


def test_repeated_ctrl_c_keeps_applied_edits(edit, workdir, monkeypatch):
    from rlsedit_fast.editing import Editor

    real, real_save, calls = value_search.search_within_memory, Editor.save_pretrained, []

    def pressed(*args):
        calls.append(1)
        found = real(*args)
        if len(calls) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return found

    def pressed_saving(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return real_save(*args, **options)

    monkeypatch.setattr(value_search, "search_within_memory", pressed)
    monkeypatch.setattr(Editor, "save_pretrained", pressed_saving)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 130
    assert read(workdir / "report.json")["files"] == ["checkpoint: out"]
    assert (workdir / "out" / "tokenizer.json").exists()


def fail_at(batch, error, monkeypatch):
    """Makes the value search of the given batch raise `error`."""

    real, calls = value_search.search_within_memory, []

    def fails(*args):
        calls.append(1)
        if len(calls) == batch:
            raise error
        return real(*args)

    monkeypatch.setattr(value_search, "search_within_memory", fails)


def test_failing_batch_keeps_earlier_batches_and_is_reported(edit, workdir, monkeypatch, capsys):
    from rlsedit_fast.errors import UpdateError

    fail_at(3, UpdateError("made to fail"), monkeypatch)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 2
    assert read(workdir / "report.json")["made"] == 8
    assert "made to fail" in capsys.readouterr().err


def test_failing_export_does_not_prevent_others(edit, workdir, monkeypatch, capsys):
    from rlsedit_fast.editing import Editor

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Editor, "save_pretrained", full)
    outputs = ["--out", "out", "--delta", "edits.delta", "--store", "edits"]
    assert edit("--no-anchors", "--limit", "4", *outputs, "--json", "report.json") == 2
    output = capsys.readouterr()
    assert "4 of 4 edits applied" in output.out
    assert "--out out: not written or incomplete: unexpected OSError: [Errno 28] No space left on device" in output.err
    assert "`rlsedit export --store edits`" in output.err
    report = read(workdir / "report.json")
    assert (report["made"], report["files"]) == (4, ["delta: edits.delta"])
    assert "No space left" in report["not_written"][0]
    assert (workdir / "edits.delta").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_unwritable_report_keeps_summary_and_exports(edit, workdir, capsys):
    assert edit("--no-anchors", "--limit", "4", "--out", "out", "--json", "/dev/full") == 2
    output = capsys.readouterr()
    assert "4 of 4 edits applied" in output.out
    assert "--json /dev/full: cannot write the file (No space left on device)" in output.err
    assert (workdir / "out" / "model.safetensors").exists()


def test_demo_checks_for_matplotlib_first(workdir, monkeypatch, capsys):
    monkeypatch.setattr("rlsedit_fast.cli.demo.find_spec", lambda _name: None)
    assert main(["demo", "--out", "demo"]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not (workdir / "demo").exists()


def test_unexpected_error_keeps_earlier_batches(edit, workdir, monkeypatch, capsys):
    fail_at(2, RuntimeError("made to fail"), monkeypatch)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 2
    assert read(workdir / "report.json")["made"] == 4
    assert (workdir / "out" / "model.safetensors").exists()
    assert "rlsedit edit: error: unexpected RuntimeError: made to fail" in capsys.readouterr().err


def test_commands_check_output_paths_first(base, workdir, capsys):
    (workdir / "file").write_text("")
    facts = ["--model", str(base), "--edits", "facts.jsonl", "--json", "facts.jsonl"]
    before = (workdir / "facts.jsonl").read_bytes()
    for name in ("show", "calibrate", "edit"):
        assert main([name, *facts, *["--dry-run"] * (name == "edit")]) == 2
        assert "--json facts.jsonl is also the input file --edits" in capsys.readouterr().err
    assert main(["apply", "--model", str(base), "--delta", "file", "--out", "out", "--json", "file"]) == 2
    assert "--json file is also the input file --delta" in capsys.readouterr().err
    assert (workdir / "facts.jsonl").read_bytes() == before
    for command in (
        ["apply", "--model", str(base), "--delta", "file", "--out", "file/out"],
        ["demo", "--out", "file/out"],
        ["evaluate", "--out", "file/out"],
        ["export", "--model", str(base), "--edited", str(base), "--delta", "file/delta"],
    ):
        assert main(command) == 2
        assert "cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no output given"),
        (("--out", "facts.jsonl"), "already exists"),
        (("--out", "BASE"), "is the folder of the model"),
        (("--out", "BASE", "--overwrite"), "is the folder of the model"),
        (("--out", "facts.jsonl", "--overwrite"), "--out facts.jsonl is a file; choose another path"),
        (("--out", "out", "--rank", "4"), "--rank requires --adapter"),
        (("--out", "out", "--again"), "--again requires --store"),
        (("--out", "/proc/out"), "--out /proc/out: cannot be written"),
        (("--out", "facts.jsonl/out"), "cannot be written (Not a directory)"),
        (
            ("--delta", "new/edits.delta", "--json", "text.txt/new/report.json"),
            "--json text.txt/new/report.json: cannot",
        ),
        (("--adapter", "a" * 300), "cannot be written (File name too long)"),
        (("--out", "out", "--json", "BASE"), "it is a folder"),
        (("--out", "out", "--delta", "new/../out"), "are the same path"),
        (("--out", "out", "--store", "out"), "are the same path"),
        (("--delta", "new", "--out", "new/out"), "lies below --delta new, which is a file"),
        (("--out", "out", "--json", "settings.json"), "is also the input file --config"),
        (("--out", "out", "--layers", "x"), "expected layer indices"),
        (("--out", "out", "--layers", "9"), "--layers 9: layers [9] do not exist; the model has layers 0 to 3"),
        (("--out", "out", "--adherence", "2"), "--adherence 2: expected a number above 0 and below 1"),
        (("--out", "out", "--layers", "1,1"), "--layers 1,1: expected at least one layer index, each given once"),
        (
            ("--out", "out", "--statistics", "none.safetensors"),
            "--statistics none.safetensors: the file does not exist",
        ),
        (("--out", "out", "--statistics", "text.txt"), "is damaged, or not a file of kind"),
        (("--out", "out", "--text", "tex.txt"), "did you mean text.txt?"),
        (("--out", "out", "--text", "taken/file"), "contains no text"),
        (("--out", "out", "--text", "."), "--text .: this is a folder; pass a file"),
        (("--out", "out", "--no-anchors", "--mu", "2"), "--mu 2 is the weight of the anchors, and --no-anchors"),
        (("--out", "out", "--device", "cuda:99"), "device 'cuda:99'"),
        (("--store", "taken"), "contains file and is not a store"),
        (("--out", "out", "--protect", "none.txt"), "--protect none.txt: the file does not exist"),
        (("--out", "out", "--config", "text.txt"), "cannot be read as JSON"),
        (("--out", "out", "--config", "other.json"), "unknown setting 'laters'"),
    ],
)
def test_invalid_options_are_rejected_before_any_work(edit, base, workdir, capsys, monkeypatch, options, message):
    (workdir / "other.json").write_text('{"laters": [1]}')
    (workdir / "taken").mkdir()
    (workdir / "taken" / "file").write_text("")
    monkeypatch.setattr(setup, "load_model", None)  # nothing is loaded
    before = sorted(path.name for path in workdir.rglob("*"))
    assert edit(*(str(base) if option == "BASE" else option for option in options)) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in workdir.rglob("*")) == before


def test_options_override_settings_that_the_file_names_as_peft_and_memit_do(workdir):
    settings = {"layers_to_transform": [1], "mom2_update_weight": 16, "v_num_grad_steps": 7}
    (workdir / "memit.json").write_text(json.dumps(settings))
    parser = argparse.ArgumentParser()
    setup.add_settings(parser)
    config = setup.make_config(parser.parse_args(["--config", "memit.json", "--layers", "0", "--mu", "3"]))
    assert (config.layers, config.prior.mu, config.search.steps) == ((0,), 3.0, 7)


def test_missing_model_is_reported(workdir, capsys):
    assert main(["show", "--model", "nowhere/at/all"]) == 2
    assert "model 'nowhere/at/all': the folder does not exist" in capsys.readouterr().err


def test_show_marks_the_token_and_lists_the_layers(base, workdir, capsys):
    one = ["--prompt", "{} lives in", "--subject", "Toze Lado Rekuno", "--target", "Port Alder"]
    assert main(["show", "--model", str(base), *one]) == 0
    stdout = capsys.readouterr().out
    assert "Toze Lado [Rekuno] lives in" in stdout
    assert "model.layers.0.mlp.down_proj" in stdout
    assert main(["show", "--model", str(base), "--edits", "facts.jsonl", "--limit", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["edits"]) == 3
    assert report["edits"][0]["tokens"][report["edits"][0]["lookup"]] == PEOPLE[0].name.split()[-1]
    assert main(["show", "--model", str(base), *one[:2]]) == 2


@pytest.mark.parametrize("content", ["csv", "jsonl"])
def test_edits_are_read_from_stdin(base, workdir, capsys, monkeypatch, content):
    lines = records(2)
    lines[1]["target"] += " "
    if content == "csv":
        columns = ("prompt", "subject", "target")
        text = "\n".join(",".join(row) for row in (columns, *([line[name] for name in columns] for line in lines)))
    else:
        text = "\n".join(map(json.dumps, lines))
    stdin = io.BytesIO(text.encode())
    stdin.name = "<stdin>"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
    assert main(["show", "--model", str(base), "--edits", "-", "--json", "report.json"]) == 0
    assert [edit["subject"] for edit in read(workdir / "report.json")["edits"]] == [PEOPLE[0].name, PEOPLE[1].name]
    stderr = capsys.readouterr().err
    assert "<stdin>: 2 edits, format edits" in stderr
    assert "white space around the prompt, subject or target of 1 edits is ignored" in stderr
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"prompt,subject,target\n{} is,x\n")))
    assert main(["show", "--model", str(base), "--edits", "-"]) == 2
    assert ":2: target: missing" in capsys.readouterr().err


def test_a_single_edit_is_given_by_options(base, workdir, capsys):
    command = ["edit", "--model", str(base), "--config", "settings.json", "--layers", "0", "--no-anchors"]
    one = ["--prompt", "{} lives in", "--subject", PEOPLE[0].name, "--target", " Port Alder", "--name", "home"]
    assert main([*command, *one, "--delta", "edit.delta", "--json", "report.json"]) == 0
    (record,) = read(workdir / "report.json")["records"]
    assert (record["name"], record["target"], record["place"]) == ("home", "Port Alder", "command line")
    assert "of 1 edits is ignored" in capsys.readouterr().err


def test_a_single_edit_needs_no_subject(base, workdir, capsys):
    command = ["edit", "--model", str(base), "--config", "settings.json", "--layers", "0", "--no-anchors"]
    one = ["--prompt", f"{PEOPLE[0].name} lives in", "--target", "Port Alder", "--join", "space"]
    assert main([*command, *one, "--delta", "edit.delta", "--json", "report.json"]) == 0
    (record,) = read(workdir / "report.json")["records"]
    assert (record["subject"], record["join"], record["stated"]) == ("", "space", True)
    assert "1 edit without a subject: edited at the last token of the prompt" in capsys.readouterr().err


def test_statistics_are_resumed_and_cached_per_model(base, workdir, capsys, monkeypatch):

    command = ["statistics", "--model", str(base), "--layers", "0,1", "--text", "text.txt", "--tokens", "3000"]
    assert main([*command, "--json", "whole.json", "--out", "whole.safetensors"]) == 0
    real, calls = collection._add, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(collection, "_PASS", 512)
    assert main([*command, "--out", "small.safetensors"]) == 0
    monkeypatch.setattr(collection, "_add", interrupted)
    assert main([*command, "--json", "cached.json"]) == 130
    assert list((workdir / "cache").glob("*.part"))
    capsys.readouterr()
    assert main([*command, "--json", "cached.json"]) == 0
    assert "resuming from" in capsys.readouterr().err
    assert not list((workdir / "cache").glob("*.part"))
    cached = load_file(read(workdir / "cached.json")["file"])
    small = load_file(workdir / "small.safetensors")
    assert all(torch.equal(value, small[name]) for name, value in cached.items())
    assert read(workdir / "whole.json")["tokens"] == 2703

    # The cache is not used for another model in a folder of the same name.
    other = workdir / base.name
    model, tokenizer = load_demo_model()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(other)
    save_tokenizer(tokenizer, other)
    table = ["calibrate", "--edits", "facts.jsonl", "--layers", "0", "--json"]
    assert main([*table, "--model", str(base)]) == 0
    assert json.loads(capsys.readouterr().out)["anchors"].startswith("27")
    assert main([*table, "--model", str(other)]) == 0
    assert json.loads(capsys.readouterr().out)["anchors"] == "none"


def test_statistics_overwrite_only_statistics(base, workdir, capsys):
    command = ["statistics", "--model", str(base), "--layers", "0", "--text", "text.txt", "--tokens", "600", "--out"]
    before = {name: (workdir / name).read_bytes() for name in ("facts.jsonl", "text.txt")}
    for out, message in (
        ("text.txt", "--out text.txt is also the input file --text"),
        ("facts.jsonl", "already exists and is not a key statistics file"),
        (str(base / "model.safetensors"), "already exists and is not a key statistics file"),
        ("text.txt/new", "cannot be written"),
        ("cache.json", "are the same path"),
    ):
        assert main([*command, out, "--json", "cache.json"]) == 2
        assert message in capsys.readouterr().err
    assert {name: (workdir / name).read_bytes() for name in before} == before
    assert main([*command, "new.safetensors"]) == 0
    first = load_file(workdir / "new.safetensors")
    assert main([*command, "new.safetensors", "--tokens", "900"]) == 2
    assert "already exists; choose another path or pass --overwrite" in capsys.readouterr().err
    assert main([*command, "new.safetensors", "--tokens", "900", "--overwrite"]) == 0
    assert not torch.equal(first["0"], load_file(workdir / "new.safetensors")["0"])


def test_calibrate_compares_adherences(base, workdir, capsys):
    command = ["calibrate", "--model", str(base), "--edits", "facts.jsonl", "--layers", "0", "--text", "text.txt"]
    assert main([*command, "--tokens", "2000", "--adherences", "0.8", "0.95", "--json"]) == 0
    low, high = json.loads(capsys.readouterr().out)["rows"]
    assert [round(row["realized"], 3) for row in (low, high)] == [0.8, 0.95]
    assert low["mu"][0] > high["mu"][0]
    assert low["leakage"][0] < high["leakage"][0]


def test_calibrate_forecasts_planned_edits(base, workdir, capsys):
    command = ["calibrate", "--model", str(base), "--layers", "0", "--text", "text.txt", "--tokens", "2000"]
    command += ["--adherences", "0.9", "--pilot", "5", "--count", "40"]
    assert main([*command, "--edits", "facts.jsonl", "--plot", "plot.svg", "--json", "forecast.json"]) == 0
    out = capsys.readouterr().out
    assert "proposal: " in out
    assert "extrapolated" in out
    assert "plot: plot.svg" in out
    assert (workdir / "plot.svg").read_text().lstrip().startswith("<?xml")
    forecast = read(workdir / "forecast.json")["forecast"]
    assert forecast["settings"][0]["points"][-1]["edits"] == 40
    assert forecast["settings"][0]["points"][-1]["layers"][0]["held_out"] > 0
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forecast"]["keys"] == 40, "subjects are drawn from the text"
    assert main([*command, "--edits", "facts.jsonl", "--plot", "plot.pdf"]) == 2
    assert "expected a file name that ends with .png or .svg" in capsys.readouterr().err
    assert main(["calibrate", "--model", str(base), "--count", "5"]) == 2
    assert "pass --edits FILE, or --text FILE and --count N" in capsys.readouterr().err
    assert main([*command, "--held-out", "1"]) == 2
    assert "--held-out 1: expected a fraction" in capsys.readouterr().err


def test_self_generated_text_as_anchors(edit, workdir):
    options = ["--self-generate", "--tokens", "600", "--out", "out", "--json", "report.json", "--limit", "4"]
    assert edit(*options) == 0
    assert "self-generated, seed 0" in read(workdir / "report.json")["anchors"]


def test_prompts_are_protected(edit, workdir, capsys):
    (workdir / "protect.txt").write_text(f"{PEOPLE[150].name} lives in\n\n{PEOPLE[151].name} works as a\n")
    assert edit("--no-anchors", "--protect", "protect.txt", "--out", "out", "--limit", "4") == 0
    assert "tokens of 2 prompts" in capsys.readouterr().err


def test_preset_is_selected_by_architecture_by_name_or_not(base, workdir, capsys, monkeypatch):
    from rlsedit_fast.editing import presets

    def layers(*options):
        assert main(["show", "--model", str(base), "--json", *options]) == 0
        report = json.loads(capsys.readouterr().out)
        return report["preset"], [layer["layer"] for layer in report["layers"]]

    assert layers() == (None, [0, 1])
    shape = {"model_type": "llama", "blocks": 4, "hidden_size": 128, "intermediate_size": 1536}
    known = presets.Preset(
        name="shipped",
        layers=(2, 3),
        learning_rate=0.1,
        steps=5,
        moment_weight=100.0,
        **shape,
    )
    monkeypatch.setitem(presets.PRESETS, "shipped", known)
    assert layers() == ("shipped", [2, 3])
    assert layers("--preset", "generic") == ("shipped", [0, 1])
    assert layers("--layers", "1-2") == ("shipped", [1, 2])
    assert main(["show", "--model", str(base), "--preset", "gpt2-xl"]) == 2
    stderr = capsys.readouterr().err
    assert "--preset gpt2-xl is for gpt2 models with 48 layers of width 1600" in stderr
    assert "omit --preset to use layers 0 to 3 by depth" in stderr
    assert main(["show", "--model", str(base), "--preset", "gpt2-xl", "--layers", "1"]) == 0
    assert "warning: --preset gpt2-xl is for gpt2 models" in capsys.readouterr().err

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
    assert "increase lam above 0" in capsys.readouterr().err, (
        "the published settings have lam = 0 and there are too few anchors"
    )
    assert main([*edit, "--lam", "0.1", "--json", "report.json"]) == 1, (
        "the published search does not converge for these edits"
    )
    config = read(workdir / "report.json")["config"]
    assert (config["prior"]["mu"], config["search"]["optimizer"], config["contexts"]["rows"]) == (10.0, "adam", "mean")


def test_skipped_edits_are_counted_and_listed(edit, workdir, capsys):
    lines = records(4)
    lines[2]["target"] = "<pad> <pad> <pad>"
    write_lines(workdir / "hard.jsonl", lines)
    (workdir / "settings.json").write_text(json.dumps(SETTINGS | {"unconverged": "skip"}))
    assert edit("--no-anchors", "--out", "out", "--json", "report.json", facts="hard.jsonl") == 1
    report = read(workdir / "report.json")
    assert report["made"] == 3
    assert report["skipped"] == ["hard.jsonl:3"]
    assert report["after"]["efficacy"] == {"count": 3, "of": 3}
    assert [record["state"] for record in report["records"]] == ["active", "active", "skipped", "active"]
    assert "1 skipped, because" in capsys.readouterr().out


@pytest.mark.parametrize("evaluation", [[], ["--no-evaluation"]])
def test_edits_not_stated_by_the_model_are_listed(edit, workdir, capsys, evaluation):
    """A low adherence without refinement leaves some targets unstated."""
    (workdir / "settings.json").write_text(json.dumps(SETTINGS | {"refine": 0, "prior": {"adherence": 0.7}}))
    assert edit("--no-anchors", "--out", "out", "--json", "report.json", *evaluation) == 1
    report, shown = read(workdir / "report.json"), capsys.readouterr().out
    failed = [record["place"] for record in report["records"] if record["rank"] > 1]
    assert report["not_stated"] == failed
    assert 0 < len(failed) < 12
    assert report["made"] == 12
    assert f"the model states {12 - len(failed)} targets, {len(failed)} not: {failed[0]}" in shown
    assert "raise --adherence" in shown
    assert "after" in report or evaluation
    if not evaluation:
        assert report["after"]["efficacy"] == {"count": 12 - len(failed), "of": 12}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "3000"], "--tokens requires --text FILE or --self-generate"),
        (
            ["--statistics", "statistics.safetensors", "--tokens", "3000"],
            "--tokens requires --text FILE or --self-generate",
        ),
        (["--text", "text.txt", "--seed", "1"], "--seed requires --self-generate"),
    ],
)
def test_text_options_without_text_are_rejected(workdir, base, capsys, options, message):
    (workdir / "statistics.safetensors").write_text("")
    assert main(["edit", "--model", str(base), "--edits", "facts.jsonl", *options]) == 2
    assert message in capsys.readouterr().err


def test_before_and_after_cover_the_same_edits(edit, workdir, monkeypatch):
    """After a failure, edits that were not applied count in neither."""
    fail_at(2, RuntimeError("made to fail"), monkeypatch)
    assert edit("--no-anchors", "--batch-size", "4", "--out", "out", "--json", "report.json") == 2
    report = read(workdir / "report.json")
    for kind in ("efficacy", "generalization", "specificity"):
        assert report["before"][kind]["of"] == report["after"][kind]["of"] == 4


def test_skipped_records_are_reported_if_none_is_left(edit, workdir, capsys):
    (workdir / "bad.jsonl").write_text('{"prompt": "no place", "subject": "S", "target": "t"}\n')
    assert edit("--no-anchors", "--skip-bad", "--out", "out", facts="bad.jsonl") == 2
    stderr = capsys.readouterr().err
    assert "bad.jsonl:1" in stderr
    assert "no valid record is left" in stderr


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("paraphrases", "so " * 400, "tokens with the target, and the model supports"),
        ("neighborhood", "\ud83d speaks", "contains half a character"),
        ("neighborhood", " ", "expected non-blank strings"),
    ],
)
def test_invalid_evaluation_prompts_are_found_before_any_work(edit, workdir, capsys, monkeypatch, field, text, message):
    lines = records(2)
    lines[1][field] = [text]
    write_lines(workdir / "odd.jsonl", lines)
    with monkeypatch.context() as patched:
        patched.setattr(setup, "load_model", None)  # the weights are not loaded
        assert edit("--no-anchors", "--out", "out", facts="odd.jsonl") == 2
    stderr = capsys.readouterr().err
    assert "odd.jsonl:2" in stderr
    assert message in stderr
    assert edit("--no-anchors", "--skip-bad", "--out", "out", facts="odd.jsonl") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["show", "--limit", "3", "--skip-bad"], "--limit, --skip-bad requires --edits FILE"),
        (
            ["show", "--edits", "facts.jsonl", "--zsre-target", "answers"],
            "--zsre-target applies to zsRE files only, and facts.jsonl has the format edits",
        ),
    ],
)
def test_file_options_without_a_file_are_rejected(workdir, base, capsys, command, message):
    assert main([*command, "--model", str(base)]) == 2
    assert message in capsys.readouterr().err
