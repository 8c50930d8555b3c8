"""Every record of a file becomes an edit or is reported with its place, field and reason."""

import json
import os
from pathlib import Path

import pytest

import rlsedit_fast as rf
from rlsedit_fast.data import edits_from_lists, read_edits
from rlsedit_fast.errors import InputError, RequestError

DATA = Path(os.environ.get("RLSEDIT_DATA", Path(__file__).parents[3] / "shared" / "data"))

PLAIN = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}
ORIGINAL = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "subject": "Miles Davis",
        "target_new": {"str": "piano", "id": "Q5994"},
        "target_true": {"str": "trumpet", "id": "Q8338"},
    },
    "paraphrase_prompts": ["Rain fell. Miles Davis is known for the"],
    "neighborhood_prompts": ["Chet Baker plays the", "Clifford Brown plays the"],
    "attribute_prompts": [],
}
FLAT = {
    "case_id": 3,
    "prompt": "The mother tongue of Ada Bell is",
    "target_new": "English",
    "subject": "Ada Bell",
    "ground_truth": "French",
    "rephrase_prompt": "Where Ada Bell is from, people speak",
    "locality_prompt": "Jean Roc is a speaker of",
    "locality_ground_truth": "French",
}
ZSRE = {
    "subject": "WEFS",
    "src": "When was WEFS established?",
    "pred": "1998",
    "rephrase": "When has WEFS been established?",
    "alt": "1997",
    "answers": ["1987", "1988"],
    "loc": "nq question: who voiced the duck",
    "loc_ans": "Clarence",
}
MQUAKE = {
    "case_id": 12,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "subject": "Ada Bell",
            "target_new": {"str": "Croatia"},
            "question": "Of which country is Ada Bell a citizen?",
        },
        {
            "prompt": "The capital of {} is",
            "subject": "Croatia",
            "target_new": {"str": "Split"},
            "question": "What is the capital of Croatia?",
        },
    ],
    "questions": ["What is the capital of Ada Bell's country?"],
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="facts.json"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
        return path

    return write


def lines(*records):
    return "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)


def test_every_field_of_a_line_is_read(write):
    full = {
        **PLAIN,
        "name": 41,
        "weight": 2,
        "paraphrases": ["{} has the capital", "France's capital is"],
        "neighborhood": ["The capital of Spain is"],
        "span": [15, 21],
    }
    read = read_edits(write(lines(full, "", "  ", {**PLAIN, "name": None, "weight": None}), "facts.jsonl"))
    assert read.edits == [
        rf.Edit(
            "The capital of {} is",
            "France",
            "Lyon",
            weight=2.0,
            name="41",
            span=(15, 21),
            paraphrases=("{} has the capital", "France's capital is"),
            neighborhood=("The capital of Spain is",),
        ),
        rf.Edit("The capital of {} is", "France", "Lyon"),
    ]
    assert read.places == ["facts.jsonl:1", "facts.jsonl:4"]
    assert (read.skipped, read.format, read.unread) == ([], "edits", [])


def test_both_forms_of_counterfact_are_read(write):
    original = read_edits(write([ORIGINAL]))
    assert original.edits == [
        rf.Edit(
            "{} plays the",
            "Miles Davis",
            "piano",
            name="7",
            paraphrases=("Rain fell. Miles Davis is known for the",),
            neighborhood=("Chet Baker plays the", "Clifford Brown plays the"),
        )
    ]
    assert original.format == "counterfact"
    assert original.unread == [
        "attribute_prompts",
        "requested_rewrite.relation_id",
        "requested_rewrite.target_new.id",
        "requested_rewrite.target_true",
    ]
    flat = read_edits(write(lines(FLAT, FLAT), "facts.jsonl"))
    assert flat.edits[1] == rf.Edit(
        "The mother tongue of Ada Bell is",
        "Ada Bell",
        "English",
        name="3",
        paraphrases=("Where Ada Bell is from, people speak",),
        neighborhood=("Jean Roc is a speaker of",),
    )
    assert flat.unread == ["ground_truth", "locality_ground_truth"]


