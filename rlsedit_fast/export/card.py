"""Model cards: the README.md of an edited checkpoint or adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlsedit_fast._version import __version__
from rlsedit_fast.errors import counted
from rlsedit_fast.models.gguf_files import is_gguf, read_header

CARD = "README.md"
SHOWN = 50
"""Number of edits that a card lists."""

_LONGEST = 200  # characters of a prompt or a target
_KEPT = ("license", "license_name", "license_link", "language")
"""Fields that are taken from the card of the base model."""

_PROJECT = "https://github.com/rlsedit/rlsedit-fast"
_PAPER = "https://arxiv.org/abs/2601.15686"
_SPECIAL = re.compile(r"[^\w ,.()\-'\"?%+/;=]|_|\.(?=\w*[^\W\d])")  # a dot before a word can make a link
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # folder of a model in the cache of the Hub


@dataclass(frozen=True)
class CardEdit:
    """An edit in a card.

    Attributes:
        prompt: the prompt with its subject.
        target: the target.
        rank: rank of the worst target token; 1 is first.
        nll: mean NLL of the target tokens, nats.

    Example:
        >>> from rlsedit_fast.export.card import CardEdit
        >>> CardEdit("The capital of France is", "Lyon", rank=1, nll=0.02).rank
        1
    """

    prompt: str
    target: str
    rank: int
    nll: float


@dataclass(frozen=True)
class CardContents:
    """What a card states about an edited model.

    Attributes:
        base: path or Hub name of the base model.
        count: number of active edits; None if it is not known.
        edits: the active edits, of which the card lists `SHOWN`; may be empty if they are not known.
        settings: settings of the edits, by name.
        figures: measurements, by name.
        undo: how edits are undone, as Markdown.

    Example:
        >>> from rlsedit_fast.export.card import CardContents
        >>> CardContents("org/base", count=3).settings
        {}
    """

    base: str
    count: int | None
    edits: Sequence[CardEdit] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    undo: str = ""


def make_card(contents: CardContents, *, library: str = "transformers") -> str:
    """Returns the text of a model card with metadata for the Hugging Face Hub.

    License and language are those of the card of the base model, if it is on this machine.

    Args:
        contents: what the card states.
        library: program of the files on the Hub: `transformers`, `peft` for a LoRA adapter, or `gguf`.

    Example:
        >>> from rlsedit_fast.export.card import CardContents, CardEdit, make_card
        >>> edit = CardEdit("The capital of France is", "Lyon", rank=1, nll=0.02)
        >>> card = make_card(CardContents("org/base", count=1, edits=[edit]))
        >>> card.splitlines()[1]
        'base_model: org/base'
    """
    from huggingface_hub import ModelCardData

    name, shown, adapter = hub_name(contents.base), _shown_name(contents.base), library == "peft"
    kept = _base_fields(contents.base)
    data: Any = ModelCardData(
        base_model=name,
        base_model_relation="adapter" if adapter and name else "finetune" if name else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["knowledge-editing", "rlsedit", *(["lora"] if adapter else [])],
        **kept,
    )
    what = "LoRA adapter with edits of" if adapter else "Edited version of"
    base = f"[{escape(name)}](https://huggingface.co/{name})" if name else escape(shown) or "an unnamed model"
    edits = "factual edits" if contents.count is None else counted(contents.count, "factual edit")
    lines = [
        "---",
        data.to_yaml().rstrip("\n"),
        "---",
        "",
        f"# {what} {escape(shown) or 'a model'}",
        "",
        f"{base} with {edits}, applied by [rlsedit_fast]({_PROJECT}), an implementation of RLSEdit "
        f"([arXiv 2601.15686]({_PAPER})). An edit changes what the model states after a prompt. The statements of the "
        "edits are those that someone asked for; they need not be true.",
    ]
    if contents.settings:
        lines += ["", "## Settings", "", "| setting | value |", "|---|---|", *_rows(contents.settings)]
    if contents.figures:
        lines += ["", "## Measurements", "", "| figure | value |", "|---|---|", *_rows(contents.figures)]
    if contents.edits:
        lines += ["", "## Edits", "", *_edit_lines(contents)]
    if contents.undo:
        lines += ["", "## Undo", "", contents.undo]
    if license_line := _license_line(kept, name or shown):
        lines += ["", "## License", "", license_line]
    lines += ["", f"Written by rlsedit_fast {__version__} ({_versions()}) on {_today()}."]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Returns text for one line or table cell of Markdown, in which no character has a special meaning.

    Example:
        >>> from rlsedit_fast.export.card import escape
        >>> escape("a|b <b>")
        'a&#124;b &#60;b&#62;'
    """
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    plain = "".join(c if c.isprintable() else " " for c in short)
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", plain).strip()


def hub_name(base: str) -> str | None:
    """Returns the Hub name of a base model, also of a folder in the cache of the Hub; None for other folders."""
    if Path(base).exists():
        found = [match for part in Path(base).absolute().parts if (match := _CACHED.fullmatch(part))]
        return f"{found[-1][1]}/{found[-1][2]}" if found else None
    return base if _HUB_ID.fullmatch(base) else None


def _shown_name(base: str) -> str:
    """Returns the Hub name of a model, or the last part of its path: other folders are private."""
    return hub_name(base) or Path(base).name


def _base_fields(base: str) -> dict[str, Any]:
    """Returns the fields of the card of the base model that apply to an edited one."""
    from huggingface_hub import ModelCard

    place = _base_card(base)
    with suppress(Exception):  # a card without metadata, or with metadata that cannot be read
        if place is not None:
            text = place.read_text(encoding="utf-8")
            data = ModelCard(text).data.to_dict() if text.startswith("---") else {}
            if kept := {key: data[key] for key in _KEPT if _is_plain(data.get(key))}:
                return kept
    if is_gguf(base):
        with suppress(Exception):
            held = read_header(base).metadata.get("general.license")
            return {"license": held} if _is_plain(held) else {}
    return {}


def _is_plain(value: object) -> bool:
    """Whether a field is a text or a list of texts, as the Hub expects."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _base_card(base: str) -> Path | None:
    place = Path(base)
    if place.exists():
        found = (place if place.is_dir() else place.parent) / CARD
        return found if found.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    if not _HUB_ID.fullmatch(base):
        return None
    cached = try_to_load_from_cache(base, CARD)
    return Path(cached) if isinstance(cached, str) else None


def _rows(table: Mapping[str, str]) -> list[str]:
    return [f"| {escape(name)} | {escape(value)} |" for name, value in table.items()]


def _edit_lines(contents: CardContents) -> list[str]:
    lines = ["| prompt | target | rank | NLL |", "|---|---|---|---|"]
    lines += [
        f"| {escape(edit.prompt)} | {escape(edit.target)} | {edit.rank} | {edit.nll:.2f} |"
        for edit in contents.edits[:SHOWN]
    ]
    if (rest := (contents.count or 0) - len(contents.edits[:SHOWN])) > 0:
        lines += ["", f"and {rest} more edits, which are not listed."]
    return lines


def _license_line(kept: Mapping[str, Any], base: str) -> str:
    if "license" not in kept:
        return ""
    named = kept["license"] if kept["license"] != "other" else kept.get("license_name", "other")
    text = named if isinstance(named, str) else ", ".join(named)
    return f"The license is that of the base model {escape(base)}: {escape(text)}."


def _versions() -> str:
    found = []
    for package in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def _today() -> str:
    return datetime.now(timezone.utc).date().isoformat()
