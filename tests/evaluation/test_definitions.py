"""Every metric agrees with its published definition on small examples."""

import json
import math

import pytest
import torch

from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation import demo, generation
from rlsedit_fast.evaluation.cases import Case, MultiHop, Question, edited_twice, related_cases, world_cases
from rlsedit_fast.evaluation.datasets import REBUILT, counterfact_cases, zsre_cases
from rlsedit_fast.evaluation.generation import (
    _may_match,
    continuations,
    fluency,
    free_accuracy,
    free_multihop,
    matches_answer,
    n_gram_entropy,
)
from rlsedit_fast.evaluation.metrics import evaluate, harmonic_mean, judge, score_before, summarize
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.evaluation.stability import TextProbe, _mean
from rlsedit_fast.evaluation.tasks import Item, evaluate_task, read_task
from rlsedit_fast.models import generate_answers
from rlsedit_fast.world import RELATIONS, World, load_demo_model

from .conftest import TableModel

CITY = Case(
    edit=Edit("{} lives in", "Lado", "Port Alder"),
    question=Question("Lado lives in", "Old Garnet"),
    paraphrases=(Question("The home of Lado is in", "Old Garnet"),),
    neighbors=(Question("Veta lives in", "Old Garnet"),),
    namesakes=(),
    same_subject=(),
    rebuilt=(Question("Toze lives in", "Old Garnet"),),
)
BEFORE = {
    "Veta lives in": {"Old": 0.9},
    "Veta lives in Old": {"Garnet": 0.9},
    "Toze lives in": {"New": 0.9},  # wrong answer
    "Toze lives in Old": {"Garnet": 0.9},
}
AFTER = BEFORE | {
    "Lado lives in": {"Port": 0.9, "Old": 0.1},
    "Lado lives in Port": {"Alder": 0.4, "Farrow": 0.6},
    "Lado lives in Old": {"Garnet": 1.0},
    "The home of Lado is in": {"Port": 0.9},
    "The home of Lado is in Port": {"Alder": 0.9},
    "Veta lives in Old": {"Garnet": 0.3, "Alder": 0.7},
}


def report(tokenizer, after=AFTER, cases=(CITY,)):
    before = score_before(TableModel(tokenizer, BEFORE), tokenizer, cases)
    return evaluate(TableModel(tokenizer, after), tokenizer, cases, before)


def test_multi_token_answers_have_forced_strict_and_token_scores(tokenizer):
    found = report(tokenizer)
    # new: -(log .9 + log .4) / 2 = 0.51; old: -(log .1 + log 1) / 2 = 1.15
    assert found.efficacy.forced == 1.0
    assert found.efficacy.strict == 0.0, "Port is ranked first, Alder is not"
    assert found.efficacy.tokens == 0.5
    assert (found.generalization.strict, found.generalization.tokens) == (1.0, 1.0)
    assert (found.neighbors.strict, found.neighbors.exact, found.neighbors.tokens) == (0.0, 0.0, 0.5)


def test_an_unchanged_prediction_may_be_wrong(tokenizer):
    found = report(tokenizer)
    assert found.rebuilt.strict == 1.0, "the prediction did not change"
    assert found.rebuilt.exact == 0.0, "the prediction is not the correct answer"


def test_the_score_is_the_harmonic_mean():
    assert harmonic_mean([1.0, 0.5, 0.25]) == pytest.approx(3 / (1 + 2 + 4))
    assert harmonic_mean([1.0, 0.0, 1.0]) == 0.0
    assert harmonic_mean([1.0, None, 1.0]) is None
    assert harmonic_mean([]) is None


def test_the_score_of_a_report_combines_three_metrics(tokenizer):
    found = report(tokenizer)
    parts = (found.efficacy, found.generalization, found.neighbors)
    assert found.score == harmonic_mean([part.forced for part in parts]) > 0
    assert found.strict_score == 0.0


def test_a_summary_of_judged_cases_equals_their_report(tokenizer):
    other = Case(CITY.edit, Question("Veta lives in", "Old Garnet"), (), (), (), ())
    cases = [CITY, other]
    before = score_before(TableModel(tokenizer, BEFORE), tokenizer, cases)
    judged = judge(TableModel(tokenizer, AFTER), tokenizer, cases, before)
    assert summarize(judged[:1]) == report(tokenizer)
    assert summarize(judged).efficacy.forced == 0.5, "the old answer of the second case is more likely"
    assert summarize(judged[1:]).neighbors.prompts == 0