def test_zsre_target_selects_the_field(write):
    path = write([ZSRE])
    expected = {"subject": "WEFS", "paraphrases": ("When has WEFS been established?",), "neighborhood": (ZSRE["loc"],)}
    assert read_edits(path).edits == [rf.Edit("When was WEFS established?", target="1997", **expected)]
    other = read_edits(path, zsre_target="answers")
    assert other.edits == [rf.Edit("When was WEFS established?", target="1987", **expected)]
    assert other.format == "zsre"
    assert other.unread == ["alt", "loc_ans", "pred"]
    with pytest.raises(
        RequestError, match=r"facts\.json:2 \(record 1\): answers: expected a list of at least one entry"
    ):
        read_edits(write([{**ZSRE, "answers": []}]), zsre_target="answers")


def test_each_mquake_rewrite_is_an_edit(write):
    read = read_edits(write([MQUAKE, MQUAKE]))
    assert read.edits[:2] == [
        rf.Edit(
            "{} is a citizen of",
            "Ada Bell",
            "Croatia",
            name="12.1",
            paraphrases=("Of which country is Ada Bell a citizen?",),
        ),
        rf.Edit(
            "The capital of {} is", "Croatia", "Split", name="12.2", paraphrases=("What is the capital of Croatia?",)
        ),
    ]
    assert len(read.edits) == 4
    assert read.places[1] == "facts.json:2 (record 1), rewrite 2"
    assert (read.format, read.unread) == ("mquake", ["questions"])
    bad = {**MQUAKE, "requested_rewrite": [MQUAKE["requested_rewrite"][0], {"prompt": "{} is", "subject": "x"}, "y"]}
    read = read_edits(write([bad]), strict=False)
    assert [edit.name for edit in read.edits] == ["12.1"]
    assert [str(skipped) for skipped in read.skipped] == [
        "facts.json:2 (record 1), rewrite 2: requested_rewrite.target_new: missing",
        "facts.json:2 (record 1), rewrite 3: requested_rewrite: expected a JSON object, got 'y'",
    ]
    with pytest.raises(RequestError, match="requested_rewrite: expected a list"):
        read_edits(write([{**MQUAKE, "requested_rewrite": []}]))


@pytest.mark.parametrize(
    ("record", "format"), [(PLAIN, "edits"), (ORIGINAL, "counterfact"), (FLAT, "counterfact"), (ZSRE, "zsre")]
)
def test_format_is_detected_from_fields_not_file_name(write, record, format):
    assert read_edits(write([record], "zsre-mquake.jsonl")).format == format
    assert read_edits(write(lines("{}", record), "counterfact.json"), strict=False).format == format


def test_explicit_format_is_used(write):
    with pytest.raises(RequestError, match=r"read as 'edits': 1 of 1(.|\n)*unknown field; did you mean 'target'"):
        read_edits(write([FLAT]), format="edits")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target": None}, "target: missing"),
        ({"targt": "Nice", "target": None}, "targt: unknown field; did you mean 'target'?"),
        ({"paraphrase": ["x"]}, "paraphrase: unknown field; did you mean 'paraphrases'?"),
        ({"colour": 3}, "colour: unknown field; expected: prompt, subject, target, name,"),
        ({"subject": 3}, "subject: expected a string, got 3"),
        ({"subject": " "}, "subject: is blank (' ')"),
        ({"prompt": "The capital is"}, "prompt: the prompt 'The capital is' contains neither"),
        ({"prompt": "{} and {} are"}, "prompt: the prompt '{} and {} are' contains {} twice"),
        ({"weight": 0}, "weight: expected a number from 1e-30 to 1e+30, got 0"),
        ({"weight": 10**400}, "weight: expected a number from 1e-30 to 1e+30, got 1000"),
        ({"weight": float("nan")}, "weight: expected a number from 1e-30 to 1e+30, got nan"),
        ({"weight": True}, "weight: expected a number from 1e-30 to 1e+30, got True"),
        ({"name": 1.5}, "name: expected a string or an integer, got 1.5"),
        ({"paraphrases": ["x", 3]}, "paraphrases: expected non-blank strings, got 3"),
        ({"neighborhood": [""]}, "neighborhood: expected non-blank strings, got ''"),
        ({"span": [3]}, "span: expected [start, stop]"),
        ({"span": [5, 5]}, "span: expected [start, stop]"),
        (
            {"span": [0, 25]},
            "span: expected [start, stop], positions in the filled prompt (24 characters), got [0, 25]",
        ),
    ],
)
def test_errors_name_place_and_field(write, changes, expected):
    record = {name: value for name, value in {**PLAIN, **changes}.items() if value is not None}
    path = write(lines(PLAIN, "", record), "facts.jsonl")
    with pytest.raises(RequestError) as error:
        read_edits(path)
    assert f"facts.jsonl:3: {expected}" in str(error.value)
    assert "1 of 2 edits" in str(error.value)
    read = read_edits(path, strict=False)
    assert [edit.target for edit in read.edits] == ["Lyon"]
    (skipped,) = read.skipped
    assert (skipped.place, skipped.field) == ("facts.jsonl:3", expected.split(":")[0])
    assert str(skipped).startswith(f"facts.jsonl:3: {expected}")


