"""Compares time and figures of `rlsedit evaluate` between this version and an earlier one.

    python bench/evaluate_speed.py --before OLD --model MODEL --data counterfact.json --text text.txt --edits 100 \\
        --json bench/results/evaluate-speed-cpu.json

OLD is a folder from which the earlier version can be imported: a checkout with built native kernels. Both versions run
in separate processes with the same number of threads and the options given after `--`. `cpu` is the CPU time of all
threads of a process, which depends less on other load than wall-clock time. Figures of sampled texts (`fluency`,
`consistency`) come from different samples.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recording import add_json, record

COMMAND = "import sys; from rlsedit_fast.cli import main; sys.exit(main(sys.argv[1:]))"


def run(folder: Path, arguments: list[str], threads: int) -> dict[str, Any]:
    """Runs one evaluation with the version in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as out:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-c", COMMAND, "evaluate", *arguments, "--seeds", "0", "--out", out]
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        (file,) = Path(out).glob("*.json")
        result = json.loads(file.read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "seconds_editing": result["seconds_editing"],
        "seconds_by_phase": result.get("seconds_by_phase"),
        "rows": result["rows"],
    }


def largest_differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the largest difference of the figures that both results have, by metric and form, without zeros."""
    key = ("edits", "of", "metric", "form")
    known = {tuple(row[name] for name in key): row["value"] for row in one}
    differences: dict[str, float] = {}
    for row in other:
        if (at := tuple(row[name] for name in key)) in known:
            name = f"{row['metric']} {row['form']}"
            differences[name] = max(differences.get(name, 0.0), abs(row["value"] - known[at]))
    return {name: value for name, value in differences.items() if value}


def main() -> None:
    """Runs both versions and prints and records the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="OLD")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("rest", nargs="*", help="further options of `rlsedit evaluate` for both versions, after --")
    add_json(parser)
    options = parser.parse_args()
    arguments = ["--model", options.model, "--data", options.data, "--text", options.text]
    arguments += ["--edits", str(options.edits), *options.rest]
    folders = {"before": options.before.resolve(), "now": Path(__file__).resolve().parents[1]}
    found = {name: run(folder, arguments, options.threads) for name, folder in folders.items()}
    differences = largest_differences(found["before"].pop("rows"), found["now"].pop("rows"))
    faster = {name: found["before"][name] / found["now"][name] for name in ("seconds", "cpu")}
    for name, one in found.items():
        print(f"{name:8} {one['seconds']:8.0f} s, {one['cpu']:8.0f} s CPU time, {one['seconds_by_phase']}")
    print("faster by:", {name: round(value, 2) for name, value in faster.items()})
    print("largest differences:", differences)
    record(
        options.json,
        "rlsedit evaluate, this version against an earlier one",
        model=Path(options.model).name,
        edits=options.edits,
        threads=options.threads,
        options=options.rest,
        faster=faster,
        largest_differences=differences,
        **found,
    )


if __name__ == "__main__":
    main()
