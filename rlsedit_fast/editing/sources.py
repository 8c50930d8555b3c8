"""Where running text comes from: given texts, a text file, or the model itself; always read as a stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlsedit_fast.errors import InputError
from rlsedit_fast.models.generation import sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS_AT_ONCE = 64  # to a call of the tokenizer
_PARAGRAPH = 8192  # characters at which a paragraph is taken for ended, so that a file without blank lines streams
_READ = 1 << 20  # bytes at once, where a file is only hashed


class Source(Protocol):
    """A stream of tokenised texts.

    Attributes:
        name: what text it is; two sources of one name give the same texts.
        repeatable: whether it can be read again, and from where it was left.
    """

    @property
    def name(self) -> str: ...

    @property
    def repeatable(self) -> bool: ...

    def read(self, tokenizer: PreTrainedTokenizerBase, start: int) -> Iterator[tuple[int, list[int]]]:
        """The texts' token ids from position `start` on (0 is the beginning), each with the position behind it."""


@dataclass(frozen=True)
class GivenTexts:
    """Texts that the caller holds; blank ones are passed over."""

    texts: Iterable[str]
    name = "texts given by the caller"
    repeatable = False

    def read(self, tokenizer: PreTrainedTokenizerBase, start: int) -> Iterator[tuple[int, list[int]]]:
        """See `Source`.

        Raises:
            InputError: see `each_text`.
        """
        return _tokenised(tokenizer, islice(enumerate(each_text(self.texts), start=1), start, None))


class TextFile:
    """A UTF-8 file: `.jsonl` with a field `text` in every line, anything else as plain text.

    Plain text is read by paragraphs, which end at a blank line or, where none comes, after 8,192 characters.
    """

    repeatable = True

    def __init__(self, path: str | Path) -> None:
        """Reads the file once, for its name in the statistics: its own and its SHA-256, but not its folder.

        Raises:
            InputError: there is no such file, or it cannot be read.
        """
        self._path = Path(path)
        digest = hashlib.sha256()
        try:
            with self._path.open("rb") as file:
                while piece := file.read(_READ):
                    digest.update(piece)
        except OSError as error:
            raise InputError(
                f"text file {str(path)!r} cannot be read ({error.strerror}); name a readable file"
            ) from error
        self.name = f"{self._path.name}, sha256 {digest.hexdigest()}"

    def read(self, tokenizer: PreTrainedTokenizerBase, start: int) -> Iterator[tuple[int, list[int]]]:
        """See `Source`.

        Raises:
            InputError: the file is not UTF-8, or a line of a `.jsonl` file has no text in `text`.
        """
        texts = self._records if self._path.suffix == ".jsonl" else self._paragraphs
        return _tokenised(tokenizer, texts(start))

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
                    f"{self._path.name}, line {place}: expected a JSON object with a text in the field 'text', got "
                    f"{line.strip()[:80]!r}; correct the line"
                )
            yield place, text

    def _lines(self, start: int, *, longest: int) -> Iterator[tuple[int, str]]:
        """Lines, in pieces where one has more than `longest` characters; a position counts these."""
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
    """The model's own text without end, at temperature 1.

    Attributes:
        model: which model.
        seed: of the samples.
        length: most tokens of a text, the one it starts from included; fewer where the model takes no more.
        batch: texts sampled at once; each batch has a seed of its own, so any can be made without those before it.
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
        """What text it is."""
        return f"self-generated, seed {self.seed}, temperature 1.0, {self.batch} texts at once, {self._length} tokens"

    @property
    def _length(self) -> int:
        return min(self.length, getattr(self.model.config.get_text_config(), "max_position_embeddings", self.length))

    def read(self, tokenizer: PreTrainedTokenizerBase, start: int) -> Iterator[tuple[int, list[int]]]:
        """See `Source`."""
        place = start
        while True:
            # Hashed, for some generators look at no more than the lower half of a seed.
            mixed = hashlib.sha256(f"{self.seed} {place // self.batch}".encode()).digest()
            seed = int.from_bytes(mixed[:4], "big")
            samples = sample(self.model, tokenizer, texts=self.batch, length=self._length, seed=seed)
            for drawn in samples[place % self.batch :]:
                place += 1
                yield place, drawn.ids


def each_text(texts: Iterable[str]) -> Iterator[str]:
    """Some texts one by one.

    Raises:
        InputError: a single text, of which every letter would pass for one; or what is no text or no texts.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise InputError(f"texts: expected a list of texts, got {texts!r:.60}; put a single one in a list")
    return (_text(place, text) for place, text in enumerate(texts))


def _text(place: int, text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"texts: expected a list of texts, got {text!r:.60} at place {place}; leave it out or mend it")
    return text


def _tokenised(tokenizer: PreTrainedTokenizerBase, texts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[int]]]:
    some = ((place, text) for place, text in texts if text.strip())
    while group := list(islice(some, _TEXTS_AT_ONCE)):
        # verbose: texts longer than the model takes are read in pieces, so its warning would mislead
        ids = tokenizer([text for _, text in group], verbose=False)["input_ids"]
        yield from ((place, row) for (place, _), row in zip(group, ids, strict=True) if row)
