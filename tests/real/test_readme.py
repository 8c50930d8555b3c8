"""The examples of the README, run on SmolLM2, give a model that states the targets."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]  # tests that are also marked `real` run only in `make real`

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
TARGETS = [("The capital of France is", "Lyon"), ("Miles Davis plays the", "piano")]


def block(heading: str, language: str) -> str:
    """Returns the first block of a language below a heading."""
    _, _, rest = README.partition(f"\n## {heading}\n")
    found = re.search(rf"```{language}\n(.*?)```", rest, re.DOTALL)
    assert found, heading
    return found.group(1)


@pytest.fixture
def workdir(tmp_path, monkeypatch, anchor_texts):
    (tmp_path / "text.txt").write_text("\n\n".join(anchor_texts[:40]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.real
def test_the_commands_of_the_readme(workdir, smollm2, load, scores):
    from rlsedit_fast.cli import main

    (workdir / "facts.jsonl").write_text(block("Edit your own model", "json"), encoding="utf-8")
    for line in block("Edit your own model", "bash").splitlines():
        _, *arguments = shlex.split(line.partition("#")[0].replace("path/to/checkpoint", str(smollm2)))
        assert main(arguments) == 0, line
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    assert (report["made"], report["not_stated"]) == (2, [])
    for score in scores(*load(workdir / "edited"), TARGETS):
        assert score.first, score


def test_the_editor_example_of_the_readme(workdir, smollm2, scores):
    code = block("Edit from Python", "python").replace("path/to/checkpoint", str(smollm2))
    first, rest = code.split("inputs = editor.tokenizer(")
    names: dict = {}
    exec(first, names)
    editor = names["editor"]
    assert [record.success for record in editor.history()] == [True, True]
    for score in scores(editor.model, editor.tokenizer, TARGETS):
        assert score.first, score
    exec("inputs = editor.tokenizer(" + rest, names)
    (nice,) = scores(editor.model, editor.tokenizer, [("The capital of France is", "Nice")])
    assert nice.first
