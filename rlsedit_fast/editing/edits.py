"""Edits as they are requested, and records of what the model does after them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

EditState = Literal["active", "undone", "replaced", "skipped"]


WEIGHT_WITHIN = 1e-30, 1e30
"""Bounds of a weight. It is written in float32, which must hold it, its inverse and their products with keys."""


def weight_trouble(weight: object) -> str | None:
    """What is the matter with a weight; None where nothing is."""
    least, most = WEIGHT_WITHIN
    if isinstance(weight, int | float) and not isinstance(weight, bool) and least <= weight <= most:
        return None
    return f"weight={weight!r:.60}: expected a number from {least:g} to {most:g}; 1 is the ordinary weight"


@dataclass(frozen=True)
class Edit:
    """One fact that a model is to state.

    Attributes:
        prompt: a text that the target continues, with `{}` where the subject stands.
        subject: what the fact is about.
        target: what the model is to say next.
        weight: how firmly this edit is held against the others and the anchors, within `WEIGHT_WITHIN`; 1 is the
            ordinary weight.
        name: what you call this edit in your own files, for reports and the history.
        span: characters `[start, stop)` of the prompt with its subject filled in: the last token that covers any of
            them is where the model is edited. Wins over `EditConfig.fact_token`.
        paraphrases: other texts, subject included, that the target should then continue too; for evaluation alone.
        neighborhood: texts about something else whose answers are to stay; for evaluation alone.
    """

    prompt: str
    subject: str
    target: str
    weight: float = 1.0
    name: str | None = None
    span: tuple[int, int] | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()


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
        state: `active`, `undone`, `replaced` by a later edit, or `skipped`: never made, since its search fell short.
        batch: which batch it was in, from 1.
        search_converged: whether the value search reached its stopping rule.
        search_nll: mean NLL of the target's tokens under the value that the search found, nats, the worst context's.
        search_rank: of the target's tokens under that value, the worst one's over all contexts; 1 is first.
        search_steps: optimizer steps of the search.
        realized: share of the wanted change that arrived at the edited state, measured in the model after the write:
            `1 - ||arrived - wanted|| / ||wanted||` at the bare prompt. 0 for a skipped edit.
        nll: mean NLL of the target's tokens behind the bare prompt after the write, nats.
        rank: of the target's tokens behind the bare prompt after the write, the worst one's; 1 is first.
        name: as asked for.
        joint_with: ids of the other active edits of the same subject, with which it shares one value.
    """

    id: int
    time: datetime
    prompt: str
    subject: str
    target: str
    weight: float
    state: EditState
    batch: int
    search_converged: bool
    search_nll: float
    search_rank: int
    search_steps: int
    realized: float
    nll: float
    rank: int
    name: str | None = None
    joint_with: tuple[int, ...] = ()

    @property
    def success(self) -> bool:
        """Whether the model stated the target after the write: each of its tokens ranked first (`rank == 1`)."""
        return self.rank == 1
