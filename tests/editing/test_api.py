"""The public interface of the editor: accepted inputs, and options that are passed on."""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.errors import RequestError
from rlsedit_fast.models import load_model
from rlsedit_fast.statistics.cache import cache_path

CONFIG = rf.EditConfig(
    layers=(1,), contexts={"prefixes": ("",)}, prior={"lam": 1.0}, search={"steps": 2}, fact_token="last"
)
FACT = {"prompt": "{} lives in", "subject": "Lado Toze", "target": "Port Alder"}


@pytest.fixture
def editor(make_model, tokenizer):
    return rf.Editor(make_model("llama"), tokenizer, config=CONFIG)


def test_edits_may_be_dicts(editor):
    (record,) = editor.edit([FACT | {"name": "first", "weight": 2.0, "paraphrases": ["Lado Toze is at home in"]}])
    assert (record.subject, record.target, record.name, record.weight) == ("Lado Toze", "Port Alder", "first", 2.0)
    assert editor._session.ledger.edits([1]) == [
        rf.Edit(**FACT, name="first", weight=2.0, paraphrases=("Lado Toze is at home in",))
    ]


def test_a_file_of_edits_is_a_list_of_edits(editor):
    file = rf.read_edits(io.StringIO("\n".join(json.dumps(FACT | {"id": at}) for at in (1, 2))))
    assert len(editor.context.prepare(file)) == 2
    found = rf.resolve(file)
    assert (found.edits, found.places) == ([file[1]], ["<file>:1", "<file>:2"])
    editor.calibrate(file)
    assert [record.name for record in editor.edit(file)] == ["1", "2"]


def test_resolve_accepts_dicts(editor):
    assert rf.resolve([FACT, FACT | {"target": "Old Corran"}]).edits == [rf.Edit(**FACT | {"target": "Old Corran"})]
    with pytest.raises(RequestError, match="edit 1: unknown field 'targt'; did you mean 'target'"):
        rf.resolve([FACT, FACT | {"targt": "x"}])
    with pytest.raises(RequestError, match="put a single edit in a list"):
        rf.resolve(FACT)


def test_white_space_around_an_edit_is_ignored_and_reported(editor, caplog):
    spaced = rf.Edit(" {} lives in \t", " Lado Toze ", " Port Alder\n", span=(1, 5))
    assert spaced.trimmed() == rf.Edit(**FACT, span=(0, 4))
    assert rf.Edit("Where is {}?\n ", "Lado", "x").trimmed().prompt == "Where is {}?\n"
    plain, same = editor.context.prepare([rf.Edit(**FACT, span=(0, 4)), spaced])
    assert plain == same
    assert caplog.records == []
    with caplog.at_level(logging.INFO, logger="rlsedit_fast"):
        (record,) = editor.edit([spaced.to_dict()])
    assert (record.prompt, record.subject, record.target) == tuple(FACT.values())
    assert "white space around the prompt, subject or target of 1 edits is ignored" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "{} is", "subject": "Lado"}, "edit 2: missing fields: target; add them"),
        ({"prompt": "{} is", "target": "x"}, "missing fields: subject; name the words of the prompt"),
        (FACT | {"targt": "x"}, "edit 2: unknown field 'targt'; did you mean 'target'"),
        (FACT | {"case": 3}, "edit 2: unknown field 'case'; expected: prompt, subject, target, weight"),
        (FACT | {"subject": 3}, "edit 2: subject=3: expected a string"),
    ],
)
def test_invalid_dicts_raise_before_the_first_edit(editor, wrong, message):
    with pytest.raises(RequestError, match=message):
        editor.edit([FACT, wrong])
    assert editor.history() == []


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Lado speaks Kubeish .\n\nVeta plays the organ .\n")
    return path


def test_anchors_are_read_from_a_file(editor, text, tmp_path, caplog):
    editor.statistics(rf.TextFile(text)).save(tmp_path / "statistics.safetensors")
    for given in (text, str(text), rf.TextFile(text), text.open(), tmp_path / "statistics.safetensors"):
        caplog.clear()
        assert editor.anchor(given) == 11
        assert "the anchors have 11 tokens, and keys have 96 dimensions" in caplog.text
    assert editor.anchors.startswith("11 tokens: text.txt, sha256")
    assert editor.anchor(text, tokens=7) == 7
    caplog.clear()
    assert editor.anchor(rf.SelfGenerated(editor.model, length=8), tokens=150) == 150
    assert caplog.text == ""


