"""Evaluation cases: an edit, and prompts that measure its efficacy, generalization and specificity."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError
from rlsedit_fast.world import RELATIONS, Person, Relation, World
from rlsedit_fast.world.facts import shuffled

NEIGHBORS = 3
"""Maximum number of neighborhood prompts per case."""
HELD_OUT = 3
"""Maximum number of further neighborhood prompts per case that are not evaluated."""


@dataclass(frozen=True)
class Question:
    """A prompt and its answer before the edits.

    Attributes:
        prompt: the prompt.
        answer: the answer that continues it.

    Example:
        >>> from rlsedit_fast.evaluation import Question
        >>> Question("The capital of Peru is", "Lima").answer
        'Lima'
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class MultiHop:
    """A question whose answer follows from several facts, some of which are edited.

    Attributes:
        prompts: wordings of the question.
        answer: answer before the edits.
        new_answer: answer after the edits.
        aliases: other names of the new answer, which are also correct.

    Example:
        >>> from rlsedit_fast.evaluation import MultiHop
        >>> chain = MultiHop(("The capital of the country of Vince is",), "Washington", "Tripoli", ("Tarabulus",))
        >>> chain.correct_answers
        ('Tripoli', 'Tarabulus')
    """

    prompts: tuple[str, ...]
    answer: str
    new_answer: str
    aliases: tuple[str, ...] = ()

    @property
    def correct_answers(self) -> tuple[str, ...]:
        """The new answer and its aliases."""
        return (self.new_answer, *self.aliases)


@dataclass(frozen=True)
class Case:
    """One edit and the prompts that evaluate it.

    Attributes:
        edit: the edit.
        question: the edited prompt, with the answer before the edit.
        paraphrases: the same question in other words, which are not used for editing.
        neighbors: the same question about other subjects that have the same answer and are not edited.
        namesakes: the same question about unedited people who share two of the subject's three names, if any.
        same_subject: other facts of the subject, in words that differ from the KL prompts.
        rebuilt: the same question about subjects of other records of the data set that have the same answer and are
            not edited. Results on this neighborhood must be labeled as rebuilt, since data sets do not contain it.
        multihop: questions whose answers follow from this edit and from earlier ones.
        generation: prompts for texts about the subject.
        references: texts about other subjects that have the new answer.
        asked: questions for a chat, in words that are not used for editing; their answers should contain the target.
        held_out: further neighborhood (or rebuilt) prompts that are not evaluated. An editor may protect them, so that
            the evaluated prompts show whether protection generalizes.

    Example:
        >>> from rlsedit_fast import Edit
        >>> from rlsedit_fast.evaluation import Case, Question
        >>> case = Case(
        ...     edit=Edit("The capital of {} is", "Peru", "Quito"),
        ...     question=Question("The capital of Peru is", "Lima"),
        ...     paraphrases=(Question("Peru is governed from", "Lima"),),
        ...     neighbors=(),
        ...     namesakes=(),
        ...     same_subject=(Question("The language of Peru is", "Spanish"),),
        ... )
        >>> len(case.paraphrases)
        1
    """

    edit: Edit
    question: Question
    paraphrases: tuple[Question, ...]
    neighbors: tuple[Question, ...]
    namesakes: tuple[Question, ...]
    same_subject: tuple[Question, ...]
    rebuilt: tuple[Question, ...] = ()
    multihop: tuple[MultiHop, ...] = ()
    generation: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    held_out: tuple[Question, ...] = ()


def world_cases(world: World, count: int, seed: int) -> list[Case]:
    """Creates cases with false facts about different people, one per person, in random order.

    Args:
        world: the world.
        count: number of cases.
        seed: random seed.

    Returns:
        The cases.

    Raises:
        InputError: `count` is below 1 or above the number of people.

    Example:
        >>> from rlsedit_fast.evaluation import world_cases
        >>> from rlsedit_fast.world import World
        >>> case = world_cases(World.generate(), 3, seed=0)[0]
        >>> case.edit.target != case.question.answer, len(case.paraphrases), len(case.neighbors)
        (True, 4, 3)
    """
    if not 1 <= count <= len(world.people):
        raise InputError(f"edits={count}: expected 1 to {len(world.people)}, the number of people in the world")
    rng = random.Random(seed)
    people = shuffled(world.people, rng)
    edited, others = people[:count], _Others.of(people[count:])
    return [_case(person, RELATIONS[int(rng.random() * len(RELATIONS))], others, rng) for person in edited]


