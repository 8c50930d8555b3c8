"""Edited weights are written into a copy of a GGUF file, and nothing else changes."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Type  # noqa: E402

from rlsedit_fast.errors import InputError, ModelError  # noqa: E402
from rlsedit_fast.export import WeightChange  # noqa: E402
from rlsedit_fast.export.gguf import find_targets, write_gguf  # noqa: E402
from rlsedit_fast.models import find_decoder, load_model  # noqa: E402
from rlsedit_fast.models.gguf_files import check_gguf, read_header  # noqa: E402

from ..gguf_models import k_quant, tiny_family, tiny_llama, write_model  # noqa: E402

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "phi3", "stablelm", "falcon")


def edited(model, layers=(1,)):
    """Returns changes of layers, as an editor does."""
    random = torch.Generator().manual_seed(0)
    changes = []
    for one in find_decoder(model).select(layers):
        change = torch.randn(one.weight.shape, generator=random) * float(one.weight.float().std())
        after = one.weight.float() + change
        changes.append(WeightChange(one.name, one.weight, after.to(one.weight.dtype), after, one.transposed))
    return changes


def parts(path):
    """Returns metadata and tensors of a file, read by the package gguf: bytes by name, in order."""
    reader = gguf.GGUFReader(path)
    fields = {name: [part.tobytes() for part in field.parts] for name, field in reader.fields.items()}
    return fields, {one.name: (one.tensor_type.name, one.data.tobytes()) for one in reader.tensors}


def saved(header, targets, out, kind):
    packed = {one.tensor.name: (kind or one.tensor.type, one.pack(kind or one.tensor.type)) for one in targets}
    write_gguf(header, out, packed)
    return packed


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf", tiny_llama())


@pytest.mark.parametrize("kind", [None, "F32", "Q4_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_tensors_of_edited_weights_change(name, kind, tmp_path):
    given = tiny_family(name)
    source = write_model(tmp_path / "model.gguf", given)
    # transformers assumes the padding token of Phi-3, which the tiny vocabulary does not have.
    options = {"config": given.config} if name == "phi3" else {}
    model, tokenizer = load_model(source, dtype="float32", **options)
    assert tokenizer.decode(tokenizer("house")["input_ids"], skip_special_tokens=True) == "house"
    changes = edited(model)
    header = check_gguf(source)
    (target,) = find_targets(header, changes, layers=4)
    out = tmp_path / "edited.gguf"
    packed = saved(header, [target], out, kind)
    before, after = parts(source), parts(out)
    assert after[0] == before[0]
    assert list(after[1]) == list(before[1])
    assert {n for n in before[1] if before[1][n] != after[1][n]} == {target.tensor.name}
    assert after[1][target.tensor.name] == packed[target.tensor.name]

    again, _ = load_model(out, dtype="float32", **options)
    weights, old = again.state_dict(), model.state_dict()
    differing = [key for key in weights if not torch.equal(weights[key], old[key])]
    assert differing == [f"{changes[0].name}.weight"]
    (written,) = find_decoder(again).select([1])
    assert torch.equal(written.weight, target.unpack(*packed[target.tensor.name]))
    if kind == "F32":
        assert torch.equal(written.weight, changes[0].current)


def test_a_copy_without_edits_is_the_same_file(llama, tmp_path):
    write_gguf(read_header(llama), tmp_path / "copy.gguf", {})
    assert (tmp_path / "copy.gguf").read_bytes() == llama.read_bytes()


@pytest.mark.parametrize("alignment", [8, 256])
def test_alignment_and_gaps_are_kept(alignment, tmp_path):
    source = write_model(tmp_path / "model.gguf", tiny_llama(), alignment=alignment)
    model, _ = load_model(source, dtype="float32")
    header = read_header(source)
    assert header.alignment == alignment
    targets = find_targets(header, edited(model, (0, 1)), layers=2)
    for kind in (None, "F16"):
        out = tmp_path / f"{kind}.gguf"
        saved(header, targets, out, kind)
        new = read_header(out)
        assert all(not (one.start - new.data) % alignment for one in new.tensors.values())
        assert parts(out)[0] == parts(source)[0]
    assert (tmp_path / "None.gguf").stat().st_size == source.stat().st_size


def test_types_that_cannot_be_written_become_larger_ones(tmp_path):
    data = k_quant(64, 256)
    source = write_model(tmp_path / "model.gguf", tiny_llama(inner=256), types={"ffn_down.weight": data})
    model, _ = load_model(source, dtype="float32")
    header = read_header(source)
    (target,) = find_targets(header, edited(model), layers=2)
    assert target.tensor.type == "Q4_K"
    assert target.ladder() == ["Q8_0", "F16", "F32"]
    with pytest.raises(InputError, match=r"cannot be written as Q4_K") as error:
        target.choose("own")
    assert "--gguf-type auto" in error.value.hint
    saved(header, [target], tmp_path / "out.gguf", "Q8_0")
    assert read_header(tmp_path / "out.gguf").tensors[target.tensor.name].type == "Q8_0"
    assert parts(tmp_path / "out.gguf")[1]["blk.0.ffn_down.weight"] == ("Q4_K", data[1].tobytes())


def test_rows_that_no_block_fits_are_written_as_floats(tmp_path):
    source = write_model(tmp_path / "model.gguf", tiny_llama(inner=40))
    model, _ = load_model(source, dtype="float32")
    (target,) = find_targets(read_header(source), edited(model), layers=2)
    assert target.ladder() == ["F32"]
    with pytest.raises(InputError, match="rows of 40 weights, cannot be written as Q8_0"):
        target.choose("Q8_0")


def test_weights_that_float16_does_not_hold(llama):
    model, _ = load_model(llama, dtype="float32")
    (change,) = edited(model)
    large = change.current.clone()
    large[0, 0] = 1e6
    (target,) = find_targets(
        read_header(llama), [WeightChange(change.name, change.original, large, large, False)], layers=2
    )
    assert target.ladder() == ["Q8_0", "F32"]
    with pytest.raises(InputError, match="too large for F16"):
        target.pack("F16")


def test_bfloat16_models_add_the_change_to_the_weights_of_the_file(llama):
    model, _ = load_model(llama, dtype="bfloat16")
    (change,) = edited(model)
    header = read_header(llama)
    (target,) = find_targets(header, [change], layers=2)
    expected = header.read(target.tensor.name) + (change.current - change.original.float())
    assert torch.allclose(target.edited, expected, atol=1e-6)
    assert not torch.allclose(target.edited, change.current, atol=1e-6)


def test_another_file_is_refused(llama, tmp_path):
    model, _ = load_model(llama, dtype="float32")
    other = write_model(tmp_path / "other.gguf", tiny_llama(seed=5))
    with pytest.raises(InputError, match=r"blk\.1\.ffn_down\.weight differs from the weight of model\.layers\.1"):
        find_targets(read_header(other), edited(model), layers=2)


def test_a_file_without_the_tensor_is_refused(llama):
    weight = torch.zeros(2, 32)
    change = WeightChange("model.layers.1.mlp.other_proj", weight, weight, weight, False)
    with pytest.raises(ModelError, match=r"no tensor for model\.layers\.1\.mlp\.other_proj"):
        find_targets(read_header(llama), [change], layers=2)


def test_outputs_are_not_replaced_by_accident(llama, tmp_path, monkeypatch):
    header, out = read_header(llama), tmp_path / "out.gguf"
    out.write_text("mine")
    os.link(llama, tmp_path / "linked.gguf")
    for path, message in ((out, "already exists"), (llama, "is the GGUF file"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=message):
            write_gguf(header, path, {})
    with pytest.raises(InputError, match="is the GGUF file"):
        write_gguf(header, tmp_path / "linked.gguf", {}, overwrite=True)
    assert out.read_text() == "mine"
    write_gguf(header, out, {}, overwrite=True)
    assert out.read_bytes() == llama.read_bytes()


@pytest.mark.parametrize("change", ["shorter", "other"])
def test_a_file_that_changes_meanwhile_leaves_no_output(llama, tmp_path, change):
    source = tmp_path / "model.gguf"
    source.write_bytes(llama.read_bytes())
    header = read_header(source)
    if change == "shorter":
        os.truncate(source, header.size - 100)
    else:
        write_model(source, tiny_llama(seed=5), types={"attn_q.weight": Type.F16})
    with pytest.raises(InputError, match=r"became shorter|changed while|damaged"):
        write_gguf(header, tmp_path / "out.gguf", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_a_full_disk_leaves_the_old_file(llama, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    monkeypatch.setattr("rlsedit_fast.export.gguf._copy", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(InputError, match="No space"):
        write_gguf(read_header(llama), out, {}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_text() == "mine"


def damage(content, kind):
    if kind == "truncated data":
        return content[:-200]
    if kind == "truncated header":
        return content[:200]
    if kind == "no magic":
        return b"GGML" + content[4:]
    if kind == "version":
        return content[:4] + struct.pack("<I", 1) + content[8:]
    if kind == "big-endian":
        return content[:4] + struct.pack(">I", 3) + content[8:]
    if kind == "many tensors":
        return content[:8] + struct.pack("<Q", 1 << 60) + content[16:]
    if kind == "long string":
        return content[:24] + struct.pack("<Q", 1 << 62) + content[32:]
    return b""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated data", "is damaged: it has .* incomplete"),
        ("truncated header", "is damaged: its header"),
        ("no magic", "is not a GGUF file"),
        ("version", "has version 1; expected"),
        ("big-endian", "big-endian"),
        ("many tensors", "is damaged: its header"),
        ("long string", "is damaged: its header"),
        ("empty", "is empty"),
    ],
)
def test_damaged_files_are_refused(kind, message, llama, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(llama.read_bytes(), kind))
    with pytest.raises(InputError, match=message):
        load_model(path)


def header_only(path, architecture, tensors=("blk.0.ffn_down.weight",), split=None):
    writer = gguf.GGUFWriter(path, architecture)
    if split:
        writer.add_uint16("split.count", split)
    for name in tensors:
        writer.add_tensor(name, np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_that_cannot_be_edited_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    cases = [
        (header_only(tmp_path / "one-00001-of-00003.gguf", "llama", split=3), InputError, "one of 3 parts"),
        (header_only(tmp_path / "a.gguf", "rwkv7"), ModelError, "cannot load the architecture 'rwkv7'"),
        (header_only(tmp_path / "b.gguf", "llama", ["blk.0.ffn_down_exps.weight"]), ModelError, "no block"),
        (tmp_path / "missing.gguf", InputError, "the file does not exist"),
    ]
    for path, kind, message in cases:
        with pytest.raises(kind, match=message):
            load_model(path)


def test_a_missing_package_is_named(llama, monkeypatch):
    monkeypatch.setattr("rlsedit_fast.models.gguf_files.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(InputError, match="gguf is not installed") as error:
        load_model(llama)
    assert 'pip install "rlsedit-fast[gguf]"' in error.value.hint


def test_a_loaded_file_is_an_ordinary_model(llama, tmp_path):
    (llama.parent / "generation_config.json").write_text("not JSON")
    model, tokenizer = load_model(llama)
    assert model.dtype == torch.float32
    assert model.config._name_or_path == tokenizer.name_or_path == str(llama)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path)
    ids = tokenizer("house", return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, model(ids).logits)
    from_folder, _ = load_model(llama.parent, gguf_file=llama.name)
    assert torch.equal(from_folder(ids).logits, model(ids).logits)