def test_names_of_files_are_not_anchors(editor, text, tmp_path):
    for given, message in (
        (tmp_path / "none.txt", "there is no such file; pass the path of a text file, or put a single text in a list"),
        (tmp_path, "there is no such file"),
        ([str(text)], "these are names of files, not texts\nhint: pass a single path without a list"),
        (rf.SelfGenerated(editor.model), "has no end; pass tokens="),
    ):
        with pytest.raises(rf.InputError, match=message):
            editor.anchor(given)
    with pytest.raises(rf.InputError, match="tokens=5: key statistics have a fixed number of tokens"):
        editor.anchor(tokens=5)
    assert editor.anchors is None


def test_anchors_are_found_in_the_cache(make_model, tokenizer, text, tmp_path, monkeypatch, caplog):
    editor = rf.Editor(make_model("llama"), tokenizer, config=CONFIG.replace(prior={"mu": 2.0}))
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    assert editor.anchor() == 0
    assert f"in {tmp_path / 'cache'}; collect them with `rlsedit statistics`" in caplog.text
    found = editor.statistics(rf.TextFile(text))
    found.save(cache_path(found.fingerprint, editor.layers, found.source, None))
    assert editor.anchor() == 11
    assert editor.anchors == f"11 tokens: {found.source}"
    (prior,) = editor.calibrate([FACT])
    assert prior.mu == 2.0
    assert "no anchors" not in caplog.text


def test_a_single_dict_is_not_a_list_of_edits(editor):
    with pytest.raises(RequestError, match="put a single edit in a list"):
        editor.edit(FACT)


def test_an_edit_survives_a_dict():
    edit = rf.Edit(**FACT, span=(0, 4), neighborhood=("Veta lives in",))
    assert rf.Edit.from_dict(edit.to_dict()) == edit
    assert edit.filled_prompt == "Lado Toze lives in"


def test_options_of_the_checkpoint_reach_the_tokenizer(make_model, tokenizer, monkeypatch):
    import transformers

    model, seen = make_model("llama"), {}

    def load_model(path, **options):
        seen["model"] = (path, options)
        return model

    def load_tokenizer(path, **options):
        seen["tokenizer"] = (path, options)
        return tokenizer

    def load_config(path, **options):
        seen["config"] = (path, options)
        return model.config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", load_config)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load_tokenizer)
    shared = {"revision": "v2", "trust_remote_code": True, "token": "secret", "subfolder": "sub"}
    rf.Editor.from_pretrained("some/model", config=CONFIG, dtype="auto", **shared)
    others = dict.fromkeys(("config", "tokenizer"), ("some/model", shared))
    assert seen == {"model": ("some/model", {"dtype": "auto", **shared}), **others}


def test_selected_edits_are_undone_and_replaced(editor):
    editor.edit([FACT, {**FACT, "subject": "Veta Fado"}, {**FACT, "subject": "Rekuno"}])
    assert [record.id for record in editor.undo(editor.select(subject="Veta  Fado"))] == [2]
    (record,) = editor.replace(editor.select(last=1), "organ")
    assert (record.id, record.target) == (4, "organ")
    assert [one.state for one in editor.history()] == ["active", "undone", "replaced", "active"]


