"""Edited checkpoints and adapters in mergekit, lm-eval and peft, by their ordinary commands."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from rlsedit_fast import Edit, EditConfig, Editor
from rlsedit_fast.world import World, load_demo_model
from rlsedit_fast.world.tokens import save_tokenizer

from .environments import CPU_TORCH, environment, run, tool

pytestmark = pytest.mark.deploy

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The demo model before and after three edits, an adapter of the edits, and the edits."""
    folder = tmp_path_factory.mktemp("saved")
    model, tokenizer = load_demo_model()
    model.save_pretrained(folder / "base")
    save_tokenizer(tokenizer, folder / "base")
    del model
    ann, ben, cleo = World.generate().people[:3]
    edits = [
        Edit("{} plays the", ann.name, "banjo"),
        Edit("{} works as a", ben.name, "glazier"),
        Edit("{} plays the", cleo.name, "harp"),
    ]
    config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
    editor = Editor.from_pretrained(folder / "base", config=config)
    assert all(record.success for record in editor.edit(edits))
    editor.save_pretrained(folder / "edited")
    editor.save_adapter(folder / "adapter")
    return folder, edits


def test_mergekit_merges_an_edited_checkpoint_with_its_base(saved, tmp_path):
    folder, _ = saved
    python = environment("mergekit", CPU_TORCH, ("mergekit",))
    models = "".join(f"  - model: {folder / name}\n    parameters: {{weight: 0.5}}\n" for name in ("base", "edited"))
    (tmp_path / "merge.yml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")
    run(tool(python, "mergekit-yaml"), tmp_path / "merge.yml", tmp_path / "merged", env=OFFLINE)
    base, edited, merged = (
        load_file(path / "model.safetensors") for path in (folder / "base", folder / "edited", tmp_path / "merged")
    )
    changed = [name for name, tensor in base.items() if not torch.equal(tensor, edited[name])]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]
    for name, tensor in base.items():
        torch.testing.assert_close(merged[name], (tensor + edited[name]) / 2, atol=1e-6, rtol=1e-6)


def test_lm_eval_scores_the_edits(saved, tmp_path):
    folder, edits = saved
    python = environment("lm_eval", CPU_TORCH, ("lm_eval[hf]", "peft"))
    others = {"banjo": "clarinet", "glazier": "baker", "harp": "clarinet"}
    rows = [
        {"prompt": edit.prompt.format(edit.subject), "choices": [edit.target, others[edit.target]]} for edit in edits
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "facts.yaml").write_text(
        "task: facts\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'facts.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: 0\n'
        "metric_list:\n  - metric: acc\n"
    )
    accuracy = {}
    for name, options in (
        ("base", f"pretrained={folder / 'base'}"),
        ("edited", f"pretrained={folder / 'edited'}"),
        ("adapter", f"pretrained={folder / 'base'},peft={folder / 'adapter'}"),
    ):
        run(
            *(tool(python, "lm_eval"), "--model", "hf", "--model_args", f"{options},dtype=float32"),
            *("--tasks", "facts", "--include_path", tmp_path, "--output_path", tmp_path / name, "--device", "cpu"),
            env=OFFLINE | {"HF_HOME": str(tmp_path / "cache")},
        )
        (result,) = (tmp_path / name).rglob("results_*.json")
        accuracy[name] = json.loads(result.read_text())["results"]["facts"]["acc,none"]
    assert accuracy["edited"] == accuracy["adapter"] == 1.0
    assert accuracy["base"] < 1.0


def test_peft_of_another_environment_merges_the_adapter(saved, tmp_path):
    folder, _ = saved
    python = environment("lm_eval", CPU_TORCH, ("lm_eval[hf]", "peft"))
    code = (
        "import sys\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='float32')\n"
        "PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])\n"
    )
    run(python, "-c", code, folder / "base", folder / "adapter", tmp_path, env=OFFLINE)
    edited, merged = (load_file(path / "model.safetensors") for path in (folder / "edited", tmp_path))
    assert edited.keys() == merged.keys()
    for name, tensor in edited.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=1e-5)
