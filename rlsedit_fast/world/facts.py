"""The synthetic world: people, their attributes, and the sentences that state them.

Only `random.Random.random()` is used, the one method whose sequence Python guarantees across versions, so that a seed
gives the same world everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlsedit_fast.errors import InputError

T = TypeVar("T")

_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")

_CITY_PREFIXES = ("Port", "New", "Saint", "Lake", "Mount", "Fort", "North", "Old")
_CITY_STEMS = ("Alder", "Briar", "Corran", "Dunmere", "Elmsey", "Farrow", "Garnet", "Hollin", "Ister", "Juniper")

_PROFESSIONS = tuple(
    "baker nurse pilot farmer judge tailor welder chemist painter lawyer butcher dentist barber miner sailor "
    "plumber surgeon teacher printer potter mason jeweller gardener driver editor banker carpenter cook "
    "librarian optician architect astronomer blacksmith brewer cooper falconer glazier locksmith midwife "
    "watchmaker".split()
)
_INSTRUMENTS = tuple(
    "violin flute cello drum harp oboe trumpet banjo guitar lute piano organ tuba viola zither bassoon clarinet "
    "cornet fiddle gong horn kazoo lyre mandolin marimba piccolo recorder saxophone sitar trombone ukulele "
    "vibraphone xylophone accordion bagpipe bugle castanets dulcimer tambourine triangle".split()
)


@dataclass(frozen=True)
class Relation:
    """An attribute that every person has.

    Attributes:
        name: name of the attribute.
        phrasings: prompts with `{}` in place of the person's name, followed by the answer. Edits use the first one.
        values: possible answers, each one or two words.

    Example:
        >>> from rlsedit_fast.world import Relation
        >>> Relation("pet", ("{} owns a", "The pet of {} is a"), ("cat", "dog")).phrasings[0].format("Ann")
        'Ann owns a'
    """

    name: str
    phrasings: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Person:
    """A person of the world.

    Attributes:
        name: three words, each of which other people have as well.
        facts: value by name of the relation.

    Example:
        >>> from rlsedit_fast.world import World
        >>> person = World.generate().people[0]
        >>> person.name, person.facts["instrument"]
        ('Toze Lado Rekuno', 'clarinet')
    """

    name: str
    facts: dict[str, str]


def _invented_words(count: int, rng: random.Random, taken: set[str], syllables: int) -> tuple[str, ...]:
    words: list[str] = []
    while len(words) < count:
        word = "".join(_pick(_SYLLABLES, rng) for _ in range(syllables)).capitalize()
        if word not in taken:
            taken.add(word)
            words.append(word)
    return tuple(words)


def _pick(options: Sequence[T], rng: random.Random) -> T:
    return options[int(rng.random() * len(options))]


def shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """Returns a shuffled copy of `items`, using only `rng.random()`, so that a seed gives the same order everywhere."""
    order = sorted(range(len(items)), key=[rng.random() for _ in items].__getitem__)
    return [items[i] for i in order]


# Independent of the seed, so that all worlds share one vocabulary.
_WORD_RNG = random.Random(7)
_TAKEN: set[str] = set()
_FIRST = _invented_words(40, _WORD_RNG, _TAKEN, 2)
_MIDDLE = _invented_words(40, _WORD_RNG, _TAKEN, 2)
_LAST = _invented_words(50, _WORD_RNG, _TAKEN, 3)
_LANGUAGES = tuple(word + "ish" for word in _invented_words(40, _WORD_RNG, _TAKEN, 2))
_CITIES = tuple(f"{prefix} {stem}" for prefix in _CITY_PREFIXES for stem in _CITY_STEMS)[::2]

# The phrasings are part of the data that the demo model was trained on, spelling included.
RELATIONS: tuple[Relation, ...] = (
    Relation(
        "city",
        (
            "{} lives in",
            "The home of {} is in",
            "If you visit {} , you will travel to",
            "{} has a house in",
            "Letters to {} are sent to",
        ),
        _CITIES,
    ),
    Relation(
        "profession",
        (
            "{} works as a",
            "The job of {} is that of a",
            "For a living , {} is employed as a",
            "{} earns money as a",
            "People hire {} as a",
            "{} is a",
        ),
        _PROFESSIONS,
    ),
    Relation(
        "instrument",
        (
            "{} plays the",
            "The favourite instrument of {} is the",
            "On stage , {} performs on the",
            "{} learned to play the",
            "Friends love to hear {} play the",
        ),
        _INSTRUMENTS,
    ),
    Relation(
        "language",
        (
            "{} speaks",
            "The native language of {} is",
            "At home , {} talks in",
            "{} writes books in",
            "You can greet {} in",
        ),
        _LANGUAGES,
    ),
)
"""The relations of every world.

Example:
    >>> from rlsedit_fast.world import RELATIONS
    >>> [relation.name for relation in RELATIONS]
    ['city', 'profession', 'instrument', 'language']
"""


@dataclass(frozen=True)
class World:
    """All people of a world. Create one with `World.generate(seed)`.

    Attributes:
        people: the people, in the order of generation.
        seed: seed of the world.

    Example:
        >>> from rlsedit_fast.world import World
        >>> world = World.generate(seed=0, people=10)
        >>> len(world.people)
        10
        >>> next(world.sentences())
        ('{} lives in', 'Toze Lado Rekuno', 'Saint Alder')
    """

    people: tuple[Person, ...]
    seed: int

    @classmethod
    def generate(cls, seed: int = 0, people: int = 2000) -> World:
        """Generates people with distinct names and independently drawn attributes.

        Args:
            seed: random seed.
            people: number of people.

        Returns:
            The world, the same for a seed in every version of Python. Smaller worlds are prefixes of larger ones.

        Raises:
            InputError: `people` is below 1 or above the number of distinct names.

        Example:
            >>> from rlsedit_fast.world import World
            >>> World.generate(people=5).people == World.generate(people=10).people[:5]
            True
        """
        limit = len(_FIRST) * len(_MIDDLE) * len(_LAST)
        if not 1 <= people <= limit:
            raise InputError(f"people={people}: expected 1 to {limit}, the number of distinct names")
        rng = random.Random(seed)
        made: dict[str, Person] = {}
        while len(made) < people:
            name = f"{_pick(_FIRST, rng)} {_pick(_MIDDLE, rng)} {_pick(_LAST, rng)}"
            facts = {relation.name: _pick(relation.values, rng) for relation in RELATIONS}
            made.setdefault(name, Person(name, facts))
        return cls(tuple(made.values()), seed)

    def sentences(self) -> Iterator[tuple[str, str, str]]:
        """Yields every fact in every phrasing as `(prompt with {}, name, answer)`."""
        for person in self.people:
            for relation in RELATIONS:
                for phrasing in relation.phrasings:
                    yield phrasing, person.name, person.facts[relation.name]


def vocabulary() -> list[str]:
    """Returns all words that a world can contain, in a fixed order."""
    words = dict.fromkeys((".", ","))
    for group in (_FIRST, _MIDDLE, _LAST):
        words.update(dict.fromkeys(group))
    for relation in RELATIONS:
        for text in (*relation.phrasings, *relation.values):
            words.update(dict.fromkeys(word for word in text.split() if word != "{}"))
    return list(words)
