"""The lines that `rlsedit edit` prints at the end."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rlsedit_fast.cli.output import plain
from rlsedit_fast.errors import counted, listed
from rlsedit_fast.models.tokens import fill

_COLUMN = 44
_SHOWN = 10


def summary(results: dict[str, Any]) -> list[str]:
    """Formats the results of a run: what was applied, what the model states, and what changed elsewhere."""
    lines = [f"{results['made']} of {results['edits']} edits applied in {results['seconds']:.1f} s"]
    for what, count in (
        ("not applied, because the run ended before", len(results["not_made"])),
        (
            "skipped, because the value search did not converge or an earlier edit has nearly the same key",
            len(results["skipped"]),
        ),
        ("applied although the value search did not converge", len(results["not_converged"])),
        ("applied a second time, because the model did not state them", len(results.get("applied_again", ()))),
        ("skipped, because the record is invalid", len(results["left_out"])),
    ):
        if count:
            lines.append(f"{count} {what}")
    if results["made"]:
        lines += _stated_lines(results)
    lines += past_lines(results["left_as_they_became"])
    if "after" in results:
        lines += _metric_lines(results)
    if results["deviation"]:
        lines.append("weight change per layer, ||W - W0||, and its bound:")
    for layer in results["deviation"]:
        lines.append(f"  layer {layer['layer']}: {layer['weight']:.4g}, at most {layer['weight_bound']:.4g}")
    return lines


def past_lines(past: list[dict[str, str]]) -> list[str]:
    """Returns a line about the edits that are in the store and not active, if there are any."""
    if not past:
        return []
    counts = Counter(entry["state"] for entry in past)
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return [f"skipped {len(past)} edits of the store that are not active ({states}); --again applies them again"]


def _stated_lines(results: dict[str, Any]) -> list[str]:
    made, failed = results["made"], results["not_stated"]
    records = {entry["place"]: entry for entry in results["records"] if entry["state"] != "skipped"}
    if not failed:
        lines = [f"{made} written; the model states all {made} targets"]
    else:
        places = ", ".join(listed(map(str, failed), _SHOWN))
        lines = [f"{made} written; the model states {made - len(failed)} targets, {len(failed)} not: {places}"]
        lines += listed((_failed_line(records[place]) for place in failed), _SHOWN, where=" (use --json for all)")
        again = "" if results.get("applied_again") else "pass --retry-failed to apply them again, "
        lines.append(f"to improve: {again}raise --adherence, use more text for the anchors, or use smaller batches")
    chat = [entry for entry in records.values() if entry["chat_answer"] is not None]
    if chat:
        count = sum(entry["chat_stated"] for entry in chat)
        lines.append(f"in a chat with the prompt as the message, {count} of {len(chat)} answers contain the target")
    return lines


def _failed_line(entry: dict[str, Any]) -> str:
    prompt = plain(fill(entry["prompt"], entry["subject"])[0])
    return (
        f"  {entry['place']}: {prompt} -> {plain(entry['target'])!r}; before {entry['answer_before']!r}, now "
        f"{entry['answer']!r} (target: rank {entry['rank']}, NLL {entry['nll']:.2f})"
    )


def _metric_lines(results: dict[str, Any]) -> list[str]:
    lines = [f"{'':{_COLUMN}}{'before':>8}{'after':>8}"]
    for name, what in (
        ("efficacy", "targets stated: efficacy"),
        ("generalization", "targets stated after paraphrases"),
        ("specificity", "neighborhood prompts: same next token"),
    ):
        was, now = (results[when][name] for when in ("before", "after"))
        if now["of"]:
            lines.append(
                f"{what:{_COLUMN}}{was['count'] / was['of']:8.3f}{now['count'] / now['of']:8.3f}  of {now['of']}"
            )
    if "after" in (stability := results.get("stability", {})):
        was, now = stability["before"], stability["after"]
        lines += [
            f"{'perplexity on other text':{_COLUMN}}{was['perplexity']:8.2f}{now['perplexity']:8.2f}  "
            f"{now['tokens']} tokens: {stability['text']}",
            f"{'KL divergence there, nats per token':{_COLUMN}}{was['kl']:8.3f}{now['kl']:8.3f}",
            f"{'same most likely token there':{_COLUMN}}{was['top']:8.3f}{now['top']:8.3f}",
        ]
        if routing := stability.get("routing_change"):
            layer, most = max(routing.items(), key=lambda one: one[1])
            lines.append(
                f"{'tokens there that reach other experts':{_COLUMN}}{0:8.3f}{most:8.3f}  layer {layer}, of "
                f"{counted(len(routing), 'mixture')} the one with most"
            )
    return lines
