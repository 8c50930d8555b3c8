"""Collects what a change report contains, from a store and, if there is one, from the model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

from rlsedit_fast._version import __version__
from rlsedit_fast.activity import report_activity
from rlsedit_fast.data.edits import prompt_key
from rlsedit_fast.editing import Editor, EditRecord, Status
from rlsedit_fast.editing.status import largest_changes
from rlsedit_fast.editing.storage.recovery import Contents
from rlsedit_fast.evaluation.ages import age_groups
from rlsedit_fast.evaluation.gate_file import Question
from rlsedit_fast.evaluation.gate_results import GateReport
from rlsedit_fast.evaluation.gates import BoundGates, answers_of, check_questions, tokens_needed
from rlsedit_fast.evaluation.scoring import score_rows
from rlsedit_fast.models.answers import CHAT_TOKENS, answer_facts, supports_chat
from rlsedit_fast.models.facts import encode_fact, fact_key
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.models.tokens import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASKED_TOKENS = 32
"""Maximum number of tokens of answers to the prompts of a user."""

Kind = Literal["asked", "protected", "neighborhood"]


@dataclass(frozen=True)
class EditRow:
    """An edit in a report.

    Attributes:
        id: its id.
        name: its name.
        prompt: its prompt with the subject.
        target: its target.
        state: its state in the store.
        time: when it was applied.
        batch: number of its batch.
        before: answer of the unedited model; without the model, of the model before its batch.
        now: answer of the present model; without the model, when it was last measured. None if it was not recorded.
        chat_before: the same in a chat.
        chat_now: the same in a chat.
        stated: whether the present model states the target; None for an edit that is not active.
        chat_stated: whether the answer in a chat contains the target; None without such an answer.
        nll: NLL per token of the target, nats.
        paraphrases: number of paraphrases after which the model states the target, and their number; None without
            paraphrases or without the model.
        note: why it was skipped, or what replaced it.
    """

    id: int
    name: str | None
    prompt: str
    target: str
    state: str
    time: datetime
    batch: int
    before: str | None
    now: str | None
    chat_before: str | None
    chat_now: str | None
    stated: bool | None
    chat_stated: bool | None
    nll: float
    paraphrases: tuple[int, int] | None
    note: str


@dataclass(frozen=True)
class OtherRow:
    """Another prompt in a report.

    Attributes:
        kind: `asked` by the user, `protected`, or in the `neighborhood` of an edit.
        prompt: the prompt.
        chat: whether it was asked in a chat.
        before: answer of the unedited model; None without the model.
        now: answer of the present model; None without the model.
        moved: whether the answers differ; None without the model.
    """

    kind: Kind
    prompt: str
    chat: bool
    before: str | None
    now: str | None
    moved: bool | None


@dataclass(frozen=True)
class Age:
    """Active edits that follow each other.

    Attributes:
        first: id of the first one.
        last: id of the last one.
        stated: number of edits whose target the model states.
        edits: number of edits.
    """

    first: int
    last: int
    stated: int
    edits: int


@dataclass(frozen=True)
class ChangeReport:
    """Everything that a change report contains.

    Attributes:
        model: path of the unedited model.
        store: folder of the store.
        about: metadata of the store.
        created: when the report was made.
        version: version of the package.
        measured: whether the answers were measured in the model; otherwise they are those of the records.
        edits: all edits, in order.
        others: other prompts.
        ages: retention by age, oldest first.
        status: the status of the store.
        changes: number of active edits and largest relative change of a layer after each of the recent changes.
        gates: results of the gates; None if none were given.
        missing: what was not measured, and why.
    """

    model: str
    store: str
    about: dict[str, Any]
    created: datetime
    version: str
    measured: bool
    edits: list[EditRow]
    others: list[OtherRow]
    ages: list[Age]
    status: Status
    changes: list[tuple[int, float]]
    gates: GateReport | None
    missing: list[str] = field(default_factory=list)

    @property
    def active(self) -> list[EditRow]:
        """The active edits."""
        return [row for row in self.edits if row.state == "active"]

    @property
    def not_stated(self) -> list[EditRow]:
        """The active edits whose target the model does not state."""
        return [row for row in self.active if not row.stated]

    @property
    def moved(self) -> list[OtherRow]:
        """The other prompts with another answer."""
        return [row for row in self.others if row.moved]

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents as a dict that `json.dumps(default=str)` accepts."""
        values = {name: getattr(self, name) for name in ("model", "store", "created", "version", "measured", "missing")}
        return values | {
            "edits": [asdict(row) for row in self.edits],
            "others": [asdict(row) for row in self.others],
            "ages": [asdict(age) for age in self.ages],
            "status": asdict(self.status),
            "changes": self.changes,
            "gates": self.gates.to_dict() if self.gates else None,
        }


