"""The gates of a release: their settings, and the file that contains them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rlsedit_fast.data.prompts import read_prompts
from rlsedit_fast.errors import InputError, did_you_mean, listed
from rlsedit_fast.models.answers import CHAT_TOKENS
from rlsedit_fast.statistics.sources import TextFile

RAW_TOKENS = 5
"""Default maximum number of tokens of a continuation."""


class _Part(BaseModel):
    """Base class of the parts of a gate file; unknown keys and other types than declared are invalid."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _with_prompt(value: Any) -> Any:
    return {"prompt": value} if isinstance(value, str) else value


def _with_file(value: Any) -> Any:
    return {"file": str(value)} if isinstance(value, str | Path) else value


def _with_share(value: Any) -> Any:
    return {"at_least": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


_Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
_Texts = Annotated[list[_Text], BeforeValidator(_several)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=1)]


class Question(_Part):
    """A prompt to ask.

    Attributes:
        prompt: the prompt.
        chat: ask it as the user message of a chat, instead of continuing it.
        tokens: maximum number of tokens of the answer; by default 5, in a chat 24.

    Example:
        >>> from rlsedit_fast.evaluation.gate_file import Question
        >>> Question(prompt="The capital of France is").answer_tokens
        5
    """

    prompt: _Text
    chat: bool = False
    tokens: _Count | None = None

    @property
    def answer_tokens(self) -> int:
        """Maximum number of tokens of the answer."""
        return self.tokens or (CHAT_TOKENS if self.chat else RAW_TOKENS)

    @property
    def key(self) -> tuple[str, bool, int]:
        """Prompt, chat and number of tokens, which determine the answer."""
        return self.prompt, self.chat, self.answer_tokens


class Questions(_Part):
    """Prompts whose answers must be those of the unedited model: one prompt, or a file with one per line.

    Attributes:
        prompt: the prompt.
        file: text file of prompts; a relative path is relative to the gate file.
        chat: see `Question`.
        tokens: see `Question`.
    """

    prompt: _Text | None = None
    file: _Text | None = None
    chat: bool = False
    tokens: _Count | None = None

    def questions(self) -> list[Question]:
        """Returns the prompts, without duplicates.

        Raises:
            InputError: the file cannot be read or contains no prompt.
        """
        prompts = [self.prompt] if self.prompt is not None else read_prompts(self.file or "")
        return [Question(prompt=prompt, chat=self.chat, tokens=self.tokens) for prompt in prompts]


class Expected(Question):
    """A prompt whose answer must be as given; upper and lower case and white space are not distinguished.

    Attributes:
        contains: one of these texts must be in the answer.
        starts_with: the answer must start with one of these texts.
        excludes: none of these texts may be in the answer.
        when: `always`: at every check; `end`: when all edits are applied. By default `always` if the answer of the
            unedited model is as given, otherwise `end`.

    Example:
        >>> from rlsedit_fast.evaluation.gate_file import Expected
        >>> Expected(prompt="The capital of France is", contains="Lyon").holds("the city of  LYON .")
        True
    """

    contains: _Texts = []
    starts_with: _Texts = []
    excludes: _Texts = []
    when: Literal["always", "end"] | None = None

    def holds(self, answer: str) -> bool:
        """Returns whether an answer is as given."""
        text = _folded(answer)
        return (
            (not self.contains or any(_folded(one) in text for one in self.contains))
            and (not self.starts_with or any(text.startswith(_folded(one)) for one in self.starts_with))
            and not any(_folded(one) in text for one in self.excludes)
        )

    @property
    def expected(self) -> str:
        """The conditions, such as "contains 'Lyon'"."""
        named = {"contains": self.contains, "starts with": self.starts_with, "does not contain": self.excludes}
        return ", ".join(f"{what} {' or '.join(map(repr, texts))}" for what, texts in named.items() if texts)


class HeldOut(_Part):
    """Text on which perplexity and KL divergence are measured.

    Attributes:
        file: text file, plain or JSON Lines with a field `text`; a relative path is relative to the gate file.
        tokens: maximum number of tokens.
    """

    file: _Text
    tokens: _Count = 2000