def test_ties_rank_one_token_first_and_make_no_answer_more_likely(tokenizer):
    tied = AFTER | {"Lado lives in": {"Port": 0.5, "Old": 0.5}, "Lado lives in Port": {"Alder": 1.0}}
    found = report(tokenizer, tied)
    assert found.efficacy.forced == 0.0
    first = score(TableModel(tokenizer, tied), tokenizer, [("Lado lives in", "Port"), ("Lado lives in", "Old")])
    assert [one.exact for one in first].count(True) == 1
    lower = min(("Port", "Old"), key=tokenizer.convert_tokens_to_ids)
    assert first[("Port", "Old").index(lower)].exact


def test_the_beginning_of_text_token_is_not_part_of_an_answer(tokenizer):
    """If it were scored, tokenizers that add it to every text would get lower scores."""
    port, alder = tokenizer.convert_tokens_to_ids(["Port", "Alder"])
    distributions = {"Lado lives in": {"Port": 1.0}, "Lado lives in Port": {"Alder": 1.0}}
    model, questions = TableModel(tokenizer, distributions), [("Lado lives in", "Port Alder")]
    (right,) = score(model, tokenizer, questions)
    assert right.predicted == (port, alder)
    assert right.token_accuracy == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" Lyon. The city", "Lyon", True),
        (" Lyon", "Lyon", True),
        (" Lyon and Paris", "Lyon", False),
        (" Lyonnais", "Lyon", False),
        (" St. Louis.", "St. Louis", True),
        (" St. Paul.", "St. Louis", False),
        ("\nLyon\n", "Lyon", True),
        (" lyon.", "Lyon", False),
        ("", "Lyon", False),
        (" Lyon , France", "Lyon", False),
        (" 3.5 million", "3", False),
        (" 3. Five", "3", True),
        (" Lyon.anish", "Lyon", True),
    ],
)
def test_a_generated_answer_matches_if_it_ends_after_the_answer(text, answer, right):
    assert matches_answer(text, answer) is right


def test_free_accuracy_of_the_demo_model_agrees_with_strict_scores():
    model, tokenizer = load_demo_model()
    world = World.generate()
    questions = [(RELATIONS[i % 4].phrasings[0].format(p.name), p.facts[RELATIONS[i % 4].name])
             for i, p in enumerate(world.people[:24])]  # fmt: skip
    wrong = [(prompt, "organ") for prompt, answer in questions if answer != "organ"]
    strict = [one.exact for one in score(model, tokenizer, questions)]
    assert free_accuracy(model, tokenizer, questions) == strict
    assert sum(strict) >= 23
    assert not any(free_accuracy(model, tokenizer, wrong))


@pytest.mark.parametrize(
    ("text", "answer", "undecided"),
    [
        ("", "Lyon", True),
        (" Ly", "Lyon", True),
        ("\n", "Lyon", True),
        (" Paris", "Lyon", False),
        (" Lyon", "Lyon", True),
        (" Lyon.", "Lyon", True),  # a digit may follow
        (" Lyon.\n", "Lyon", True),
        (" Lyon. It", "Lyon", False),
        (" Lyonnais", "Lyon", False),
        (" Lyon <|end", "Lyon", True),
        (" Zür", "Zürich", True),
        (" Z\ufffd", "Zürich", True),  # an incomplete character
        (" B\ufffd", "Zürich", False),
    ],
)
def test_a_match_is_undecided_until_the_answer_has_ended(text, answer, undecided):
    assert _may_match(text, answer) is undecided


