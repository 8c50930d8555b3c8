"""Cases from MQuAKE: edits that belong together, and questions whose answers follow from them."""

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
    """`count` edits of MQuAKE (Zhong et al. 2023, arXiv 2305.14795), CF or T, as cases, a record's edits together.

    Records are taken in random order, each whole. An edit that an earlier record makes is not made again; a record's
    multi-hop question belongs to the last of its edits. Passed over, and counted in a warning of the
    package's log, are records

    - that contradict one that is taken: the same statement gets another target, or one edits a fact that the
      other's chain, after its edits, needs with another answer. The release's first files have such
      records, and its second version of MQuAKE-CF-3k takes them out, since no model could satisfy both;
    - that cannot be edited: an edit changes nothing, its prompt has no place for its subject, or two of them disagree;
    - with more new edits than are still wanted.

    Args:
        path: a JSON list of records in the published form.
        count: how many edits, of as many different statements.
        seed: of the choice of records and their order.
        order: which order of the same records, 0 the first.
        among: only the first so many records of the file.

    Returns:
        Cases with the question form of an edit as its paraphrase and no neighbours, since MQuAKE has none.

    Raises:
        InputError: a file that cannot be read so, or fewer usable edits.
    """
    records = [_read_one(record, f"{path}, record {at}") for at, record in enumerate(read_records(path)[:among], 1)]
    random.Random(seed).shuffle(records)
    taken = _choose(path, records, count)
    if order:
        taken = shuffled(taken, random.Random(f"{seed}-{order}"))
    made: dict[str, Case] = {}
    chains: dict[str, list[MultiHop]] = defaultdict(list)
    for record in taken:
        for statement, case in record.edits.items():
            made.setdefault(statement, case)
        places = {statement: at for at, statement in enumerate(made)}
        chains[max(record.edits, key=places.__getitem__)].append(record.chain)
    return [replace(case, multihop=tuple(chains[statement])) for statement, case in made.items()]


@dataclass(frozen=True)
class _Record:
    """One record.

    Attributes:
        edits: a case by the statement that it edits, its prompt with the subject filled in.
        granted: the answers that any unedited fact of the chain may have after the edits, by its statement.
        chain: what is to follow.
        usable: whether its edits can be made, see `mquake_cases`.
    """

    edits: Mapping[str, Case]
    granted: Mapping[str, frozenset[str]]
    chain: MultiHop
    usable: bool


def _choose(path: Path, records: list[_Record], count: int) -> list[_Record]:
    taken: list[_Record] = []
    targets: dict[str, str] = {}
    granted: dict[str, frozenset[str]] = {}
    passed = {"contradict others": 0, "cannot be edited": 0, "have more edits than are still wanted": 0}
    for record in records:
        if len(targets) >= count:
            break
        own = {statement: case.edit.target for statement, case in record.edits.items()}
        if not record.usable:
            passed["cannot be edited"] += 1
        elif (
            any(targets.get(statement, target) != target for statement, target in own.items())
            or any(targets[s] not in answers for s, answers in record.granted.items() if s in targets)
            or any(target not in granted[s] for s, target in own.items() if s in granted)
        ):
            passed["contradict others"] += 1
        elif len(targets | own) > count:
            passed["have more edits than are still wanted"] += 1
        else:
            taken.append(record)
            targets |= own
            granted |= {s: granted.get(s, answers) & answers for s, answers in record.granted.items()}
    if len(targets) < count:
        raise InputError(
            f"{path}: {len(targets)} edits of whole records that do not contradict one another, {count} were asked "
            "for; ask for fewer"
        )
    if any(passed.values()):
        why = ", ".join(f"{number} {what}" for what, number in passed.items() if number)
        _log.warning("%s: %d records taken, passed over: %s", path, len(taken), why)
    return taken


def _read_one(record: Any, where: str) -> _Record:
    edits: dict[str, Case] = {}
    usable = True
    try:
        for rewrite in record["requested_rewrite"]:
            prompt, subject = rewrite["prompt"], rewrite["subject"]
            new, old = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
            statement = prompt.replace("{}", subject)
            paraphrases = (Question(rewrite["question"], old),)
            case = Case(Edit(prompt, subject, new), Question(statement, old), paraphrases, (), (), ())
            usable &= new != old and prompt.count("{}") == 1 and edits.get(statement, case) == case
            edits[statement] = case
        granted = {
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
    return _Record(edits, granted, chain, usable)