class Limits(_Part):
    """Limits; None: no limit.

    Attributes:
        perplexity: maximum perplexity on the text.
        perplexity_ratio: maximum of the perplexity relative to that of the unedited model.
        kl: maximum KL divergence from the unedited model on the text, nats per token.
        same_top: minimum share of tokens of the text whose most likely prediction is that of the unedited model.
        changed: maximum share of the `unchanged` prompts with another answer.
        deviation: maximum of `||W - W0|| / ||W0||` over the edited layers.
        deviation_bound: maximum over the edited layers of the bound on the relative change of the outputs on the
            anchors; without anchors, of the weights.
    """

    perplexity: Annotated[float, Field(gt=0)] | None = None
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    kl: Annotated[float, Field(ge=0)] | None = None
    same_top: _Share | None = None
    changed: _Share = 0.0
    deviation: Annotated[float, Field(ge=0)] | None = None
    deviation_bound: Annotated[float, Field(ge=0)] | None = None


class Retention(_Part):
    """Share of earlier active edits that the model still states.

    Attributes:
        at_least: the minimum.
        sample: maximum number of edits that are measured, evenly spaced.
    """

    at_least: _Share
    sample: _Count = 200


class GateSettings(_Part):
    """The contents of a gate file; see `Gates`."""

    every: _Count = 1
    on_violation: Literal["stop", "undo"] = "stop"
    unchanged: list[Annotated[Questions, BeforeValidator(_with_prompt)]] = []
    answers: list[Expected] = []
    text: Annotated[HeldOut, BeforeValidator(_with_file)] | None = None
    limits: Limits = Limits()
    retention: Annotated[Retention, BeforeValidator(_with_share)] | None = None


def make_settings(values: Mapping[str, Any], lines: Mapping[tuple[Any, ...], int] | None = None) -> GateSettings:
    """Validates the contents of a gate file.

    Args:
        values: the contents.
        lines: line numbers by path of keys and indices, for error messages.

    Raises:
        InputError: a key is unknown, a value is invalid, or there is no gate.
    """
    lines = lines or {}
    try:
        made = GateSettings(**values)
    except ValidationError as error:
        faults = [_fault(dict(one), lines) for one in error.errors(include_url=False)]
        raise InputError("\n".join(listed(faults))) from None
    except TypeError:
        raise InputError("the keys must be strings, such as `unchanged` and `limits`") from None
    found = list(_contradictions(made))
    if found:
        raise InputError("\n".join(_at(lines, where) + text for where, text in found))
    return made


def read_gate_file(path: str | Path) -> GateSettings:
    """Reads and checks a gate file, YAML or JSON, with the files that it names; no model is needed.

    Raises:
        InputError: a file cannot be read, or a key or value is invalid; the message contains the line.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"gate file {str(path)!r}: cannot be read as UTF-8 ({error}); pass a YAML file") from error
    values, lines = _parsed(text, file)
    if not isinstance(values, dict):
        raise InputError(
            f"gate file {str(path)!r}: expected keys such as `unchanged`, `answers` and `limits`, got "
            f"{'an empty file' if values is None else repr(values)[:60]}"
        )
    try:
        made = make_settings(values, lines)
        return _check_files(_resolved(made, file.parent), lines)
    except InputError as error:
        raise InputError(f"gate file {str(path)!r}: {error.message}", error.hint) from None


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _resolved(made: GateSettings, folder: Path) -> GateSettings:
    """Returns the settings with paths relative to the folder of the gate file."""
    unchanged = [
        one if one.file is None else one.model_copy(update={"file": str(folder / one.file)}) for one in made.unchanged
    ]
    text = made.text and made.text.model_copy(update={"file": str(folder / made.text.file)})
    return made.model_copy(update={"unchanged": unchanged, "text": text})


def _check_files(made: GateSettings, lines: Mapping[tuple[Any, ...], int]) -> GateSettings:
    for at, one in enumerate(made.unchanged):
        try:
            one.questions()
        except InputError as error:
            raise InputError(f"{_at(lines, ('unchanged', at))}{error.message}", error.hint) from None
    if made.text is not None:
        try:
            TextFile(made.text.file).check()
        except InputError as error:
            raise InputError(f"{_at(lines, ('text',))}{error.message}", error.hint) from None
    return made


def _contradictions(made: GateSettings) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yields the place and a description of values that contradict each other."""
    for at, one in enumerate(made.unchanged):
        if (one.prompt is None) == (one.file is None):
            yield ("unchanged", at), "expected either `prompt` or `file`"
    for at, each in enumerate(made.answers):
        if not each.expected:
            yield ("answers", at), "expected at least one of `contains`, `starts_with` and `excludes`"
    limits = made.limits
    needs_text = [name for name in ("perplexity", "perplexity_ratio", "kl", "same_top") if getattr(limits, name)]
    needs_text += ["kl"] if limits.kl == 0 else []
    if needs_text and made.text is None:
        yield ("limits", needs_text[0]), f"limits.{needs_text[0]} requires `text: FILE`, text that is not edited"
    if made.text is not None and not needs_text:
        yield ("text",), "text is not used: no limit on `perplexity`, `perplexity_ratio`, `kl` or `same_top` is given"
    if "changed" in limits.model_fields_set and not made.unchanged:
        yield ("limits", "changed"), "limits.changed requires `unchanged`, a list of prompts"
    given = (limits.deviation, limits.deviation_bound, made.retention)
    if not (made.unchanged or made.answers or needs_text or any(one is not None for one in given)):
        yield (), "contains no gate; add `unchanged`, `answers`, `limits` or `retention`"