def test_known_scores_do_not_change_free_accuracy_and_save_passes(monkeypatch):
    model, tokenizer = load_demo_model()
    questions = []
    for at, person in enumerate(World.generate().people[:20]):
        relation, other = RELATIONS[at % 4], RELATIONS[(at + 1) % 4]
        prompt = relation.phrasings[at % 3].format(person.name)
        questions += [(prompt, person.facts[relation.name]), (prompt, person.facts[other.name]), (prompt, "Port")]
    plain = free_accuracy(model, tokenizer, questions)
    assert 10 < sum(plain) < 30
    scores = dict(zip(questions, score(model, tokenizer, questions), strict=True))
    rows, real = [], generation.greedy
    monkeypatch.setattr(
        generation,
        "greedy",
        lambda model, prompts, *rest, **more: rows.extend(prompts) or real(model, prompts, *rest, **more),
    )
    reported = []
    known = free_accuracy(
        model, tokenizer, questions, known=scores, progress=lambda done, total: reported.append((done, total))
    )
    assert known == plain
    assert sum(plain) <= len(rows) < 40, "most wrong answers need no pass"
    assert reported[-1] == (60, 60)
    some = dict(list(scores.items())[::2])
    assert free_accuracy(model, tokenizer, questions, known=some) == plain


def test_known_scores_do_not_change_free_multihop():
    model, tokenizer = load_demo_model()
    chains = []
    for person in World.generate().people[:6]:
        prompts = tuple(phrasing.format(person.name) for phrasing in RELATIONS[0].phrasings[:2])
        answer = person.facts[RELATIONS[0].name]
        chains += [MultiHop(prompts, "?", "nothing", (answer,)), MultiHop(prompts, "?", "nothing")]
    plain = free_multihop(model, tokenizer, chains)
    assert plain[1::2] == [False] * 6
    assert sum(plain[::2]) >= 5
    questions = [(prompt, answer) for chain in chains for prompt in chain.prompts for answer in chain.correct_answers]
    scores = dict(zip(questions, score(model, tokenizer, questions), strict=True))
    assert free_multihop(model, tokenizer, chains, known=scores) == plain


def test_continuations_depend_neither_on_the_batch_nor_on_the_global_generator():
    model, tokenizer = load_demo_model()
    names = [person.name for person in World.generate().people[:6]]
    prompts = [phrasing.format(name) for name in names for phrasing in RELATIONS[0].phrasings]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    together = continuations(model, tokenizer, prompts, tokens=3)
    sampled = continuations(model, tokenizer, prompts, tokens=6, top_k=5, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert together == [continuations(model, tokenizer, [prompt], tokens=3)[0] for prompt in prompts]
    assert sampled == continuations(model, tokenizer, prompts, tokens=6, top_k=5, seed=1)
    assert sampled != continuations(model, tokenizer, prompts, tokens=6, top_k=5, seed=2)


def test_generation_ignores_a_repetition_penalty_of_the_model():
    model, tokenizer = load_demo_model()
    questions = [RELATIONS[0].phrasings[0].format(person.name) for person in World.generate().people[:4]]
    answers = continuations(model, tokenizer, questions, tokens=1)
    # The prompt contains the answer, so a repetition penalty would give another one.
    prompts = [f"{text.strip()} {question}" for question, text in zip(questions, answers, strict=True)]
    most_likely = []
    for prompt in prompts:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits
        most_likely.append(tokenizer.decode([int(logits[0, -1].argmax())]).strip())
    model.generation_config.repetition_penalty = 1e3
    for prompt, text in zip(prompts, most_likely, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        generated = model.generate(ids, max_new_tokens=1, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(generated).strip() != text, "precondition: generate() applies the penalty"
    assert [text.strip() for text in continuations(model, tokenizer, prompts, tokens=1)] == most_likely
    assert generate_answers(model, tokenizer, list(zip(prompts, most_likely, strict=True))) == most_likely
    shown = demo._complete(model, tokenizer, prompts)
    assert all(whole.startswith(first) for whole, first in zip(shown, most_likely, strict=True))


def test_n_gram_entropy_matches_a_hand_calculation():
    # bigrams ab bc ca ab bc: 2/5 2/5 1/5; trigrams abc bca cab abc: 2/4 1/4 1/4
    bigrams = -(2 * 0.4 * math.log2(0.4) + 0.2 * math.log2(0.2))
    assert n_gram_entropy("a b c a b c") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1.5) / 2)
    assert n_gram_entropy("a a a a a a") == 0.0
    assert n_gram_entropy("Yes, no.") == n_gram_entropy("a b c d")  # punctuation counts as words
    with pytest.raises(InputError, match="3-grams"):
        n_gram_entropy("a b")


def test_fluency_is_the_mean_entropy_of_prompts_with_continuations():
    model, tokenizer = load_demo_model()
    prompts = [RELATIONS[0].phrasings[0].format(p.name) for p in World.generate().people[:4]]
    texts = continuations(model, tokenizer, prompts, tokens=40, top_k=5, seed=3)
    expected = [n_gram_entropy(f"{prompt} {text}") for prompt, text in zip(prompts, texts, strict=True)]
    assert fluency(model, tokenizer, prompts, tokens=40, seed=3) == pytest.approx(sum(expected) / 4)
    assert min(expected) > 3


def test_perplexity_and_kl_match_a_hand_calculation(tokenizer):
    before = {"Lado": {"speaks": 0.6, "plays": 0.4}, "Lado speaks": {"Kubeish": 0.8, "Nafiish": 0.2}}
    after = {"Lado": {"speaks": 0.25, "plays": 0.75}, "Lado speaks": {"Kubeish": 0.2, "Nafiish": 0.8}}
    start = tuple(tokenizer("")["input_ids"])
    first = {start: {"Lado": 1.0}}
    model = TableModel(tokenizer, before | first)
    probe = TextProbe(model, tokenizer, ["Lado speaks Kubeish"])
    same = probe(model)
    assert same.perplexity == pytest.approx(math.exp(-(math.log(0.6) + math.log(0.8)) / 3), rel=1e-2)
    assert same.kl == pytest.approx(0, abs=1e-2)  # stored in float16
    assert (same.top, same.tokens) == (1.0, 3)
    now = probe(TableModel(tokenizer, after | first))
    kl = 0.6 * math.log(0.6 / 0.25) + 0.4 * math.log(0.4 / 0.75) + 0.8 * math.log(4) + 0.2 * math.log(0.25)
    assert now.kl == pytest.approx(kl / 3, rel=2e-2)
    assert now.perplexity == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.2)) / 3), rel=1e-2)
    assert now.top == pytest.approx(1 / 3)


