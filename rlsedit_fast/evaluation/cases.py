"""Evaluation cases: an edit, and the prompts that show whether it took, spread, and did harm."""

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
"""Neighbours asked per case."""
SPARE = 3
"""Further ones that are not asked, per case."""


@dataclass(frozen=True)
class Question:
    """A prompt, and what the unedited world answers."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class MultiHop:
    """Questions whose answer follows from several facts, of which edits change some.

    Attributes:
        prompts: wordings of one question.
        answer: before the edits.
        new_answer: after them.
        aliases: other names of the new answer, any of which is as right.
    """

    prompts: tuple[str, ...]
    answer: str
    new_answer: str
    aliases: tuple[str, ...] = ()

    @property
    def right(self) -> tuple[str, ...]:
        """Everything that is a right answer after the edits."""
        return (self.new_answer, *self.aliases)


@dataclass(frozen=True)
class Case:
    """One edit and what to ask about it.

    Attributes:
        edit: what the model is to learn.
        asked: the edited prompt, with the answer before the edit.
        paraphrases: the same question under phrasings that editing never sees.
        neighbors: the same question about people who have the same answer and are not edited.
        namesakes: the same question about unedited people who share two of the subject's three names, if any.
        same_subject: other facts of the subject, under phrasings that the KL term does not look at.
        rebuilt: the edited question about subjects of other records of the data set that have the same answer and are
            not edited: a neighbourhood rebuilt from the records, to be named so wherever a figure of it is quoted.
        multihop: questions whose answers follow from this edit and from others, all applied by then.
        generation: beginnings of texts about the subject, which the model is to continue.
        references: texts about other subjects which have the new answer.
        spare: more of the neighbours' questions (or of the rebuilt ones), which are never asked: what an editor may be
            given to keep, where what is asked then shows whether that reaches beyond what it was given.
    """

    edit: Edit
    asked: Question
    paraphrases: tuple[Question, ...]
    neighbors: tuple[Question, ...]
    namesakes: tuple[Question, ...]
    same_subject: tuple[Question, ...]
    rebuilt: tuple[Question, ...] = ()
    multihop: tuple[MultiHop, ...] = ()
    generation: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    spare: tuple[Question, ...] = ()


def world_cases(world: World, count: int, seed: int) -> list[Case]:
    """`count` false facts about as many different people of a world, in random order.

    Raises:
        InputError: more edits than people.
    """
    if not 1 <= count <= len(world.people):
        raise InputError(f"edits={count}: expected 1 to {len(world.people)}, the people of the world, one fact each")
    rng = random.Random(seed)
    people = shuffled(world.people, rng)
    edited, others = people[:count], _Others.of(people[count:])
    return [_case(person, RELATIONS[int(rng.random() * len(RELATIONS))], others, rng) for person in edited]


def related_cases(world: World, count: int, seed: int) -> list[Case]:
    """`count` false facts, all the facts there are of as few people as that takes, in random order.

    Of these people nothing else is left to ask, so `same_subject` is empty.

    Raises:
        InputError: more edits than facts.
    """
    most = len(world.people) * len(RELATIONS)
    if not 1 <= count <= most:
        raise InputError(f"edits={count}: expected 1 to {most}, the facts of the world")
    rng = random.Random(seed)
    people = shuffled(world.people, rng)
    needed = -(-count // len(RELATIONS))
    others = _Others.of(people[needed:])
    made = [_case(person, relation, others, rng) for person in people[:needed] for relation in RELATIONS][:count]
    return [replace(case, same_subject=()) for case in shuffled(made, rng)]


def edited_twice(cases: Sequence[Case], seed: int) -> list[Case]:
    """Each case edited again, in another order, with a target that is neither the first one nor the true answer."""
    rng = random.Random(seed)
    values = {relation.phrasings[0]: relation.values for relation in RELATIONS}
    again = [
        replace(
            case,
            edit=replace(
                case.edit,
                target=next(
                    v for v in shuffled(values[case.edit.prompt], rng) if v not in (case.edit.target, case.asked.answer)
                ),
            ),
        )
        for case in cases
    ]
    return shuffled(again, rng)


@dataclass(frozen=True)
class _Others:
    """Unedited people, by a fact that they share with someone and by two of their three names."""

    peers: dict[tuple[str, str], list[Person]]
    sharing: dict[tuple[int, str, str], list[Person]]

    @classmethod
    def of(cls, spared: Sequence[Person]) -> _Others:
        peers: dict[tuple[str, str], list[Person]] = defaultdict(list)
        sharing: dict[tuple[int, str, str], list[Person]] = defaultdict(list)
        for person in spared:
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
        if other.facts[relation.name] != target  # who has it already could not show harm
    ]
    # Drawn in the order in which a case has them: the streams of earlier results are the same ones.
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
        spare=tuple(drawn[NEIGHBORS : NEIGHBORS + SPARE]),
    )


def _name_pairs(person: Person) -> list[tuple[int, str, str]]:
    first, middle, last = person.name.split()
    return [(0, middle, last), (1, first, last), (2, first, middle)]