def test_misspelled_field_is_reported_once(write):
    record = {"promt": "{} is", "subject": "France", "Target": "a"}
    assert str(read_edits(write([record]), strict=False).skipped[0]) == (
        "facts.json:2 (record 1): promt: unknown field; did you mean 'prompt'?; "
        "Target: unknown field; did you mean 'target'?"
    )


@pytest.mark.parametrize(
    ("record", "place"),
    [
        ({**ZSRE, "subject": "Nobody"}, "src: "),
        ({**FLAT, "subject": "Nobody"}, "prompt: "),
        (
            {"requested_rewrite": {"prompt": "It is", "subject": "Nobody", "target_new": {"str": "a"}}},
            "requested_rewrite.prompt: ",
        ),
    ],
)
def test_subject_missing_from_prompt_is_reported(write, record, place):
    path = write([record])
    with pytest.raises(RequestError, match=rf"\(record 1\): {place}.*Nobody"):
        read_edits(path)
    read = read_edits(path, strict=False)
    assert (read.edits, len(read.skipped)) == ([], 1)


def test_all_problems_of_a_record_are_reported(write):
    read = read_edits(write([{"prompt": 1, "weight": -1}]), strict=False)
    assert str(read.skipped[0]) == (
        "facts.json:2 (record 1): prompt: expected a string, got 1; target: missing; "
        "weight: expected a number from 1e-30 to 1e+30, got -1; the default is 1"
    )


def test_repeated_field_is_reported(write):
    text = '{"prompt": "{} is", "subject": "France", "target": "a", "target": "b"}'
    with pytest.raises(RequestError, match="target: given more than once"):
        read_edits(write(text))


def test_ten_problems_are_listed_and_all_are_counted(write):
    with pytest.raises(RequestError, match="12 of 13 edits") as error:
        read_edits(write(lines(*[{**PLAIN, "target": ""}] * 12, PLAIN), "facts.jsonl"))
    assert str(error.value).count("facts.jsonl:") == 10
    assert error.value.message.endswith("and 2 more")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("[]", "empty list"),
        ('[\n {"prompt": "a",}\n]', "line 2, column 17"),
        ('[{"prompt": "a"}\n {"prompt": "b"}]', r"line 2, column 2: Expecting ',' or '\]'"),
        ('[{"prompt": "a"},\n', "line 2, column 1: Expecting value"),
        ('[{"prompt": "a"}]\n[]', "line 2, column 1: Extra data"),
        ('{"prompt": "a"\n}', r"facts\.json:1: invalid JSON at column 15"),
        ("[3]", r"facts\.json:1 \(record 1\): expected a JSON object, got 3"),
        ("null", r"facts\.json:1: expected a JSON object, got None"),
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', "byte 0xe9 in line 2 is not UTF-8"),
        (json.dumps([PLAIN]).encode("utf-16"), "byte 0xff in line 1 is not UTF-8"),
    ],
)
def test_the_error_for_an_unreadable_file_names_the_position(write, content, expected):
    path = write(content)
    with pytest.raises(RequestError, match=expected) as error:
        read_edits(path)
    assert str(path) in str(error.value)


def test_missing_file_and_unknown_options_are_rejected(tmp_path):
    with pytest.raises(RequestError, match="is a directory"):
        read_edits(tmp_path)
    with pytest.raises(RequestError, match=r"nothing\.json cannot be read: No such file"):
        read_edits(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="format='csv'"):
        read_edits(tmp_path / "nothing.json", format="csv")
    with pytest.raises(InputError, match="zsre_target='pred'"):
        read_edits(tmp_path / "nothing.json", zsre_target="pred")


def test_bad_line_is_skipped_without_strict(write):
    read = read_edits(write(lines(PLAIN, '{"prompt": ', PLAIN), "facts.jsonl"), strict=False)
    assert read.places == ["facts.jsonl:1", "facts.jsonl:3"]
    assert str(read.skipped[0]) == "facts.jsonl:2: invalid JSON at column 12: Expecting value"
    assert read.skipped[0].field is None


