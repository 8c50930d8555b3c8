"""Questions about the relations of CounterFact, as a user asks them in a chat.

`relations.json` has, for each of the 34 relations (identifiers of Wikidata), the prompts of CounterFact and questions
in other words. Four more entries contain prompts that several relations share, such as "{} is in". The questions are
used for evaluation only: no edit is searched with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("relations.json")


@dataclass(frozen=True)
class RelationQuestions:
    """The questions about a relation.

    Attributes:
        relation: identifier of the relation, such as P36; None for prompts that several relations share.
        name: its name.
        questions: questions with `{}` in place of the subject.
        prompts: prompts of CounterFact with `{}` in place of the subject.

    Example:
        >>> from rlsedit_fast.evaluation import RelationQuestions
        >>> RelationQuestions("P36", "capital", ("What is the capital of {}?",), ("The capital of {} is",)).name
        'capital'
    """

    relation: str | None
    name: str
    questions: tuple[str, ...]
    prompts: tuple[str, ...]


@cache
def relation_questions() -> tuple[RelationQuestions, ...]:
    """Returns the questions of all relations.

    Example:
        >>> from rlsedit_fast.evaluation import relation_questions
        >>> len({one.relation for one in relation_questions() if one.relation})
        34
    """
    return tuple(
        RelationQuestions(one["relation"], one["name"], tuple(one["questions"]), tuple(one["prompts"]))
        for one in json.loads(_FILE.read_text(encoding="utf-8"))
    )


def questions_about(prompt: str, subject: str, relation: str | None = None) -> tuple[str, ...]:
    """Returns questions that ask a user's way what a prompt of CounterFact states.

    Args:
        prompt: the prompt with `{}` in place of the subject.
        subject: the subject.
        relation: identifier of the relation, if it is known; otherwise it is found by the prompt.

    Returns:
        Questions with the subject; the prompt itself if it is a question; none for other prompts.

    Example:
        >>> from rlsedit_fast.evaluation import questions_about
        >>> questions_about("The capital of {} is", "Peru")[0]
        'What is the capital of Peru?'
    """
    by_relation, by_prompt = _tables()
    found = by_relation.get(relation or "") or by_prompt.get(prompt)
    if found is None:
        return (prompt.replace("{}", subject),) if prompt.rstrip().endswith("?") else ()
    return tuple(question.replace("{}", subject) for question in found)


def subject_of(prompt: str) -> tuple[str, str] | None:
    """Returns the prompt of CounterFact with `{}`, and the subject, of a filled prompt; None if there is none.

    Args:
        prompt: the filled prompt. Of several prompts that fit, the one with the shortest subject is used.

    Example:
        >>> from rlsedit_fast.evaluation import subject_of
        >>> subject_of("The capital of Peru is")
        ('The capital of {} is', 'Peru')
    """
    found = []
    for template in _tables()[1]:
        before, after = template.split("{}")
        if prompt.startswith(before) and prompt.endswith(after) and len(prompt) > len(before) + len(after):
            found.append((template, prompt[len(before) : len(prompt) - len(after)]))
    return min(found, key=lambda pair: len(pair[1]), default=None)


@cache
def _tables() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Returns the questions by relation and by prompt."""
    every = relation_questions()
    by_relation = {one.relation: one.questions for one in every if one.relation is not None}
    return by_relation, {prompt: one.questions for one in every for prompt in one.prompts}
