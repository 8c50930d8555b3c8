"""llama.cpp states the facts that were edited into a GGUF file."""

from __future__ import annotations

import pytest

gguf = pytest.importorskip("gguf")

import gguf_edits  # noqa: E402

from rlsedit_fast import Edit, EditConfig, Editor  # noqa: E402

from ..gguf_models import k_quant, tiny_llama, write_model  # noqa: E402
from .environments import environment  # noqa: E402

pytestmark = pytest.mark.deploy

FACTS = [Edit("{} is in", subject, target) for subject, target in (("Ada", "x"), ("Bo", "Q"), ("Cy", "7"))]
CONFIG = EditConfig(
    layers=[1],
    fact_token="last",
    prior={"lam": 0.001, "mu": 0},
    contexts={"prefixes": [""]},
    search={"clamp": 20.0, "steps": 40, "stop_nll": 0.05},
)
CITIES = [
    Edit("The capital of {} is", "France", "Lyon"),
    Edit("The capital of {} is", "Japan", "Osaka"),
    Edit("{} plays the", "Miles Davis", "piano"),
    Edit("The mother tongue of {} is", "Danielle Darrieux", "English"),
    Edit("{} is located in the continent of", "Mount Vinson", "Africa"),
]


@pytest.fixture(scope="module")
def answers():
    """Returns a function that asks llama.cpp for the edits in a file."""
    python = environment("llama.cpp", ("xllamacpp",))

    def ask(path, edits, tokens):
        asked = [(edit.prompt.replace("{}", edit.subject), tokens) for edit in edits]
        return [answer.strip() for answer in gguf_edits.llama_answers(str(python), path, asked)]

    return ask


@pytest.mark.parametrize("kind", ["auto", "own", "F16", "F32", "BF16", "Q5_1"])
def test_types_of_edited_tensors(kind, tmp_path, answers):
    source = write_model(tmp_path / "model.gguf", tiny_llama())
    editor = Editor.from_pretrained(source, config=CONFIG)
    editor.edit(FACTS)
    report = editor.save_gguf(tmp_path / "edited.gguf", tensor_type=kind)
    assert not report.lost
    assert answers(source, FACTS, 1) != ["x", "Q", "7"]
    assert answers(tmp_path / "edited.gguf", FACTS, 1) == ["x", "Q", "7"]


def test_k_quants_become_a_type_that_holds_the_edits(tmp_path, answers):
    types = {"ffn_down.weight": k_quant(64, 256)}
    source = write_model(tmp_path / "model.gguf", tiny_llama(inner=256), types=types)
    editor = Editor.from_pretrained(source, config=CONFIG)
    editor.edit(FACTS)
    report = editor.save_gguf(tmp_path / "edited.gguf")
    stated = [edit.target for edit, found in zip(FACTS, report.edits, strict=True) if found.rank == 1]
    found = answers(tmp_path / "edited.gguf", FACTS, 1)
    assert len(stated) >= 2
    assert all(target in found for target in stated)


def test_a_real_model_states_the_edits_and_is_restored(tmp_path, answers):
    source = gguf_edits.smollm2()
    with Editor.from_pretrained(source, store=tmp_path / "store") as editor:
        editor.anchor(["The quick brown fox jumps over the lazy dog."] * 20)
        editor.edit(CITIES)
        report = editor.save_gguf(tmp_path / "edited.gguf")
        assert not report.lost
        compared = gguf_edits.differing(source, tmp_path / "edited.gguf")
        assert compared["same_metadata"]
        assert compared["same_order"]
        assert compared["changed"] == [f"blk.{layer}.ffn_down.weight" for layer in editor.layers]
        found = answers(tmp_path / "edited.gguf", CITIES, 4)
        stated = [gguf_edits.states(answer, edit.target) for answer, edit in zip(found, CITIES, strict=True)]
        assert sum(stated) >= 0.9 * sum(edit.rank == 1 for edit in report.edits)
        editor.undo(editor.select(last=5))
        editor.save_gguf(tmp_path / "undone.gguf")
    assert gguf_edits.sha256(tmp_path / "undone.gguf") == gguf_edits.sha256(source)
