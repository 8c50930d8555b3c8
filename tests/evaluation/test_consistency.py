"""Consistency with reference texts: the texts of a case, the similarity of two texts, and the reported metric."""

import json
import math
import sys

import pytest

from rlsedit_fast.cli import main
from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation import consistency as measured
from rlsedit_fast.evaluation.cases import Case, Question
from rlsedit_fast.evaluation.consistency import TextSimilarity, consistency, reference_texts
from rlsedit_fast.evaluation.datasets import counterfact_cases
from rlsedit_fast.evaluation.demo import anchor_texts
from rlsedit_fast.evaluation.grounds import GroundSpec, make_cases, make_ground
from rlsedit_fast.world import RELATIONS, World, load_demo_model

SNIPPETS = [
    {"relation_id": "P103", "target_id": "Q1860", "samples": [{"name": "Ann", "text": "Ann writes English novels"}]},
    {"relation_id": "P103", "target_id": "Q150", "samples": [{"name": "Luc", "text": "Luc sings in French"}]},
    {"relation_id": "P103", "target_id": "Q150", "samples": [{"name": "Zoe", "text": "Zoe acts in French"}]},
    {"relation_id": "P19", "target_id": "Q150", "samples": [{"name": "Max", "text": "a text of another relation"}]},
]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return write


def record(subject, new, new_id, old):
    """A CounterFact record with the fields that consistency uses."""
    rewrite = {"prompt": "The mother tongue of {} is", "relation_id": "P103", "subject": subject}
    rewrite |= {"target_new": {"str": new, "id": new_id}, "target_true": {"str": old, "id": "Q0"}}
    return {
        "case_id": 0,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [],
        "neighborhood_prompts": [],
        "generation_prompts": [f"{subject} was born in", f"{subject} lives in"],
    }


RECORDS = [record("Ida", "French", "Q150", "English"), record("Bo", "Greek", "Q9129", "English")]


def test_a_case_has_the_texts_of_its_relation_and_new_answer(write):
    texts = reference_texts(write("snippets.json", SNIPPETS))
    cases = {c.edit.subject: c for c in counterfact_cases(write("cf.json", RECORDS), 2, references=texts)}
    assert cases["Ida"].references == ("Luc sings in French", "Zoe acts in French")
    assert cases["Ida"].generation == ("Ida was born in", "Ida lives in")
    assert cases["Bo"].references == (), "no text has Greek as its answer"
    for case in counterfact_cases(write("cf.json", RECORDS), 2):
        assert (case.generation, case.references) == ((), ())


def test_similarity_is_the_cosine_of_tf_idf_vectors():
    # n = 2 texts; idf = ln((1 + n) / (1 + df)) + 1: cat 1, dog and owl each in one text
    similarity = TextSimilarity(["cat dog", "cat owl"])
    rare = math.log(3 / 2) + 1
    assert similarity("cat dog dog", "cat dog owl") == pytest.approx(
        (1 + 2 * rare**2) / math.sqrt((1 + 4 * rare**2) * (1 + 2 * rare**2))
    )
    assert similarity("Cat DOG.", "dog, cat") == pytest.approx(1.0)
    assert similarity("cat", "dog") == 0.0
    assert similarity("unheard of", "cat") == 0.0, "a text without known words is similar to none"


def test_consistency_is_the_mean_similarity_over_cases_of_generated_texts(monkeypatch):
    generated = {"a": "cat", "b": "dog", "c": "owl"}
    used = {}

    def stub(model, tokenizer, prompts, **settings):
        used.update(settings)
        return [generated[prompt] for prompt in prompts]

    monkeypatch.setattr(measured, "continuations", stub)

    def case(prompts, references):
        question = Question("x", "y")
        return Case(Edit("{}", "x", "y"), question, (), (), (), (), generation=prompts, references=references)

    cases = [case(("a", "b"), ("some cat", "some dog")), case(("c",), ("something else",))]
    compared = []

    def similarity(one, other):
        compared.append((one, other))
        return (0.5, 0.25)[len(compared) - 1]

    assert consistency(None, None, cases, similarity) == 0.375
    assert compared == [("a cat b dog", "some cat some dog"), ("c owl", "something else")]
    assert (used["top_k"], used["tokens"]) == (5, 100)


