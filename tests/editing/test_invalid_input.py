"""Arguments of wrong type or value raise with a clear message, before any work, and change nothing."""

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.data.edits import WEIGHT_RANGE
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.requests import find_invalid
from rlsedit_fast.errors import InputError, ModelError, RequestError

EDITS = [
    rf.Edit(prompt, subject, target)
    for prompt, subject, target in [
        ("{} lives in", "Toze Lado Rekuno", "Port Alder"),
        ("{} works as a", "Lado Toze", "mason"),
        ("{} plays the", "Veta Fado Rekuno", "organ"),
        ("{} lives in", "Voluvu Lado", "Old Corran"),
        ("{} speaks", "Toze Fado Veta", "Kubeish"),
    ]
]


def config(**changes):
    base = {
        "layers": (1, 2),
        "contexts": {"prefixes": ("",)},
        "fact_token": "last",
        "prior": {"lam": 1.0},
        "search": {"steps": 2},
    }
    return rf.EditConfig(**base).replace(**changes)


@pytest.fixture
def editor(make_model, tokenizer):
    return rf.Editor(make_model("llama"), tokenizer, config=config())


@pytest.fixture
def edited(editor):
    editor.edit(EDITS)
    return editor


@pytest.fixture
def unchanged(request):
    """Checks after the test that model and history are unchanged."""
    editor = request.getfixturevalue("edited" if "edited" in request.fixturenames else "editor")
    before, history = {k: v.clone() for k, v in editor.model.state_dict().items()}, editor.history()
    yield
    assert all(torch.equal(before[name], value) for name, value in editor.model.state_dict().items())
    assert editor.history() == history


def test_last_selects_the_newest_of_the_given_ids_in_any_order(edited):
    assert edited.select([5, 3], last=1) == [5]
    assert edited.select([5, 2, 4], last=2) == [4, 5]
    assert edited.select([5, 3]) == [5, 3]


def test_equivalent_types_of_ids_and_times_are_accepted(edited):
    assert edited.select(np.int64(3)) == [3]
    assert edited.select(np.array([4, 2])) == [4, 2]
    assert edited.select(range(2, 4)) == [2, 3]
    assert edited.select(since=datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))) == [1, 2, 3, 4, 5]
    assert edited.select(until=datetime.max.replace(tzinfo=timezone(-timedelta(hours=5)))) == [1, 2, 3, 4, 5]
    assert edited.replace(np.int64(2), target="organ").id == 6


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ids": True}, "ids: True"),
        ({"ids": [1, False]}, "ids: False"),
        ({"ids": 2.0}, "ids: 2.0"),
        ({"ids": "12"}, "ids: '12'"),
        ({"ids": [[1]]}, r"ids: \[1\]"),
        ({"last": True}, "last=True"),
        ({"last": "2"}, "last='2'"),
        ({"subject": 3}, "subject=3"),
        ({"since": "2020-01-01"}, "since='2020-01-01': expected a datetime"),
        ({"until": 2020}, "until=2020: expected a datetime"),
    ],
)
def test_invalid_selections_raise(edited, wrong, message):
    with pytest.raises(InputError, match=message):
        edited.select(**wrong)
    if "ids" in wrong:
        for act in (edited.undo, lambda ids: edited.replace(ids, target="organ")):
            with pytest.raises(InputError, match=message):
                act(wrong["ids"])


def test_a_time_without_local_time_raises(edited):
    class Early(datetime):
        def astimezone(self, tz=None):
            raise OverflowError("date value out of range")

    with pytest.raises(InputError, match="pass a datetime with a time zone"):
        edited.select(since=Early(1, 1, 1))


NO_TEXTS = [
    ("one text", "put a single text in a list"),
    (b"one text", "put a single text in a list"),
    (None, "got None"),
    (3, "got 3"),
    ([3], "got 3 at index 0"),
    (["Lado speaks .", None], "got None at index 1"),
]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("wrong", "message"), NO_TEXTS)
def test_anchors_and_protected_texts_must_be_lists_of_texts(editor, wrong, message):
    for act in (editor.protect, *[editor.anchor] * (wrong is not None)):
        with pytest.raises(InputError, match=message):
            act(wrong)
    assert editor._session.moments is None
    assert editor._session.waiting == []


def test_texts_may_come_from_an_iterator(editor):
    assert editor.anchor(text for text in ["Lado speaks .", " ", "Veta speaks ."]) == 8
    assert editor.protect(text for text in ["Lado speaks .", "Veta speaks ."]) == 8


@pytest.mark.usefixtures("unchanged")
def invalid(editor, edits):
    return find_invalid(editor.tokenizer, edits, editor.config, longest=None)


