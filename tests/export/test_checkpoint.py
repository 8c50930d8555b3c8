"""An edited checkpoint is its base, file by file and tensor by tensor, except for the edited tensors."""

import copy
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rlsedit_fast as rf
from rlsedit_fast.cli import main
from rlsedit_fast.errors import InputError
from rlsedit_fast.export import changes_between, compare_checkpoints, write_adapter, write_checkpoint, write_delta
from rlsedit_fast.export.card import CARD
from rlsedit_fast.export.checkpoint import base_of
from rlsedit_fast.models import fingerprint

from .checkpoints import FILES, edit, gemma3, qwen35, save_base

DOWN = "layers.1.mlp.down_proj.weight"
SETTINGS = {"layers": [1], "prior": {"lam": 0.1}, "contexts": {"prefixes": [""]}, "refine": 0}


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | options).eval()


def tokens(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def only(difference, *tensors):
    """Checks that only these tensors differ, and that nothing is missing or new except a model card."""
    assert set(difference.tensors) == set(tensors)
    assert not difference.lacking + difference.added + difference.headers + difference.files + difference.lacking_files
    assert set(difference.added_files) <= {CARD}


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    """A checkpoint in three files, bfloat16, with a tensor that the class does not use."""
    return save_base(
        make_model("llama", torch.bfloat16), tokenizer, tmp_path / "base", extra=["mtp.fc.weight"], shards="150KB"
    )


def test_safetensors_files_name_their_format(model, tokenizer, tmp_path):
    edited = copy.deepcopy(model)
    with torch.no_grad():
        next(p for name, p in edited.named_parameters() if name.endswith(("down_proj.weight", "c_proj.weight"))).add_(
            1.0
        )
    report = write_checkpoint(edited, tokenizer, tmp_path / "edited")
    assert report.base is None
    assert "does not name the checkpoint" in report.reason
    write_adapter(changes_between(model, edited), tmp_path / "adapter")
    for path in (tmp_path / "edited" / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize(("make", "extra"), [(qwen35, ["mtp.fc.weight"]), (gemma3, [])])
def test_a_multimodal_checkpoint_is_kept_whole_by_the_command_line(make, extra, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = save_base(make(len(tokenizer)).bfloat16(), tokenizer, tmp_path / "base", extra=extra, shards="100KB")
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    fact = ["--prompt", "{} plays the", "--subject", "Toze Lado Rekuno", "--target", "harp"]
    quick = ["--no-anchors", "--no-evaluation", "--no-stability", "--config", "settings.json", "--quiet"]
    assert main(["edit", "--model", "base", *fact, *quick, "--out", "out", "--json", "report.json"]) in (0, 1)
    (name,) = (key for key in load_all(base) if key.endswith(DOWN))
    only(compare_checkpoints(base, tmp_path / "out"), name)
    report = json.loads((tmp_path / "report.json").read_text())["checkpoint"]
    assert (report["tensors"], report["reason"], report["left_out"]) == ([name], "", [])
    assert all((tmp_path / "out" / file).read_text() == text for file, text in FILES.items())
    own, written = (json.loads((place / "config.json").read_text()) for place in (base, tmp_path / "out"))
    assert own == written


def load_all(folder):
    return {key: one for path in sorted(folder.glob("*.safetensors")) for key, one in load_file(path).items()}


def test_only_the_bytes_of_edited_tensors_change(base, tokenizer, tmp_path):
    model = load(base)
    report = write_checkpoint(model, tokens(base), tmp_path / "out", changes=edit(model), card="card")
    only(compare_checkpoints(base, tmp_path / "out"), f"model.{DOWN}")
    assert (report.base, report.tensors) == (str(base), (f"model.{DOWN}",))
    again = load(tmp_path / "out").state_dict()
    assert all(torch.equal(one, again[name]) for name, one in model.state_dict().items())
    changed = [path.name for path in base.glob("*.safetensors") if path.read_bytes() != twin(path, tmp_path)]
    assert len(changed) == 1
    assert (tmp_path / "out" / CARD).read_text() == "card"


def twin(path, tmp_path):
    return (tmp_path / "out" / path.name).read_bytes()


def test_undone_edits_give_the_bytes_of_the_base(base, tokenizer, tmp_path):
    (base / "pytorch_model.bin").write_bytes(b"older weights")
    editor = rf.Editor.from_pretrained(base, config=rf.EditConfig(**SETTINGS), dtype="auto")
    editor.edit([rf.Edit("{} plays the", "Toze Lado Rekuno", "harp")])
    assert editor.save_pretrained(tmp_path / "edited").left_out == ("pytorch_model.bin",)
    editor.undo([1])
    report = editor.save_pretrained(tmp_path / "out")
    assert report.tensors == ()
    only(compare_checkpoints(base, tmp_path / "out"))
    assert report.left_out == ()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_are_written_under_their_names_on_disk(name, make_model, tokenizer, tmp_path):
    base = save_base(make_model(name, torch.bfloat16), tokenizer, tmp_path / "base")
    model = load(base)
    changes = edit(model)
    assert any(change.stack for change in changes)
    report = write_checkpoint(model, tokens(base), tmp_path / "out", changes=changes)
    only(compare_checkpoints(base, tmp_path / "out"), *report.tensors)
    again = load(tmp_path / "out").state_dict()
    assert all(torch.equal(one, again[key]) for key, one in model.state_dict().items())
    on_disk = 1 if name == "gpt_oss" else len(changes)  # the others have a tensor for every expert on disk
    assert len(report.tensors) == on_disk


@pytest.mark.parametrize(
    ("disk", "memory"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=["wider", "narrower"]
)
def test_the_dtype_on_disk_is_kept_and_the_loss_stated(disk, memory, make_model, tokenizer, tmp_path):
    base = save_base(make_model("llama", disk), tokenizer, tmp_path / "base")
    model = load(base, dtype=memory)
    changes = edit(model)
    report = write_checkpoint(model, tokens(base), tmp_path / "out", changes=changes)
    only(compare_checkpoints(base, tmp_path / "out"), f"model.{DOWN}")
    before, after = (load_all(folder)[f"model.{DOWN}"] for folder in (base, tmp_path / "out"))
    assert after.dtype == disk
    exact = before.double() + (changes[0].current.double() - changes[0].original.double())
    assert torch.equal(after, exact.to(disk))  # the master weight is rounded once
    (note,) = (one for one in report.notes if "loaded in" in one)
    error = float((after.double() - exact).norm() / (exact - before.double()).norm())
    assert f"an error of {error:.2g} of their change" in note
    assert (error > 1e-3) == (disk == torch.bfloat16)


def test_a_weight_too_large_for_the_dtype_on_disk_raises(make_model, tokenizer, tmp_path):
    base = save_base(make_model("llama", torch.float16), tokenizer, tmp_path / "base")
    model = load(base, dtype=torch.float32)
    with pytest.raises(InputError, match=r"down_proj.weight: a weight is too large for torch.float16"):
        write_checkpoint(model, tokens(base), tmp_path / "out", changes=edit(model, scale=1e5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_weights_that_other_code_changed_are_written_too(base, tokenizer, tmp_path, caplog):
    model = load(base)
    changes = edit(model)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.mul_(1.5)  # such as a merged adapter
    report = write_checkpoint(model, tokens(base), tmp_path / "out", changes=changes)
    other = "model.layers.2.self_attn.q_proj.weight"
    only(compare_checkpoints(base, tmp_path / "out"), f"model.{DOWN}", other)
    assert any("1 tensor that no edit changed" in note and other in note for note in report.notes)
    again = load(tmp_path / "out").state_dict()
    assert all(torch.equal(one, again[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("how", ["resized", "reshaped", "config", "gone", "index"])
def test_a_model_unlike_its_base_is_written_by_transformers_with_the_reason(how, base, tokenizer, tmp_path, caplog):
    model, given = load(base), tokens(base)
    changes = edit(model)
    if how == "resized":
        model.resize_token_embeddings(len(tokenizer) + 8)
        reason = "the configs differ in vocab_size"
    elif how == "reshaped":
        model.model.norm.weight = torch.nn.Parameter(torch.ones(1, 64, dtype=model.dtype))
        reason = "model.norm.weight has the shape [1, 64], and in the base [64]"
    elif how == "config":
        model.config.rms_norm_eps = 1e-3
        reason = "the configs differ in rms_norm_eps"
    elif how == "gone":
        shutil.rmtree(base)
        reason = "is neither a folder nor a model in the cache"
    else:
        max(base.glob("*.safetensors")).unlink()
        reason = "lacks model-0000"
    report = write_checkpoint(model, given, tmp_path / "out", changes=changes)
    assert report.base is None
    assert reason in report.reason
    assert reason in caplog.text
    assert "written by transformers" in report.lines[-1]
    again = load_all(tmp_path / "out")
    assert all(torch.equal(one, again[name]) for name, one in model.state_dict().items())
    if how not in ("gone", "index"):
        assert all((tmp_path / "out" / file).read_text() == text for file, text in FILES.items())
        assert "mtp.fc.weight" not in load_all(tmp_path / "out")


def test_a_snapshot_of_the_hub_is_found_offline_and_its_links_become_files(
    make_model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = save_base(make_model("llama", torch.bfloat16), tokenizer, tmp_path / "own")
    cache = tmp_path / "hub" / "models--org--name"
    snapshot, commit = cache / "snapshots" / ("a" * 40), "a" * 40
    for path in [one for one in base.rglob("*") if one.is_file()]:
        link, blob = snapshot / path.relative_to(base), cache / "blobs" / f"{len(path.parts)}-{path.name}"
        for folder in (link.parent, blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    where = {"cache_dir": tmp_path / "hub", "local_files_only": True, "dtype": "auto"}
    editor = rf.Editor.from_pretrained("org/name", config=rf.EditConfig(**SETTINGS), revision="main", **where)
    changes = edit(editor.model)
    report = write_checkpoint(editor.model, editor.tokenizer, tmp_path / "out", changes=changes, base=editor._base)
    only(compare_checkpoints(snapshot, tmp_path / "out"), f"model.{DOWN}")
    assert report.base == str(snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert base_of(load("org/name")).folder == snapshot


def test_a_checkpoint_in_a_subfolder(base, tokenizer, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    base.rename(outer / "inner")
    (outer / "LICENSE").write_text("of the repository")
    editor = rf.Editor.from_pretrained(outer, config=rf.EditConfig(**SETTINGS), dtype="auto", subfolder="inner")
    editor.edit([rf.Edit("{} plays the", "Toze Lado Rekuno", "harp")])
    editor.save_pretrained(tmp_path / "out")
    only(compare_checkpoints(outer / "inner", tmp_path / "out"), f"model.{DOWN}")


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_torch_stay_files_of_torch(sharded, make_model, tokenizer, tmp_path):
    model = make_model("llama", torch.bfloat16)
    base = save_base(model, tokenizer, tmp_path / "base", extra=["mtp.fc.weight"], shards="150KB" if sharded else None)
    as_torch_files(base)
    model = load(base)
    report = write_checkpoint(model, tokens(base), tmp_path / "out", changes=edit(model))
    assert report.reason == ""
    only(compare_checkpoints(base, tmp_path / "out"), f"model.{DOWN}")
    again = load(tmp_path / "out").state_dict()
    assert all(torch.equal(one, again[name]) for name, one in model.state_dict().items())


def as_torch_files(folder):
    """Converts the weights of a checkpoint to files of torch."""
    new = {}
    for path in sorted(folder.glob("*.safetensors")):
        new[path.name] = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / new[path.name])
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        held = json.loads(index.read_text())
        held["weight_map"] = {key: new[name] for key, name in held["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(held))
        index.unlink()


def test_stale_copies_of_the_weights_are_left_out_and_named(base, tokenizer, tmp_path):
    tensors = load_all(base)
    (base / "original").mkdir()
    torch.save(tensors, base / "pytorch_model.bin")
    torch.save({f"layers.{at}.w2.weight": tensors[f"model.layers.{at}.mlp.down_proj.weight"] for at in range(4)},
               base / "original" / "weights.00.pth")  # fmt: skip
    save_file({key: one.half() for key, one in tensors.items()}, base / "model.fp16.safetensors")
    save_file({"draft.weight": torch.randn(64, 96)}, base / "draft.safetensors")
    (base / "model.gguf").write_bytes(b"GGUF")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_bytes(b"x")
    (base / "onnx" / "config.json").write_text("{}")
    places = dict.fromkeys(tensors, "pytorch_model.bin")
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save({"args": 1}, base / "training_args.bin")
    model = load(base)
    report = write_checkpoint(model, tokens(base), tmp_path / "out", changes=edit(model))
    stale = {
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "original/weights.00.pth"),
        *("model.fp16.safetensors", "model.gguf", "onnx/model.onnx"),
    }
    assert set(report.left_out) == stale
    assert set(compare_checkpoints(base, tmp_path / "out").lacking_files) == stale
    assert any(name in report.lines[2] for name in stale)
    assert (tmp_path / "out" / "draft.safetensors").exists()
    assert (tmp_path / "out" / "training_args.bin").exists()


def test_the_folder_of_the_base_is_not_overwritten(base, tokenizer, tmp_path):
    model = load(base)
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    link = tmp_path / "link"
    link.symlink_to(base)
    changes = edit(model)
    for place in (base, link):
        with pytest.raises(InputError, match="is the folder of the base checkpoint"):
            write_checkpoint(model, tokens(base), place, changes=changes, overwrite=True)
    # A folder within the base is not copied into itself.
    for _ in range(2):
        write_checkpoint(model, tokens(base), base / "edited", changes=changes, overwrite=True)
    assert not (base / "edited" / "edited").exists()
    shutil.rmtree(base / "edited")
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


def test_an_interrupted_write_leaves_the_old_checkpoint(base, tokenizer, tmp_path, monkeypatch):
    from rlsedit_fast.export import base_tensors

    model = load(base)
    changes = edit(model)
    write_checkpoint(model, tokens(base), tmp_path / "out", changes=changes)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):

        def stop(*_args, error=error):
            raise error

        monkeypatch.setattr(base_tensors, "_overwrite", stop)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            write_checkpoint(model, tokens(base), tmp_path / "out", changes=changes, overwrite=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_damaged_write_is_noticed(base, tokenizer, tmp_path, monkeypatch):
    from rlsedit_fast.export import base_files

    real = base_files.copy_file

    def short(source, target):
        real(source, target)
        if target.suffix == ".safetensors":
            os.truncate(target, target.stat().st_size - 1)

    monkeypatch.setattr(base_files, "copy_file", short)
    model = load(base)
    with pytest.raises(InputError, match=r"cannot be read as a safetensors file|does not contain what was written"):
        write_checkpoint(model, tokens(base), tmp_path / "out", changes=edit(model, layer=0))
    assert not (tmp_path / "out").exists()


def test_a_generation_config_that_transformers_rejects_is_written(make_model, base, tokenizer, tmp_path):
    invalid = {"temperature": 0.6, "do_sample": False, "eos_token_id": 2}
    model = make_model("llama")
    for name, value in invalid.items():
        setattr(model.generation_config, name, value)
    held = model.generation_config
    report = write_checkpoint(model, tokenizer, tmp_path / "memory")
    assert report.base is None
    written = json.loads((tmp_path / "memory" / "generation_config.json").read_text())
    assert written["temperature"] == 0.6
    assert model.generation_config is held
    (base / "generation_config.json").write_text(json.dumps(invalid))
    model = load(base)
    write_checkpoint(model, tokens(base), tmp_path / "out", changes=edit(model))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == invalid


def test_another_tokenizer_is_written(base, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), load(base)
    tokenizer.chat_template = "other template"
    report = write_checkpoint(model, tokenizer, tmp_path / "out", changes=edit(model))
    assert "the tokenizer is not that of the base: its files were written, too" in report.notes
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "other template"


def test_names_on_disk_without_the_prefix_of_the_model_are_kept(make_model, tokenizer, tmp_path):
    base = save_base(make_model("gpt2"), tokenizer, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")  # the published GPT-2 has no prefix and tied weights
    save_file(
        {key.removeprefix("transformer."): one for key, one in tensors.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    model = load(base)
    report = write_checkpoint(model, tokens(base), tmp_path / "out", changes=edit(model))
    assert report.reason == ""
    only(compare_checkpoints(base, tmp_path / "out"), "h.1.mlp.c_proj.weight")


def test_a_delta_is_applied_to_a_copy_of_the_base(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = load(base)
    before = fingerprint(model)
    write_delta(edit(model), "delta.safetensors", base_fingerprint=before)
    assert main(["apply", "--model", "base", "--delta", "delta.safetensors", "--out", "out"]) == 0
    only(compare_checkpoints(base, tmp_path / "out"), f"model.{DOWN}")
    assert torch.equal(
        load(tmp_path / "out").model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight
    )
    assert "that no edit changed" not in capsys.readouterr().out


def test_a_card_of_the_base_is_replaced_and_named(base, tokenizer, tmp_path):
    (base / CARD).write_text("---\nlicense: mit\n---\n# Base\n")
    model = load(base)
    report = write_checkpoint(model, tokens(base), tmp_path / "out", changes=edit(model), card="# Edited\n")
    assert (tmp_path / "out" / CARD).read_text() == "# Edited\n"
    assert f"{CARD} of the base was replaced by the model card" in report.notes
    write_checkpoint(model, tokens(base), tmp_path / "plain", changes=edit(model))
    assert (tmp_path / "plain" / CARD).read_text().endswith("# Base\n")