def collect(
    contents: Contents,
    store: str,
    *,
    editor: Editor | None = None,
    gates: BoundGates | None = None,
    asked: Sequence[str] = (),
    chat: bool = False,
) -> ChangeReport:
    """Collects a report.

    Args:
        contents: contents of the store.
        store: folder of the store, as shown.
        editor: editor of the store; None makes the report from the records alone.
        gates: gates of this editor.
        asked: further prompts.
        chat: whether to ask the edited prompts in a chat; ignored without a chat template.

    Raises:
        InputError: a prompt of `asked` is too long for the model.
    """
    missing: list[str] = []
    measured: _Measured | None = None
    if editor is None:
        missing.append("answers: the model was not loaded; those of the records are shown, as last measured")
        if asked:
            missing.append(f"{len(asked)} prompts of --ask: the model was not loaded")
    else:
        measured = _measure(editor, contents, asked, chat=chat, missing=missing)
    if gates is None:
        missing.append("gates: none were given (--gate FILE)")
    if gates is None or not gates.has_text:
        missing.append("perplexity and KL divergence: no gate with `text` was given")
    notes = _notes(contents.records)
    rows = [_row(record, notes.get(record.id, ""), contents, measured) for record in contents.records]
    others = _others(contents, asked, measured)
    if editor is None and others:
        missing.append(f"{len(others)} protected and neighborhood prompts: the model was not loaded")
    status = editor.status(budget=contents.status.budget) if editor is not None else contents.status
    return ChangeReport(
        model=str(contents.about["model"] or "a model without a path"),
        store=store,
        about=contents.about,
        created=datetime.now(timezone.utc),
        version=__version__,
        measured=editor is not None,
        edits=rows,
        others=others,
        ages=_ages([row for row in rows if row.state == "active"], contents.about["config"]["batch_size"]),
        status=status,
        changes=largest_changes(contents.trace, contents.status.layers),
        gates=gates.measure() if gates is not None else None,
        missing=missing,
    )


@dataclass(frozen=True)
class _Answers:
    """Answers of one model: of edits by (prompt, target), of edits in a chat by prompt, and of questions by key."""

    plain: dict[tuple[str, str], str]
    chat: dict[str, str]
    questions: dict[tuple[str, bool, int], str]


@dataclass(frozen=True)
class _Measured:
    before: _Answers
    now: _Answers
    scores: dict[tuple[str, str], tuple[bool, float]]
    """Whether a target is stated, and its NLL, by (prompt, target)."""
    questions: dict[Kind, list[Question]]


def _measure(editor: Editor, contents: Contents, asked: Sequence[str], *, chat: bool, missing: list[str]) -> _Measured:
    model, tokenizer = editor.model, editor.tokenizer
    has_chat = supports_chat(tokenizer)
    facts = {fact_key(record): record for record in contents.records}
    pairs = list(facts)
    asked_in_chat = (pair[0] for pair, record in facts.items() if record.messages is None)
    prompts = list(dict.fromkeys(asked_in_chat)) if chat and has_chat else []
    chats, long = _fitting(model, tokenizer, [Question(prompt=text, chat=True, tokens=CHAT_TOKENS) for text in prompts])
    if not has_chat:
        missing.append("answers in a chat: the tokenizer has no chat template")
    elif not chat:
        missing.append(f"answers of {len(pairs)} edits in a chat: pass --chat; those of the records are shown")
    elif long:
        missing.append(f"answers of {long} edits in a chat: the prompts are too long for the model")
    own = [Question(prompt=text, tokens=ASKED_TOKENS) for text in asked]
    own += [Question(prompt=text, chat=True, tokens=ASKED_TOKENS) for text in asked if has_chat]
    check_questions(model, tokenizer, own, "--ask")
    questions: dict[Kind, list[Question]] = {"asked": own}
    given: dict[Kind, Iterable[str]] = {"protected": contents.protected, "neighborhood": _neighborhood(contents)}
    for kind, texts in given.items():
        questions[kind], long = _fitting(model, tokenizer, [Question(prompt=text) for text in texts])
        if long:
            missing.append(f"{long} {kind} prompts: they are too long for the model")
    every = [one for some in questions.values() for one in some]

    def answers() -> _Answers:
        plain = answer_facts(model, tokenizer, list(facts.values())) if facts else []
        found = answers_of(model, tokenizer, [*chats, *every])
        return _Answers(dict(zip(pairs, plain, strict=True)), {one.prompt: found[one.key] for one in chats}, found)

    report_activity("answers of the unedited model")
    with editor.unedited():
        before = answers()
    report_activity("answers of the edited model")
    now = answers()
    scored = {pair: encode_fact(tokenizer, fact) for pair, fact in facts.items()}
    for edit in contents.edits.values():
        scored |= {p: encode_plain(tokenizer, *p, edit.join) for p in _paraphrased(edit) if p not in scored}
    found = score_rows(model, list(scored.values())) if scored else []
    scores = {pair: (one.exact, one.nll) for pair, one in zip(scored, found, strict=True)}
    return _Measured(before, now, scores, questions)


