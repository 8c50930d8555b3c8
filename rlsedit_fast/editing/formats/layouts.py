"""What the fields of a record mean in each format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rlsedit_fast.editing.edits import Edit
from rlsedit_fast.editing.formats.fields import Fields

Format = Literal["edits", "counterfact", "zsre", "mquake"]
ZsreTarget = Literal["alt", "answers"]

FORMATS: tuple[Format, ...] = get_args(Format)

_LOOK_AT = 10  # records from which the format is told; one would do, were it never a faulty one


@dataclass(frozen=True)
class Draft:
    """An edit as its record has it, which is whole only if `fields` has no troubles.

    Attributes:
        edit: the edit.
        fields: what it was made of.
        part: which part of its record it is, where a record has several.
    """

    edit: Edit
    fields: Fields
    part: str = ""


Layout = Callable[[object], Iterator[Draft]]


def layout(name: Format, zsre_target: ZsreTarget) -> Layout:
    """The reader of a format's records."""
    layouts: dict[Format, Layout] = {
        "edits": _edits,
        "counterfact": _counterfact,
        "zsre": lambda record: _zsre(record, zsre_target),
        "mquake": _mquake,
    }
    return layouts[name]


def recognise(records: Sequence[Any]) -> Format:
    """The format of the first record that has a data set's fields; `edits` where none of the first ones has."""
    for record in records[:_LOOK_AT]:
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
    fields.allow_only(("prompt", "subject", "target", "id", "weight", "paraphrases", "neighborhood", "span"))
    prompt, subject, target = (fields.text(name) for name in ("prompt", "subject", "target"))
    filled = fields.filled("prompt", prompt, subject)
    edit = Edit(
        prompt,
        subject,
        target,
        weight=fields.weight("weight"),
        name=fields.label("id"),
        span=fields.span("span", filled),
        paraphrases=tuple(text.replace("{}", subject) for text in fields.texts("paraphrases")),
        neighborhood=fields.texts("neighborhood"),
    )
    yield Draft(edit, fields)


def _counterfact(record: object) -> Iterator[Draft]:
    """Both forms: the original one (Meng et al. 2022), and EasyEdit's flat fields."""
    fields = Fields(record)
    name = fields.label("case_id")
    if isinstance(record, dict) and "requested_rewrite" not in record:
        prompt, subject, target = (fields.text(part) for part in ("prompt", "subject", "target_new"))
        fields.filled("prompt", prompt, subject)
    else:
        prompt, subject, target = _rewrite(fields.inner("requested_rewrite"))
    paraphrases = fields.texts("paraphrase_prompts", "rephrase_prompt")
    neighborhood = fields.texts("neighborhood_prompts", "locality_prompt")
    yield Draft(Edit(prompt, subject, target, name=name, paraphrases=paraphrases, neighborhood=neighborhood), fields)


def _zsre(record: object, target: ZsreTarget) -> Iterator[Draft]:
    """MEND's form. MEND and EasyEdit teach `alt`, a false answer; ROME, MEMIT and AlphaEdit the first of `answers`."""
    fields = Fields(record)
    prompt, subject = fields.text("src"), fields.text("subject")
    fields.filled("src", prompt, subject)
    wanted = fields.text("alt") if target == "alt" else fields.first("answers")
    edit = Edit(prompt, subject, wanted, paraphrases=fields.texts("rephrase"), neighborhood=fields.texts("loc"))
    yield Draft(edit, fields)


def _mquake(record: object) -> Iterator[Draft]:
    """A case is one edit or several, named `case.1`, `case.2` ...; its own `questions` ask for their combination."""
    case = Fields(record)
    name = case.label("case_id")
    rewrites = case.listed("requested_rewrite")
    if case.troubles:
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