def test_the_standard_error_over_texts_matches_a_hand_calculation():
    mean, error = _mean([2.0, 6.0, 4.0], [1, 2, 1])
    assert mean == pytest.approx(3.0)  # residuals -1, 0, 1
    assert error == pytest.approx(math.sqrt((1 + 0 + 1) * 3 / 2) / 4)
    assert math.isnan(_mean([2.0], [1])[1])


def test_the_error_of_perplexity_is_the_standard_error_over_texts(tokenizer):
    start = tuple(tokenizer("")["input_ids"])
    distributions = {start: {"Lado": 0.5, "Veta": 0.5}, "Lado": {"speaks": 0.5, "plays": 0.5}}
    distributions["Veta"] = {"speaks": 0.125, "plays": 0.875}
    texts = ["Lado speaks", "Veta speaks", "Lado speaks"]
    found = TextProbe(TableModel(tokenizer, distributions), tokenizer, texts).unedited
    tokens = [len(tokenizer(text)["input_ids"]) - 1 for text in texts]
    nll = [math.log(4), math.log(16), math.log(4)] if start else [math.log(2), math.log(8), math.log(2)]
    mean, error = _mean(nll, tokens)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-2)
    assert found.perplexity_error == pytest.approx(math.exp(mean) * error, rel=2e-2)
    assert found.kl_error < 1e-2


def test_a_text_probe_respects_its_token_limit_and_requires_text(tokenizer):
    model = TableModel(tokenizer, {})
    texts = ["Lado speaks Kubeish", "Lado plays the organ", "Veta speaks Kubeish"]
    assert TextProbe(model, tokenizer, texts, tokens=5)(model).tokens == 5
    assert TextProbe(model, tokenizer, texts, length=2)(model).tokens == 3
    with pytest.raises(InputError, match="two tokens"):
        TextProbe(model, tokenizer, [])


def test_the_answer_to_an_item_has_the_lowest_mean_nll_and_ties_are_wrong(tokenizer):
    distributions = {
        "Lado lives in": {"Port": 0.3, "Old": 0.7},
        "Lado lives in Port": {"Alder": 0.9},
        "Lado lives in Old": {"Garnet": 0.1, "Alder": 0.9},
        "Veta speaks": {"Kubeish": 0.5, "Nafiish": 0.5},
        "Toze speaks": {"Kubeish": 0.9, "Nafiish": 0.1},
    }
    items = [
        Item("Lado lives in", ("Port Alder", "Old Garnet"), 0),  # .3 * .9 > .7 * .1
        Item("Veta speaks", ("Kubeish", "Nafiish"), 0),
        Item("Toze speaks", ("Kubeish", "Nafiish"), 0),
        Item("Toze speaks", ("Kubeish", "Nafiish"), 1),
    ]
    found = evaluate_task(TableModel(tokenizer, distributions), tokenizer, items)
    assert (found.accuracy, found.items, found.truncated, found.skipped) == (0.5, 4, 0, 0)
    assert found.error == pytest.approx(0.25)