def test_edits_are_selected_by_name(editor):
    with pytest.raises(rf.InputError, match=r"name 'home': no active edit has a name \(active: none\)"):
        editor.select(name="home")
    editor.edit(
        [FACT | {"name": "home"}, FACT | {"subject": "Veta Fado", "name": "home"}, FACT | {"subject": "Rekuno"}]
    )
    assert editor.select(name="home") == [1, 2]
    assert editor.select(name="home", subject="Veta Fado") == [2]
    editor.undo(editor.select(name="home", last=1))
    assert editor.select(name="home") == [1]
    for name, message in (
        ("hone", "no edit has this name; similar names: 'home'"),
        ("other", "no edit has this name; names of active edits: 'home'"),
        (3, "name=3: expected a string"),
    ):
        with pytest.raises(rf.InputError, match=message):
            editor.select(name=name)
    with pytest.raises(rf.InputError, match=r"ids 2 \(undone\): not active \(active: 1, 3\)"):
        editor.undo(2)
    editor.undo(1)
    with pytest.raises(rf.InputError, match=r"the edits with this name are not active: 1 \(undone\), 2 \(undone\)"):
        editor.select(name="home")


def test_the_package_has_a_version_and_exports_its_errors():
    assert rf.__version__
    errors = [name for name in rf.__all__ if name.endswith("Error")]
    assert all(issubclass(getattr(rf, name), rf.RLSEditError) for name in errors)
    defined = {
        name for name, value in vars(rf.errors).items() if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert defined == set(errors)


@pytest.mark.parametrize("field", ["paraphrases", "neighborhood"])
def test_a_single_text_is_not_read_as_characters(editor, field):
    with pytest.raises(RequestError, match=f"{field}='abc': expected a tuple of strings"):
        editor.edit([rf.Edit(FACT["prompt"], FACT["subject"], FACT["target"], **{field: "abc"})])
    assert editor.history() == []


def test_a_checkpoint_is_not_saved_to_a_file(editor, tmp_path):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(rf.InputError, match="is a file; pass a folder"):
        editor.save_pretrained(tmp_path / "text.txt")


def test_existing_outputs_are_overwritten_only_if_asked(editor, tmp_path, monkeypatch):
    editor.edit([FACT])
    saves = {"model": editor.save_pretrained, "delta": editor.save_delta, "adapter": editor.save_adapter}
    for name, save in saves.items():
        save(tmp_path / name)
        with pytest.raises(rf.InputError, match=r"(?s)already exists.*overwrite=True"):
            save(tmp_path / name)
        save(tmp_path / name, overwrite=True)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(_folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(editor.tokenizer, "save_pretrained", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        editor.save_pretrained(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(saves)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "path"}, "model is a str; expected a loaded model"),
        ({"tokenizer": "path"}, "tokenizer is a str; expected a tokenizer"),
        ({"config": {"batch_size": 10}}, "config is a dict; expected an EditConfig"),
        (
            {"model": SimpleNamespace(model=torch.nn.Linear(1, 1), tokenizer="t")},
            r"model is a SimpleNamespace, which contains a model.*Editor\(pipeline.model, pipeline.tokenizer\)",
        ),
    ],
)
def test_arguments_of_other_types_raise(make_model, tokenizer, wrong, message, tmp_path):
    for store in (None, tmp_path / "store"):
        given = {"model": make_model("llama"), "tokenizer": tokenizer, "config": CONFIG, "store": store} | wrong
        with pytest.raises(rf.InputError, match=message):
            rf.Editor(given.pop("model"), given.pop("tokenizer"), **given)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_a_head_raises(make_model, tokenizer, family):
    with pytest.raises(rf.ModelError, match="has no language model head"):
        rf.Editor(make_model(family).base_model, tokenizer, config=CONFIG)


def test_swapped_arguments_and_encoder_decoder_models_raise(make_model, tokenizer):
    model = make_model("llama")
    with pytest.raises(rf.InputError, match="swap them"):
        rf.Editor(tokenizer, model, config=CONFIG)
    model.config.is_encoder_decoder = True
    with pytest.raises(rf.ModelError, match="encoder-decoder models are not supported"):
        rf.Editor(model, tokenizer, config=CONFIG)


def saved(model, tokenizer, folder):
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


