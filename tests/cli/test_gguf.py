"""Edits from a GGUF file into a GGUF file, on the command line and in Python."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

gguf = pytest.importorskip("gguf")

from rlsedit_fast import EditConfig, Editor  # noqa: E402
from rlsedit_fast.cli import main  # noqa: E402
from rlsedit_fast.errors import InputError  # noqa: E402
from rlsedit_fast.models import load_model  # noqa: E402
from rlsedit_fast.models.gguf_files import read_header  # noqa: E402

from ..gguf_models import k_quant, tiny_llama, write_model  # noqa: E402

SETTINGS = {
    "layers": [1],
    "fact_token": "last",
    "prior": {"lam": 0.001, "mu": 0},
    "contexts": {"prefixes": [""]},
    "search": {"clamp": 20.0, "steps": 40, "stop_nll": 0.05},
}
FACTS = [
    {"prompt": "{} is in", "subject": subject, "target": target}
    for subject, target in (("Ada", "x"), ("Bo", "Q"), ("Cy", "7"))
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source") / "model.gguf", tiny_llama())


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def edit(model, *options):
    fixed = ["edit", "--model", str(model), "--edits", "facts.json", "--config", "settings.json", "--no-anchors"]
    return main([*fixed, "--no-evaluation", *map(str, options)])


def test_edits_are_written_measured_and_undone(source, workdir, capsys):
    assert edit(source, "--store", "store", "--out", "edited.gguf", "--json", "report.json") == 0
    output = capsys.readouterr().out
    report = json.loads((workdir / "report.json").read_text())["gguf"]
    assert report["lost"] == []
    assert [one["id"] for one in report["edits"]] == [1, 2, 3]
    (tensor,) = report["tensors"]
    assert tensor["name"] == "blk.1.ffn_down.weight"
    assert f"  blk.1.ffn_down.weight: {tensor['type']}" in output
    assert "the written weights state 3 of 3 active edits, the model 3" in output

    model, tokenizer = load_model("edited.gguf")
    for fact in FACTS:
        ids = tokenizer(fact["prompt"].format(fact["subject"]), return_tensors="pt").input_ids
        logits = model(ids).logits[0, -1]
        assert tokenizer.decode(logits.argmax()).strip() == fact["target"]

    assert main(["undo", "--store", "store", "3", "--out", "two.gguf", "--gguf-type", "F32"]) == 0
    assert "blk.1.ffn_down.weight: F32 (before Q8_0)" in capsys.readouterr().out
    assert read_header("two.gguf").tensors["blk.1.ffn_down.weight"].type == "F32"
    assert main(["export", "--store", "store", "--out", "again.gguf", "--gguf-type", "F32"]) == 0
    assert (workdir / "again.gguf").read_bytes() == (workdir / "two.gguf").read_bytes()
    assert main(["undo", "--store", "store", "1", "2", "--out", "undone.gguf"]) == 0
    assert "no weight differs: the file is a copy of" in capsys.readouterr().out
    assert (workdir / "undone.gguf").read_bytes() == source.read_bytes()


def test_edits_that_quantization_would_lose_are_written_with_a_larger_type(workdir, capsys):
    from gguf import GGMLQuantizationType as Type

    source = write_model(workdir / "model.gguf", tiny_llama(), types={"ffn_down.weight": Type.Q4_0})
    config = EditConfig(**{**SETTINGS, "refine": 0, "prior": {"lam": 0.1, "mu": 0}})
    editor = Editor.from_pretrained(source, config=config)
    editor.edit(FACTS)
    own = editor.save_gguf("own.gguf", tensor_type="Q4_0")
    assert own.tensors[0].type == "Q4_0"
    assert own.tensors[0].error > 0.01
    auto = editor.save_gguf("auto.gguf")
    assert auto.lost == []
    assert (auto.tensors[0].type == "Q4_0") == (own.lost == [])
    assert auto.tried == ({"Q4_0": len(own.lost)} if own.lost else {})
    written, _ = load_model("auto.gguf")
    before = editor.model.model.layers[1].mlp.down_proj.weight.detach()
    error = (written.model.layers[1].mlp.down_proj.weight.detach() - before).norm()
    (change,) = editor.changes()
    assert float(error / change.delta.norm()) == pytest.approx(auto.tensors[0].error, rel=1e-4)


def test_lost_edits_are_reported(source, workdir, capsys, monkeypatch):
    from rlsedit_fast.editing.methods.exports import Exports

    ranks = Exports._ranks

    def lose(self, targets, weights):
        found = ranks(self, targets, weights)
        return [(i, 9, nll) if weights and i == 2 else (i, rank, nll) for i, rank, nll in found]

    monkeypatch.setattr(Exports, "_ranks", lose)
    assert edit(source, "--out", "own.gguf", "--gguf-type", "own") == 1
    assert "lost by quantization: edits 2" in capsys.readouterr().out
    assert edit(source, "--out", "auto.gguf") == 1
    output = capsys.readouterr().out
    assert "Q8_0 was not used: 1 edit would be lost" in output
    assert "F16 was not used" in output
    assert "blk.1.ffn_down.weight: F32 (before Q8_0)" in output


def test_types_that_cannot_be_written_are_reported_before_the_edits(workdir, capsys, monkeypatch):
    types = {"ffn_down.weight": k_quant(64, 256)}
    source = write_model(workdir / "model.gguf", tiny_llama(inner=256), types=types)
    monkeypatch.setattr(Editor, "edit", None)
    assert edit(source, "--out", "out.gguf", "--gguf-type", "own") == 2
    error = capsys.readouterr().err
    assert "cannot be written as Q4_K by the package gguf" in error
    assert "--gguf-type auto" in error
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    assert edit(source, "--out", "out.gguf") == 0
    assert "blk.1.ffn_down.weight: Q8_0 (before Q4_K)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "model.gguf", "--overwrite"], "is the file of the model"),
        (["--out", "old.gguf"], "already exists"),
        (["--out", "folder.gguf", "--overwrite"], "is a folder"),
        (["--out", "out", "--gguf-type", "F16"], "--gguf-type requires --out FILE.gguf"),
        (["--out", "facts.json/x.gguf"], "cannot be written"),
    ],
)
def test_outputs_are_checked_before_the_work(source, workdir, capsys, monkeypatch, options, message):
    (workdir / "model.gguf").symlink_to(source)
    (workdir / "old.gguf").write_text("mine")
    (workdir / "folder.gguf").mkdir()
    monkeypatch.setattr("rlsedit_fast.cli.setup.plan_editor", None)
    assert edit("model.gguf", *options) == 2
    assert message in capsys.readouterr().err
    assert (workdir / "old.gguf").read_text() == "mine"


def test_a_checkpoint_is_not_written_as_a_gguf_file(base, workdir, capsys, monkeypatch):
    monkeypatch.setattr("rlsedit_fast.cli.setup.plan_editor", None)
    assert edit(base, "--out", "out.gguf") == 2
    assert "is not one; pass --model FILE.gguf" in capsys.readouterr().err
    assert main(["apply", "--model", str(base), "--delta", "facts.json", "--out", "out.gguf"]) == 2
    assert "writes checkpoint folders" in capsys.readouterr().err


def test_the_weights_of_the_model_stay_as_they_are_if_the_measurement_fails(source, workdir, monkeypatch):
    editor = Editor.from_pretrained(source, config=EditConfig(**SETTINGS))
    editor.edit(FACTS)
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}
    calls = []

    def fail(_requests):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return type(editor._session.measurement).ranks(editor._session.measurement, _requests)

    monkeypatch.setattr(editor._session.measurement, "ranks", fail, raising=False)
    with pytest.raises(KeyboardInterrupt):
        editor.save_gguf("out.gguf")
    assert all(torch.equal(value, before[name]) for name, value in editor.model.state_dict().items())
    assert not (workdir / "out.gguf").exists()
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    editor.undo([1])
    assert editor.save_gguf("out.gguf").edits[0].id == 2


def test_the_source_can_be_named_and_has_to_be_the_file_of_the_model(source, workdir):
    model, tokenizer = load_model(source)
    model.config._name_or_path = ""
    editor = Editor(model, tokenizer, config=EditConfig(**SETTINGS))
    with pytest.raises(InputError, match="no GGUF file"):
        editor.check_gguf()
    with pytest.raises(InputError, match="expected one of auto, own"):
        editor.check_gguf(source, tensor_type="Q4_K")
    assert editor.check_gguf(source).architecture == "llama"
    other = write_model(workdir / "other.gguf", tiny_llama(seed=9))
    with pytest.raises(InputError, match="differs from the weight"):
        editor.check_gguf(other)


def test_quiet_hides_the_bars(source, workdir):
    command = [sys.executable, "-m", "rlsedit_fast", "ask", "--model", str(source), "house", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_checkpoint_can_be_written_from_a_gguf_file(source, workdir):
    assert edit(source, "--out", "folder") == 0
    model, _ = load_model("folder")
    base, _ = load_model(source)
    differing = [n for n, v in model.state_dict().items() if not torch.equal(v, base.state_dict()[n])]
    assert differing == ["model.layers.1.mlp.down_proj.weight"]
    assert "model&#46;gguf" in (workdir / "folder" / "README.md").read_text()