def related_cases(world: World, count: int, seed: int) -> list[Case]:
    """Creates cases with false facts about as few people as possible, in random order.

    All facts of these people are edited, so `Case.same_subject` is empty.

    Args:
        world: the world.
        count: number of cases.
        seed: random seed.

    Returns:
        The cases.

    Raises:
        InputError: `count` is below 1 or above the number of facts.

    Example:
        >>> from rlsedit_fast.evaluation import related_cases
        >>> from rlsedit_fast.world import World
        >>> len({case.edit.subject for case in related_cases(World.generate(), 8, seed=0)})
        2
    """
    most = len(world.people) * len(RELATIONS)
    if not 1 <= count <= most:
        raise InputError(f"edits={count}: expected 1 to {most}, the number of facts in the world")
    rng = random.Random(seed)
    people = shuffled(world.people, rng)
    needed = -(-count // len(RELATIONS))
    others = _Others.of(people[needed:])
    made = [_case(person, relation, others, rng) for person in people[:needed] for relation in RELATIONS][:count]
    return [replace(case, same_subject=()) for case in shuffled(made, rng)]


def edited_twice(cases: Sequence[Case], seed: int) -> list[Case]:
    """Edits each case again, in another order, with a target that differs from the first target and the true answer.

    Args:
        cases: cases of `world_cases`.
        seed: random seed.

    Returns:
        One case per given case.

    Example:
        >>> from rlsedit_fast.evaluation import edited_twice, world_cases
        >>> from rlsedit_fast.world import World
        >>> first = world_cases(World.generate(), 1, seed=0)
        >>> second = edited_twice(first, seed=0)
        >>> second[0].edit.subject == first[0].edit.subject, second[0].edit.target == first[0].edit.target
        (True, False)
    """
    rng = random.Random(seed)
    values = {relation.phrasings[0]: relation.values for relation in RELATIONS}
    again = [
        replace(
            case,
            edit=replace(
                case.edit,
                target=next(
                    v
                    for v in shuffled(values[case.edit.prompt], rng)
                    if v not in (case.edit.target, case.question.answer)
                ),
            ),
        )
        for case in cases
    ]
    return shuffled(again, rng)


@dataclass(frozen=True)
class _Others:
    """Unedited people by a fact, and by two of their three names."""

    peers: dict[tuple[str, str], list[Person]]
    sharing: dict[tuple[int, str, str], list[Person]]

    @classmethod
    def of(cls, unedited: Sequence[Person]) -> _Others:
        peers: dict[tuple[str, str], list[Person]] = defaultdict(list)
        sharing: dict[tuple[int, str, str], list[Person]] = defaultdict(list)
        for person in unedited:
            for name, value in person.facts.items():
                peers[name, value].append(person)
            for pair in _name_pairs(person):
                sharing[pair].append(person)
        return cls(peers, sharing)


def _case(person: Person, relation: Relation, others: _Others, rng: random.Random) -> Case:
    old = person.facts[relation.name]
    target = shuffled([value for value in relation.values if value != old], rng)[0]
    peers = others.peers.get((relation.name, old), ())
    edited_prompt, *unseen = relation.phrasings
    namesakes = [
        other
        for pair in _name_pairs(person)
        for other in others.sharing.get(pair, ())
        if other.facts[relation.name] != target  # otherwise a wrong edit could not be detected
    ]
    # The order of random draws is part of the recorded results.
    drawn = [Question(edited_prompt.format(other.name), old) for other in shuffled(peers, rng)]
    return Case(
        Edit(edited_prompt, person.name, target),
        Question(edited_prompt.format(person.name), old),
        tuple(Question(phrasing.format(person.name), old) for phrasing in unseen),
        tuple(drawn[:NEIGHBORS]),
        tuple(Question(edited_prompt.format(o.name), o.facts[relation.name]) for o in namesakes[:NEIGHBORS]),
        tuple(
            Question(phrasing.format(person.name), person.facts[other.name])
            for other in RELATIONS
            if other is not relation
            for phrasing in shuffled(other.phrasings[1:], rng)[:2]
        ),
        held_out=tuple(drawn[NEIGHBORS : NEIGHBORS + HELD_OUT]),
    )


def _name_pairs(person: Person) -> list[tuple[int, str, str]]:
    first, middle, last = person.name.split()
    return [(0, middle, last), (1, first, last), (2, first, middle)]
