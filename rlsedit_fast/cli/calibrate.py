"""`rlsedit calibrate`: compare values of adherence before editing, and forecast what planned edits would do."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlsedit_fast.baselines import RECURSIVE
from rlsedit_fast.cli import DONE, PARTIAL, setup
from rlsedit_fast.cli.facts import Facts, add_facts, facts_given, read_facts, sift
from rlsedit_fast.cli.output import add_json, emit, progress, say, working
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.data.drawn import draw_edits
from rlsedit_fast.editing import Editor
from rlsedit_fast.editing.capacity.forecast import ADHERENCES, LEAST_REALIZED, Forecast, Report
from rlsedit_fast.editing.priors import Tradeoff
from rlsedit_fast.editing.status import DEFAULT_BUDGET, IDENTIFIED
from rlsedit_fast.errors import InputError, counted
from rlsedit_fast.processes import world
from rlsedit_fast.report.capacity import check_plot, plot_forecast
from rlsedit_fast.statistics import TextFile

HELP = "compare values of --adherence and forecast planned edits before editing; the model is not modified"
ABOUT = (
    "Show for several adherences the penalties mu and lam that they give, what they would do to a sample of the edits "
    "(realized, the fraction of the target change that arrives, and leakage, the change of the outputs on the anchors "
    "per layer), and a forecast for all planned edits: what old and new edits keep, and how far the layers drift, by "
    "number of edits. Values are searched for --pilot edits only; of the others the keys are read, which is much "
    "faster than editing. Pass the proposed value to `rlsedit edit --adherence`."
)
USAGE = "--model MODEL (--edits FILE | --text FILE --count N) [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    setup.add_model(parser, divided=True)
    add_facts(parser, required=False)
    parser.add_argument(
        "--count",
        type=setup.at_least_one,
        metavar="N",
        help="forecast N edits (default: as many as --edits has). More than --edits has are extrapolated; without "
        f"--edits, up to {IDENTIFIED} subjects are drawn from the file of --text",
    )
    parser.add_argument(
        "--pilot",
        type=setup.at_least_one,
        metavar="N",
        default=100,
        help="calibrate on the first N edits, whose values are searched (default 100)",
    )
    parser.add_argument(
        "--adherences",
        type=_fraction,
        nargs="+",
        metavar="A",
        default=list(ADHERENCES),
        help=f"adherence values to compare (default {' '.join(f'{one:g}' for one in ADHERENCES)})",
    )
    parser.add_argument(
        "--max-drift",
        type=float,
        default=DEFAULT_BUDGET,
        metavar="X",
        help="allowed relative change of the outputs on held-out anchor text; without it on the anchors, without "
        f"anchors of the weights (default {DEFAULT_BUDGET:g})",
    )
    parser.add_argument(
        "--min-realized",
        type=float,
        default=LEAST_REALIZED,
        metavar="A",
        help=f"fraction of their target change that the oldest edits must keep (default {LEAST_REALIZED:g})",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the forecast into a .png or .svg file (requires matplotlib)"
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
    world().lead(lambda: check_places(options, files=("plot", "json")))
    if options.adherence is not None:
        raise InputError("--adherence is not used here; pass --adherences with the values to compare")
    if options.plot is not None:
        check_plot(options.plot)
    facts = read_facts(options) if facts_given(options) else _drawn(options)
    plan = setup.plan_editor(options)
    facts = sift(facts, plan, options)
    editor = plan.load()
    anchors = setup.anchor(editor, options)
    results: dict[str, Any] = {"layers": list(editor.layers), "anchors": anchors}
    lines = [f"layers {', '.join(map(str, editor.layers))}; anchors: {anchors}"]
    mixture = any(projection.layout is not None for projection in editor.context.projections)
    if mixture or editor.config.rule != RECURSIVE:
        what = "mixtures of experts" if mixture else f"rule {editor.config.rule}"
        say(f"there is no forecast for {what}")
        with working("calibrating"):
            rows = editor.assess(facts.edits[: options.pilot], options.adherences)
        lines += _table(rows)
    else:
        forecast = _forecast(editor, facts, options)
        rows = [one.tradeoff for one in forecast.settings]
        lines += [*_table(rows), "", *forecast_lines(forecast)]
        results["forecast"] = asdict(forecast)
        if options.plot is not None:
            world().lead(lambda: plot_forecast(forecast, options.plot))
            lines.append(f"plot: {options.plot}")
    results["rows"] = [asdict(row) for row in rows]
    emit({**results, "left_out": facts.left_out}, lines, options.json)
    return PARTIAL if facts.left_out else DONE


def _drawn(options: argparse.Namespace) -> Facts:
    """Returns edits drawn from the text of the anchors."""
    if options.text is None or options.count is None:
        raise InputError("no edits given; pass --edits FILE, or --text FILE and --count N to draw subjects from text")
    edits = draw_edits(TextFile(options.text).texts(), min(options.count, IDENTIFIED))
    if not edits:
        raise InputError(f"--text {options.text} contains no subject that is followed by four words; pass --edits FILE")
    say(f"{counted(len(edits), 'subject')} drawn from {options.text}")
    return Facts(edits, [f"subject {at} of the text" for at in range(1, len(edits) + 1)], [], {}, [])


def _forecast(editor: Editor, facts: Facts, options: argparse.Namespace) -> Forecast:
    with _shown() as report:
        return editor.forecast(
            facts.edits,
            adherences=options.adherences,
            count=options.count,
            pilot=options.pilot,
            max_drift=options.max_drift,
            min_realized=options.min_realized,
            progress=report,
        )


@contextmanager
def _shown() -> Iterator[Report]:
    """Shows progress with the time left."""
    with progress(None, "searching the pilot", "edit") as bar:

        def report(about: str, done: int, of: int) -> None:
            if about != bar.desc.removesuffix(": ") or bar.total != of:
                bar.set_description(about, refresh=False)
                bar.unit_scale = False
                bar.reset(of)
            bar.update(done - bar.n)

        yield report


def _table(rows: list[Tradeoff]) -> list[str]:
    lines = [f"{'adherence':>9}  {'realized':>8}  {'mu':>10}  {'lam':>22}  leakage per layer"]
    for row in rows:
        lam = f"{min(row.lam):.4g}" if len(set(row.lam)) == 1 else f"{min(row.lam):.4g} to {max(row.lam):.4g}"
        leaks = " ".join(f"{leak:.3g}" for leak in row.leakage)
        lines.append(f"{row.adherence:9.3f}  {row.realized:8.3f}  {row.mu[0]:10.4g}  {lam:>22}  {leaks}")
    return lines


def forecast_lines(forecast: Forecast) -> list[str]:
    """Formats a forecast as text."""
    lines = [
        f"{'adherence':>9}  {'edits':>7}  {'rows/d_k':>8}  {'realized: first':>15}  {'last':>5}  {'drift':>7}  "
        f"{'||dW||/||W0||':>13}  {'free':>5}"
    ]
    for setting in forecast.settings:
        for point in setting.points:
            weight, free = max(one.weight for one in point.layers), min(one.free for one in point.layers)
            lines.append(
                f"{setting.tradeoff.adherence:9.3f}  {point.edits:7}  {point.rows_per_dimension:8.2f}  "
                f"{point.realized_oldest:15.3f}  {point.realized_newest:5.3f}  {point.drift:7.3g}  {weight:13.3g}  "
                f"{free:5.2f}{'  extrapolated' * point.extrapolated}"
            )
    lines.append(
        "realized: what the first and the last batch have of their target changes; drift: relative change of the "
        "outputs on held-out anchor text, else on the anchors; free: how much of the prior's freedom is left to new "
        "keys; all of the layer with the largest change"
    )
    proposal = forecast.proposal
    if proposal.adherence is not None and proposal.lam is not None:
        lam = ", ".join(f"{one:.4g}" for one in dict.fromkeys(proposal.lam))
        lines.append(
            f"proposal: --adherence {proposal.adherence:g} (mu {proposal.mu:.4g}, lam {lam}): {proposal.reason}"
        )
    else:
        lines.append(f"proposal: {proposal.reason}")
    return lines + [f"note: {note}" for note in forecast.notes]
