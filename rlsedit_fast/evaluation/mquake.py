"""Cases from MQuAKE: groups of edits, and multi-hop questions whose answers follow from them."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import Case, MultiHop, Question
from rlsedit_fast.evaluation.datasets import read_records
from rlsedit_fast.world.facts import shuffled

_log = logging.getLogger(__name__)

_FIELDS = (
    "requested_rewrite (a list of prompt, subject, target_new.str, target_true.str, question), questions, answer, "
    "new_answer, new_answer_alias, and new_single_hops (a list of cloze, answer, answer_alias)"
)


def mquake_cases(path: Path, count: int, *, seed: int = 0, order: int = 0, among: int | None = None) -> list[Case]:
    """Reads cases from an MQuAKE file (Zhong et al. 2023, arXiv 2305.14795), CF or T.

    Whole records are selected in random order, and the edits of a record stay together. An edit that several records
    contain is applied once. The multi-hop question of a record belongs to the last of its edits. Records are skipped,
    and counted in a warning of the log, if they

    - contradict a selected record: the same statement has another target, or one record edits a fact that the other one
      requires with another answer. The first release contains such records; its second version of MQuAKE-CF-3k removes
      them, because no model can satisfy both;
    - cannot be edited: an edit changes nothing, its prompt has no `{}`, or two edits of the record disagree;
    - have more new edits than are missing.

    Args:
        path: JSON list of records in the published format.
        count: number of edits, all of different statements.
        seed: random seed of the choice of records and their order.
        order: number of another order of the same records; 0 for the first one.
        among: use only the first records of the file.

    Returns:
        Cases with the question of an edit as its paraphrase, and without neighborhood prompts, which MQuAKE lacks.

    Raises:
        InputError: the file cannot be read, has another format or too few usable edits.

    Example:
        >>> import json, pathlib, tempfile
        >>> from rlsedit_fast.evaluation import mquake_cases
        >>> rewrite = {"prompt": "{} is a citizen of", "subject": "Vince", "question": "Of what is Vince a citizen?"}
        >>> rewrite |= {"target_new": {"str": "Libya"}, "target_true": {"str": "America"}}
        >>> record = {"requested_rewrite": [rewrite], "questions": ["What is the capital of the country of Vince?"]}
        >>> record |= {"answer": "Washington", "new_answer": "Tripoli", "new_answer_alias": [], "new_single_hops": []}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "mquake.json")
        ...     _ = path.write_text(json.dumps([record]))
        ...     (case,) = mquake_cases(path, 1)
        >>> case.edit.target, case.multihop[0].new_answer
        ('Libya', 'Tripoli')
    """
    records = [_read_one(record, f"{path}, record {at}") for at, record in enumerate(read_records(path)[:among], 1)]
    random.Random(seed).shuffle(records)
    selected = _select(path, records, count)
    if order:
        selected = shuffled(selected, random.Random(f"{seed}-{order}"))
    cases: dict[str, Case] = {}
    chains: dict[str, list[MultiHop]] = defaultdict(list)
    for record in selected:
        for statement, case in record.edits.items():
            cases.setdefault(statement, case)
        places = {statement: at for at, statement in enumerate(cases)}
        chains[max(record.edits, key=places.__getitem__)].append(record.chain)
    return [replace(case, multihop=tuple(chains[statement])) for statement, case in cases.items()]


@dataclass(frozen=True)
class _Record:
    """One record.

    Attributes:
        edits: cases by statement, the prompt with its subject.
        required: correct answers of the unedited facts on which the multi-hop answer depends, by statement.
        chain: the multi-hop question.
        usable: whether the record can be edited, see `mquake_cases`.
    """

    edits: Mapping[str, Case]
    required: Mapping[str, frozenset[str]]
    chain: MultiHop
    usable: bool


def _select(path: Path, records: list[_Record], count: int) -> list[_Record]:
    selected: list[_Record] = []
    targets: dict[str, str] = {}
    required: dict[str, frozenset[str]] = {}
    skipped = {"contradict others": 0, "cannot be edited": 0, "have more edits than are missing": 0}
    for record in records:
        if len(targets) >= count:
            break
        own = {statement: case.edit.target for statement, case in record.edits.items()}
        if not record.usable:
            skipped["cannot be edited"] += 1
        elif (
            any(targets.get(statement, target) != target for statement, target in own.items())
            or any(targets[s] not in answers for s, answers in record.required.items() if s in targets)
            or any(target not in required[s] for s, target in own.items() if s in required)
        ):
            skipped["contradict others"] += 1
        elif len(targets | own) > count:
            skipped["have more edits than are missing"] += 1
        else:
            selected.append(record)
            targets |= own
            required |= {s: required.get(s, answers) & answers for s, answers in record.required.items()}
    if len(targets) < count:
        raise InputError(
            f"{path}: {count} edits requested, but its whole records without contradictions have {len(targets)}; "
            "request fewer edits"
        )
    if any(skipped.values()):
        reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.items() if number)
        _log.warning("%s: %d records selected, others skipped: %s", path, len(selected), reasons)
    return selected


def _read_one(record: Any, where: str) -> _Record:
    edits: dict[str, Case] = {}
    usable = True
    try:
        for rewrite in record["requested_rewrite"]:
            prompt, subject = rewrite["prompt"], rewrite["subject"]
            new, old = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
            statement = prompt.replace("{}", subject)
            paraphrases = (Question(rewrite["question"], old),)
            case = Case(
                Edit(prompt, subject, new),
                Question(statement, old),
                paraphrases,
                (),
                (),
                (),
                asked=tuple(one.prompt for one in paraphrases),
            )
            usable &= new != old and prompt.count("{}") == 1 and edits.get(statement, case) == case
            edits[statement] = case
        required = {
            hop["cloze"]: frozenset((hop["answer"], *hop["answer_alias"]))
            for hop in record["new_single_hops"]
            if hop["cloze"] not in edits
        }
        aliases = tuple(alias for alias in record["new_answer_alias"] if alias.strip())
        chain = MultiHop(tuple(record["questions"]), record["answer"], record["new_answer"], aliases)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} lacks {error}; expected MQuAKE's fields: {_FIELDS}") from error
    if not edits or not chain.prompts:
        raise InputError(f"{where} has no rewrite or no question; expected MQuAKE's fields: {_FIELDS}")
    return _Record(edits, required, chain, usable)
