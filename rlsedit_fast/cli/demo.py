"""`rlsedit demo`: edit the shipped model with a stream of facts and measure what happened."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from rlsedit_fast.cli.output import add_json, emit
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.errors import InputError

HELP = "edit the shipped model with a stream of facts and measure what happened"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "--edits", type=int, default=1000, help="facts to change, each of another person (default 1000)"
    )
    parser.add_argument("--batch-size", type=int, default=10, help="edits written at once (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of people and facts (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for model and plot (default demo-out)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it; without --json the results go to OUT/demo.json."""
    from rlsedit_fast import doctor
    from rlsedit_fast.evaluation import demo

    check_places(options, folders=("out",))
    if find_spec("matplotlib") is None:
        raise InputError("the plot needs matplotlib; pip install matplotlib")
    results = demo.run(edits=options.edits, batch_size=options.batch_size, seed=options.seed, out=options.out)
    picture, numbers = options.out / "retention.png", options.json or str(options.out / "demo.json")
    lines = [
        demo.table(results),
        "",
        f"edited model: {options.out / 'model'}",
        f"results: {numbers}",
        f"plot: {picture}",
    ]
    demo.plot(results, picture)
    emit({**doctor.context(), **results}, lines, numbers)
    return 0
