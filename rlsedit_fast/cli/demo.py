"""`rlsedit demo`: apply a stream of edits to the bundled demo model and measure the results."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from rlsedit_fast.cli.output import add_json, emit, is_quiet
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.cli.setup import at_least_one
from rlsedit_fast.errors import InputError

HELP = "apply a stream of edits to the bundled demo model and measure the results"
USAGE = "[options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--edits",
        type=at_least_one,
        metavar="N",
        default=1000,
        help="number of edits, each about a different person (default 1000)",
    )
    parser.add_argument("--batch-size", type=at_least_one, metavar="N", default=10, help="edits per batch (default 10)")
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="random seed for sampling people and facts (default 0)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="output folder for the edited model, the plot and the results (default demo-out)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; without --json the results go to OUT/demo.json."""
    from rlsedit_fast import doctor
    from rlsedit_fast.evaluation import demo

    check_places(options, folders=("out",))
    if find_spec("matplotlib") is None:
        raise InputError("the demo draws a plot and matplotlib is not installed; run `pip install matplotlib`")
    results = demo.run(
        edits=options.edits, batch_size=options.batch_size, seed=options.seed, out=options.out, show=not is_quiet()
    )
    plot, numbers = options.out / "retention.png", options.json or str(options.out / "demo.json")
    lines = [
        demo.table(results),
        "",
        f"edited model: {options.out / 'model'}",
        f"results: {numbers}",
        f"plot: {plot}",
    ]
    demo.plot(results, plot)
    emit({**doctor.context(), **results}, lines, numbers)
    return 0
