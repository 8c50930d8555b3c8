"""`python -m rlsedit_fast.world train` trains the demo model; `show` prints some people of the world."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from rlsedit_fast.world.facts import World
from rlsedit_fast.world.train import Recipe, train


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlsedit_fast.world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the demo model (about 40 minutes on two CPU cores)")
    training.add_argument(
        "--out", type=Path, required=True, help="output folder for weights, tokenizer and recipe.json"
    )
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        training.add_argument(flag, dest=field.name, type=type(field.default), default=field.default)
    show = commands.add_parser("show", help="print some people and their attributes")
    show.add_argument("--seed", type=int, default=Recipe.seed)
    show.add_argument("--people", type=int, default=5)
    options = vars(parser.parse_args(argv))
    if options.pop("command") == "train":
        train(out=options.pop("out"), recipe=Recipe(**options))
        return 0
    for person in World.generate(**options).people:
        print(person.name, *(f"{name}={value}" for name, value in person.facts.items()), sep="\t")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