def other_tokenizer(size):
    """A tokenizer with the tokens of the fixture in another order."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from rlsedit_fast.world.tokens import build_tokenizer

    words = sorted(build_tokenizer().get_vocab())[:size]
    vocab = {word: at for at, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")))


def test_a_smaller_tokenizer_of_another_model_raises(make_model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved(make_model("llama"), tokenizer, tmp_path))
    with pytest.raises(rf.InputError, match="tokens have other ids than in the tokenizer of"):
        rf.Editor(model, other_tokenizer(200), config=CONFIG)
    rf.Editor(model, tokenizer, config=CONFIG)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<one>", "<two>"])
    model.resize_token_embeddings(384)
    rf.Editor(model, tokenizer, config=CONFIG)
    model.config._name_or_path = ""
    model.resize_token_embeddings(4096)
    with pytest.raises(rf.InputError, match="the tokenizer has only 323 tokens and the model 4096 embeddings"):
        rf.Editor(model, tokenizer, config=CONFIG)


def test_other_ends_of_texts_raise_unless_only_one_differs(make_model, tokenizer):
    model = make_model("llama")
    model.config.bos_token_id, model.config.eos_token_id = 20, [21, 22]
    with pytest.raises(rf.InputError, match="bos_token_id 1 in the tokenizer and 20 in the model, eos_token_id 2"):
        rf.Editor(model, tokenizer, config=CONFIG)
    model.config.bos_token_id = tokenizer.bos_token_id
    rf.Editor(model, tokenizer, config=CONFIG)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json, so it is not a checkpoint"),
        (["inner/config.json"], "such as .*inner"),
        (["adapter_config.json"], "contains an adapter, not a model"),
        (["config.json", "model.safetensors"], "has no tokenizer files, such as tokenizer.json"),
        (["config.json", "tokenizer.json"], "cannot be loaded: "),
    ],
)
def test_folders_that_are_no_checkpoints_raise(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    with pytest.raises(rf.InputError, match=message):
        load_model(tmp_path)


def test_encoder_decoder_checkpoints_raise_before_the_weights_are_loaded(tmp_path):
    (tmp_path / "tokenizer.json").write_text("")
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(rf.ModelError, match="t5: encoder-decoder models are not supported"):
        load_model(tmp_path)


def test_editor_and_history_print_what_they_contain(editor):
    editor.edit([FACT, FACT | {"subject": "Rekuno <b>"}])
    editor.undo(1)
    assert repr(editor) == "Editor(LlamaForCausalLM, layers 1, 1 of 2 edits active, no store)"
    history = editor.history()
    assert isinstance(history, list)
    title, first, _ = str(history).splitlines()
    assert title.split() == ["id", "state", "prompt", "->", "target", "rank", "nll", "realized"]
    assert "undone" in first
    assert "Lado Toze lives in -> Port Alder" in first
    assert "<td>Rekuno &lt;b&gt; lives in -&gt; Port Alder</td>" in history._repr_html_()
    assert f"{41 * 2 - 40} more" in repr(type(history)([*history] * 41))


def test_progress_bars_show_the_step_within_a_batch(editor):
    from rlsedit_fast.activity import activity_shown

    steps = []
    bar = SimpleNamespace(set_postfix_str=lambda text, refresh=True: steps.append(text))
    with activity_shown(bar):
        editor.edit([FACT])
    assert steps[0].startswith(("value search, step 1 of at most 2", "building the states", "calibrating"))
    assert steps[-1] == ""


def test_steps_report_the_time_left(monkeypatch):
    from rlsedit_fast import activity

    clock, shown = iter((0.0, 1.0, 31.0)), []
    monkeypatch.setattr(activity.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(activity, "report_activity", shown.append)
    steps = activity.Steps("value search", 4)
    steps.report("9 values")
    steps.report("7 values")
    assert shown == [
        "value search, step 1 of at most 4, 9 values",
        "value search, step 2 of at most 4, 7 values, at most 1:30 left",
    ]


def test_a_name_that_cannot_be_downloaded_raises_with_the_reason_last():
    with pytest.raises(rf.InputError, match=r"(?s)could be downloaded .* Reason: .*") as raised:
        load_model("no-such-owner/no-such-model", local_files_only=True)
    assert "Repo id" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "dtype 'fp16': expected .*; did you mean float16?"),
        ({"dtype": "bfloat"}, "did you mean bfloat16?"),
        ({"dtype": 16}, "dtype 16: expected one of auto, float32"),
        ({"device": "gpu"}, "device 'gpu' is unknown; expected cpu, cuda"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
    ],
)
def test_unknown_dtypes_and_devices_raise_before_the_model_is_loaded(options, message):
    with pytest.raises(rf.InputError, match=message):
        rf.Editor.from_pretrained("/nowhere/model", **options)


def test_a_missing_folder_names_a_similar_one(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("")
    with pytest.raises(rf.InputError, match=r"the folder does not exist; did you mean '.*checkpoint'\?"):
        load_model(tmp_path / "checkpont")


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "a/b/c", "my model", "~/model"])
def test_a_missing_folder_raises(path):
    with pytest.raises(rf.InputError, match=f"model '{path}': the folder does not exist"):
        rf.Editor.from_pretrained(path)


def test_wrong_types_of_options_raise_before_a_change(editor, tmp_path):
    with pytest.raises(rf.InputError, match="on_batch=3"):
        editor.edit([FACT], on_batch=3)
    assert editor.history() == []
    editor.edit([FACT])
    with pytest.raises(rf.InputError, match="budget='a'"):
        editor.status(budget="a")
    with pytest.raises(rf.InputError, match="rank='4'"):
        editor.save_adapter(tmp_path / "adapter", rank="4")
    with pytest.raises(rf.InputError, match="is a folder; pass the path of a file"):
        editor.save_delta(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_change_through_data_is_detected(editor):
    editor.edit([FACT])
    weight = editor.model.get_submodule("model.layers.1.mlp.down_proj").weight
    weight.data += 1e-3
    changed = weight.detach().clone()
    for operation in (lambda: editor.edit([{**FACT, "subject": "Rekuno"}]), lambda: editor.undo(1)):
        with pytest.raises(rf.ModelError, match="modified by other code"):
            operation()
    assert weight.equal(changed)


def test_the_subject_is_filled_into_paraphrases(editor):
    edit = rf.Edit(**FACT, paraphrases=("The home of {} is", "Lado Toze is at home in"))
    assert edit.filled_paraphrases == ("The home of Lado Toze is", "Lado Toze is at home in")
    spaced = replace(edit, subject=" Lado Toze ", prompt="Today Lado Toze lives in")
    assert spaced.filled_paraphrases == edit.filled_paraphrases
    assert spaced.filled_prompt == "Today Lado Toze lives in"
    with pytest.raises(RequestError, match=r"contains {} twice"):
        editor.edit([replace(edit, paraphrases=("{} and {} live in",))])


def test_a_batch_that_is_not_stated_is_taken_back_with_all_it_changed(make_model, tokenizer, tmp_path):
    config = CONFIG.replace(batch_size=1, refine=0)
    with rf.Editor(make_model("llama"), tokenizer, config=config, store=tmp_path / "store") as editor:
        editor.edit([FACT])
        history, changes = editor.history(), [change.current.clone() for change in editor.changes()]
        impossible = {**FACT, "target": "Toze Lado Toze Lado Toze Lado Toze Lado Toze Lado Toze Lado"}
        with pytest.raises(rf.UnstatedError, match="1 of 1 edits of a batch"):
            editor.edit([impossible], require_stated=True)
        assert editor.history() == history
        assert all(change.current.equal(was) for change, was in zip(editor.changes(), changes, strict=True))
        (record,) = editor.edit([{**FACT, "subject": "Rekuno"}])
        assert record.id == 2
    with rf.Editor(make_model("llama"), tokenizer, store=tmp_path / "store") as editor:
        assert [record.id for record in editor.history()] == [1, 2]


@pytest.mark.parametrize("field", ["paraphrases", "neighborhood"])
@pytest.mark.parametrize("wrong", [None, 3, "Lado Toze is at home in", {"Lado Toze is at home in"}])
def test_texts_of_the_evaluation_are_a_list_or_a_tuple(editor, field, wrong):
    with pytest.raises(RequestError, match=f"{field}=.*: expected a tuple of strings"):
        editor.edit([{**FACT, field: wrong}])
    assert len(editor.context.prepare([{**FACT, field: ["Veta lives in"]}])) == 1
