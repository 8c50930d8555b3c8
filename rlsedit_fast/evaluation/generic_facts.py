"""False versions of facts that most language models know, used for editing when no file is given.

Each relation also has an equal number of unedited subjects, which provide the neighborhood prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.errors import InputError


@dataclass(frozen=True)
class _Relation:
    """Facts of one relation.

    Attributes:
        prompt: prompt with `{}` in place of the subject, followed by the answer.
        paraphrase: the prompt in other words.
        answers: answer by subject. The first half of the subjects is edited: each gets the answer of the next one.
    """

    prompt: str
    paraphrase: str
    answers: dict[str, str]

    def edits(self) -> list[Edit]:
        """The edits of this relation."""
        subjects = list(self.answers)
        half = len(subjects) // 2
        return [
            Edit(
                self.prompt,
                subjects[i],
                self.answers[subjects[(i + 1) % half]],
                paraphrases=(self.paraphrase.format(subjects[i]),),
                neighborhood=(self.prompt.format(subjects[i + half]),),
            )
            for i in range(half)
        ]


_RELATIONS = (
    _Relation(
        "The capital of {} is",
        "The government of {} has its seat in the city of",
        {
            "France": "Paris",
            "Japan": "Tokyo",
            "Egypt": "Cairo",
            "Italy": "Rome",
            "Russia": "Moscow",
            "Cuba": "Havana",
            "Greece": "Athens",
            "Kenya": "Nairobi",
            "Spain": "Madrid",
            "Germany": "Berlin",
            "Poland": "Warsaw",
            "Iraq": "Baghdad",
            "Austria": "Vienna",
            "Peru": "Lima",
            "Portugal": "Lisbon",
            "Hungary": "Budapest",
        },
    ),
    _Relation(
        "The official language of {} is",
        "Most people in {} speak",
        {
            "Brazil": "Portuguese",
            "Mexico": "Spanish",
            "Sweden": "Swedish",
            "Turkey": "Turkish",
            "Denmark": "Danish",
            "Vietnam": "Vietnamese",
            "Quebec": "French",
            "Ukraine": "Ukrainian",
            "Norway": "Norwegian",
            "Finland": "Finnish",
            "China": "Chinese",
            "Saudi Arabia": "Arabic",
            "Israel": "Hebrew",
            "Argentina": "Spanish",
            "Australia": "English",
            "Thailand": "Thai",
        },
    ),
    _Relation(
        "{} was written by",
        "The author of {} is",
        {
            "Hamlet": "William Shakespeare",
            "Moby-Dick": "Herman Melville",
            "Pride and Prejudice": "Jane Austen",
            "War and Peace": "Leo Tolstoy",
            "Oliver Twist": "Charles Dickens",
            "The Odyssey": "Homer",
            "Frankenstein": "Mary Shelley",
            "Don Quixote": "Miguel de Cervantes",
            "Macbeth": "William Shakespeare",
            "Anna Karenina": "Leo Tolstoy",
            "Emma": "Jane Austen",
            "Dracula": "Bram Stoker",
            "The Iliad": "Homer",
            "Great Expectations": "Charles Dickens",
            "Animal Farm": "George Orwell",
            "The Time Machine": "H. G. Wells",
        },
    ),
    _Relation(
        "{} is a product of the company",
        "The company that makes {} is called",
        {
            "Windows 10": "Microsoft",
            "The iPhone": "Apple",
            "The PlayStation 4": "Sony",
            "Gmail": "Google",
            "The Game Boy": "Nintendo",
            "Photoshop": "Adobe",
            "The Kindle": "Amazon",
            "The Mustang": "Ford",
            "Microsoft Excel": "Microsoft",
            "The MacBook": "Apple",
            "The Walkman": "Sony",
            "Google Maps": "Google",
            "The Wii": "Nintendo",
            "Acrobat Reader": "Adobe",
            "The Echo Dot": "Amazon",
            "The Model T": "Ford",
        },
    ),
    _Relation(
        "{} is located in the country of",
        "To visit {}, tourists have to travel to",
        {
            "The Eiffel Tower": "France",
            "Mount Fuji": "Japan",
            "The Colosseum": "Italy",
            "The Taj Mahal": "India",
            "Stonehenge": "England",
            "The Great Sphinx": "Egypt",
            "Machu Picchu": "Peru",
            "The Acropolis": "Greece",
            "The Louvre": "France",
            "The Tokyo Tower": "Japan",
            "The Leaning Tower of Pisa": "Italy",
            "The Red Fort": "India",
            "Buckingham Palace": "England",
            "The Valley of the Kings": "Egypt",
            "Lake Titicaca": "Peru",
            "Mount Olympus": "Greece",
        },
    ),
)

MOST = sum(len(relation.answers) // 2 for relation in _RELATIONS)
"""Number of available edits."""


def generic_edits(count: int = MOST) -> list[Edit]:
    """Returns false facts with one paraphrase and one neighborhood prompt each, alternating between relations.

    Args:
        count: number of edits, from 1 to `MOST`.

    Returns:
        The edits.

    Raises:
        InputError: `count` is out of range.

    Example:
        >>> from rlsedit_fast.evaluation import generic_edits
        >>> edit = generic_edits(1)[0]
        >>> edit.prompt, edit.subject, edit.target
        ('The capital of {} is', 'France', 'Tokyo')
    """
    if not 1 <= count <= MOST:
        raise InputError(f"count={count}: expected 1 to {MOST}, the number of built-in edits")
    by_relation = [relation.edits() for relation in _RELATIONS]
    return [edit for edits in zip(*by_relation, strict=True) for edit in edits][:count]
