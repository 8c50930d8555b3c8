"""Compares time and figures of `rlsedit evaluate` between this version and an earlier one.

    python bench/evaluate_speed.py --before OLD --model MODEL --data counterfact.json --text text.txt --edits 100 \\
        --threads 1 --keep measured --json bench/results/real/evaluate-speed-smollm2.json

OLD is a folder from which the earlier version can be imported: a checkout with built native kernels. Both versions run
in separate processes with the same number of threads and the options given after `--`. `cpu` is the CPU time of all
threads of a process, which depends less on other load than wall-clock time. `--keep` writes each measurement into a
folder when it ends, and does not repeat existing ones. Figures of sampled texts (`fluency`, `consistency`) come
from different samples, and figures after the edits differ if the versions write edits differently.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from recording import add_json, record

# Without the current folder, which may contain a version too.
COMMAND = (
    "import sys; del sys.path[0]; import evaluate_speed; sys.exit(evaluate_speed.timed(sys.argv[1], sys.argv[2:]))"
)

PARTS = {
    "editing": ("editing:Editor.edit",),
    "key statistics": ("editing:Editor.anchor", "editing:Editor.statistics"),
    "scores": ("evaluation.metrics:score",),
    "free answers": ("evaluation.stream:free_accuracy", "evaluation.stream:free_multihop"),
    "text": ("evaluation.stream:TextProbe.__init__", "evaluation.stream:TextProbe.__call__"),
    "fluency": ("evaluation.stream:fluency",),
    "tasks": ("evaluation.stream:answer",),
}
"""Functions of both versions, by module and name, whose CPU time is added up; the rest is `other`."""


def timed(out: str, arguments: list[str]) -> int:
    """Runs `rlsedit evaluate` in this process and writes the CPU seconds of each part into the file `out`."""
    from rlsedit_fast.cli import main as command

    seconds: dict[str, float] = defaultdict(float)
    parts, since = ["other"], [time.process_time()]

    def switch() -> None:
        now = time.process_time()
        seconds[parts[-1]] += now - since[0]
        since[0] = now

    def within(part: str, function: Any) -> Any:
        @functools.wraps(function)
        def run_timed(*given: Any, **options: Any) -> Any:
            switch()
            parts.append(part)
            try:
                return function(*given, **options)
            finally:
                switch()
                parts.pop()

        return run_timed

    for part, places in PARTS.items():
        for place in places:
            module, names = place.split(":")
            *path, name = names.split(".")
            of: Any = importlib.import_module(f"rlsedit_fast.{module}")
            for step in path:
                of = getattr(of, step)
            setattr(of, name, within(part, getattr(of, name)))
    status: int = command(["evaluate", *arguments])
    switch()
    Path(out).write_text(json.dumps(seconds), encoding="utf-8")
    return status


def measured(keep: Path | None, name: str, folder: Path, arguments: list[str], threads: int) -> dict[str, Any]:
    """Measures one version, or returns the measurement that the folder `keep` has."""
    path = None if keep is None else keep / f"{name}.json"
    about = {"arguments": arguments, "threads": threads}
    if path is not None and path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["about"] != about:
            raise SystemExit(f"{path} is of other options: {kept['about']}")
        return kept["found"]
    found = run(folder, arguments, threads)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": about, "found": found}), encoding="utf-8")
    return found


def run(folder: Path, arguments: list[str], threads: int) -> dict[str, Any]:
    """Runs one evaluation with the version in `folder`."""
    path = os.pathsep.join((str(folder), str(Path(__file__).resolve().parent)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as out:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        parts = Path(out, "parts")
        command = [sys.executable, "-c", COMMAND, str(parts), *arguments, "--seeds", "0", "--out", f"{out}/runs"]
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        (file,) = Path(out, "runs").glob("*.json")
        by_part = json.loads(parts.read_text(encoding="utf-8"))
        result = json.loads(file.read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "cpu_by_part": by_part,
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
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder of the measurements; existing ones are used")
    parser.add_argument("rest", nargs="*", help="further options of `rlsedit evaluate` for both versions, after --")
    add_json(parser)
    options = parser.parse_args()
    arguments = ["--model", options.model, "--data", options.data, "--text", options.text]
    arguments += ["--edits", str(options.edits), *options.rest]
    folders = {"before": options.before.resolve(), "now": Path(__file__).resolve().parents[1]}
    found = {name: measured(options.keep, name, folder, arguments, options.threads) for name, folder in folders.items()}
    differences = largest_differences(found["before"].pop("rows"), found["now"].pop("rows"))
    for one in found.values():
        one["cpu_without_editing"] = one["cpu"] - one["cpu_by_part"]["editing"]
    faster = {name: found["before"][name] / found["now"][name] for name in ("cpu", "cpu_without_editing")}
    for name, one in found.items():
        print(f"{name:8} {one['seconds']:8.0f} s, {one['cpu']:8.0f} s CPU time, {one['cpu_by_part']}")
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
