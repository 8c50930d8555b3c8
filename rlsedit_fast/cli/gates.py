"""Options and output of gates, for `rlsedit edit`, `rlsedit check` and `rlsedit report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit_fast.cli.output import plain
from rlsedit_fast.cli.setup import at_least_one
from rlsedit_fast.errors import InputError, listed

if TYPE_CHECKING:
    from rlsedit_fast.evaluation.gates import GateReport, Gates

_SHOWN = 20


def add_gate(parser: argparse._ActionsContainer, *, required: bool = False) -> None:
    """Adds the option --gate."""
    parser.add_argument(
        "--gate",
        type=Path,
        required=required,
        metavar="FILE",
        help="YAML or JSON file of conditions on the edited model: answers, perplexity, KL divergence, deviation and "
        "retention (see docs/release.md)",
    )


def add_checks(parser: argparse.ArgumentParser) -> None:
    """Adds the options of checks between batches."""
    group = parser.add_argument_group("gates, checked between batches and at the end; exit code 3 if one is violated")
    add_gate(group)
    group.add_argument(
        "--check-every",
        type=at_least_one,
        metavar="N",
        help="check after N batches (default: `every` of the file, or 1)",
    )
    group.add_argument(
        "--on-violation",
        choices=("stop", "undo"),
        help="stop before the next batch, or undo: also take back what was changed since the last check (default: "
        "`on_violation` of the file, or stop)",
    )


def read_gates(options: argparse.Namespace) -> Gates | None:
    """Reads the gate file, if one is given; no model is needed.

    Raises:
        InputError: the file is invalid, or another option requires it.
    """
    changes = {"every": getattr(options, "check_every", None), "on_violation": getattr(options, "on_violation", None)}
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.gate is None:
        if changes:
            raise InputError("--check-every and --on-violation require --gate FILE; add it or omit them")
        return None
    from rlsedit_fast.evaluation.gates import Gates

    return Gates.load(options.gate).replace(**changes)


def gate_lines(report: GateReport, *, violations: bool = True) -> list[str]:
    """Formats a report: counts, violated gates if wanted, gates that were not measured, and limits that hold."""
    lines = [report.summary]
    if violations:
        lines += listed((f"  violated: {plain(one.line)}" for one in report.violated), _SHOWN, where=" (see --json)")
    lines += listed(
        (f"  not measured: {plain(one.line)}" for one in report.not_measured), _SHOWN, where=" (see --json)"
    )
    return lines + [f"  passed: {plain(one.line)}" for one in report.passed if one.prompt is None]


def gate_results(reports: list[GateReport], gates: Gates) -> dict[str, Any]:
    """Returns the last report for --json, with the number of checks."""
    about = {"checks": len(reports), "on_violation": gates.settings.on_violation}
    return about | (reports[-1].to_dict() if reports else {"violated": 0, "results": []})
