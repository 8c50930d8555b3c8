"""Cases from the data sets that the field evaluates on: CounterFact and zsRE."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import Case, Question

REBUILT = 5
"""Most prompts of a rebuilt neighbourhood, and of those that are kept aside as `Case.spare`."""

Texts = Mapping[tuple[str, str], tuple[str, ...]]
"""Reference texts by the ids of a relation and of an answer."""


def counterfact_cases(
    path: Path, count: int, *, seed: int = 0, among: int | None = None, references: Texts | None = None
) -> list[Case]:
    """`count` records of CounterFact as cases, of different subjects, in random order.

    Both forms are read: the original one (Meng et al. 2022), and EasyEdit's flat fields. Records that contain no
    place for their subject are passed over. The neighbourhood has what the file gives; beside it, `rebuilt` asks the
    same question about subjects of other records, not among the edited ones, that have the same answer.

    Args:
        path: a JSON list of records.
        count: how many.
        seed: of the choice and the order.
        among: only the first so many records of the file, such as those that a model was trained to know.
        references: texts for `Case.references`, which a record's ids name; a case has `Case.generation` with them.

    Raises:
        InputError: a file that cannot be read so, or fewer usable records; or references, and records without the ids
            or the prompts that go with them, which only the original form has.
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
        raise InputError(f"{path}: {len(chosen)} records of different subjects, {count} were asked for; ask for fewer")
    peers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if record["template"] is not None and record["subject"] not in chosen:
            peers[record["template"], record["ground_truth"]].append(record["subject"])
    cases = [_counterfact(record, peers, rng) for record in chosen.values()]
    if references is None:
        return cases
    return [_with_texts(case, record, references, path) for case, record in zip(cases, chosen.values(), strict=True)]


def zsre_cases(path: Path, count: int, *, seed: int = 0) -> list[Case]:
    """`count` records of zsRE in MEND's form as cases: the edit teaches `alt`, and `loc` is to stay as it is.

    Raises:
        InputError: a file that cannot be read so, or fewer records of different subjects.
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
                )
                chosen.setdefault(subject, case)
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path}: a record lacks {error}; expected zsRE in MEND's form") from error
        if len(chosen) == count:
            return list(chosen.values())
    raise InputError(f"{path}: {len(chosen)} records of different subjects, {count} were asked for; ask for fewer")


def read_records(path: Path) -> list[Any]:
    """A file's JSON list.

    Raises:
        InputError: it cannot be read as one, or has no record.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: expected a JSON list of records")
    return records


def counterfact_record(record: Any) -> dict[str, Any]:
    """A record of either form in one; `template` is None where the prompt has no place for the subject."""
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
        raise InputError(f"a record lacks {error}; expected CounterFact, or EasyEdit's form of it") from error
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


def _template(prompt: str, subject: str) -> str | None:
    if "{" in prompt or "}" in prompt or prompt.count(subject) != 1:
        return None
    return prompt.replace(subject, "{}")


def _counterfact(record: dict[str, Any], peers: dict[tuple[str, str], list[str]], rng: random.Random) -> Case:
    old, template = record["ground_truth"], record["template"]
    others = peers[template, old]
    # By turns, and alike for all cases: no subject that one of them asks about is spare to another.
    rebuilt, spare = (
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
        spare=spare,
    )


def _with_texts(case: Case, record: dict[str, Any], references: Texts, path: Path) -> Case:
    if None in record["ids"] or not record["generation"]:
        raise InputError(
            f"{path}: the record of {record['subject']!r} lacks generation_prompts, requested_rewrite.relation_id or "
            "target_new.id, without which no reference text belongs to it; give CounterFact in its original form, or "
            "no references"
        )
    return replace(case, generation=record["generation"], references=tuple(references.get(record["ids"], ())))
