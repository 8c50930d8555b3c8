"""`rlsedit status`: bounds, objective and health of the edits of a store."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rlsedit_fast.baselines.memory import size
from rlsedit_fast.cli import setup
from rlsedit_fast.cli.output import add_json, emit, working
from rlsedit_fast.cli.stores import add_store, open_editor
from rlsedit_fast.editing.status import DEFAULT_BUDGET, Status
from rlsedit_fast.editing.storage.recovery import read_history, read_status
from rlsedit_fast.errors import InputError, counted, listed

HELP = "show how far the edits of a store have changed the model, and how many more fit"
ABOUT = (
    "Show bounds on the change of each edited layer, an estimate of how many more edits fit into a budget, and "
    "warnings with what to do. The model is loaded only with --measure."
)
USAGE = "--store DIR [--measure] [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_store(parser)
    parser.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_BUDGET,
        metavar="X",
        help="allowed relative change of the outputs on the anchors, or of the weights if there are no anchors; used "
        f"to estimate how many more edits fit (default {DEFAULT_BUDGET})",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="load the model and measure the current deviation and drift (default: values of the last snapshot)",
    )
    setup.add_model(parser, required=False, divided=True)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    setup.show_warnings()
    if options.model is not None and not options.measure:
        raise InputError("--model is used only with --measure; add --measure or omit --model")
    status = read_status(options.store, budget=options.budget)  # also checks the options before the model is loaded
    if options.measure:
        with open_editor(options) as editor, working("measuring"):
            status = editor.status(budget=options.budget)
    records = [record for record in read_history(options.store) if record.state == "active"]
    lines = status_lines(status)
    if failed := [record.id for record in records if not record.success]:
        lines.append(
            f"active edits whose target the model did not state when last measured: {', '.join(listed(failed, 20))} "
            "(see `rlsedit history`)"
        )
    emit(asdict(status) | {"active": [record.to_dict() for record in records]}, lines, options.json)
    return 0


def status_lines(status: Status) -> list[str]:
    """Formats the status as text."""
    counts = ", ".join(f"{count} {state}" for state, count in status.edits.items() if count or state == "active")
    lines = [f"edits: {counts}; {status.batches} batches"]
    if status.realized is not None and status.success is not None:
        target = f" (adherence {status.adherence:g})" if status.adherence else ""
        lines.append(
            f"recent edits: {status.realized:.3f} of the change that the value search asks for arrived in the model"
            f"{target}; the model stated {status.success:.0%} of the targets right after the edit"
        )
    if status.sample and status.sample.success is not None:
        lines.append(
            f"sample of {counted(status.sample.edits, 'active edit')}: the model states "
            f"{status.sample.success:.0%} of the targets"
        )
        if status.sample.key_shift:
            shifts = ", ".join(f"{shift:.3f}" for shift in status.sample.key_shift)
            lines.append(f"relative change of the keys since their edits, per layer: {shifts}")
    for layer in status.layers:
        parts = [f"least-squares objective {layer.objective:.4g}"]
        if layer.misfit is not None:
            parts[0] += f" ({layer.misfit:.0%} misfit of the edits)"
        if layer.anchors_bound is not None:
            parts.append(f"change of outputs on the anchors {_value(layer.anchors, layer.anchors_bound)}")
        if layer.held_out is not None:
            parts.append(f"on held-out text {layer.held_out:.3g}")
        parts.append(f"weight change {_value(layer.weight, layer.weight_bound)}")
        if layer.residual is not None:
            parts.append(f"drift of C {layer.residual:.1e}")
        lines.append(f"layer {layer.layer}: {', '.join(parts)}")
    if status.layers:
        left = "unknown" if status.edits_left is None else f"about {status.edits_left}"
        lines.append(
            f"budget, the allowed relative change (--budget): {status.budget:g}, {status.spent:.0%} used; edits left: "
            f"{left}"
        )
        if status.edits_left_basis:
            lines.append(f"edits left is based on {status.edits_left_basis}")
    if status.sizes:
        sizes = ", ".join(f"{part} {size(count)}" for part, count in status.sizes.items())
        lines.append(f"size on disk: {size(sum(status.sizes.values()))} ({sizes})")
    return lines + [f"warning: {warning}" for warning in status.warnings]


def _value(exact: float | None, bound: float) -> str:
    return f"at most {bound:.3g}" if exact is None else f"{exact:.3g} (at most {bound:.3g})"
