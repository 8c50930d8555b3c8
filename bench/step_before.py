"""Compares the time of a step, `RLSState.update`, in one process between this version and an earlier one.

    python bench/step_before.py --before OLD --json bench/results/step-before.json

OLD is a folder from which the earlier version can be imported: a checkout with built native kernels. Each version
runs in its own process, with the same number of threads. The processes work in turns: in each round, both perform the
same steps while the other one waits, and every second round begins with the other version. The ratios are those of
the medians over the rounds, of wall-clock and of CPU time; `spread` has the quartiles of the ratio within a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from recording import add_json, record

WORKER = """
import json, sys, time
import torch
import rlsedit_fast as rf

torch.set_num_threads(int(sys.argv[1]))
print(rf.__file__, flush=True)
for line in sys.stdin:
    d, n, steps, fresh = json.loads(line)
    if fresh:
        torch.manual_seed(0)
        keys, values = torch.randn(4, n, d) / d**0.5, torch.randn(4, n, d // 4)
        state = rf.RLSState(torch.zeros(d // 4, d), rf.Prior(lam=1.0), delay=256)
    began, used = time.perf_counter(), time.process_time()
    for at in range(steps):
        state.update(keys[at % 4], values[at % 4])
    print(json.dumps([(time.perf_counter() - began) / steps, (time.process_time() - used) / steps]), flush=True)
"""


def start(folder: Path, threads: int) -> subprocess.Popen[str]:
    """Starts a process with the version in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads), "RLSEDIT_TUNE": "0"}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(threads)],
        env=environment,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout
    place = worker.stdout.readline().strip()
    if not Path(place).is_relative_to(folder):
        raise SystemExit(
            f"{folder} is not imported, but {place or 'nothing'}; pass a folder that contains rlsedit_fast"
        )
    return worker


def ask(worker: subprocess.Popen[str], *what: object) -> list[float]:
    """Returns wall-clock and CPU seconds per step."""
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write(json.dumps(what) + "\n")
    worker.stdin.flush()
    found: list[float] = json.loads(worker.stdout.readline())
    return found


def measure(workers: list[subprocess.Popen[str]], d: int, n: int, rounds: int) -> dict[str, Any]:
    """Returns a row of the result for workers of the earlier version and of this one."""
    steps = max(1, 256 // n)  # with a flush
    for worker in workers:
        ask(worker, d, n, steps, True)
    times: list[list[list[float]]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(ask(workers[which], d, n, steps, False))
    row: dict[str, Any] = {"d": d, "n": n, "steps": steps}
    for at, kind in enumerate(("wall", "cpu")):
        before, now = ([each[at] for each in of] for of in times)
        first, _, third = statistics.quantiles([b / a for a, b in zip(before, now, strict=True)], n=4)
        row[kind] = {
            "before_s": statistics.median(before),
            "now_s": statistics.median(now),
            "ratio": statistics.median(now) / statistics.median(before),
            "spread": [first, third],
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="OLD", help="folder of the earlier version")
    parser.add_argument("--name", default="", help="name of the earlier version in the result, such as a commit")
    parser.add_argument("--d", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--n", type=int, nargs="+", default=[1, 16, 100])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    add_json(parser)
    options = parser.parse_args()
    workers = [start(folder.resolve(), options.threads) for folder in (options.before, Path(__file__).parents[1])]
    about = {"before": options.name or str(options.before), "rounds": options.rounds, "threads": options.threads}
    rows = []
    for d, n in itertools.product(options.d, options.n):
        rows.append(measure(workers, d, n, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
        record(options.json, "a step in one process, this version against an earlier one", **about, rows=rows)
    for worker in workers:
        worker.communicate()


if __name__ == "__main__":
    main()
