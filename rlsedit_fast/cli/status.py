"""`rlsedit status`: how a stream of edits is doing, and what is to be done."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rlsedit_fast.cli import setup
from rlsedit_fast.cli.output import add_json, emit
from rlsedit_fast.cli.stores import add_model, add_store, open_editor
from rlsedit_fast.editing.memory import size
from rlsedit_fast.editing.recovery import read_status
from rlsedit_fast.editing.status import DEFAULT_BUDGET, Status
from rlsedit_fast.errors import InputError

HELP = "bounds, objective and health of a store's edits, and how many more there is room for"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_store(parser)
    parser.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_BUDGET,
        help="how far the outputs on the anchors (without anchors: the weights) may move, as a share of their norms "
        f"(default {DEFAULT_BUDGET})",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="load the model and measure; else deviation and drift are those of the last snapshot",
    )
    add_model(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    setup.show_warnings()
    if options.model is not None and not options.measure:
        raise InputError("--model is loaded to measure; add --measure, or leave it out")
    if options.measure:
        with open_editor(options) as editor:
            status = editor.status(budget=options.budget)
    else:
        status = read_status(options.store, budget=options.budget)
    emit(asdict(status), status_lines(status), options.json)
    return 0


def status_lines(status: Status) -> list[str]:
    """For a terminal."""
    counts = ", ".join(f"{count} {state}" for state, count in status.edits.items() if count or state == "active")
    lines = [f"edits: {counts}; {status.batches} batches"]
    if status.realized is not None and status.success is not None:
        asked = f", {status.adherence:g} asked for" if status.adherence else ""
        lines.append(
            f"recent edits: {status.realized:.3f} of the wanted change arrived{asked}; the model stated "
            f"{status.success:.0%} of them after the write"
        )
    if status.sample and status.sample.success is not None:
        lines.append(f"asked again: the model states {status.sample.success:.0%} of {status.sample.edits} active edits")
        if status.sample.key_shift:
            shifts = ", ".join(f"{shift:.3f}" for shift in status.sample.key_shift)
            lines.append(f"keys have moved since their edits were written, per layer (relative): {shifts}")
    for layer in status.layers:
        parts = [f"objective {layer.objective:.4g}"]
        if layer.anchors_bound is not None:
            parts.append(f"outputs on the anchors moved by at most {layer.anchors_bound:.3g}")
        measured = f" (measured {layer.weight:.3g})" if layer.weight is not None else ""
        parts.append(f"weight by at most {layer.weight_bound:.3g}{measured}")
        if layer.residual is not None:
            parts.append(f"drift of C {layer.residual:.1e}")
        lines.append(f"layer {layer.layer}: {', '.join(parts)}")
    if status.layers:
        left = "unknown" if status.edits_left is None else f"about {status.edits_left}"
        lines.append(f"budget {status.budget:g}: {status.spent:.0%} spent; edits left: {left}")
    if status.sizes:
        sizes = ", ".join(f"{part} {size(count)}" for part, count in status.sizes.items())
        lines.append(f"on the disk: {size(sum(status.sizes.values()))} ({sizes})")
    return lines + [f"warning: {warning}" for warning in status.warnings]
