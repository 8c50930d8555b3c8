"""The commands load the whole of a multimodal or hybrid checkpoint, and never lose edits to a failing output."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlsedit_fast.cli import main
from rlsedit_fast.editing import Editor
from rlsedit_fast.models.loading import empty_model, load_model, load_tokenizer
from rlsedit_fast.world.tokens import save_tokenizer

from ..tiny_families import MULTIMODAL, make

FACT = ["--prompt", "{} speaks", "--subject", "Toze Lado Rekuno", "--target", "Kubeish"]
EDIT = ["edit", *FACT, "--lam", "0.1", "--mu", "0", "--no-anchors", "--no-evaluation", "--no-stability", "--no-chat"]


def checkpoint(name, tokenizer, folder, **changes):
    make(name, len(tokenizer), **changes).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A byte-level tokenizer, as Auto classes expect it for Qwen, whatever the files name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([" ".join(FACT)], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def contents(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"contexts": {"prefixes": [""]}, "search": {"steps": 4, "clamp": 4}, "refine": 0}))
    return ["--config", str(path)]


@pytest.mark.parametrize("name", ["qwen3_5", "llama4", "llava"])
def test_a_multimodal_checkpoint_is_edited_shown_and_asked(name, byte_tokenizer, tmp_path, settings, capsys):
    base, out = checkpoint(name, byte_tokenizer, tmp_path / "base"), tmp_path / "out"
    weights = load_file(base / "model.safetensors")
    weights["mtp.layers.0.weight"] = torch.ones(2, 2)  # which the class does not load
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')

    assert main(["show", "--model", str(base), *FACT, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    kind = f"{MULTIMODAL[name][0]}ForConditionalGeneration"
    assert shown["model"] == kind
    assert all("language_model" in layer["name"] for layer in shown["layers"])

    assert main([*EDIT, *settings, "--model", str(base), "--out", str(out)]) in (0, 1, 2)
    capsys.readouterr()
    before, after = contents(base), contents(out)
    assert before.keys() == after.keys()
    differing = [key for key, tensor in before.items() if not torch.equal(tensor, after[key])]
    assert 0 < len(differing) <= len(shown["layers"])
    assert not any("vision" in key or "visual" in key or "mtp" in key for key in differing)
    assert (out / "preprocessor_config.json").exists()
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())

    assert (
        main(["ask", "--model", str(base), "--edited", str(out), "Toze Lado Rekuno speaks", "--answer-tokens", "2"])
        == 0
    )
    assert "edited" in capsys.readouterr().out


@pytest.mark.parametrize("named", [None, "feed_forward.down_proj"])
def test_states_of_another_batch_size_are_not_shared(named, tokenizer, tmp_path, settings, capsys):
    """Contexts of one prompt share a prefix, so that there are fewer prefixes than rows."""
    base = checkpoint("falcon_h1", tokenizer, tmp_path / "base")
    path = tmp_path / "settings.json"
    chosen = json.loads(path.read_text()) | {"contexts": {"prefixes": ["", "Yes. "]}, "projection_module": named}
    path.write_text(json.dumps(chosen))
    facts = tmp_path / "facts.jsonl"
    lines = [{"prompt": "{} speaks", "subject": "Toze Lado Rekuno", "target": word} for word in ("Kubeish", "baker")]
    facts.write_text("\n".join(map(json.dumps, lines)))
    options = [*settings, "--model", str(base), "--out", str(tmp_path / "out"), "--edits", str(facts)]
    assert main(["edit", *EDIT[1 + len(FACT) :], *options]) in (0, 1, 2)
    assert contents(base).keys() == contents(tmp_path / "out").keys()


def test_show_names_only_mlps_of_a_hybrid(tokenizer, tmp_path, capsys):
    base = checkpoint("nemotron_h", tokenizer, tmp_path / "base")
    assert main(["show", "--model", str(base), "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["layers"]] == ["model.layers.1.mixer.down_proj"]
    assert main(["show", "--model", str(base), "--layers", "2", "--json"]) != 0
    assert "has no MLP" in capsys.readouterr().err


def test_a_generation_config_that_transformers_rejects_is_kept(tokenizer, tmp_path, settings, capsys):
    base, out = checkpoint("smollm3", tokenizer, tmp_path / "base"), tmp_path / "out"
    given = {"temperature": 0.6, "do_sample": False, "top_p": 0.9, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(given))
    assert main([*EDIT, *settings, "--model", str(base), "--out", str(out)]) in (0, 1, 2)
    assert json.loads((out / "generation_config.json").read_text()) == given
    model, _ = load_model(base, tokenizer=tokenizer)
    model.generation_config.temperature = 0.7  # modified, so that every version rejects it
    editor = Editor(model, tokenizer)
    editor.save_pretrained(tmp_path / "python")
    assert (tmp_path / "python" / "generation_config.json").exists()


def full(*_args, **_options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_edits_survive_an_output_that_fails(place, base, tmp_path, settings, monkeypatch, capsys):
    monkeypatch.setattr(Editor, "save_pretrained", full)
    monkeypatch.chdir(tmp_path)
    away = tmp_path / "away"
    if place == "elsewhere":
        whole = Editor.save_delta
        blocked = lambda self, path, **options: full() if path.parent == away else whole(self, path, **options)  # noqa: E731
        monkeypatch.setattr(Editor, "save_delta", blocked)
    assert main([*EDIT, *settings, "--model", str(base), "--out", str(away / "out")]) != 0
    message = capsys.readouterr().err
    assert "No space left" in message
    (delta,) = [one for one in tmp_path.rglob("*.delta.safetensors")]
    assert delta.parent == (away if place == "beside" else tmp_path)
    assert f"--delta {delta}" in message
    monkeypatch.undo()
    assert main(["apply", "--model", str(base), "--delta", str(delta), "--out", str(tmp_path / "applied")]) == 0
    before, after = contents(base), contents(tmp_path / "applied")
    assert any(not torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_no_delta_is_added_if_another_output_holds_the_edits(base, tmp_path, settings, monkeypatch, capsys):
    monkeypatch.setattr(Editor, "save_pretrained", full)
    wanted = tmp_path / "wanted.safetensors"
    options = [*settings, "--model", str(base), "--out", str(tmp_path / "out"), "--delta", str(wanted)]
    assert main([*EDIT, *options]) != 0
    assert wanted.exists()
    assert not list(tmp_path.rglob("*.delta.safetensors"))


PROCESSOR = """
from transformers import PreTrainedTokenizerFast


