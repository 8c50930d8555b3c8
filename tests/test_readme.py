"""The commands and Python examples of README and docs run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def block(heading: str, language: str = "python", file: str = "README.md") -> str:
    """Returns the first block of a language below a heading."""
    _, _, rest = (ROOT / file).read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    found = re.search(rf"```{language}\n(.*?)```", rest, re.DOTALL)
    assert found, heading
    return found.group(1)


@pytest.fixture
def workdir(tokenizer, tmp_path, monkeypatch):
    """Working directory with a checkpoint, a text file and its own cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=9,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text("Lado speaks Kubeish .\n\nVeta plays the organ .\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_commands(workdir, capsys):
    from rlsedit_fast.cli import main

    (workdir / "facts.jsonl").write_text(block("Edit your own model", "json"))
    lines = [line.partition("#")[0] for line in block("Edit your own model", "bash").splitlines()]
    commands = [shlex.split(line.replace("path/to/checkpoint", "checkpoint")) for line in lines]
    assert [command[:2] for command in commands] == [["rlsedit", name] for name in ("show", "statistics", "edit")]
    *before, (_, *edit) = commands
    assert [main(arguments) for _, *arguments in before] == [0, 0]
    code, report = main(edit), json.loads((workdir / "report.json").read_text())
    assert code == bool(report["not_stated"]), "an untrained model may not state the targets"
    assert report["made"] == 2
    assert "text.txt" in report["anchors"]
    assert (workdir / "edited" / "model.safetensors").exists()
    assert "2 of 2 edits applied" in capsys.readouterr().out


def test_editor_example(workdir, capsys):
    code = block("Edit from Python").replace("path/to/checkpoint", "checkpoint")
    names: dict = {}
    exec(code, names)
    assert [record.state for record in names["editor"].history()] == ["replaced", "undone", "active"]
    assert "1 France" in capsys.readouterr().out
    for path in ("out/model.safetensors", "edits.safetensors", "adapter/adapter_model.safetensors"):
        assert (workdir / path).exists()


def test_store_commands(workdir, capsys):
    from rlsedit_fast.cli import main

    (workdir / "facts.jsonl").write_text(block("Edit your own model", "json"))
    lines = [line.partition("#")[0] for line in block("Commands and Python", "bash", "docs/store.md").splitlines()]
    commands = [shlex.split(line.replace("path/to/checkpoint", "checkpoint")) for line in lines]
    assert {tuple(shlex.split(line.partition("#")[0])) for line in block("Edits that last", "bash").splitlines()} <= {
        tuple(shlex.split(line)) for line in lines
    }, "README has some of these commands"
    (workdir / "new.jsonl").write_text('{"prompt": "{} plays the", "subject": "John Coltrane", "target": "flute"}\n')
    (workdir / "gates.yaml").write_text("retention: 0\n")
    names = ["edit", "history", "ask", "undo", "replace", "check", "report", "status", "show", "consolidate", "export"]
    assert [command[:2] for command in commands] == [["rlsedit", name] for name in names]
    for _, name, *arguments in commands:
        # An untrained model may not state the targets; then `edit` returns 1.
        assert main([name, *arguments]) in ((0, 1) if name == "edit" else (0,))
    assert (workdir / "edited-2" / "model.safetensors").exists()
    assert "<title>Change report: checkpoint</title>" in (workdir / "report.html").read_text(encoding="utf-8")
    names = {}
    exec(block("Commands and Python", file="docs/store.md").replace("path/to/checkpoint", "checkpoint"), names)
    assert "3 France Nice active\n4 Spain Bilbao undone" in capsys.readouterr().out
    assert [record.state for record in names["editor"].history()] == ["replaced", "undone", "active", "undone"]


def test_gate_file_and_example_of_the_release_page(workdir, capsys):
    import rlsedit_fast as rf
    from rlsedit_fast.world import load_demo_model

    (workdir / "gates.yaml").write_text(block("Gates", "yaml", "docs/release.md"))
    (workdir / "protected.txt").write_text("Lado speaks\n")
    (workdir / "held-out.txt").write_text("Lado speaks Kubeish .\n")
    model, tokenizer = load_demo_model()
    tokenizer.chat_template = "{{ messages[0].content }}"
    config = rf.EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
    names = {"editor": rf.Editor(model, tokenizer, config=config)}
    names["edits"] = [rf.Edit("{} speaks", "Toze Lado Rekuno", "Nafiish")]
    exec(block("While editing", file="docs/release.md"), names)
    shown = capsys.readouterr().out
    assert "answers The capital of France is" in shown, "this model knows no countries"
    assert "violated" in shown.splitlines()[-1]


def test_solver_example():
    import rlsedit_fast as rf

    torch.manual_seed(0)
    weight, K0 = torch.randn(6, 20), torch.randn(50, 20)
    keys, values, new_values = torch.randn(3, 20), torch.randn(3, 6), torch.randn(3, 6)
    names = {
        "rf": rf,
        "torch": torch,
        "weight": weight,
        "K0": K0,
        "keys": keys,
        "values": values,
        "new_values": new_values,
    }
    names |= {"all_keys": keys, "all_values": new_values}
    exec(block("The solver alone", file="docs/python.md"), names)
    once = rf.RLSState(weight, names["state"].prior)
    once.update(keys, new_values)
    torch.testing.assert_close(names["state"].weight, once.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_relative_links_resolve(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (ROOT / file).parent.joinpath(target).exists(), target
