"""`rlsedit calibrate`: compare values of adherence on a sample of edits."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rlsedit_fast.cli import DONE, PARTIAL, setup
from rlsedit_fast.cli.facts import add_facts, read_facts, sift
from rlsedit_fast.cli.output import add_json, emit, working
from rlsedit_fast.errors import InputError

HELP = "compare values of --adherence before editing; the model is not modified"
ABOUT = (
    "Show for several adherences the penalties mu and lam that they give and what they would do to a sample of the "
    "edits and to other text: realized, the fraction of the target change that arrives, and leakage, the change of "
    "the outputs on the anchors per layer. Pass the chosen value to `rlsedit edit --adherence`."
)
USAGE = "--model MODEL --edits FILE [--text FILE] [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    setup.add_model(parser)
    add_facts(parser)
    parser.add_argument(
        "--pilot",
        type=setup.at_least_one,
        metavar="N",
        default=100,
        help="calibrate on the first N edits (default 100)",
    )
    parser.add_argument(
        "--adherences",
        type=_fraction,
        nargs="+",
        metavar="A",
        default=[0.8, 0.9, 0.95, 0.975, 0.99],
        help="adherence values to compare (default 0.8 0.9 0.95 0.975 0.99)",
    )
    setup.add_settings(parser)
    setup.add_anchors(parser)
    add_json(parser)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 and below 1, such as 0.9")
    return value


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    setup.show_warnings()
    setup.settle_text(options)
    if options.adherence is not None:
        raise InputError("--adherence is not used here; pass --adherences with the values to compare")
    facts = read_facts(options)
    plan = setup.plan_editor(options)
    facts = sift(facts, plan, options)
    editor = plan.load()
    anchors = setup.anchor(editor, options)
    with working("calibrating"):
        rows = editor.assess(facts.edits[: options.pilot], options.adherences)
    lines = [f"layers {', '.join(map(str, editor.layers))}; anchors: {anchors}"]
    lines.append(f"{'adherence':>9}  {'realized':>8}  {'mu':>10}  {'lam':>22}  leakage per layer")
    for row in rows:
        lam = f"{min(row.lam):.4g}" if len(set(row.lam)) == 1 else f"{min(row.lam):.4g} to {max(row.lam):.4g}"
        leaks = " ".join(f"{leak:.3g}" for leak in row.leakage)
        lines.append(f"{row.adherence:9.3f}  {row.realized:8.3f}  {row.mu[0]:10.4g}  {lam:>22}  {leaks}")
    results = {"layers": list(editor.layers), "anchors": anchors, "rows": [asdict(row) for row in rows]}
    emit({**results, "left_out": facts.left_out}, lines, options.json)
    return PARTIAL if facts.left_out else DONE
