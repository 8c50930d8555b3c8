"""Sources of running text: given texts, a text file, or the model itself; all are read as streams."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rlsedit_fast.errors import InputError
from rlsedit_fast.models.generation import sample
from rlsedit_fast.models.loading import max_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS_AT_ONCE = 64  # per call of the tokenizer
_PARAGRAPH = 8192  # maximum number of characters of a paragraph, so that a file without blank lines is streamed
_READ = 1 << 20  # bytes per read while hashing a file


@runtime_checkable
class Source(Protocol):
    """A stream of tokenized texts.

    Attributes:
        name: description of the text; sources with equal names give equal texts.
        repeatable: whether it can be read again, from any position.

    Example:
        >>> from rlsedit_fast.statistics import GivenTexts, Source
        >>> source: Source = GivenTexts(["A text."])
        >>> source.name
        'texts given by the caller'
    """

    @property
    def name(self) -> str:
        """Description of the text."""

    @property
    def repeatable(self) -> bool:
        """Whether the text can be read again."""

    def read(self, tokenizer: PreTrainedTokenizerBase, start: int) -> Iterator[tuple[int, list[int]]]:
        """Yields the token ids of each text from position `start` on, with the position after the text."""


@dataclass(frozen=True)
class GivenTexts:
    """Texts in memory; blank ones are skipped.

    Attributes:
        texts: the texts.

    Example:
        >>> from rlsedit_fast.statistics import GivenTexts
        >>> GivenTexts(["A text."]).repeatable
        False
    """

    texts: Iterable[str]
    name = "texts given by the caller"
    repeatable = False

    def read(self, tokenizer: PreTrainedTokenizerBase, start: int) -> Iterator[tuple[int, list[int]]]:
        """See `Source`.

        Raises:
            InputError: see `each_text`.
        """
        return _tokenized(tokenizer, islice(enumerate(each_text(self.texts), start=1), start, None))


class TextFile:
    """A UTF-8 file: `.jsonl` with a field `text` in every line, otherwise plain text.

    Plain text is read by paragraphs, which end at a blank line, or after 8,192 characters without one.

    Example:
        >>> import tempfile
        >>> from rlsedit_fast import TextFile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("A paragraph.")
        ...     file.flush()
        ...     TextFile(file.name).repeatable
        True
    """

    repeatable = True

    def __init__(self, path: str | Path) -> None:
        """Reads the file once to compute its name in the statistics: file name and SHA-256, without the folder.

        Raises:
            InputError: the file does not exist or cannot be read.
        """
        self._path = Path(path)
        digest = hashlib.sha256()
        try:
            with self._path.open("rb") as file:
                while piece := file.read(_READ):
                    digest.update(piece)
        except OSError as error:
            raise InputError(
                f"text file {str(path)!r} cannot be read ({error.strerror}); pass a readable file"
            ) from error
        self.name = f"{self._path.name}, sha256 {digest.hexdigest()}"

    def read(self, tokenizer: PreTrainedTokenizerBase, start: int) -> Iterator[tuple[int, list[int]]]:
        """See `Source`.

        Raises:
            InputError: the file is not UTF-8, or a line of a `.jsonl` file has no string in `text`.
        """
        return _tokenized(tokenizer, self._texts(start))

    def texts(self) -> Iterator[str]:
        """Yields the texts.

        Raises:
            InputError: see `read`.
        """
        return (text for _, text in self._texts(0) if text.strip())

    def check(self) -> None:
        """Reads the first text.

        Raises:
            InputError: the file contains no text, is not UTF-8, or its first line has no string in `text`.
        """
        if next(self.texts(), None) is None:
            raise InputError(f"text file {self._path.name!r} contains no text; pass a file with text")

    def _texts(self, start: int) -> Iterator[tuple[int, str]]:
        return self._records(start) if self._path.suffix == ".jsonl" else self._paragraphs(start)

    def _paragraphs(self, start: int) -> Iterator[tuple[int, str]]:
        held, size = [], 0
        place = start
        for place, line in self._lines(start, longest=_PARAGRAPH):
            if line.strip():
                held.append(line)
                size += len(line)
            if held and (not line.strip() or size >= _PARAGRAPH):
                yield place, "".join(held).strip()
                held, size = [], 0
        if held:
            yield place, "".join(held).strip()

    def _records(self, start: int) -> Iterator[tuple[int, str]]:
        for place, line in self._lines(start, longest=-1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise InputError(
                    f"{self._path.name}, line {place}: expected a JSON object with a string in the field 'text', got "
                    f"{line.strip()[:80]!r}; correct the line"
                )
            yield place, text

    def _lines(self, start: int, *, longest: int) -> Iterator[tuple[int, str]]:
        """Yields lines, split after `longest` characters, with their positions, which count the pieces."""
        try:
            with self._path.open(encoding="utf-8-sig") as file:
                place = 0
                while line := file.readline(longest):
                    place += 1
                    if place > start:
                        yield place, line
        except UnicodeDecodeError as error:
            raise InputError(f"text file {self._path.name!r} is not UTF-8 ({error}); convert it") from error


@dataclass(frozen=True)
class SelfGenerated:
    """Unlimited text that the model generates at temperature 1.

    Attributes:
        model: the model.
        seed: random seed.
        length: maximum number of tokens of a text, including the first; at most the maximum of the model.
        batch: number of texts sampled at once. Each batch has its own seed, so it can be sampled without earlier ones.

    Raises:
        InputError: `length` is below 2 or `batch` below 1.

    Example:
        >>> from rlsedit_fast import SelfGenerated
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> position, ids = next(SelfGenerated(model, batch=1, length=4).read(tokenizer, 0))
        >>> position
        1
    """

    model: PreTrainedModel
    seed: int = 0
    length: int = 256
    batch: int = 64
    repeatable = True

    def __post_init__(self) -> None:
        """Raises InputError for numbers out of range."""
        if self.length < 2 or self.batch < 1:
            raise InputError(f"length={self.length}, batch={self.batch}: expected at least 2 and at least 1")

    @property
    def name(self) -> str:
        """Description of the text."""
        return f"self-generated, seed {self.seed}, temperature 1.0, {self.batch} texts at once, {self._length} tokens"

    @property
    def _length(self) -> int:
        return min(self.length, max_tokens(self.model.config) or self.length)

    def read(self, tokenizer: PreTrainedTokenizerBase, start: int) -> Iterator[tuple[int, list[int]]]:
        """See `Source`."""
        place = start
        while True:
            # Hashed, since some generators use only the lower half of a seed.
            mixed = hashlib.sha256(f"{self.seed} {place // self.batch}".encode()).digest()
            seed = int.from_bytes(mixed[:4], "big")
            samples = sample(self.model, tokenizer, texts=self.batch, length=self._length, seed=seed)
            for drawn in samples[place % self.batch :]:
                place += 1
                yield place, drawn.ids


def each_text(texts: Iterable[str]) -> Iterator[str]:
    """Yields texts after checking that they are a list of strings.

    Raises:
        InputError: `texts` is a single string or not iterable, or a text is not a string.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise InputError(f"texts: expected a list of strings, got {texts!r:.60}; put a single text in a list")
    return (_text(place, text) for place, text in enumerate(texts))


def _text(place: int, text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"texts: expected strings, got {text!r:.60} at index {place}; remove or correct it")
    return text


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[int]]]:
    some = ((place, text) for place, text in texts if text.strip())
    while group := list(islice(some, _TEXTS_AT_ONCE)):
        # verbose: texts longer than the maximum of the model are split, so its warning would mislead
        ids = tokenizer([text for _, text in group], verbose=False)["input_ids"]
        yield from ((place, row) for (place, _), row in zip(group, ids, strict=True) if row)