@pytest.mark.parametrize(
    "missing", ["generation_prompts", "relation_id", "id"], ids=["no prompts", "no relation", "no answer's id"]
)
def test_records_without_prompts_or_ids_raise_with_references(write, missing):
    broken = json.loads(json.dumps(RECORDS[0]))
    for part in (broken, broken["requested_rewrite"], broken["requested_rewrite"]["target_new"]):
        part.pop(missing, None)
    path = write("cf.json", [broken])
    assert len(counterfact_cases(path, 1)) == 1
    spec = GroundSpec(model="any", data=str(path), references=str(write("snippets.json", SNIPPETS)))
    with pytest.raises(
        InputError, match=r"record of 'Ida' lacks generation_prompts.*CounterFact in its original format"
    ):
        make_cases(spec, "plain", 1, 0)


def test_data_sets_without_generation_prompts_raise_with_references(write):
    flat = {"prompt": "The mother tongue of Ida is", "subject": "Ida", "target_new": "French", "ground_truth": "Greek"}
    flat |= {"rephrase_prompt": "Ida speaks", "locality_prompt": "Ann is", "locality_ground_truth": "here"}
    snippets = str(write("snippets.json", SNIPPETS))
    for name, first in (("flat", flat), ("zsre", {"src": "What?", "alt": "a"}), ("mquake", {"requested_rewrite": []})):
        spec = GroundSpec(model="any", data=str(write(f"{name}.json", [first])), references=snippets)
        with pytest.raises(InputError, match=rf"{name}\.json.*CounterFact in its original format"):
            make_cases(spec, "plain", 1, 0)
    with pytest.raises(InputError, match="references: demo has no generation prompts"):
        make_cases(GroundSpec(references=snippets), "plain", 1, 0)


def test_reference_texts_in_another_format_or_without_words_raise(write):
    with pytest.raises(InputError, match=r"record 1: the field 'relation_id' is missing.*attribute_snippets\.json"):
        reference_texts(write("other.json", [{"text": "a text"}]))
    with pytest.raises(InputError, match="no reference text has a word"):
        TextSimilarity(["", "."])


def test_without_scikit_learn_the_error_names_the_package(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(InputError, match=r"requires scikit-learn; pip install scikit-learn"):
        make_ground(GroundSpec(references=str(write("snippets.json", SNIPPETS))))


@pytest.mark.parametrize("available", [True, False], ids=["texts of the new answer", "no texts"])
def test_the_command_reports_consistency_if_reference_texts_exist(write, tmp_path, capsys, available):
    model, tokenizer = load_demo_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    world, relation = World.generate(), RELATIONS[0]
    texts = anchor_texts(world, 1)
    (tmp_path / "text.txt").write_text("\n".join(" ".join(texts[at : at + 2]) for at in range(0, 200, 2)))
    records = []
    for person in world.people[:2]:
        old = person.facts[relation.name]
        new = next(value for value in relation.values if value != old)
        case = record(person.name, new, "Q150", old)
        case["requested_rewrite"]["prompt"] = relation.phrasings[0]
        records.append({**case, "generation_prompts": [p.format(person.name) for p in relation.phrasings[1:3]]})
    answer = "Q150" if available else "Q9129"
    snippets = [{"relation_id": "P103", "target_id": answer, "samples": [{"name": "x", "text": t} for t in texts[:9]]}]
    command = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(write("cf.json", records))]
    command += ["--text", str(tmp_path / "text.txt"), "--edits", "2", "--seeds", "1", "--layers", "0"]
    command += ["--references", str(write("snippets.json", snippets)), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert ("consistency cosine" in capsys.readouterr().out) is available
    (run,) = (tmp_path / "out").glob("*.json")
    rows = [row for row in json.loads(run.read_text())["rows"] if row["metric"] == "consistency"]
    assert [(row["edits"], row["of"], row["form"], row["n"]) for row in rows] == [(2, "all", "cosine", 2)] * available
    assert all(0 < row["value"] < 1 for row in rows)