def test_line_numbers_match_a_text_editor(write):
    odd = json.dumps({**PLAIN, "target": "a\u2028b\u0085c"}, ensure_ascii=False)
    read = read_edits(write(("\ufeff" + lines(odd, PLAIN).replace("\n", "\r\n")).encode(), "facts.jsonl"))
    assert [edit.target for edit in read.edits] == ["a\u2028b\u0085c", "Lyon"]
    assert read.places == ["facts.jsonl:1", "facts.jsonl:2"]
    assert read_edits(write("\n[" + json.dumps(PLAIN) + ",\n\n" + json.dumps(PLAIN) + "]\n")).places == [
        "facts.json:2 (record 1)",
        "facts.json:4 (record 2)",
    ]


TABLE = """prompt,subject,target,id,weight,paraphrases,neighborhood,source
The capital of {} is,France,Lyon,41,2,{} has the capital|France's capital is,"[""Spain's capital is"", ""a|b""]",web
,,,,,,,
"{}, the trumpeter, plays the",Miles Davis,piano,,,,,
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("facts.csv", TABLE),
        ("facts.CSV", TABLE.replace("prompt,subject", "Prompt, Subject").replace("\n", "\r\n")),
        ("facts.csv", "\ufeff" + TABLE),
        ("facts.txt", TABLE),
    ],
)
def test_every_column_of_a_table_is_read(write, name, content):
    read = read_edits(write(content.encode(), name))
    assert read.edits == [
        rf.Edit(
            "The capital of {} is",
            "France",
            "Lyon",
            weight=2.0,
            name="41",
            paraphrases=("{} has the capital", "France's capital is"),
            neighborhood=("Spain's capital is", "a|b"),
        ),
        rf.Edit("{}, the trumpeter, plays the", "Miles Davis", "piano"),
    ]
    assert read.places == [f"{name}:2", f"{name}:4"]
    assert (read.format, read.unread) == ("edits", ["source"])


@pytest.mark.parametrize("name", ["facts.csv", "facts.tsv", "facts"])
@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_tables_of_spreadsheets_are_read(write, name, delimiter):
    rows = (["", "prompt", "subject", "target", "weight"], ["0", "{} is, was", "France", '"big; ""new"""', '"0,5"'])
    content = "\r\n".join(delimiter.join(row) for row in rows)
    content = f"sep=;\r\n{content}" if delimiter == ";" else content.replace("0,5", "0.5")
    read = read_edits(write(content.encode(), name))
    assert read.edits == [rf.Edit("{} is, was", "France", 'big; "new"', weight=0.5)]
    assert read.places == [f"{name}:{3 if delimiter == ';' else 2}"]
    assert read.unread == ["column 1"]


def test_json_lines_are_read_whatever_the_suffix(write):
    assert read_edits(write(lines(PLAIN), "facts.csv")).edits[0].target == "Lyon"