class TinyProcessor:
    @classmethod
    def from_pretrained(cls, path, **options):
        made = cls()
        made.tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{path}/words.token.json", bos_token="<s>")
        return made

    @classmethod
    def register_for_auto_class(cls, *_names):
        pass
"""


def test_a_tokenizer_inside_of_a_processor_is_found(tokenizer, tmp_path):
    base = checkpoint("llava", tokenizer, tmp_path / "base")
    shutil.move(base / "tokenizer.json", base / "words.token.json")
    (base / "tokenizer_config.json").unlink()
    (base / "processing_tiny.py").write_text(PROCESSOR)
    about = {"auto_map": {"AutoProcessor": "processing_tiny.TinyProcessor"}, "processor_class": "TinyProcessor"}
    (base / "processor_config.json").write_text(json.dumps(about))
    found = load_tokenizer(base, trust_remote_code=True)
    assert found.get_vocab() == tokenizer.get_vocab()


def test_a_plan_has_the_whole_model(tokenizer, tmp_path):
    make("qwen3_5", len(tokenizer)).config.save_pretrained(tmp_path)
    assert any("visual" in name for name, _ in empty_model(tmp_path).named_modules())


def test_a_class_that_does_not_generate_is_refused(tokenizer, tmp_path, capsys):
    base = checkpoint("smollm3", tokenizer, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["SmolLM3ForSequenceClassification"]}))
    assert main(["show", "--model", str(base), *FACT]) != 0
    assert "SmolLM3ForSequenceClassification, which does not generate text" in capsys.readouterr().err


def test_a_mixture_of_experts_is_edited_with_its_routing_measured(make_model, tokenizer, tmp_path, settings, capsys):
    base = tmp_path / "base"
    make_model("qwen3_moe").save_pretrained(base)
    save_tokenizer(tokenizer, base)
    options = ["edit", *FACT, "--model", str(base), "--lam", "0.1", "--mu", "0", "--no-anchors", "--no-chat", *settings]
    report = tmp_path / "report.json"
    assert main([*options, "--layers", "2", "--adapter", str(tmp_path / "adapter"), "--json", str(report)]) in (0, 1)
    routing = json.loads(report.read_text())["stability"]["routing_change"]
    assert routing["2"] == 0.0, "the edited layer routes as before"
    assert 0 < routing["3"] <= 1
    assert "tokens there that reach other experts" in capsys.readouterr().out
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"] == [
        "model.layers.2.mlp.experts.down_proj"
    ]
