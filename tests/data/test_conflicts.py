"""Conflicting and duplicate edits are found despite different spelling, and every dropped edit is reported."""

import json

import pytest

import rlsedit_fast as rf
from rlsedit_fast.data.conflicts import resolve
from rlsedit_fast.errors import InputError, RequestError

EDITS = [
    rf.Edit("The capital of {} is", "France", "Lyon"),  # 0
    rf.Edit("{} plays the", "Miles Davis", "piano"),  # 1
    rf.Edit("The capital of France  is ", "France", "Nice"),  # 2: contradicts 0
    rf.Edit("{} lies in", "France", "Asia"),  # 3
    rf.Edit("The capital of {} is", "France", " Lyon"),  # 4: duplicate of 0
    rf.Edit("{} plays the", "Miles Davis", "piano", name="again"),  # 5: duplicate of 1
]


@pytest.mark.parametrize(
    ("conflicts", "kept", "duplicates", "contradictions", "same_subject"),
    [
        ("later", [3, 4, 5], [(0, 4), (1, 5)], [(2, 4)], [[3, 4]]),
        ("first", [0, 1, 3], [(4, 0), (5, 1)], [(2, 0)], [[0, 3]]),
        ("keep", [2, 3, 4, 5], [(0, 4), (1, 5)], [(2, 4)], [[2, 3, 4]]),
    ],
)
def test_the_conflicts_option_determines_which_edit_is_kept(conflicts, kept, duplicates, contradictions, same_subject):
    resolved = resolve(EDITS, conflicts=conflicts)
    assert resolved.kept == kept
    assert resolved.edits == [EDITS[index] for index in kept]
    assert resolved.duplicates == duplicates
    assert resolved.contradictions == contradictions
    assert resolved.same_subject == same_subject


def test_every_edit_is_kept_or_reported_as_dropped():
    for conflicts in ("later", "first"):
        resolved = resolve(EDITS, conflicts=conflicts)
        dropped = [index for index, _ in (*resolved.duplicates, *resolved.contradictions)]
        assert sorted([*resolved.kept, *dropped]) == list(range(len(EDITS)))


def test_keep_keeps_the_last_edit_of_each_target_in_order():
    edits = [rf.Edit("{} is", "x", target) for target in "abacb"]
    resolved = resolve(edits, conflicts="keep")
    assert [edit.target for edit in resolved.edits] == ["a", "c", "b"]
    assert resolved.duplicates == [(0, 2), (1, 4)]
    assert resolved.contradictions == [(2, 4), (3, 4)]


def test_error_raises_for_contradictions_but_not_for_duplicates():
    with pytest.raises(RequestError, match=r"1 of 6 edits(.|\n)*edit 2 has the target 'Nice', edit 4 ' Lyon'"):
        resolve(EDITS, conflicts="error")
    assert resolve([EDITS[1], EDITS[5], EDITS[3]], conflicts="error").kept == [1, 2]


def test_composed_and_decomposed_letters_are_equal():
    edits = [rf.Edit("{} lives in", "Zo\u00eb", "Z\u00fcrich"), rf.Edit("{} lives in", "Zoe\u0308", "Zu\u0308rich")]
    assert resolve(edits).duplicates == [(0, 1)]
    different = [rf.Edit("{} lives in", "Zo\u00eb", "Bern"), rf.Edit("{} lives in", "Zoe", "Bern")]
    resolved = resolve(different)
    assert (resolved.kept, resolved.duplicates, resolved.same_subject) == ([0, 1], [], [])


def test_invalid_edits_are_kept_for_the_editor_to_reject():
    bad = [
        rf.Edit("{} and {} are", "x", "a"),
        rf.Edit("{} and {} are", "x", "b"),
        rf.Edit("no subject", "y", "a"),
        rf.Edit("{} is", "", "a"),
        rf.Edit("{} is", None, "a"),
        "no edit",
    ]
    resolved = resolve(bad)
    assert resolved.kept == list(range(6))
    assert resolved.contradictions == []


def test_the_report_names_places_and_abbreviates_long_lists():
    places = [f"facts.jsonl:{number}" for number in range(1, 7)]
    assert resolve(EDITS, places=places).describe() == [
        "duplicates dropped: 2",
        "  facts.jsonl:1 dropped: same as facts.jsonl:5",
        "  facts.jsonl:2 dropped: same as facts.jsonl:6",
        "contradictions: 1",
        "  facts.jsonl:3 ('Nice') dropped: facts.jsonl:5 has the same prompt and the target ' Lyon'",
        "subjects with several edits: 1",
        "  'France': facts.jsonl:4, facts.jsonl:5",
    ]
    assert "same as edit 5 (again)" in resolve(EDITS).describe()[2]
    assert "  edit 2 ('Nice') kept: edit 4" in "\n".join(resolve(EDITS, conflicts="keep").describe())
    assert resolve(EDITS[:2]).describe() == []
    many = resolve([rf.Edit("{} is", f"s{i % 50}", "a") for i in range(100)]).describe()
    assert (many[0], many[-1], len(many)) == ("duplicates dropped: 50", "  and 40 more", 12)


def test_the_json_report_is_complete():
    resolved = resolve(EDITS)
    assert json.loads(json.dumps(resolved.to_json())) == {
        "conflicts": "later",
        "given": 6,
        "kept": [3, 4, 5],
        "duplicates": [[0, 4], [1, 5]],
        "contradictions": [[2, 4]],
        "same_subject": [[3, 4]],
    }


def test_invalid_arguments_raise():
    with pytest.raises(InputError, match="conflicts='last'"):
        resolve(EDITS, conflicts="last")
    with pytest.raises(InputError, match="1 places for 6 edits"):
        resolve(EDITS, places=["x"])
    assert resolve([]).edits == []