def test_line_breaks_within_cells_keep_the_places(write):
    read = read_edits(write('prompt,subject,target\n"Q: {}?\nA:",France,"Ly\non"\n{} is,Spain,x\n', "facts.csv"))
    assert [edit.target for edit in read.edits] == ["Ly\non", "x"]
    assert read.places == ["facts.csv:2", "facts.csv:5"]


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ("prompt,subject,target_new,ground_truth\n{} is,France,Lyon,Paris", "counterfact"),
        ("src,subject,alt,loc\n{} is,France,Lyon,x", "zsre"),
    ],
)
def test_tables_have_the_fields_of_the_other_formats(write, content, format):
    read = read_edits(write(content, "facts.csv"))
    assert (read.edits[0].target, read.format) == ("Lyon", format)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{} is,France,Lyon,,x", "5 cells for 4 columns; put cells that contain ',' into double quotes"),
        ("{} is,France", "target: missing"),
        ("{} is,France,Lyon,much", "weight: expected a number from 1e-30 to 1e+30, got 'much'"),
    ],
)
def test_invalid_rows_are_reported_with_their_line(write, row, expected):
    path = write(f"prompt,subject,target,weight\n\n{row}\n{{}} is,Spain,x", "facts.csv")
    with pytest.raises(RequestError, match="1 of 2 edits are invalid") as error:
        read_edits(path)
    assert f"facts.csv:3: {expected}" in str(error.value)
    assert "--skip-bad" in str(error.value)
    assert read_edits(path, strict=False).places == ["facts.csv:4"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "The capital of {} is,France,Lyon",
            "the first line is 'The capital of {} is,France,Lyon'; expected the names",
        ),
        ("prompt,subject,target", "has a header and no rows"),
        ("prompt,subject,target,Target\na,b,c,d", "has the column 'target' more than once"),
        ('prompt,subject,target\n"Heroes" by {},Bowie,x', "the row at line 2 is invalid .*write each quote"),
        ("prompt,subject,target,paraphrase\n{} is,a,b,c", "paraphrase: unknown field; did you mean 'paraphrases'"),
        (b"prompt,subject,target\n{} is,Orl\xe9ans,x", "byte 0xe9 in line 2 is not UTF-8"),
    ],
)
def test_invalid_tables_raise(write, content, expected):
    with pytest.raises(RequestError, match=expected) as error:
        read_edits(write(content, "facts.csv"))
    assert "--skip-bad" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "Lyon is the capital.\nRome too.",
            "is not a file of edits: it starts with 'Lyon is the capital.'; expected JSON",
        ),
        ('{\n"prompt": "a"\n}', "no line is a record; facts.txt:1: invalid JSON at column 2"),
        (b"PK\x03\x04\x90\xff", "is a zip archive, such as an Excel workbook, not a text file; save the sheet as CSV"),
        (lines({"prompt": "{} is", "subject": "x"}, {"prompt": "{} is", "subject": "y"}), "same in all others"),
    ],
)
def test_errors_of_whole_files_do_not_advise_to_skip_records(write, content, expected):
    with pytest.raises(RequestError, match=expected) as error:
        read_edits(write(content, "facts.txt"))
    assert "--skip-bad" not in str(error.value)
    assert str(error.value).count("facts.txt") == (2 if isinstance(content, str) and "{" in content else 1)


@pytest.mark.parametrize("mode", ["r", "rb"])
def test_open_files_are_read(write, mode):
    with write(lines(PLAIN), "facts.jsonl").open(mode) as file:
        read = read_edits(file)
        assert (read.edits[0].target, read.places) == ("Lyon", ["facts.jsonl:1"])
    with pytest.raises(RequestError, match=r"cannot be read: .*closed file"):
        read_edits(file)
    with pytest.raises(RequestError, match="3 is not a file of edits"):
        read_edits(3)


def test_id_is_a_name(write):
    read = read_edits(write(lines({**PLAIN, "id": 7}, {**PLAIN, "id": 8, "name": "eight"}), "facts.jsonl"))
    assert [edit.name for edit in read.edits] == ["7", "eight"]
    assert read.unread == []


def test_edits_from_lists():
    edits = edits_from_lists(
        ["{} plays the", "The capital of France is"],
        target_new=["piano", "Lyon"],
        subject=["Miles Davis", "France"],
        ground_truth=["trumpet", None],
        rephrase_prompts=["Miles Davis is known for the", None],
        locality_prompts=[["Chet Baker plays the", "Rome is in"], "The capital of Spain is"],
        locality_inputs={"distracting": {"prompt": ["a", "b"], "ground_truth": ["c", "d"]}},
    )
    assert edits == [
        rf.Edit(
            "{} plays the",
            "Miles Davis",
            "piano",
            paraphrases=("Miles Davis is known for the",),
            neighborhood=("Chet Baker plays the", "Rome is in", "a"),
        ),
        rf.Edit("The capital of France is", "France", "Lyon", neighborhood=("The capital of Spain is", "b")),
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"subject": ["x"]}, "prompts 2, target_new 2, subject 1"),
        ({"ground_truth": ["x"]}, "subject 2, ground_truth 1"),
        ({"locality_inputs": {"near": {"prompt": ["x"]}}}, r"subject 2, locality_inputs\['near'\]\['prompt'\] 1"),
        ({"locality_inputs": {"near": ["x"]}}, r"locality_inputs\['near'\]: expected a dict"),
        ({"target_new": "ab"}, "target_new='ab': expected a list"),
        ({"target_new": ["a", None]}, r"target_new\[1\]=None: expected a string"),
        ({"rephrase_prompts": ["a", 3]}, r"rephrase_prompts\[1\]=3: expected a string"),
        ({"rephrase_prompts": ["a", [3]]}, r"rephrase_prompts\[1\]=\[3\]: expected a string"),
    ],
)
def test_mismatched_lists_are_rejected(changes, expected):
    lists = {"prompts": ["{} is", "{} was"], "target_new": ["a", "b"], "subject": ["x", "y"], **changes}
    with pytest.raises(InputError, match=expected):
        edits_from_lists(lists.pop("prompts"), **lists)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}; set RLSEDIT_DATA to its folder")
