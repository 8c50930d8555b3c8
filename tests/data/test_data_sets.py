"""Published data sets are edited into a model, and every record of a file is an edit or is reported."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import rlsedit_fast as rf
from rlsedit_fast.cli import PARTIAL, main
from rlsedit_fast.data import EditFile, read_edits, resolve
from rlsedit_fast.models.tokens import encode, fill

DATA = Path(os.environ.get("RLSEDIT_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}; set RLSEDIT_DATA to its folder")

# These records include contradictory edits and two records without a target.
COUNTERFACT, ZSRE = slice(8000, 9000), slice(530, 730)
VOCABULARY = 1500
CONFIG = {
    "layers": (0,),
    "batch_size": 200,
    "contexts": {"prefixes": ("",)},
    "search": {"kl_prompts": (), "steps": 2},
}
WIDTH = 512  # of the keys: larger than a batch


@dataclass(frozen=True)
class Records:
    """A part of each file, as written and as read."""

    count: int
    files: tuple[EditFile, EditFile]

    @property
    def edits(self):
        return [edit for file in self.files for edit in file.edits]

    @property
    def places(self):
        return [place for file in self.files for place in file.places]

    @property
    def skipped(self):
        return [skipped for file in self.files for skipped in file.skipped]


def raw(name, part):
    return json.loads((DATA / name).read_text(encoding="utf-8"))[part]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    count, files = 0, []
    for name, part in (("counterfact-10k.json", COUNTERFACT), ("zsre-1k.json", ZSRE)):
        content = raw(name, part)
        count += len(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        files.append(read_edits(folder / name, strict=False))
    return Records(count, (files[0], files[1]))


def texts(records):
    return [f"{fill(edit.prompt, edit.subject)[0]} {edit.target}" for edit in records.edits]


def byte_level(records, _folder):
    """A tokenizer like that of GPT-2, without special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(records), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece(records, folder):
    """A tokenizer like that of Llama, with a BOS token and a space before every text."""
    from transformers import LlamaTokenizer

    written = io.BytesIO()
    pytest.importorskip("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(texts(records)),
        model_writer=written,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=True)


@pytest.fixture(scope="module")
def byte_level_tokenizer(records):
    return byte_level(records, None)


@pytest.fixture(scope="module", params=["byte_level", pytest.param("sentencepiece", marks=pytest.mark.soak)])
def any_tokenizer(request, records, tmp_path_factory):
    if request.param == "byte_level":
        return request.getfixturevalue("byte_level_tokenizer")
    return sentencepiece(records, tmp_path_factory.mktemp("tokenizer"))


def make_model(tokenizer, positions=256):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if tokenizer.bos_token_id is None:
        sizes = {"n_embd": 32, "n_inner": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": positions}
        config = GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=None, eos_token_id=None)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).eval()


def decoded(tokenizer, ids):
    """Decodes ids, without the space that sentencepiece adds before a text."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if tokenizer.bos_token_id is None else text.removeprefix(" ")


def test_every_subject_is_located_at_its_last_token(records, any_tokenizer):
    counterfact, zsre = records.files
    assert (len(counterfact.edits), len(zsre.edits)) == (1000, 198)
    for edit in records.edits:
        filled, start = fill(edit.prompt, edit.subject)
        row = encode(any_tokenizer, edit.prompt, edit.subject, target=edit.target)
        expected = filled[: start + len(edit.subject.strip())]
        assert expected.endswith(edit.subject.strip())
        assert decoded(any_tokenizer, row.ids[: row.lookup + 1]) == expected
        assert decoded(any_tokenizer, row.ids) == f"{filled} {edit.target.strip()}"


def test_every_record_is_an_edit_or_is_reported(records, any_tokenizer):
    resolved = resolve(records.edits, places=records.places)
    dropped = [index for index, _ in (*resolved.duplicates, *resolved.contradictions)]
    model = make_model(any_tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    editor = rf.Editor(model, any_tokenizer, config=rf.EditConfig(**CONFIG))
    applied = editor.edit(resolved.edits)

    assert (len(records.skipped), len(dropped)) == (2, 3), (
        "precondition: the records include invalid and conflicting ones"
    )
    assert len(applied) + len(records.skipped) + len(dropped) == records.count == 1200
    assert all(skipped.place and skipped.field == "alt" and skipped.reason for skipped in records.skipped)
    assert sorted([*resolved.kept, *dropped]) == list(range(len(records.places)))
    assert [(r.prompt, r.subject, r.target) for r in applied] == [
        (e.prompt, e.subject, e.target) for e in resolved.edits
    ]
    assert editor.history() == applied, "precondition: no edit replaces another"
    assert {record.state for record in applied} == {"active"}
    # Single edits may fail: in a random model, subjects with the same last token have nearly equal keys.
    assert sum(record.realized for record in applied) > 0.1 * len(applied)
    together = {tuple(sorted((r.id, *r.joint_with))) for r in applied if r.joint_with}
    places = {index: number for number, index in enumerate(resolved.kept, start=1)}
    assert together == {tuple(places[index] for index in group) for group in resolved.same_subject}

    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == 1
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_the_command_line_reports_every_record(byte_level_tokenizer, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    content = raw("counterfact-10k.json", slice(50))
    content[3]["target_new"] = " "
    content[17]["subject"] = "someone else"
    content[20]["prompt"] = "word " * 100 + content[20]["prompt"]  # longer than the model supports
    content[31] |= {key: content[30][key] for key in ("prompt", "subject")}  # contradicts record 30
    content[41] = content[40] | {"case_id": content[41]["case_id"]}
    (tmp_path / "facts.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (tmp_path / "settings.json").write_text(json.dumps(CONFIG | {"batch_size": 16}))
    make_model(byte_level_tokenizer, positions=64).save_pretrained(tmp_path / "base")
    byte_level_tokenizer.save_pretrained(tmp_path / "base")

    arguments = ["edit", "--model", tmp_path / "base", "--edits", tmp_path / "facts.json", "--skip-bad"]
    outputs = ["--json", tmp_path / "report.json", "--out", tmp_path / "out", "--no-anchors"]
    command = [*arguments, *outputs, "--config", tmp_path / "settings.json"]
    assert main([str(argument) for argument in command]) == PARTIAL
    report, stderr = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().err

    conflicts = report["conflicts"]
    dropped = [conflicts["places"][one] for one, _ in (*conflicts["duplicates"], *conflicts["contradictions"])]
    applied = [record["place"] for record in report["records"]]
    left_out = {entry["place"]: entry["reason"] for entry in report["left_out"]}
    numbers = [int(place.partition("(record ")[2].rstrip(")")) for place in (*applied, *left_out, *dropped)]
    assert sorted(numbers) == list(range(1, 51)), "each record of the file is in exactly one of the three lists"
    assert (report["made"], report["edits"], report["not_made"]) == (45, 45, [])
    for number, reason in ((4, "target_new"), (18, "someone else"), (21, "the model supports 64")):
        (message,) = (text for place, text in left_out.items() if place.endswith(f"(record {number})"))
        assert reason in message
        assert message in stderr
    assert [place.partition(" ")[2] for place in dropped] == ["(record 41)", "(record 31)"]
    assert len(report["not_converged"]) == sum(not record["search_converged"] for record in report["records"]) > 0

    base, out = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("base", "out"))
    assert [name for name, value in out.items() if not torch.equal(value, base[name])] == [
        "transformer.h.0.mlp.c_proj.weight"
    ]