def test_a_too_long_prompt_is_truncated_at_its_beginning_and_counted(tokenizer):
    long = " ".join(["Lado speaks Kubeish ."] * 20)
    (item,) = [Item(f"{long} Lado speaks", ("Kubeish", "Nafiish"), 0)]
    rows = []
    model = TableModel(tokenizer, {})
    real = model.forward

    def spy(input_ids, **rest):
        rows.extend(input_ids.tolist())
        return real(input_ids, **rest)

    model.forward = spy
    assert evaluate_task(model, tokenizer, [item]).truncated == 1
    ids = tokenizer(item.prompt)["input_ids"]
    assert rows == [[ids[0], *ids[-62:]]], "63 tokens of the prompt and one of the answer"


def test_an_item_whose_prompt_does_not_fit_beside_its_answer_is_skipped(tokenizer):
    model = TableModel(tokenizer, {"Toze speaks": {"Kubeish": 0.9, "Nafiish": 0.1}})
    fits = Item("Toze speaks", ("Kubeish", "Nafiish"), 0)
    longer = Item("Toze speaks", ("Kubeish " * 70, "Nafiish"), 0)
    found = evaluate_task(model, tokenizer, [longer, fits])
    assert (found.accuracy, found.items, found.skipped) == (1.0, 1, 1)
    with pytest.raises(InputError, match="no prompt fits"):
        evaluate_task(model, tokenizer, [longer])


@pytest.mark.parametrize(("label", "right"), [(0, "yes"), (1, "no"), ("entailment", "yes"), ("not_entailment", "no")])
def test_entailment_labels_may_be_numbers_or_words(tmp_path, label, right):
    record = {"sentence1": "Lado speaks.", "sentence2": "Someone speaks.", "label": label}
    (tmp_path / "rte.jsonl").write_text(json.dumps(record))
    (item,) = read_task("rte", tmp_path / "rte.jsonl")
    assert item.choices[item.correct] == right


def test_tasks_are_read_in_the_formats_of_glue_and_mmlu(tmp_path):
    records = {
        "sst2": ({"sentence": "good", "label": 1}, "positive"),
        "cola": ({"sentence": "Him good.", "label": 0}, "no"),
        "mrpc": ({"sentence1": "a", "sentence2": "a", "label": 1}, "yes"),
        "rte": ({"sentence1": "a", "sentence2": "b", "label": 1}, "no"),  # in GLUE's RTE, 0 is entailment
        "nli": ({"sentence1": "a", "sentence2": "b", "label": "not_entailment"}, "no"),
        "mmlu": ({"question": "1\u2028+\x85 1?", "choices": ["1", "2", "3", "4"], "answer": 1}, "2"),
    }
    for name, (record, right) in records.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(record) + "\n\n" + json.dumps(record, ensure_ascii=False) + "\n")
        items = read_task(name, path)
        assert len(items) == 2
        assert items[0].choices[items[0].correct] == right
        assert len(read_task(name, path, items=1)) == 1
    with pytest.raises(InputError, match="cannot be read as records of 'mmlu'"):
        read_task("mmlu", tmp_path / "sst2.jsonl")
    with pytest.raises(InputError, match="expected one of sst2"):
        read_task("gsm8k", tmp_path / "sst2.jsonl")