@pytest.mark.parametrize("wrong", [EDITS[0], None, 3, "Lado speaks Kubeish"])
def test_edits_must_be_a_list(editor, wrong):
    adherences, context = [0.9], editor.context
    acts = (editor.edit, editor.calibrate, context.prepare)
    for act in (*acts, lambda e: invalid(editor, e), lambda e: editor.assess(e, adherences)):
        with pytest.raises(RequestError, match="expected a list of edits"):
            act(wrong)
    assert editor.priors == []


def test_edits_may_come_from_an_iterator(editor):
    assert len(editor.calibrate(edit for edit in EDITS)) == 2
    assert invalid(editor, (edit for edit in [*EDITS, EDITS[0].target])) == {
        5: "expected an Edit or a dict with its fields, got str"
    }
    assert [record.target for record in editor.edit(edit for edit in EDITS[:2])] == ["Port Alder", "mason"]
    with pytest.raises(RequestError, match="no edits"):
        editor.edit(edit for edit in [])

    def fails(_records):
        raise InputError("made to fail")

    with pytest.raises(InputError, match="first 1 of 1 edits are applied"):
        editor.edit((edit for edit in EDITS[2:3]), on_batch=fails)


@pytest.mark.usefixtures("unchanged")
def test_a_weight_modified_by_other_code_is_neither_measured_nor_saved(edited, tmp_path):
    """Its deviation may exceed the bound, and an export would not match the history."""
    reads = {
        "deviation": edited.deviation,
        "status": edited.status,
        "changes": edited.changes,
        "delta": lambda: edited.save_delta(tmp_path / "delta.safetensors"),
        "adapter": lambda: edited.save_adapter(tmp_path / "adapter"),
        "checkpoint": lambda: edited.save_pretrained(tmp_path / "model"),
    }
    for read in reads.values():
        read()
    written = sorted(tmp_path.iterdir())
    assert len(written) == 3
    for one in (*tmp_path.glob("*/*"), *tmp_path.glob("*.*")):
        one.unlink()
    weight = edited.context.projections[0].weight
    kept = weight.clone()
    weight.add_(0.01)
    for read in reads.values():
        with pytest.raises(ModelError, match="create a new editor"):
            read()
    assert not [*tmp_path.glob("*/*"), *tmp_path.glob("*.*")]
    weight.copy_(kept)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("weight", [1e39, 1e300, 10**400, 1e-45, float("inf"), -1.0, "1", None, True])
def test_invalid_weights_raise_before_the_first_edit(editor, weight):
    wrong = replace(EDITS[1], weight=weight)
    with pytest.raises(RequestError, match=r"(?s)1 of 2 .*edit 2: weight: .*from 1e-30 to 1e\+30"):
        editor.edit([EDITS[0], wrong])
    assert list(invalid(editor, [EDITS[0], wrong])) == [1]
    with pytest.raises(InputError, match=r"weight: .*from 1e-30 to 1e\+30"):
        editor.protect(["Lado speaks ."], weight=weight)


@pytest.mark.parametrize("weight", WEIGHT_RANGE)
def test_the_smallest_and_largest_weights_work(editor, weight):
    assert len(editor.edit([replace(EDITS[0], weight=weight), EDITS[1]])) == 2


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("span", ["ab", (1,), (0, 1, 2), (0.0, 4.0), (False, True), 3, {0: 1}, ("0", "4"), (4, 4)])
def test_invalid_spans_raise_before_the_first_edit(editor, span):
    with pytest.raises(RequestError, match=r"(?s)1 of 2 .*edit 2: span "):
        editor.edit([EDITS[0], replace(EDITS[1], span=span)])


def test_a_name_that_is_not_a_string_raises_before_the_value_search(editor):
    with pytest.raises(RequestError, match=r"name=.*7.*: expected a string, or None"):
        editor.edit([replace(EDITS[0], name=np.int64(7))])
    assert editor.history() == []


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        (1e-3, r"lam=0.001: with every mu the pilot realizes more than adherence=0\.5"),
        (1e6, r"lam=1000000\.0: the pilot realizes less than adherence=0\.5"),
    ],
)
def test_a_lam_with_which_no_mu_gives_the_adherence_raises(make_model, tokenizer, lam, message):
    """The pilot's key is orthogonal to all anchors, so that only lam matters."""
    editor = rf.Editor(make_model("llama"), tokenizer, config=config(layers=(1,), prior={"lam": lam, "adherence": 0.5}))
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}
    key = request_keys(editor.context.decoder, editor.context.projections, editor.context.prepare(EDITS[:1]))[0][0][
        0, 0
    ]
    key = key.double()  # the moment is then singular up to rounding in float64
    editor._session.moments = [torch.eye(len(key), dtype=key.dtype) - key[:, None] * key / key.square().sum()]
    with pytest.raises(InputError, match=message):
        editor.calibrate(EDITS[:1])
    assert editor.priors == []
    assert all(torch.equal(before[name], value) for name, value in editor.model.state_dict().items())
