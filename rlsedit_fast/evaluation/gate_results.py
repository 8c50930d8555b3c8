"""Results of gates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["passed", "violated", "not measured"]


@dataclass(frozen=True)
class GateResult:
    """Result of one gate.

    Attributes:
        gate: its name in the gate file: `unchanged`, `answers`, `retention` or the name of a limit.
        outcome: `passed`, `violated` or `not measured`.
        value: the measured value; None for answers.
        limit: the limit; None for answers.
        prompt: the prompt, of a gate on answers.
        chat: whether it was asked in a chat.
        expected: what the answer must be.
        before: answer of the unedited model, or its value.
        now: answer of the present model.
        note: what was measured, or why it was not.

    Example:
        >>> from rlsedit_fast.evaluation import GateResult
        >>> GateResult("kl", "violated", value=0.08, limit=0.05).line
        'kl: 0.08, limit: at most 0.05'
    """

    gate: str
    outcome: Outcome
    value: float | None = None
    limit: float | None = None
    prompt: str | None = None
    chat: bool = False
    expected: str | None = None
    before: str | float | None = None
    now: str | None = None
    note: str | None = None

    @property
    def line(self) -> str:
        """The result in one line."""
        note = f" ({self.note})" if self.note else ""
        if self.prompt is None:
            if self.value is None or self.limit is None:
                return f"{self.gate}{note}"
            least = "at least" if self.gate in ("retention", "same_top") else "at most"
            before = f", before {self.before:.4g}" if isinstance(self.before, float) else ""
            return f"{self.gate}: {self.value:.4g}{before}, limit: {least} {self.limit:.4g}{note}"
        where = " in a chat" if self.chat else ""
        text = f"{self.gate}: {self.prompt!r}{where}"
        if self.outcome == "not measured":
            return f"{text}{note}"
        before = f"before {self.before!r}, " if self.before is not None else ""
        return f"{text}: {before}now {self.now!r}, expected: {self.expected}{note}"


@dataclass(frozen=True)
class GateReport:
    """Results of all gates at one check.

    Attributes:
        results: the results, in the order of the gate file.
        edits: number of active edits.
        final: whether gates that apply at the end were checked.

    Example:
        >>> from rlsedit_fast.evaluation import GateReport, GateResult
        >>> GateReport((GateResult("kl", "passed", value=0.01, limit=0.05),), edits=3, final=True).summary
        'gates: 1 passed, 0 violated'
    """

    results: tuple[GateResult, ...]
    edits: int
    final: bool

    def _of(self, outcome: Outcome) -> list[GateResult]:
        return [one for one in self.results if one.outcome == outcome]

    @property
    def passed(self) -> list[GateResult]:
        """The gates that passed."""
        return self._of("passed")

    @property
    def violated(self) -> list[GateResult]:
        """The violated gates."""
        return self._of("violated")

    @property
    def not_measured(self) -> list[GateResult]:
        """The gates that could not be measured."""
        return self._of("not measured")

    @property
    def summary(self) -> str:
        """The numbers of gates by outcome."""
        rest = f", {len(self.not_measured)} not measured" if self.not_measured else ""
        return f"gates: {len(self.passed)} passed, {len(self.violated)} violated{rest}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as a JSON-serializable dict."""
        return {
            "passed": len(self.passed),
            "violated": len(self.violated),
            "not_measured": len(self.not_measured),
            "edits": self.edits,
            "final": self.final,
            "results": [asdict(one) for one in self.results],
        }
