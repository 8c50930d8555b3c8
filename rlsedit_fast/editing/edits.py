"""What is asked for, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

EditState = Literal["active", "undone", "replaced"]


@dataclass(frozen=True)
class Edit:
    """One fact to be told to a model.

    Attributes:
        prompt: a text that the target continues, with `{}` where the subject stands.
        subject: what the fact is about.
        target: what the model is to say next.
        weight: how firmly this edit is held against the others and the anchors; 1 is the ordinary weight.
    """

    prompt: str
    subject: str
    target: str
    weight: float = 1.0


@dataclass(frozen=True)
class EditRecord:
    """An edit that was made, as `Editor.history()` lists it.

    Attributes:
        id: counts up from 1 within an editor.
        time: when its batch was written.
        prompt: as asked for.
        subject: as asked for.
        target: as asked for.
        weight: as asked for.
        state: `active`, `undone`, or `replaced` by a later edit.
        batch: which batch it was in, from 1.
        converged: whether the value search reached its stopping rule: the target ranked first and its NLL low enough.
        nll: mean negative log-likelihood of the target's tokens (nats) under the value found, before it was written.
        steps: optimiser steps that the value search took.
        realised: share of the wanted change at the edited layers that the write realised; the rest is the price of
            what is held.
    """

    id: int
    time: datetime
    prompt: str
    subject: str
    target: str
    weight: float
    state: EditState
    batch: int
    converged: bool
    nll: float
    steps: int
    realised: float