class TestRealData:
    def test_counterfact_loads(self, write):
        read = read_edits(DATA / "counterfact-10k.json")
        assert (len(read.edits), read.skipped, read.format) == (10_000, [], "counterfact")
        thousand = json.loads((DATA / "counterfact-10k.json").read_text(encoding="utf-8"))[:1000]
        as_lines = read_edits(write(lines(*thousand), "counterfact.jsonl"))
        assert as_lines.edits == read.edits[:1000]
        assert as_lines.places[999] == "counterfact.jsonl:1000"

    def test_zsre_loads_except_for_two_blank_targets(self):
        path = DATA / "zsre-1k.json"
        with pytest.raises(RequestError, match=r"2 of 1000 edits"):
            read_edits(path)
        read = read_edits(path, strict=False)
        assert len(read.edits) == 998
        assert [(skipped.place.split(" ", 1)[1], skipped.field) for skipped in read.skipped] == [
            ("(record 535)", "alt"),
            ("(record 724)", "alt"),
        ]
        assert len(read_edits(path, zsre_target="answers").edits) == 1000


CHAT = [{"role": "user", "content": "What is the capital of {}?"}, {"role": "assistant", "content": "Lyon."}]


def test_a_record_may_be_a_conversation(write):
    read = read_edits(write([{"messages": CHAT, "subject": "France", "id": 3}, {"messages": CHAT[1:]}]), strict=False)
    (edit,) = read.edits
    assert (edit.prompt, edit.target, edit.name) == ("What is the capital of {}?", "Lyon.", "3")
    assert [message["content"] for message in edit.messages] == ["What is the capital of {}?", "Lyon."]
    assert (read.format, read.unread) == ("edits", [])
    assert "messages: there is no message of the user" in str(read.skipped[0])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": CHAT, "subject": "France", "target": "Lyon"}, "target: cannot be combined with messages"),
        ({"messages": CHAT}, "subject: missing; name the words"),
        ({"messages": CHAT, "subject": "Spain", "prompt": "x"}, "prompt: cannot be combined with messages"),
        ({"messages": "Hello"}, "messages: expected a list of messages"),
        (PLAIN | {"join": "none"}, "join: expected auto, space, exact, got 'none'"),
        ({"prompt": "{} is", "target": "x"}, "subject: missing; name the words"),
        ({"prompt": "It is", "target": "x", "subject": 3}, "subject: expected a string, got 3"),
    ],
)
def test_invalid_conversations_joins_and_subjects_are_reported(write, record, reason):
    (skipped,) = read_edits(write([record]), strict=False).skipped
    assert reason in str(skipped)


def test_a_subject_may_be_absent_or_empty(tmp_path):
    file = tmp_path / "facts.csv"
    file.write_text('prompt,subject,target,join\nThe sky is,,green,\n"f(",, x),exact\n', encoding="utf-8")
    one, two = read_edits(file).edits
    assert (one.subject, one.target, one.join) == ("", "green", "auto")
    assert (two.prompt, two.join) == ("f(", "exact")
    file.write_text("prompt,target\nThe sky is,green\n", encoding="utf-8")
    assert read_edits(file).edits == [one]
    table = tmp_path / "chats.csv"
    table.write_text(f"messages\tsubject\n{json.dumps(CHAT)}\tFrance\n", encoding="utf-8")
    assert read_edits(table).edits == [rf.Edit(messages=CHAT, subject="France")]


def test_white_space_with_a_meaning_is_read_to_the_character(write):
    record = {"prompt": "def {}(a, b):", "subject": "subtract", "target": "\n    return a - b"}
    (edit,) = read_edits(write([record])).edits
    assert edit.trimmed() == edit
    assert edit.target == record["target"]


def test_edits_keep_conversations_and_joins_as_dicts():
    edit = rf.Edit(messages=CHAT, subject="France")
    assert rf.Edit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit
    assert {"join", "messages"}.isdisjoint(rf.Edit(**PLAIN).to_dict())
    assert rf.Edit(**PLAIN, join="exact").to_dict()["join"] == "exact"
    assert edit.with_target("Nice.").messages[-1]["content"] == edit.with_target("Nice.").target == "Nice."
    with pytest.raises(RequestError, match="target and messages are both given"):
        rf.Edit(messages=CHAT, target="Nice")
