"""Record layouts of the supported formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.data.fields import Fields
from rlsedit_fast.models.conversations import last_user
from rlsedit_fast.models.joins import Join

Format = Literal["edits", "counterfact", "zsre", "mquake"]
"""File formats of `read_edits`.

Example:
    >>> from typing import get_args
    >>> from rlsedit_fast.data import Format
    >>> get_args(Format)
    ('edits', 'counterfact', 'zsre', 'mquake')
"""

ZsreTarget = Literal["alt", "answers"]
"""Fields of zsRE records that can be the target.

Example:
    >>> from typing import get_args
    >>> from rlsedit_fast.data import ZsreTarget
    >>> get_args(ZsreTarget)
    ('alt', 'answers')
"""

FORMATS: tuple[Format, ...] = get_args(Format)
"""All file formats.

Example:
    >>> from rlsedit_fast.data import FORMATS
    >>> "counterfact" in FORMATS
    True
"""

_FIELDS = (
    *("prompt", "subject", "target", "name", "id", "weight", "paraphrases", "neighborhood", "span", "join"),
    "messages",
)
"""Fields of the format `edits`."""

_DETECT_FROM = 10  # number of records inspected to detect the format; more than one, since a record may be invalid


@dataclass(frozen=True)
class Draft:
    """An edit read from a record; valid only if `fields` has no problems.

    Attributes:
        edit: the edit.
        fields: the fields that it was read from.
        part: the part of the record, if a record contains several edits.
    """

    edit: Edit
    fields: Fields
    part: str = ""


Layout = Callable[[object], Iterator[Draft]]


def layout(name: Format, zsre_target: ZsreTarget) -> Layout:
    """Returns the function that reads the records of a format."""
    layouts: dict[Format, Layout] = {
        "edits": _edits,
        "counterfact": _counterfact,
        "zsre": lambda record: _zsre(record, zsre_target),
        "mquake": _mquake,
    }
    return layouts[name]


def detect(records: Sequence[Any]) -> Format:
    """Returns the format of the first record with the fields of a known data set, or `edits` if there is none."""
    for record in records[:_DETECT_FROM]:
        if not isinstance(record, dict):
            continue
        if "requested_rewrite" in record:
            return "mquake" if isinstance(record["requested_rewrite"], list) else "counterfact"
        if "src" in record and ("alt" in record or "answers" in record):
            return "zsre"
        if "prompt" in record and "target_new" in record:
            return "counterfact"
    return "edits"


def _edits(record: object) -> Iterator[Draft]:
    fields = Fields(record)
    fields.allow_only(_FIELDS)
    messages = fields.messages("messages")
    conversation = isinstance(record, dict) and record.get("messages") is not None
    if conversation:
        fields.exclude(("prompt", "target", "join"), "messages")
        prompt = messages[last_user(messages)]["content"] if messages else ""
    else:
        prompt = fields.text("prompt")
    subject = fields.text("subject") if "{}" in prompt else fields.optional("subject")
    target = "" if conversation else fields.text("target")
    filled = fields.filled("prompt", prompt, subject)
    edit = Edit(
        "" if conversation else prompt,
        subject,
        target,
        weight=fields.weight("weight"),
        name=fields.label("name", "id"),
        span=fields.span("span", filled),
        paraphrases=fields.texts("paraphrases"),
        neighborhood=fields.texts("neighborhood"),
        join=fields.choice("join", get_args(Join)) or "auto",
        messages=messages,
    )
    yield Draft(edit, fields)


def _counterfact(record: object) -> Iterator[Draft]:
    """Reads the original layout (Meng et al., 2022) and the flat layout of EasyEdit, also with fields of `edits`."""
    fields = Fields(record)
    name, weight = fields.label("case_id", "name", "id"), fields.weight("weight")
    if isinstance(record, dict) and "requested_rewrite" not in record:
        prompt, subject, target = (fields.text(part) for part in ("prompt", "subject", "target_new"))
        fields.filled("prompt", prompt, subject)
    else:
        prompt, subject, target = _rewrite(fields.inner("requested_rewrite"))
    paraphrases = fields.texts("paraphrase_prompts", "rephrase_prompt", "paraphrases")
    neighborhood = fields.texts("neighborhood_prompts", "locality_prompt", "neighborhood")
    edit = Edit(prompt, subject, target, weight, name, paraphrases=paraphrases, neighborhood=neighborhood)
    yield Draft(edit, fields)


def _zsre(record: object, target: ZsreTarget) -> Iterator[Draft]:
    """Reads the MEND layout. MEND and EasyEdit use `alt`; ROME, MEMIT and AlphaEdit use the first of `answers`."""
    fields = Fields(record)
    prompt, subject = fields.text("src"), fields.text("subject")
    fields.filled("src", prompt, subject)
    answer = fields.text("alt") if target == "alt" else fields.first("answers")
    edit = Edit(prompt, subject, answer, paraphrases=fields.texts("rephrase"), neighborhood=fields.texts("loc"))
    yield Draft(edit, fields)


def _mquake(record: object) -> Iterator[Draft]:
    """Reads a case of one or several edits named `case.1`, `case.2`, ...; its multi-hop `questions` are not read."""
    case = Fields(record)
    name = case.label("case_id")
    rewrites = case.listed("requested_rewrite")
    if case.problems:
        yield Draft(Edit("", "", ""), case)
        return
    for number, rewrite in enumerate(rewrites, 1):
        fields = Fields(rewrite, path="requested_rewrite")
        fields.taken |= case.taken
        prompt, subject, target = _rewrite(fields)
        edit = Edit(
            prompt,
            subject,
            target,
            name=None if name is None else f"{name}.{number}",
            paraphrases=fields.texts("question"),
        )
        yield Draft(edit, fields, f"rewrite {number}")


def _rewrite(fields: Fields) -> tuple[str, str, str]:
    prompt, subject = fields.text("prompt"), fields.text("subject")
    target = fields.inner("target_new").text("str")
    fields.filled("prompt", prompt, subject)
    return prompt, subject, target
