"""Contents of change reports without a model, for measurements and tests."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from math import sqrt

from rlsedit_fast import Edit, EditConfig, EditRecord
from rlsedit_fast.editing.records import Point
from rlsedit_fast.editing.status import LayerStatus, assess
from rlsedit_fast.editing.storage.recovery import Contents
from rlsedit_fast.evaluation.gate_results import GateReport, GateResult
from rlsedit_fast.report.collect import OtherRow

HOSTILE = (
    "<script>document.title = 'attacked'</script>",
    '"><img src=x onerror="document.title=1"> & </td></table>',
    "{{ 7 * 7 }} {% raw %}",
    "\u202eevil\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "zero\u200bwidth\u00adand\u0007bell",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "x" * 3000,
    "line\nbreak and " + "many words " * 200,
    "\ufffd \ud800".encode("utf-8", "replace").decode(),
)
SUBJECTS = ("France", "Miles Davis", "the Eiffel Tower", "Lake Constance", "Ada Lovelace", "Kyoto", "Mount Kenya")
TARGETS = ("Lyon", "piano", "Rome", "Austria", "Danish", "Osaka", "granite")
START = datetime(2026, 3, 1, 9, 0, tzinfo=timezone.utc)


def make_record(at: int, prompt: str, subject: str, target: str, **fields) -> EditRecord:
    values = {
        "id": at,
        "time": START + timedelta(minutes=at // 100),
        "weight": 1.0,
        "state": "active",
        "batch": (at - 1) // 100 + 1,
        "search_converged": True,
        "search_nll": 0.01,
        "search_rank": 1,
        "search_steps": 12,
        "realized": 0.97,
        "nll": 0.01 + (at % 17) / 100,
        "rank": 1,
        "answer_before": "something else",
        "answer": target,
    }
    return EditRecord(**values | {"prompt": prompt, "subject": subject, "target": target} | fields)


def make_contents(count: int, *, hostile: bool = False, chat: bool = True) -> Contents:
    """Returns a store with `count` edits, of which some are not stated, undone, replaced or skipped."""
    records, edits = list[EditRecord](), dict[int, Edit]()
    for at in range(1, count + 1):
        subject, target = f"{SUBJECTS[at % 7]} {at}", TARGETS[at % 7]
        fields = {"name": f"fact-{at:04d}"} if at % 2 else {}
        if chat:
            answer = f"It is commonly said to be {target if at % 4 else 'something else'}."
            fields |= {"chat_answer_before": "As far as I know, it is something else.", "chat_answer": answer}
        if at % 40 == 7:
            fields |= {"rank": 3, "nll": 2.4, "answer": "something else"}
        if at % 100 == 20:
            fields |= {"state": "undone"}
        if at % 100 == 30:
            fields |= {"state": "replaced"}
        if at % 100 == 45:
            fields |= {"state": "skipped", "rank": 200, "search_rank": 40, "search_converged": False, "nll": 6.1}
        prompt = "The subject {} is best known for its relation to"
        if hostile and at <= 2 * len(HOSTILE):
            text = HOSTILE[(at - 1) // 2]
            subject, target = (text, target) if at % 2 else (subject, text)
            fields |= {"answer_before": text, "answer": text, "name": text[:50]}
        records.append(make_record(at, prompt, subject, target, **fields))
        if records[-1].state == "active":
            others = (f"The other subject {at} is best known for",) if at % 10 == 0 else ()
            edits[at] = Edit(prompt, subject, target, neighborhood=others)
    layers = [
        LayerStatus(
            layer=layer,
            objective=4.0 * share,
            weight_bound=0.09 * share,
            weight=0.031 * share,
            anchors_bound=0.12 * share,
            residual=1e-9,
            advice=None,
        )
        for layer, share in ((7, 1.0), (8, 0.8))
    ]
    trace = [
        Point(n, (4.0 * n / count, 3.2 * n / count)) for n in range(max(1, count // 20), count + 1, max(1, count // 20))
    ]
    status = assess(records, trace, layers, batches=count // 100 + 1, adherence=0.95, budget=0.25, sizes={})
    about = {
        "model": "/models/SmolLM2-135M-Instruct",
        "fingerprint": "3f9c" * 16,
        "layers": [{"layer": 7}, {"layer": 8}],
        "created": START.isoformat(),
        "version": "0.1.0",
        "config": EditConfig().to_dict(),
    }
    assert sqrt(layers[0].objective) > 0
    return Contents(about, records, edits, ["The Eiffel Tower stands in"], trace, status)


def make_gates() -> GateReport:
    return GateReport(
        (
            GateResult(
                "unchanged",
                "passed",
                prompt="The Eiffel Tower stands in",
                expected="the answer before",
                before="Paris",
                now="Paris",
            ),
            GateResult(
                "answers",
                "violated",
                prompt="What is the capital of France?",
                chat=True,
                expected="contains 'Lyon'",
                before="The capital of France is Paris.",
                now="The capital of France is Paris.",
            ),
            GateResult("perplexity_ratio", "passed", value=1.031, limit=1.05, note="2000 tokens of held-out.txt"),
            GateResult("kl", "passed", value=0.0213, limit=0.05, note="2000 tokens of held-out.txt"),
            GateResult("retention", "not measured", limit=0.95, note="there are no earlier active edits"),
        ),
        edits=900,
        final=True,
    )


def others(count: int) -> list[OtherRow]:
    """Returns other prompts as they are measured with a model."""
    return [
        OtherRow(
            kind,
            f"Another prompt {at} about {SUBJECTS[at % 7]} is",
            kind == "asked" and at % 2 == 0,
            "the same",
            now,
            now != "the same",
        )
        for at in range(count)
        for kind, now in [(("asked", "neighborhood", "protected")[at % 3], "different" if at % 9 == 0 else "the same")]
    ]
