"""The public interface of the editor: accepted inputs, and options that are passed on."""

from __future__ import annotations

import inspect
import io
import json
import logging
from dataclasses import replace

import pytest

import rlsedit_fast as rf
from rlsedit_fast.errors import RequestError
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
    assert editor.context.find_invalid(file) == {}
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
        ({"prompt": "{} is", "subject": "Lado"}, "edit 1: missing fields: target"),
        (FACT | {"targt": "x"}, "edit 1: unknown field 'targt'; did you mean 'target'"),
        (FACT | {"case": 3}, "edit 1: unknown field 'case'; expected: prompt, subject, target, weight"),
        (FACT | {"subject": 3}, "edit 1: subject=3: expected a string"),
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
    assert editor.anchor(rf.SelfGenerated(editor.model, length=8), tokens=100) == 100
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

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load_tokenizer)
    shared = {"revision": "v2", "trust_remote_code": True, "token": "secret", "subfolder": "sub"}
    rf.Editor.from_pretrained("some/model", config=CONFIG, dtype="auto", **shared)
    assert seen == {"model": ("some/model", {"dtype": "auto", **shared}), "tokenizer": ("some/model", shared)}


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
    with pytest.raises(rf.InputError, match=r"\[2\] are not ids of active edits \(active: 1, 3\)"):
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "path"}, "model is a str; expected a loaded model"),
        ({"tokenizer": "path"}, "tokenizer is a str; expected a tokenizer"),
        ({"config": {"batch_size": 10}}, "config is a dict; expected an EditConfig"),
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


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "a/b/c"])
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
    with pytest.raises(RequestError, match="exactly once"):
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
    with pytest.raises(RequestError, match=f"edit 0: {field}=.*: expected a tuple of strings"):
        editor.edit([{**FACT, field: wrong}])
    assert editor.context.find_invalid([{**FACT, field: ["Veta lives in"]}]) == {}
