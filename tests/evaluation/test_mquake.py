"""MQuAKE: the selection of records, their multi-hop questions, and how a chain of facts is judged."""

import json
import logging
from dataclasses import replace

import pytest

from rlsedit_fast.cli import main
from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import Case, MultiHop, Question
from rlsedit_fast.evaluation.demo import anchor_texts
from rlsedit_fast.evaluation.generation import free_multihop
from rlsedit_fast.evaluation.grounds import GroundSpec, layout_of, make_cases
from rlsedit_fast.evaluation.metrics import evaluate, judge, score_before
from rlsedit_fast.evaluation.mquake import mquake_cases
from rlsedit_fast.world import RELATIONS, World, load_demo_model

from .conftest import TableModel


def rewrite(prompt, subject, new, old):
    return {
        "prompt": prompt,
        "relation_id": "P1",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"},
        "subject": subject,
        "question": f"What of {subject}?",
    }


def hop(cloze, answer, *aliases):
    return {"question": f"{cloze} what?", "cloze": cloze, "answer": answer, "answer_alias": list(aliases)}


def record(number, rewrites, *, kept=(), new="Franklin", aliases=("Franklin, Kentucky",)):
    """A record in the format of the release; `kept` are the unedited facts of the chain."""
    edited = [hop(r["prompt"].format(r["subject"]), r["target_new"]["str"]) for r in rewrites]
    return {
        "case_id": number,
        "requested_rewrite": rewrites,
        "questions": [f"Wording {wording} of {number}?" for wording in (1, 2, 3)],
        "answer": "Washington, D.C.",
        "answer_alias": ["Washington"],
        "new_answer": new,
        "new_answer_alias": list(aliases),
        "single_hops": [*kept, *(hop(r["prompt"].format(r["subject"]), r["target_true"]["str"]) for r in rewrites)],
        "new_single_hops": [*kept, *edited],
        "orig": {"triples": [["Q44567", "P108", "Q35339"]]},
    }


CITIZEN = rewrite("{} is a citizen of", "Vince", "Libya", "America")
CAPITAL = rewrite("The capital of {} is", "Libya", "Franklin", "Tripoli")
SPORT = rewrite("{} plays", "Dudley", "cricket", "football")
BORN = rewrite("{} was born in", "Dudley", "Oslo", "York")
EMPLOYED = hop("Triple H is employed by", "WWE", "World Wrestling Federation")


@pytest.fixture
def write(tmp_path):
    def write(*records):
        path = tmp_path / "mquake.json"
        path.write_text(json.dumps(records))
        return path

    return write


def by_statement(cases):
    return {case.question.prompt: case for case in cases}


def test_the_edits_of_a_record_are_consecutive_and_its_question_belongs_to_the_last(write):
    path = write(record(0, [CITIZEN, CAPITAL], kept=[EMPLOYED]), record(1, [SPORT], new="London", aliases=["", "Town"]))
    for order in range(4):
        cases = mquake_cases(path, 3, order=order)
        at = [case.edit.subject for case in cases].index("Vince")
        assert cases[at] == Case(
            Edit("{} is a citizen of", "Vince", "Libya"),
            Question("Vince is a citizen of", "America"),
            (Question("What of Vince?", "America"),),
            (),
            (),
            (),
            asked=("What of Vince?",),
        )
        chain = MultiHop(
            tuple(f"Wording {n} of 0?" for n in (1, 2, 3)), "Washington, D.C.", "Franklin", ("Franklin, Kentucky",)
        )
        assert cases[at + 1].edit.subject == "Libya"
        assert cases[at + 1].multihop == (chain,)
        assert by_statement(cases)["Dudley plays"].multihop[0].correct_answers == ("London", "Town")
    first_subjects = {mquake_cases(path, 3, order=order)[0].edit.subject for order in range(6)}
    assert first_subjects == {"Vince", "Dudley"}, "records are reordered as a whole"