def counterfact(n, original):
    """Records of one relation and two answers; in the flat format the third prompt lacks its subject."""
    records = []
    for i in range(n):
        subject, old, new = f"Subject {i}", ("French", "English")[i % 2], ("English", "French")[i % 2]
        prompt = f"The mother tongue of {subject} is"
        if original:
            rewrite = {"prompt": "The mother tongue of {} is", "subject": subject}
            rewrite |= {"target_new": {"str": new}, "target_true": {"str": old}}
            records.append({"case_id": i, "requested_rewrite": rewrite, "paraphrase_prompts": [f"{subject} speaks"],
                            "neighborhood_prompts": ["The mother tongue of Ann is"]})  # fmt: skip
        else:
            prompt = "Nobody knows" if i == 2 else prompt
            records.append({"case_id": i, "prompt": prompt, "subject": subject, "target_new": new, "ground_truth": old,
                            "rephrase_prompt": f"{subject} speaks", "locality_prompt": "The mother tongue of Ann is",
                            "locality_ground_truth": old})  # fmt: skip
    return records


@pytest.mark.parametrize("original", [True, False])
def test_counterfact_cases_have_neighborhoods_rebuilt_from_other_records(tmp_path, original):
    path = tmp_path / "cf.json"
    path.write_text(json.dumps(counterfact(30, original)))
    cases = counterfact_cases(path, 8, seed=3)
    assert len({case.edit.subject for case in cases}) == 8
    edited = {case.edit.subject for case in cases}
    for case in cases:
        assert case.edit.prompt == "The mother tongue of {} is"
        assert case.question == Question(case.edit.prompt.format(case.edit.subject), case.paraphrases[0].answer)
        assert case.edit.target != case.question.answer
        assert case.neighbors == (Question("The mother tongue of Ann is", case.question.answer),)
        assert len(case.rebuilt) == REBUILT
        assert all(q.answer == case.question.answer for q in case.rebuilt)
        assert not any(f"of {subject} is" in q.prompt for q in case.rebuilt for subject in edited)
    assert counterfact_cases(path, 8, seed=3) == cases != counterfact_cases(path, 8, seed=4)
    assert {c.edit.subject for c in counterfact_cases(path, 3, among=4)} <= {f"Subject {i}" for i in range(4)}
    with pytest.raises(InputError, match="request fewer edits"):
        counterfact_cases(path, 31)


def test_zsre_records_become_cases(tmp_path):
    path = tmp_path / "zsre.json"
    record = {"subject": "UniFirst", "src": "What does UniFirst make?", "rephrase": "UniFirst makes what?"}
    record |= {"alt": "aircraft", "answers": ["uniform"], "loc": "nq question: who", "loc_ans": "Walter"}
    path.write_text(json.dumps([record]))
    (case,) = zsre_cases(path, 1)
    assert case.edit == Edit("What does {} make?", "UniFirst", "aircraft")
    assert case.question == Question("What does UniFirst make?", "uniform")
    assert case.neighbors == (Question("nq question: who", "Walter"),)
    with pytest.raises(InputError, match="2 edits requested, but it has only 1 usable records"):
        zsre_cases(path, 2)
    path.write_text(json.dumps([{"subject": "UniFirst"}]))
    with pytest.raises(InputError, match="lacks 'src'"):
        zsre_cases(path, 1)


def test_conflicting_and_related_streams_have_their_structure():
    world = World.generate()
    first = world_cases(world, 20, 1)
    again = edited_twice(first, 1)
    by_subject = {case.edit.subject: case for case in first}
    assert len(again) == 20
    for case in again:
        old = by_subject[case.edit.subject]
        assert case.edit.prompt == old.edit.prompt
        assert case.question == old.question
        assert case.edit.target not in (old.edit.target, old.question.answer)
    related = related_cases(world, 40, 1)
    subjects = [case.edit.subject for case in related]
    assert len(set(subjects)) == 10
    assert all(subjects.count(subject) == 4 for subject in subjects)
    assert len({(case.edit.subject, case.edit.prompt) for case in related}) == 40
    assert not any(case.same_subject for case in related)
    with pytest.raises(InputError, match="1 to 8000"):
        related_cases(world, 8001, 1)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("sst2", {"sentence": "good", "label": -1}),  # as in the test files of GLUE
        ("mmlu", {"question": "1 + 1?", "choices": ["1", "2"], "answer": 2}),
        ("mmlu", {"question": "1 + 1?", "choices": ["1", " "], "answer": 0}),
    ],
)
def test_invalid_labels_raise(tmp_path, name, record):
    (tmp_path / f"{name}.jsonl").write_text("\n" + json.dumps(record))
    with pytest.raises(InputError, match=rf"{name}\.jsonl:2: label .* of 2 choices"):
        read_task(name, tmp_path / f"{name}.jsonl")
