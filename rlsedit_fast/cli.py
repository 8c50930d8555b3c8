"""The command line: `rlsedit demo`, `rlsedit doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rlsedit_fast.errors import RLSEditError


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 when it did what was asked, 2 when it could not (the reason is on stderr)."""
    parser = argparse.ArgumentParser(prog="rlsedit", description="Edit facts in language models and keep the rest.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="edit the shipped model with a stream of facts and measure what happened")
    demo.add_argument("--edits", type=int, default=1000, help="facts to change, each of another person (default 1000)")
    demo.add_argument("--batch-size", type=int, default=10, help="edits written at once (default 10)")
    demo.add_argument("--seed", type=int, default=0, help="of the choice of people and facts (default 0)")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for model and plot (default demo-out)")
    demo.add_argument("--json", type=Path, help="file for the results (default OUT/demo.json)")
    check = commands.add_parser("doctor", help="versions, backends, and why one is missing")
    check.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON, to a file or to stdout")
    options = parser.parse_args(argv)
    try:
        if options.command == "demo":
            return _demo(options)
        from rlsedit_fast import doctor

        return doctor.main([] if options.json is None else ["--json", options.json])
    except RLSEditError as error:
        print(f"rlsedit {options.command}: {error}", file=sys.stderr)
        return 2


def _demo(options: argparse.Namespace) -> int:
    from rlsedit_fast import doctor
    from rlsedit_fast.evaluation import demo

    results = demo.run(edits=options.edits, batch_size=options.batch_size, seed=options.seed, out=options.out)
    print(demo.table(results))
    picture, numbers = options.out / "retention.png", options.json or options.out / "demo.json"
    _write_json({**doctor.context(), **results}, numbers)
    demo.plot(results, picture)
    print(f"\nedited model: {options.out / 'model'}\nresults: {numbers}\nplot: {picture}")
    return 0


def _write_json(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