def test_an_edit_of_two_records_is_applied_once_and_each_question_follows_its_last_edit(write, caplog):
    path = write(record(0, [CITIZEN]), record(1, [CITIZEN, CAPITAL]), record(2, [CAPITAL]))
    for seed in range(6):
        cases = by_statement(mquake_cases(path, 2, seed=seed))
        assert len(cases) == 2
        statements = {chain.prompts[0]: statement for statement, case in cases.items() for chain in case.multihop}
        both = statements.get("Wording 1 of 1?")
        assert both in (None, list(cases)[-1]), "after the last of its two edits"
        for number, statement in ((0, "Vince is a citizen of"), (2, "The capital of Libya is")):
            assert statements.get(f"Wording 1 of {number}?", statement) == statement
    assert not caplog.records


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(record(1, [rewrite("{} is a citizen of", "Vince", "Chad", "America"), SPORT]), id="other target"),
        pytest.param(
            record(1, [SPORT, BORN], kept=[hop("Vince is a citizen of", "America", "US")]), id="unedited fact"
        ),
        pytest.param(
            record(1, [rewrite("{} is employed by", "Triple H", "AEW", "WWE"), SPORT]), id="edits an unedited fact"
        ),
    ],
)
def test_a_record_that_contradicts_a_selected_one_is_skipped_and_counted(write, other, caplog):
    first = record(0, [CITIZEN, CAPITAL], kept=[EMPLOYED])
    path = write(first, other)
    for seed in range(4):
        assert len(mquake_cases(path, 2, seed=seed)) == 2
        with pytest.raises(InputError, match="4 edits requested, but its whole records without contradictions have 2"):
            mquake_cases(path, 4, seed=seed)
    third = record(2, [rewrite("{} speaks", "Ann", "Greek", "French"), rewrite("{} speaks", "Bo", "Greek", "French")])
    path = write(first, other, third)
    logged = set()
    for seed in range(12):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            cases = mquake_cases(path, 4, seed=seed)
        assert len(cases) == 4
        assert "Ann speaks" in by_statement(cases)
        logged |= {line.getMessage() for line in caplog.records}
    assert logged == {f"{path}: 2 records selected, others skipped: 1 contradict others"}


def test_an_alias_of_an_unedited_answer_is_no_contradiction(write):
    renamed = rewrite("{} is employed by", "Triple H", "World Wrestling Federation", "AEW")
    path = write(record(0, [CITIZEN], kept=[EMPLOYED]), record(1, [renamed]))
    assert len(mquake_cases(path, 2)) == 2


def test_records_that_cannot_be_edited_or_do_not_fit_are_skipped_and_counted(write, caplog):
    same = record(0, [rewrite("{} speaks", "Ann", "Greek", "Greek")])
    no_placeholder = record(1, [rewrite("Ann speaks", "Ann", "Greek", "French")])
    twice = record(2, [CITIZEN, rewrite("{} is a citizen of", "Vince", "Chad", "America")])
    path = write(same, no_placeholder, twice, record(3, [CITIZEN, CAPITAL]), record(4, [SPORT]))
    logged = set()
    for seed in range(12):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            (case,) = mquake_cases(path, 1, seed=seed)
        assert case.edit.subject == "Dudley", "the only valid record with one edit"
        logged |= {line.getMessage() for line in caplog.records}
    assert (
        f"{path}: 1 records selected, others skipped: 3 cannot be edited, 1 have more edits than are missing" in logged
    )
    with pytest.raises(InputError, match=r"4 edits requested.* have 3;"):
        mquake_cases(path, 4)
    assert len(mquake_cases(path, 2, among=4)) == 2
    with pytest.raises(InputError, match="request fewer edits"):
        mquake_cases(path, 1, among=3)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"new_answer": None}, "'new_answer'"),
        ({"new_single_hops": None}, "'new_single_hops'"),
        ({"questions": []}, "no"),
    ],
)
def test_a_record_in_another_format_raises_and_is_named(write, changes, missing):
    broken = {**record(0, [SPORT]), **changes}
    broken = {name: value for name, value in broken.items() if value is not None}
    with pytest.raises(InputError, match=f"record 2 .*{missing}.*expected MQuAKE's fields"):
        mquake_cases(write(record(1, [CITIZEN]), broken), 1)


def test_the_format_of_a_file_is_detected_from_its_fields(write):
    path = write(record(0, [CITIZEN, CAPITAL]), record(1, [SPORT]))
    assert layout_of(path) == "mquake"
    spec = GroundSpec(model="somewhere", data=str(path))
    cases, superseded = make_cases(spec, "plain", 3, 0)
    assert (cases, superseded) == (mquake_cases(path, 3), [])
    assert make_cases(spec, "plain", 3, 0, 5)[0] == mquake_cases(path, 3, order=5)
    path.write_text(json.dumps([{"requested_rewrite": {"prompt": "{} is", "subject": "[x"}}]))
    assert layout_of(path) == "counterfact"
    path.write_text(json.dumps([{"subject": "UniFirst", "src": "What?", "alt": "aircraft"}]))
    assert layout_of(path) == "zsre"
    path.write_text(json.dumps([{"prompt": "{} is", "subject": "Ann", "target": "a pilot"}]))
    with pytest.raises(InputError, match="expected records of CounterFact, zsRE or MQuAKE"):
        layout_of(path)


CHAIN = MultiHop(("Lado lives in", "The home of Lado is in"), "Old Garnet", "Port Alder", ("Farrow",))
CASE = Case(Edit("{} plays the", "Lado", "organ"), Question("Lado plays the", "violin"), (), (), (), (), (), (CHAIN,))
OLD_ANSWERS = {
    "Lado lives in": {"Old": 0.9, "Port": 0.1},
    "Lado lives in Old": {"Garnet": 0.9},
    "Lado lives in Port": {"Garnet": 0.9, "Alder": 0.1},
    "The home of Lado is in": {"Old": 0.9, "Port": 0.1},
    "The home of Lado is in Old": {"Garnet": 0.9},
    "The home of Lado is in Port": {"Garnet": 0.9, "Alder": 0.1},
}


