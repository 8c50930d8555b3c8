"""What is given as what it is not is refused in words before anything is done, and changes nothing."""

from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.errors import InputError

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
    base = {"layers": (1, 2), "context_prefixes": ("",), "fact_token": "last", "lam": 1.0, "search_steps": 2}
    return rf.EditConfig(**{**base, **changes})


@pytest.fixture
def editor(make_model, tokenizer):
    return rf.Editor(make_model("llama"), tokenizer, config=config())


@pytest.fixture
def edited(editor):
    editor.edit(EDITS)
    return editor


@pytest.fixture
def unchanged(request):
    """Afterwards model and history must be as they were."""
    editor = request.getfixturevalue("edited" if "edited" in request.fixturenames else "editor")
    before, history = {k: v.clone() for k, v in editor.model.state_dict().items()}, editor.history()
    yield
    assert all(torch.equal(before[name], value) for name, value in editor.model.state_dict().items())
    assert editor.history() == history


def test_the_last_of_some_ids_are_the_newest_in_whatever_order_they_are_named(edited):
    assert edited.select([5, 3], last=1) == [5]
    assert edited.select([5, 2, 4], last=2) == [4, 5]
    assert edited.select([5, 3]) == [5, 3]


def test_ids_and_times_of_other_kinds_that_say_the_same_are_taken(edited):
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
        ({"ids": True}, "True is none"),
        ({"ids": [1, False]}, "False is none"),
        ({"ids": 2.0}, "2.0 is none"),
        ({"ids": "12"}, "'12' is none"),
        ({"ids": [[1]]}, r"\[1\] is none"),
        ({"last": True}, "last=True"),
        ({"last": "2"}, "last='2'"),
        ({"subject": 3}, "subject=3"),
        ({"since": "2020-01-01"}, "since='2020-01-01': expected a datetime"),
        ({"until": 2020}, "until=2020: expected a datetime"),
    ],
)
def test_what_names_no_edits_is_refused(edited, wrong, message):
    for act in (edited.select, edited.undo, lambda **given: edited.replace(**given, target="organ")):
        with pytest.raises(InputError, match=message):
            act(**wrong)


def test_a_time_that_has_no_local_one_is_refused(edited):
    class Early(datetime):
        def astimezone(self, tz=None):
            raise OverflowError("date value out of range")

    with pytest.raises(InputError, match="give it a time zone"):
        edited.select(since=Early(1, 1, 1))
