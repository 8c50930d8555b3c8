"""Cases from the data sets CounterFact and zsRE."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import Case, Question
from rlsedit_fast.evaluation.relations import questions_about
from rlsedit_fast.files import read_json

REBUILT = 5
"""Maximum number of prompts of a rebuilt neighborhood, and of `Case.held_out`."""

Texts = Mapping[tuple[str, str], tuple[str, ...]]
"""Reference texts by the ids of relation and answer."""


def counterfact_cases(
    path: Path, count: int, *, seed: int = 0, among: int | None = None, references: Texts | None = None
) -> list[Case]:
    """Reads cases with different subjects from a CounterFact file, in random order.

    The original format (Meng et al. 2022, arXiv 2202.05262) and the flat fields of EasyEdit are supported. Records
    whose prompt does not contain the subject exactly once are skipped. `Case.neighbors` has the prompts of the file;
    `Case.rebuilt` has the same question about unedited subjects of other records that have the same answer.

    Args:
        path: JSON list of records.
        count: number of cases.
        seed: random seed of the choice and the order.
        among: use only the first records of the file, such as those that a model was trained on.
        references: texts for `Case.references`, by the ids of relation and new answer; `Case.generation` is then filled
            as well.

    Returns:
        The cases.

    Raises:
        InputError: the file cannot be read, has another format or too few usable records; or `references` is given and
            a record lacks ids or generation prompts, which only the original format has.

    Example:
        >>> import json, pathlib, tempfile
        >>> from rlsedit_fast.evaluation import counterfact_cases
        >>> record = {
        ...     "requested_rewrite": {
        ...         "prompt": "The mother tongue of {} is",
        ...         "subject": "Ann",
        ...         "target_new": {"str": "French"},
        ...         "target_true": {"str": "Greek"},
        ...     },
        ...     "paraphrase_prompts": ["Ann speaks"],
        ...     "neighborhood_prompts": ["The mother tongue of Bo is"],
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "counterfact.json")
        ...     _ = path.write_text(json.dumps([record]))
        ...     (case,) = counterfact_cases(path, 1)
        >>> case.edit.prompt, case.edit.target, case.neighbors
        ('The mother tongue of {} is', 'French', (Question(prompt='The mother tongue of Bo is', answer='Greek'),))
    """
    records = [counterfact_record(record) for record in read_records(path)][:among]
    rng = random.Random(seed)
    order = list(range(len(records)))
    rng.shuffle(order)
    chosen: dict[str, dict[str, Any]] = {}
    for at in order:
        record = records[at]
        if record["template"] is not None and record["target_new"] != record["ground_truth"]:
            chosen.setdefault(record["subject"], record)
        if len(chosen) == count:
            break
    if len(chosen) < count:
        raise _too_few(path, len(chosen), count)
    peers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if record["template"] is not None and record["subject"] not in chosen:
            peers[record["template"], record["ground_truth"]].append(record["subject"])
    cases = [_counterfact(record, peers, rng) for record in chosen.values()]
    if references is None:
        return cases
    return [_with_texts(case, record, references, path) for case, record in zip(cases, chosen.values(), strict=True)]


def zsre_cases(path: Path, count: int, *, seed: int = 0) -> list[Case]:
    """Reads cases with different subjects from a zsRE file in MEND's format, in random order.

    The target is `alt`, the paraphrase `rephrase`, and the neighborhood prompt `loc`.

    Args:
        path: JSON list of records.
        count: number of cases.
        seed: random seed of the choice and the order.

    Returns:
        The cases.

    Raises:
        InputError: the file cannot be read, has another format or too few usable records.

    Example:
        >>> import json, pathlib, tempfile
        >>> from rlsedit_fast.evaluation import zsre_cases
        >>> record = {"subject": "UniFirst", "src": "What does UniFirst make?", "rephrase": "UniFirst makes what?"}
        >>> record |= {"alt": "aircraft", "answers": ["uniform"], "loc": "nq question: who?", "loc_ans": "Walter"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "zsre.json")
        ...     _ = path.write_text(json.dumps([record]))
        ...     (case,) = zsre_cases(path, 1)
        >>> case.edit.prompt, case.edit.target, case.question.answer
        ('What does {} make?', 'aircraft', 'uniform')
    """
    records = read_records(path)
    random.Random(seed).shuffle(records)
    chosen: dict[str, Case] = {}
    for record in records:
        try:
            subject, prompt, old = record["subject"], record["src"], record["answers"][0]
            template = _template(prompt, subject)
            if template is not None and record["alt"] != old:
                case = Case(
                    Edit(template, subject, record["alt"]),
                    Question(prompt, old),
                    (Question(record["rephrase"], old),),
                    (Question(record["loc"], record["loc_ans"]),),
                    (),
                    (),
                    asked=(record["rephrase"],),
                )
                chosen.setdefault(subject, case)
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path}: a record lacks {error}; expected zsRE in MEND's format") from error
        if len(chosen) == count:
            return list(chosen.values())
    raise _too_few(path, len(chosen), count)


def read_records(path: Path) -> list[Any]:
    """Reads a JSON list of records.

    Args:
        path: the file.

    Raises:
        InputError: the file cannot be read, or is not a JSON list with at least one record.
    """
    records = read_json(path, "a JSON list of records")
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: expected a JSON list of records")
    return records


def counterfact_record(record: Any) -> dict[str, Any]:
    """Converts a CounterFact record, in the original or EasyEdit's format, to common fields.

    Args:
        record: the record.

    Returns:
        A dictionary with `subject`, `template` (the prompt with `{}`; None if the prompt does not contain the subject
        exactly once), `prompt`, `target_new`, `ground_truth`, `paraphrases`, `neighborhood` (pairs of prompt and
        answer), `ids` (of relation and new answer, or None) and `generation` (prompts).

    Raises:
        InputError: a field is missing.

    Example:
        >>> from rlsedit_fast.evaluation import counterfact_record
        >>> record = {"prompt": "The mother tongue of Ann is", "subject": "Ann", "target_new": "French"}
        >>> record |= {"ground_truth": "Greek", "rephrase_prompt": "Ann speaks", "locality_prompt": "Bo speaks"}
        >>> counterfact_record(record | {"locality_ground_truth": "Greek"})["template"]
        'The mother tongue of {} is'
    """
    try:
        if "requested_rewrite" in record:
            rewrite = record["requested_rewrite"]
            prompt, subject = rewrite["prompt"].replace("{}", rewrite["subject"]), rewrite["subject"]
            new, old = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
            paraphrases = list(record["paraphrase_prompts"])
            neighborhood = [(text, old) for text in record["neighborhood_prompts"]]
            ids = rewrite.get("relation_id"), rewrite["target_new"].get("id")
            generation = tuple(record.get("generation_prompts", ()))
        else:
            prompt, subject = record["prompt"], record["subject"]
            new, old = record["target_new"], record["ground_truth"]
            paraphrases = [record["rephrase_prompt"]]
            neighborhood = [(record["locality_prompt"], record["locality_ground_truth"])]
            ids, generation = (None, None), ()
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"a record lacks {error}; expected CounterFact in its original or EasyEdit's format"
        ) from error
    return {
        "subject": subject,
        "template": _template(prompt, subject),
        "prompt": prompt,
        "target_new": new,
        "ground_truth": old,
        "paraphrases": paraphrases,
        "neighborhood": neighborhood,
        "ids": ids,
        "generation": generation,
    }


def _too_few(path: Path, found: int, count: int) -> InputError:
    return InputError(
        f"{path}: {count} edits requested, but it has only {found} usable records of different subjects; request fewer "
        "edits"
    )


def _template(prompt: str, subject: str) -> str | None:
    if "{" in prompt or "}" in prompt or prompt.count(subject) != 1:
        return None
    return prompt.replace(subject, "{}")


def _counterfact(record: dict[str, Any], peers: dict[tuple[str, str], list[str]], rng: random.Random) -> Case:
    old, template = record["ground_truth"], record["template"]
    others = peers[template, old]
    # Alternating, and the same for all cases: no evaluated subject of one case is held out in another.
    rebuilt, held_out = (
        tuple(Question(template.replace("{}", subject), old) for subject in rng.sample(some, min(REBUILT, len(some))))
        for some in (others[::2], others[1::2])
    )
    return Case(
        Edit(template, record["subject"], record["target_new"]),
        Question(record["prompt"], old),
        tuple(Question(text, old) for text in record["paraphrases"]),
        tuple(Question(text, answer) for text, answer in record["neighborhood"]),
        (),
        (),
        rebuilt=rebuilt,
        asked=questions_about(template, record["subject"], record["ids"][0]),
        held_out=held_out,
    )


def _with_texts(case: Case, record: dict[str, Any], references: Texts, path: Path) -> Case:
    if None in record["ids"] or not record["generation"]:
        raise InputError(
            f"{path}: the record of {record['subject']!r} lacks generation_prompts, requested_rewrite.relation_id or "
            "target_new.id, which select its reference texts; pass CounterFact in its original format, or no references"
        )
    return replace(case, generation=record["generation"], references=tuple(references.get(record["ids"], ())))