@pytest.mark.parametrize(
    ("changes", "forced", "strict"),
    [
        pytest.param({}, 0.0, 0.0, id="neither wording"),
        pytest.param(
            {"The home of Lado is in": {"Port": 0.9}, "The home of Lado is in Port": {"Alder": 0.9}}, 1.0, 1.0,
            id="one wording, the answer",
        ),
        pytest.param({"Lado lives in": {"Farrow": 0.6, "Old": 0.4}}, 0.0, 1.0, id="one wording, an alias"),
        pytest.param(
            {"Lado lives in": {"Port": 0.4, "Old": 0.1, "the": 0.5}, "Lado lives in Port": {"Alder": 0.9}}, 1.0, 0.0,
            id="more likely than the old answer, not first",
        ),
    ],
)  # fmt: skip
def test_a_chain_is_correct_if_any_wording_gives_the_new_answer_or_an_alias(tokenizer, changes, forced, strict):
    found = evaluate(TableModel(tokenizer, OLD_ANSWERS | changes), tokenizer, [CASE], {}).multihop
    assert (found.forced, found.strict, found.exact, found.prompts) == (forced, strict, strict, 1)


def test_the_multihop_share_is_over_chains_and_none_without_chains(tokenizer):
    model = TableModel(tokenizer, OLD_ANSWERS | {"Lado lives in": {"Farrow": 0.9}})
    other = replace(CHAIN, prompts=("The home of Lado is in",))
    both = replace(CASE, multihop=(CHAIN, other))
    assert evaluate(model, tokenizer, [both], {}).multihop.strict == 0.5
    assert evaluate(model, tokenizer, [both], {}).multihop.prompts == 2
    none = evaluate(model, tokenizer, [replace(CASE, multihop=())], {}).multihop
    assert (none.strict, none.forced, none.prompts) == (None, None, 0)
    assert [len(one["multihop"]) for one in judge(model, tokenizer, [both, CASE], {})] == [2, 1]
    assert score_before(model, tokenizer, [both]) == {}


def facts_of(names):
    return [(RELATIONS[0].phrasings[0].format(p.name), p.facts[RELATIONS[0].name]) for p in names]


def test_free_multihop_accepts_any_wording_and_any_alias():
    model, tokenizer = load_demo_model()
    (first, right), (second, other) = facts_of(World.generate().people[:2])
    chains = [
        MultiHop((second, first), "nothing", right),
        MultiHop((second,), "nothing", "nowhere", (other,)),
        MultiHop((second,), "nothing", "nowhere"),
    ]
    assert right != other
    assert free_multihop(model, tokenizer, chains) == [True, True, False]


def test_the_command_runs_a_stream_of_mquake_and_reports_multihop(tmp_path, capsys):
    model, tokenizer = load_demo_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    world = World.generate()
    texts = anchor_texts(world, 1)
    (tmp_path / "text.txt").write_text("\n".join(" ".join(texts[at : at + 2]) for at in range(0, 200, 2)))
    relation, second = RELATIONS[:2]
    records = []
    for number, person in enumerate(world.people[:4]):
        old = person.facts[relation.name]
        new = next(value for value in relation.values if value != old)
        edits = [rewrite(relation.phrasings[0], person.name, new, old)]
        edits[0]["question"] = relation.phrasings[1].format(person.name)
        if number == 0:  # a subject with two edits, which other rules than rls treat separately
            known = person.facts[second.name]
            other = next(value for value in second.values if value != known)
            edits.append(rewrite(second.phrasings[0], person.name, other, known))
        edited = record(number, edits, new=new, aliases=[])
        records.append({**edited, "answer": old, "questions": [p.format(person.name) for p in relation.phrasings[1:4]]})
    (tmp_path / "mquake.json").write_text(json.dumps(records))
    command = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "mquake.json")]
    command += [
        "--text",
        str(tmp_path / "text.txt"),
        "--edits",
        "5",
        "--seeds",
        "1",
        "--batch-size",
        "1",
        "--rules",
        "rls",
        "memit",
    ]
    settings = {"layers": [0], "contexts": {"prefixes": [""]}, "search": {"steps": 40, "stop_nll": 0.025}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    command += ["--config", str(tmp_path / "config.json")]
    command += ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "found.json")]
    assert main(command) == 0
    assert "multihop strict" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failed"] == []
    assert found["rules"]["rls"]["figures"]["multihop strict"]["mean"] >= 0.75
    (run,) = (tmp_path / "out").glob("rls-*.json")
    rows = [row for row in json.loads(run.read_text())["rows"] if row["metric"] == "multihop" and row["of"] == "all"]
    assert {(row["edits"], row["form"], row["n"]) for row in rows} >= {(5, form, 4) for form in ("forced", "free")}
