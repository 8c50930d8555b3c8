"""Records of edits, and the progress of a stream of edits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from html import escape
from typing import Any, Literal

from rlsedit_fast.data.edits import without_defaults
from rlsedit_fast.models.conversations import Message
from rlsedit_fast.models.joins import Join
from rlsedit_fast.rls import Terms

logger = logging.getLogger(__name__)

EditState = Literal["active", "undone", "replaced", "skipped"]

TRACE_LENGTH = 1000
"""Number of recent values of the objective that are kept."""

_BEGINNING = datetime.min.replace(tzinfo=timezone.utc)


@dataclass(frozen=True)
class EditRecord:
    """An edit and its result, as listed by `Editor.history()`.

    Attributes:
        id: number of the edit, counted from 1 within an editor.
        time: when its batch was written.
        prompt: prompt of the edit.
        subject: subject of the edit; empty if it has none.
        target: target of the edit.
        weight: weight of the edit.
        state: `active`, `undone`, `replaced` by a later edit, or `skipped`: not written, because its search did not
            converge or its key overlaps with those of active edits.
        batch: number of its batch, counted from 1.
        search_converged: whether the value search met its stopping rule.
        search_nll: mean NLL of the target tokens with the value that the search found, in the worst context, nats.
        search_rank: rank of the worst target token over all contexts with that value; 1 is first.
        search_steps: number of steps of the search.
        realized: fraction of the target change that arrived at the edited hidden state, measured in the model after the
            write: `1 - ||state - goal|| / ||target change||` at the bare prompt. 0 for a skipped edit.
        nll: mean NLL of the target tokens after the bare prompt, after the write, nats.
        rank: rank of the worst target token after the bare prompt, after the write; 1 is first.
        name: name of the edit.
        answer_before: greedy continuation of the bare prompt before its batch was written, as long as the target.
        answer: the same after the write.
        chat_answer_before: answer to the prompt as the user message of a chat, before its batch was written; None
            without `EditConfig.measure_chat`, or if the tokenizer has no chat template.
        chat_answer: the same after the write.
        chat_nll: mean NLL of the target tokens in the answer of a chat after the write, see `models.chat_row`.
        chat_rank: rank of the worst target token there.
        joint_with: ids of the other active edits of the same subject, with which it shares one value.
        used: used share of the key before the edit was made, see `Overlap`; None if it was not computed.
        innovation: what the edit added to the objective of the first edited layer, relative to the mean over all active
            edits: 1 is usual, 0 an edit that the model already stated, a large value one that contradicts what earlier
            edits left in the direction of its key. None if it is not known.
        lowered_weight: weight to which its age has lowered it, see `EditConfig.halve_after`; None if it has not.
        join: how prompt and target are joined, see `Edit`.
        messages: the conversation, if the edit is one, see `Edit`.

    Example:
        >>> from rlsedit_fast import Edit, EditConfig, Editor
        >>> from rlsedit_fast.world import load_demo_model
        >>> config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
        >>> editor = Editor(*load_demo_model(), config=config)
        >>> (record,) = editor.edit([Edit("{} speaks", "Toze Lado Rekuno", "Kubeish")])
        >>> record.id, record.state, record.batch
        (1, 'active', 1)
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
    answer_before: str | None = None
    answer: str | None = None
    chat_answer_before: str | None = None
    chat_answer: str | None = None
    chat_nll: float | None = None
    chat_rank: int | None = None
    joint_with: tuple[int, ...] = ()
    used: float | None = None
    innovation: float | None = None
    lowered_weight: float | None = None
    join: Join = "auto"
    messages: tuple[Message, ...] | None = field(default=None, hash=False)

    @property
    def present_weight(self) -> float:
        """`lowered_weight`, or `weight`."""
        return self.weight if self.lowered_weight is None else self.lowered_weight

    @property
    def success(self) -> bool:
        """Whether the model stated the target after the write: each of its tokens ranked first (`rank == 1`)."""
        return self.rank == 1

    @property
    def chat_success(self) -> bool | None:
        """Whether the answer in a chat after the write contains the target, ignoring case; None without an answer."""
        return None if self.chat_answer is None else self.target.strip().casefold() in self.chat_answer.casefold()

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a JSON-serializable dict."""
        return without_defaults(asdict(self)) | {"time": self.time.isoformat()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditRecord:
        """Returns the record of a dict written by `to_dict`."""
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**fields | {"time": datetime.fromisoformat(fields["time"])})


_SHOWN = 20  # records at the beginning and at the end of a longer history


class History(list[EditRecord]):
    """The records of an editor: a list that prints as a table, in a notebook as an HTML table.

    Example:
        >>> from rlsedit_fast.editing.records import History
        >>> History([])
        no edits
    """

    def __repr__(self) -> str:
        if not self:
            return "no edits"
        rows = [_TITLES, *self._rows()]
        widths = [max(len(row[at]) for row in rows) for at in range(len(_TITLES))]
        left = {1, 2}  # columns of text
        return "\n".join(
            "  ".join(
                f"{cell:<{width}}" if at in left else f"{cell:>{width}}"
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def _repr_html_(self) -> str:
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows())
        return f"<table><tr>{''.join(f'<th>{title}</th>' for title in _TITLES)}</tr>{body}</table>"

    def _rows(self) -> list[list[str]]:
        rest = len(self) - 2 * _SHOWN
        if rest <= 0:
            return [_cells(record) for record in self]
        skipped = ["...", "", f"{rest} more", "", "", ""]
        return [*map(_cells, self[:_SHOWN]), skipped, *map(_cells, self[-_SHOWN:])]


_TITLES = ["id", "state", "prompt -> target", "rank", "nll", "realized"]


def _cells(record: EditRecord) -> list[str]:
    filled = record.prompt.replace("{}", record.subject)
    what = "".join(c if c.isprintable() else " " for c in f"{filled} -> {record.target}")
    what = what if len(what) <= _WIDTH else f"{what[: _WIDTH - 3]}..."
    return [str(record.id), record.state, what, str(record.rank), f"{record.nll:.2f}", f"{record.realized:.2f}"]


_WIDTH = 80  # characters of prompt and target


@dataclass(frozen=True)
class Point:
    """The objective after a change.

    Attributes:
        edits: number of active edits.
        objective: `J` of each layer.
        terms: terms of `J` of each layer, exact; empty for a rule without an objective.
    """

    edits: int
    objective: tuple[float, ...]
    terms: tuple[Terms, ...] = ()


@dataclass
class Progress:
    """Counters of an editor.

    Attributes:
        batches: number of batches.
        writes: number of writes and removals, each of which rounds the weights.
        trace: recent values of the objective.
        protected: the protected prompts.
        time: time of the last record. It never decreases.
    """

    batches: int = 0
    writes: int = 0
    trace: list[Point] = field(default_factory=list)
    protected: list[str] = field(default_factory=list)
    time: datetime = _BEGINNING

    def now(self) -> datetime:
        """Returns the current time, at least the time of the last record."""
        time = datetime.now(timezone.utc)
        if time < self.time:
            logger.warning("the clock (%s) is behind the last edit (%s); recording the latter", time, self.time)
        self.time = max(time, self.time)
        return self.time

    def append(self, point: Point) -> None:
        """Adds a point to the trace."""
        self.trace.append(point)
        del self.trace[:-TRACE_LENGTH]
