"""Gates: conditions on an edited model, and their measurement against the unedited model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit_fast.activity import report_activity
from rlsedit_fast.baselines import RECURSIVE
from rlsedit_fast.editing import Editor, EditRecord
from rlsedit_fast.errors import GateError, InputError, counted, listed
from rlsedit_fast.evaluation.gate_file import Expected, GateSettings, Question, make_settings, read_gate_file
from rlsedit_fast.evaluation.gate_results import GateReport, GateResult
from rlsedit_fast.evaluation.scoring import score_rows
from rlsedit_fast.evaluation.stability import Stability, TextProbe
from rlsedit_fast.models.answers import chat_answers, generate_answers, supports_chat
from rlsedit_fast.models.facts import encode_fact
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.models.tokens import encode_plain
from rlsedit_fast.statistics.sources import TextFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlsedit_fast.export import WeightChange

_SHOWN = 10  # violations in a message
_LENGTH = 128  # tokens of a text
_CHAT_TEMPLATE = 64  # more tokens than a template adds, to check the length of prompts


class Gates:
    """Conditions that an edited model must meet, for `Editor.edit(gates=...)` and for `check`.

    Args:
        **fields: fields of `GateSettings`: `every`, the number of batches between checks; `on_violation`, `stop` before
            the next batch, or `undo`, which also takes back what was changed since the last check; `unchanged`, prompts
            whose answers must be those of the unedited model, texts or dicts with the fields of `Questions`; `answers`,
            prompts whose answers must be as given, dicts with the fields of `Expected`; `text`, path of held-out text,
            or a dict with the fields of `HeldOut`; `limits`, a dict with the fields of `Limits`; and `retention`, the
            minimum share of earlier active edits whose target the model states, or a dict with the fields of
            `Retention`.

    Attributes:
        settings: the validated settings.

    Raises:
        InputError: a field is unknown, a value is invalid, or there is no gate.

    Example:
        >>> from rlsedit_fast import Edit, EditConfig, Editor, Gates
        >>> from rlsedit_fast.world import load_demo_model
        >>> config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
        >>> editor = Editor(*load_demo_model(), config=config)
        >>> gates = Gates(answers=[{"prompt": "Toze Lado Rekuno speaks", "contains": "Nafiish"}], retention=0.9)
        >>> records = editor.edit([Edit("{} speaks", "Toze Lado Rekuno", "Nafiish")], gates=gates)
        >>> gates.check(editor).summary
        'gates: 2 passed, 0 violated'
    """

    def __init__(self, **fields: Any) -> None:
        try:
            self.settings = make_settings(fields)
        except InputError as error:
            raise InputError(f"Gates: {error.message}", error.hint) from None

    @classmethod
    def load(cls, path: str | Path) -> Gates:
        """Reads a gate file, YAML or JSON, and checks it and the files that it names.

        Raises:
            InputError: a file cannot be read, or a key or value is invalid; the message contains the line.
        """
        return cls._of(read_gate_file(path))

    @classmethod
    def _of(cls, settings: GateSettings) -> Gates:
        made = cls.__new__(cls)
        made.settings = settings
        return made

    def replace(self, **changes: Any) -> Gates:
        """Returns gates with other fields, such as `every` and `on_violation`.

        Raises:
            InputError: a field is unknown or a value is invalid.
        """
        given = self.settings.model_dump(exclude_unset=True)
        return type(self)(**given | changes)

    def bind(self, editor: Editor) -> BoundGates:
        """Measures the unedited model of an editor, also if it has edits already.

        Raises:
            InputError: a prompt is too long, the tokenizer has no chat template, or the rule has no bound.
        """
        if self.settings.limits.deviation_bound is not None and editor.config.rule != RECURSIVE:
            raise InputError(f"gates: limits.deviation_bound: rule={editor.config.rule!r} has no bound; omit it")
        with editor.unedited():
            return BoundGates(self, editor, Baseline(self, editor.model, editor.tokenizer))

    def check(self, editor: Editor) -> GateReport:
        """Measures all gates in the present model of an editor, compared with its unedited model.

        Raises:
            InputError: see `bind`.
        """
        return self.bind(editor).measure()


class Baseline:
    """Answers and predictions of an unedited model.

    Args:
        gates: the gates.
        model: the unedited model.
        tokenizer: its tokenizer.

    Raises:
        InputError: a prompt is too long for the model, or the tokenizer has no chat template.
    """

    def __init__(self, gates: Gates, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        settings = gates.settings
        self.unchanged = [one for part in settings.unchanged for one in part.questions()]
        self.expected = settings.answers
        self.questions: list[Question] = list({one.key: one for one in (*self.unchanged, *self.expected)}.values())
        check_questions(model, tokenizer, self.questions)
        self.answers = answers_of(model, tokenizer, self.questions)
        self.probe: TextProbe | None = None
        self.text = ""
        if settings.text is not None:
            report_activity("measuring held-out text")
            texts, length = _texts(settings.text.file, settings.text.tokens, model, tokenizer)
            self.probe = TextProbe(model, tokenizer, texts, tokens=settings.text.tokens, length=length)
            self.text = f"{self.probe.unedited.tokens} tokens of {Path(settings.text.file).name}"


class BoundGates:
    """Gates with the measurements of the unedited model of an editor.

    Args:
        gates: the gates.
        editor: the editor.
        base: measurements of its unedited model.

    Attributes:
        reports: the reports of all checks so far.

    Example:
        >>> from rlsedit_fast import EditConfig, Editor, Gates
        >>> from rlsedit_fast.world import load_demo_model
        >>> editor = Editor(*load_demo_model(), config=EditConfig(layers=[0]))
        >>> bound = Gates(unchanged=["Toze Lado Rekuno speaks"]).bind(editor)
        >>> bound.measure().summary  # the model is not edited
        'gates: 1 passed, 0 violated'
    """

    def __init__(self, gates: Gates, editor: Editor, base: Baseline) -> None:
        self._gates, self._editor, self._base = gates, editor, base
        self.reports: list[GateReport] = []

    @property
    def every(self) -> int:
        """Number of batches between two checks."""
        return self._gates.settings.every

    @property
    def undo(self) -> bool:
        """Whether a violation takes back what was changed since the last check."""
        return self._gates.settings.on_violation == "undo"

    @property
    def has_text(self) -> bool:
        """Whether perplexity or KL divergence on held-out text is measured."""
        return self._base.probe is not None

    @property
    def passed(self) -> bool:
        """Whether the last check was made after all edits and no gate was violated."""
        return bool(self.reports) and self.reports[-1].final and not self.reports[-1].violated

    def bind(self, editor: Editor) -> BoundGates:
        """Returns these gates, for further calls of `Editor.edit` without measuring the unedited model again.

        Raises:
            InputError: the gates are bound to another editor.
        """
        if editor is not self._editor:
            raise InputError("gates: they are bound to another editor; pass the Gates that were not bound")
        return self

    def check(self, *, first: int, final: bool) -> None:
        """Checks the gates between two batches.

        Args:
            first: id of the first edit since the last check; earlier ones count for the retention.
            final: whether all edits are applied.

        Raises:
            GateError: a gate is violated.
        """
        report = self.measure(first=None if final else first, final=final)
        if report.violated:
            count, of = len(report.violated), len(report.results)
            done = "the changes since the last check were taken back" if self.undo else "no further batch was applied"
            lines = listed((one.line for one in report.violated), _SHOWN)
            raise GateError(
                f"{count} of {counted(of, 'gate')} violated; {done}:\n" + "\n".join(lines),
                hint="correct or leave out edits, raise the limit, or use smaller batches and more anchors",
                report=report,
            )

    def measure(self, *, first: int | None = None, final: bool = True) -> GateReport:
        """Measures the gates in the present model.

        Args:
            first: edits from this id on do not count for the retention; by default all count.
            final: whether to measure gates that apply at the end.
        """
        editor, limits = self._editor, self._gates.settings.limits
        active = [record for record in editor.history() if record.state == "active"]
        bound = None
        if limits.deviation_bound is not None:
            bound = max((layer.bound for layer in editor.status(sample=0).layers), default=0.0)
        report = measure_gates(
            self._gates,
            self._base,
            editor.model,
            editor.tokenizer,
            active=active if first is None else [record for record in active if record.id < first],
            changes=editor.changes() if limits.deviation is not None else (),
            bound=bound,
            final=final,
        )
        self.reports.append(replace(report, edits=len(active)))
        return self.reports[-1]


def measure_gates(
    gates: Gates,
    base: Baseline,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    compared: bool = True,
    active: Sequence[EditRecord] | None = None,
    changes: Sequence[WeightChange] | None = None,
    bound: float | None = None,
    final: bool = True,
) -> GateReport:
    """Measures gates in a model.

    Args:
        gates: the gates.
        base: measurements of the unedited model; if there is none, of this model.
        model: the model.
        tokenizer: its tokenizer.
        compared: whether `base` is that of the unedited model. If not, gates that compare are not measured.
        active: edits for the retention; None without a store.
        changes: weight changes of the edited layers; None without the unedited model.
        bound: largest bound on the relative change; None without a store.
        final: whether to measure gates that apply at the end.

    Returns:
        The results.
    """
    settings = gates.settings
    without = "" if compared else "the unedited model is not given"
    due = [one for one in base.expected if final or one.when == "always" or _holds_before(one, base)]
    asked = [*base.unchanged, *due] if compared else due
    report_activity("checking the gates")
    now = answers_of(model, tokenizer, asked) if compared else base.answers
    results = [*_unchanged(base, now, settings.limits.changed, without), *_expected(due, base, now, compared=compared)]
    if base.probe is not None:
        results += _text_results(gates, base, base.probe(model) if compared else base.probe.unedited, without)
    limits = settings.limits
    if limits.deviation is not None:
        results.append(_deviation(changes, limits.deviation, without))
    if limits.deviation_bound is not None:
        note = "requires the store of the edits" if bound is None else None
        results.append(_limited("deviation_bound", bound, limits.deviation_bound, note=note))
    if settings.retention is not None:
        results.append(_retention(gates, model, tokenizer, active))
    return GateReport(tuple(results), edits=len(active or ()), final=final)


def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Iterable[Question]
) -> dict[tuple[str, bool, int], str]:
    """Returns the answers of a model by `Question.key`."""
    groups: dict[tuple[bool, int], dict[str, None]] = defaultdict(dict)
    for one in questions:
        groups[one.chat, one.answer_tokens][one.prompt] = None
    found: dict[tuple[str, bool, int], str] = {}
    for (chat, tokens), prompts in groups.items():
        if chat:
            texts = chat_answers(model, tokenizer, list(prompts), tokens=tokens)
        else:
            texts = generate_answers(model, tokenizer, [(prompt, "") for prompt in prompts], tokens=tokens)
        found |= {(prompt, chat, tokens): text for prompt, text in zip(prompts, texts, strict=True)}
    return found


def check_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], named: str = "gates"
) -> None:
    """Raises InputError if a prompt is too long for the model, or is to be asked in a chat without a template.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        questions: the prompts.
        named: where they come from, for the message.
    """
    if any(one.chat for one in questions) and not supports_chat(tokenizer):
        raise InputError(f"{named}: `chat: true`, and the tokenizer has no chat template; omit it")
    longest = max_tokens(model.config)
    for one in questions:
        if longest is not None and (count := tokens_needed(tokenizer, one)) > longest:
            raise InputError(
                f"{named}: {one.prompt!r:.60}: {count} tokens with its answer, and the model supports {longest}; "
                "shorten the prompt or decrease `tokens`"
            )


def tokens_needed(tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
    """Returns the number of tokens of a prompt with its answer; in a chat an upper estimate."""
    return len(encode_plain(tokenizer, question.prompt).ids) + question.answer_tokens + _CHAT_TEMPLATE * question.chat


def _texts(file: str, tokens: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], int]:
    """Returns texts with at least `tokens` tokens if the file has as many, and the maximum length of a text."""
    length = min(_LENGTH, max_tokens(model.config) or _LENGTH)
    texts, taken = list[str](), 0
    for _, ids in TextFile(file).read(tokenizer, 0):
        if taken >= tokens:
            break
        if len(ids) > 1:
            texts.append(str(tokenizer.decode(ids[:length], skip_special_tokens=True)))
            taken += min(len(ids), length) - 1
    return texts, length


def _holds_before(one: Expected, base: Baseline) -> bool:
    return one.when is None and one.holds(base.answers[one.key])


def _unchanged(
    base: Baseline, now: Mapping[tuple[str, bool, int], str], allowed: float, without: str
) -> list[GateResult]:
    if without:
        return [
            GateResult("unchanged", "not measured", prompt=one.prompt, chat=one.chat, note=without)
            for one in base.unchanged
        ]
    moved = sum(now[one.key] != base.answers[one.key] for one in base.unchanged)
    share = moved / max(1, len(base.unchanged))
    note = f"{moved} of {len(base.unchanged)} changed, allowed share {allowed:g}" if allowed and moved else None
    return [
        GateResult(
            "unchanged",
            "violated" if now[one.key] != base.answers[one.key] and share > allowed else "passed",
            prompt=one.prompt,
            chat=one.chat,
            expected="the answer before",
            before=base.answers[one.key],
            now=now[one.key],
            note=note if now[one.key] != base.answers[one.key] else None,
        )
        for one in base.unchanged
    ]


def _expected(
    due: Sequence[Expected], base: Baseline, now: Mapping[tuple[str, bool, int], str], *, compared: bool
) -> list[GateResult]:
    return [
        GateResult(
            "answers",
            "passed" if one.holds(now[one.key]) else "violated",
            prompt=one.prompt,
            chat=one.chat,
            expected=one.expected,
            before=base.answers[one.key] if compared else None,
            now=now[one.key],
        )
        for one in due
    ]


def _text_results(gates: Gates, base: Baseline, found: Stability, without: str) -> list[GateResult]:
    assert base.probe is not None
    limits, before = gates.settings.limits, base.probe.unedited.perplexity
    results = []
    if limits.perplexity is not None:
        was = None if without else before
        results.append(_limited("perplexity", found.perplexity, limits.perplexity, note=base.text, before=was))
    compared = {
        "perplexity_ratio": (found.perplexity / before, limits.perplexity_ratio),
        "kl": (found.kl, limits.kl),
        "same_top": (found.top, limits.same_top),
    }
    for name, (value, limit) in compared.items():
        if limit is not None:
            results.append(_limited(name, None if without else value, limit, note=without or base.text))
    return results


def _limited(
    gate: str, value: float | None, limit: float, *, note: str | None, before: float | None = None
) -> GateResult:
    if value is None:
        return GateResult(gate, "not measured", limit=limit, note=note)
    within = value >= limit if gate in ("same_top", "retention") else value <= limit  # False for NaN
    return GateResult(gate, "passed" if within else "violated", value, limit, before=before, note=note)


def _deviation(changes: Sequence[WeightChange] | None, limit: float, without: str) -> GateResult:
    if changes is None:
        return _limited("deviation", None, limit, note=without or "the edited weights are not known")
    norms = {
        change.name: float(change.delta.norm()) / max(float(change.original.float().norm()), 1e-30)
        for change in changes
    }
    largest = max(norms, key=lambda name: norms[name], default=None)
    return _limited("deviation", norms[largest] if largest else 0.0, limit, note=largest or "no layer is edited")


def _retention(
    gates: Gates, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, active: Sequence[EditRecord] | None
) -> GateResult:
    wanted = gates.settings.retention
    assert wanted is not None
    if active is None:
        return _limited("retention", None, wanted.at_least, note="requires the store of the edits")
    if not active:
        return _limited("retention", None, wanted.at_least, note="there are no earlier active edits")
    count = min(wanted.sample, len(active))
    some = [active[at * len(active) // count] for at in range(count)]
    found = score_rows(model, [encode_fact(tokenizer, one) for one in some])
    lost = [one.id for one, scored in zip(some, found, strict=True) if not scored.exact]
    note = f"{count - len(lost)} of {count} stated" + f", a sample of {len(active)}" * (count < len(active))
    if lost:
        note += f"; not stated: edits {', '.join(listed(lost, _SHOWN))}"
    return _limited("retention", 1 - len(lost) / count, wanted.at_least, note=note)