def _paraphrased(edit: Any) -> list[tuple[str, str]]:
    return [(text, edit.target) for text in edit.filled_paraphrases]


def _fitting(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> tuple[list[Question], int]:
    """Returns the questions that are short enough for the model, and the number of the others."""
    longest = max_tokens(model.config)
    kept = [one for one in questions if longest is None or tokens_needed(tokenizer, one) <= longest]
    return kept, len(questions) - len(kept)


def _neighborhood(contents: Contents) -> list[str]:
    return list(dict.fromkeys(prompt for edit in contents.edits.values() for prompt in edit.neighborhood))


def _row(record: EditRecord, note: str, contents: Contents, measured: _Measured | None) -> EditRow:
    pair, active = fact_key(record), record.state == "active"
    prompt = pair[0]
    stated, nll, paraphrases = record.success, record.nll, None
    before, now = record.answer_before, record.answer
    chat_before, chat_now = record.chat_answer_before, record.chat_answer
    if measured is not None:
        before, now = measured.before.plain[pair], measured.now.plain[pair]
        stated, nll = measured.scores[pair]
        if prompt in measured.now.chat:
            chat_before, chat_now = measured.before.chat[prompt], measured.now.chat[prompt]
        if active and (others := _paraphrased(contents.edits[record.id])):
            paraphrases = sum(measured.scores[other][0] for other in others), len(others)
    has_chat = chat_now is not None and active
    return EditRow(
        id=record.id,
        name=record.name,
        prompt=prompt,
        target=record.target,
        state=record.state,
        time=record.time,
        batch=record.batch,
        before=before,
        now=now,
        chat_before=chat_before,
        chat_now=chat_now,
        stated=stated if active else None,
        chat_stated=_folded(record.target) in _folded(chat_now or "") if has_chat else None,
        nll=nll,
        paraphrases=paraphrases,
        note=note,
    )


def _notes(records: Sequence[EditRecord]) -> dict[int, str]:
    """Returns by id why edits were skipped, and what replaced them."""
    notes, later = dict[int, str](), dict[str, int]()
    for record in reversed(records):
        key = prompt_key(record)
        if record.state == "skipped":
            notes[record.id] = (
                f"the value search did not converge in {record.search_steps} steps: rank {record.search_rank}, NLL "
                f"{record.search_nll:.2f}"
            )
            continue
        if record.state == "replaced":
            notes[record.id] = f"replaced by edit {later[key]}" if key in later else "replaced"
        later[key] = record.id
    return notes


def _folded(text: str) -> str:
    return text.strip().casefold()


def _others(contents: Contents, asked: Iterable[str], measured: _Measured | None) -> list[OtherRow]:
    if measured is not None:
        return [
            OtherRow(kind, one.prompt, one.chat, before, now, before != now)
            for kind, some in measured.questions.items()
            for one in some
            for before, now in [(measured.before.questions[one.key], measured.now.questions[one.key])]
        ]
    given: dict[Kind, Iterable[str]] = {"asked": asked, "protected": contents.protected}
    given["neighborhood"] = _neighborhood(contents)
    return [OtherRow(kind, text, False, None, None, None) for kind, texts in given.items() for text in texts]


def _ages(active: Sequence[EditRow], batch_size: int) -> list[Age]:
    groups = [active[start:stop] for start, stop in age_groups(len(active), batch_size)] if active else []
    return [Age(some[0].id, some[-1].id, sum(bool(row.stated) for row in some), len(some)) for some in groups]


def counts_of(rows: Iterable[OtherRow]) -> list[tuple[Kind, int, int]]:
    """Returns for each kind of other prompts the number of those that moved, and their number."""
    of, moved = Counter[Kind](), defaultdict[Kind, int](int)
    for row in rows:
        of[row.kind] += 1
        moved[row.kind] += bool(row.moved)
    return [(kind, moved[kind], count) for kind, count in of.items()]
