"""Compares speed and quality of the demo stream between this version and earlier ones, alternating.

    python bench/demo_rate.py --before OLD [OLD ...] --json bench/results/demo-rate.json

OLD is a folder from which an earlier version can be imported: a checkout with built native kernels, or the target of
`pip install --no-deps --target OLD SOURCE`. Every version runs in its own process with its own demo settings, 100 edits
per call. Rates are medians over the rounds, quality is that of the last round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from recording import add_json, record

ONE = """
import json, sys, time
from dataclasses import replace
from rlsedit_fast import Editor
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.evaluation.metrics import evaluate, score_before
from rlsedit_fast.world import World, load_demo_model

count, seed = int(sys.argv[1]), int(sys.argv[2])
world = World.generate()
cases = world_cases(world, count, seed)
model, tokenizer = load_demo_model()
before = score_before(model, tokenizer, cases)
# Earlier versions have a dataclass of settings.
config = CONFIG.replace(batch_size=10) if hasattr(CONFIG, "replace") else replace(CONFIG, batch_size=10)
editor = Editor(model, tokenizer, config=config)
editor.anchor(anchor_texts(world, seed))
edits = [case.edit for case in cases]
records, began = [], time.perf_counter()
for at in range(0, count, 100):
    records += editor.edit(edits[at : at + 100])
seconds = time.perf_counter() - began
report = evaluate(model, tokenizer, cases, before)


def of_search(record, name):  # earlier versions name these fields without "search_"
    now = f"search_{name}"
    return getattr(record, now if hasattr(record, now) else name)


print(json.dumps({
    "edits_per_second": count / seconds,
    "mean_steps": sum(of_search(record, "steps") for record in records) / count,
    "not_converged": sum(not of_search(record, "converged") for record in records),
    "efficacy": report.efficacy.strict,
    "generalization": report.generalization.strict,
    "neighbors": report.neighbors.strict,
    "namesakes": report.namesakes.strict,
    "same_subject": report.same_subject.strict,
    "drift": editor.deviation()[0].weight,
}))
"""


def run(folder: Path, edits: int, seed: int) -> dict[str, Any]:
    """Runs one stream with the version in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", ONE, str(edits), str(seed)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, nargs="*", default=[], metavar="OLD")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    options = parser.parse_args()
    versions = {"now": Path(__file__).resolve().parent.parent} | {old.name: old.resolve() for old in options.before}
    rates: dict[str, list[float]] = {name: [] for name in versions}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name, folder in versions.items():
            found[name] = run(folder, options.edits, options.seed)
            rates[name].append(found[name]["edits_per_second"])
            print(name, {key: round(value, 4) for key, value in found[name].items()}, flush=True)
    rows = [
        {
            "version": name,
            **found[name],
            "edits_per_second": statistics.median(rates[name]),
            "all_rates": rates[name],
            "ratio": statistics.median(n / o for n, o in zip(rates["now"], rates[name], strict=True)),
        }
        for name in versions
    ]
    about = {"edits": options.edits, "seed": options.seed, "rounds": options.rounds}
    record(options.json, "the demo's stream on several versions", **about, rows=rows)


if __name__ == "__main__":
    main()