def _parsed(text: str, file: Path) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """Returns the contents of a YAML or JSON file, and the line of every key and item."""
    lines: dict[tuple[Any, ...], int] = {}
    values, is_json = None, file.suffix.lower() == ".json"
    if is_json:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"gate file {str(file)!r}: not valid JSON ({error}); correct the file") from None
        text = text.replace("\t", " ")  # YAML, which gives the lines, does not accept tabs
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _collect_lines(node, (), lines, set(), str(file))
            values = values if is_json else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if not is_json:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"gate file {str(file)!r}: not valid YAML: {reason}; correct the file") from None
    return values, lines


def _collect_lines(
    node: yaml.Node, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], above: set[int], file: str
) -> None:
    """Enters the line of every key and item below a node.

    Raises:
        InputError: a key is given twice, of which YAML would keep the last.
    """
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in above:
        raise InputError(f"gate file {file!r}, line {node.start_mark.line + 1}: an alias contains itself")
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for at, item in enumerate(node.value):
            _collect_lines(item, (*path, at), lines, above, file)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, key.value if isinstance(key.value, str) else "")
            if inner in lines:
                raise InputError(
                    f"gate file {file!r}, line {key.start_mark.line + 1}: the key {key.value!r} is given twice, first "
                    f"in line {lines[inner]}; keep one of them"
                )
            lines[inner] = key.start_mark.line + 1
            _collect_lines(value, inner, lines, above, file)


def _at(lines: Mapping[tuple[Any, ...], int], where: tuple[Any, ...]) -> str:
    """Returns "line N: " for the innermost known part of a path, or an empty string."""
    for end in range(len(where), 0, -1):
        if where[:end] in lines:
            return f"line {lines[where[:end]]}: "
    return ""


def _fault(one: dict[str, Any], lines: Mapping[tuple[Any, ...], int]) -> str:
    """Describes an error of the validation: line, place, what was given and what is expected."""
    where = tuple(one["loc"])
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
    if one["type"] == "extra_forbidden":
        known = list(_part_at(where[:-1]).model_fields)
        near = did_you_mean(str(where[-1]), known) or f"; expected one of {', '.join(known)}"
        return f"{_at(lines, where)}unknown key {place!r}{near}"
    if one["type"] == "missing":
        return f"{_at(lines, where)}{place} is missing; add it"
    expected = _EXPECTED.get(one["type"], one["msg"].removeprefix("Input should be ")).format(**one.get("ctx", {}))
    if one["type"] == "string_type" and isinstance(one["input"], bool | int | float):
        expected = "text; put it in quotes"
    return f"{_at(lines, where)}{place}: expected {expected}, got {one['input']!r:.60}"


_EXPECTED = {
    "greater_than_equal": "a number of at least {ge:g}",
    "greater_than": "a number above {gt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "text that is not blank",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a mapping of keys to values",
}
"""Expected values by pydantic's type of error."""


def _part_at(where: tuple[Any, ...]) -> type[BaseModel]:
    """Returns the class of the part at a path of keys and indices."""
    part: type[BaseModel] = GateSettings
    for name in where:
        if isinstance(name, str) and name in part.model_fields:
            part = next(_classes(part.model_fields[name].annotation), part)
    return part


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _classes(inner)
