"""How edits, their rows and the settings are put into words and tensors for a store, and read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast._version import __version__
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import Edit, EditRecord
from rlsedit_fast.editing.layers import EditRows
from rlsedit_fast.editing.ledger import TransactionRecord
from rlsedit_fast.editing.rounding import packed, unpacked
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.projections import Projection
from rlsedit_fast.rls.state import dtype_of
from rlsedit_fast.store import Entry

START, EDIT, REVISE, PROTECT, REBUILD = "start", "edit", "revise", "protect", "rebuild"

FIXED = (
    "layers layer_module projection_module fact_token adherence lam mu ridge delay context_prefixes context_samples "
    "context_tokens context_seed same_subject keys key_rows bare_weight"
).split()
"""Settings that a store's edits were made under, and that hold for all of them. The others may change in between."""


def describe(
    config: EditConfig, given: EditConfig, projections: Sequence[Projection], identity: str, model: str
) -> Any:
    """What a store says of itself."""
    return {
        "fingerprint": identity,
        "model": model,
        "given": asdict(given),
        "config": asdict(config),
        "layers": [
            {"layer": p.layer, "name": p.name, "shape": list(p.weight.shape), "dtype": str(p.weight.dtype)}
            for p in projections
        ],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
    }


def settings_of(about: Mapping[str, Any], given: EditConfig | None = None) -> EditConfig:
    """The settings that a store's edits go on under.

    Args:
        about: what the store says of itself.
        given: by the user, who may change some of them.

    Raises:
        InputError: one is changed that holds for all edits of a store.
    """
    stored = config_of(about["config"])
    if given is None:
        return stored
    first = config_of(about["given"])
    if changed := [name for name in FIXED if getattr(given, name) != getattr(first, name)]:
        differences = "; ".join(
            f"{name}={getattr(given, name)!r}, the store's is {getattr(first, name)!r}" for name in changed
        )
        raise InputError(
            f"{differences}: these settings are fixed for all edits of a store; nothing was modified",
            hint="omit --config and the options of settings to use those of the store (Python: config=None), or create "
            "another store",
        )
    return replace(given, **{name: getattr(stored, name) for name in FIXED})


def tensors_of(edits: Sequence[EditRows], prefix: str, *, halved: bool = False) -> dict[str, Tensor]:
    """The rows of edits, one edit after the other, as a tensor per layer and side, and their goals."""
    goals = [rows.goal for rows in edits if rows.goal is not None]
    tensors: dict[str, Tensor] = {f"{prefix}goals": torch.cat(goals)} if goals else {}
    for side in ("keys", "values") if edits else ():
        for at in range(len(getattr(edits[0], side))):
            name, whole = f"{prefix}{side}.{at}", torch.cat([getattr(rows, side)[at] for rows in edits])
            if halved:
                tensors[name], tensors[f"{name}.exponents"] = packed(whole)
            else:
                tensors[name] = whole
    return tensors


def rows_of(
    tensors: Mapping[str, Tensor],
    prefix: str,
    weights: Sequence[float],
    counts: Sequence[int],
    projections: Sequence[Projection],
) -> list[EditRows]:
    """What `tensors_of` was given.

    Args:
        tensors: from it.
        prefix: given to it.
        weights: of the edits.
        counts: rows of each edit.
        projections: the edited ones.
    """
    if not weights:
        return []
    sides = []
    for side in ("keys", "values"):
        each = []
        for at, projection in enumerate(projections):
            name = f"{prefix}{side}.{at}"
            rows = tensors[name]
            if f"{name}.exponents" in tensors:
                rows = unpacked(rows, tensors[f"{name}.exponents"], dtype_of(projection.weight))
            each.append(rows.split(list(counts)))
        sides.append(list(zip(*each, strict=True)))
    goals = tensors[f"{prefix}goals"].split(list(counts)) if f"{prefix}goals" in tensors else [None] * len(weights)
    return [EditRows(k, v, weight, g) for k, v, weight, g in zip(*sides, weights, goals, strict=True)]


def revised(
    tensors: Mapping[str, Tensor], held: Sequence[EditRows], projections: Sequence[Projection]
) -> list[EditRows]:
    """Rows with the values in the last layer and the goals that a revision gave them."""
    counts = [len(one) for one in held]
    values = tensors["values.0"]
    if "values.0.exponents" in tensors:
        values = unpacked(values, tensors["values.0.exponents"], dtype_of(projections[-1].weight))
    fresh = zip(held, values.split(counts), tensors["goals"].split(counts), strict=True)
    return [replace(one, values=(*one.values[:-1], value), goal=goal) for one, value, goal in fresh]


def transaction_of(entry: Entry) -> TransactionRecord:
    """A transaction as it was journalled, without its rows."""
    about = entry.about
    made = [made_of(text) for text in about["made"]]
    return TransactionRecord(
        gone=tuple(about["gone"]),
        outcome=about["outcome"],
        again=tuple(about["again"]),
        rebuilt=tuple(about["rebuilt"]),
        edits=tuple(edit for edit, _ in made),
        records=tuple(record for _, record in made),
        rewritten=tuple(record_of(text) for text in about["rewritten"]),
    )


def entered(edit: Edit, record: EditRecord) -> dict[str, Any]:
    return {"edit": asdict(edit), "record": record_text(record)}


def record_text(record: EditRecord) -> dict[str, Any]:
    """A record for JSON."""
    return asdict(record) | {"time": record.time.isoformat()}


def made_of(text: Mapping[str, Any]) -> tuple[Edit, EditRecord]:
    return Edit(**_tuples(text["edit"])), record_of(text["record"])


def record_of(text: Mapping[str, Any]) -> EditRecord:
    return EditRecord(**_tuples(text) | {"time": datetime.fromisoformat(text["time"])})


def asked_of(record: EditRecord) -> Edit:
    return Edit(record.prompt, record.subject, record.target, record.weight, record.name)


def config_of(text: Mapping[str, Any]) -> EditConfig:
    known = {one.name for one in fields(EditConfig)}
    return EditConfig(**{name: value for name, value in _tuples(text).items() if name in known})


def _tuples(text: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in text.items()}
