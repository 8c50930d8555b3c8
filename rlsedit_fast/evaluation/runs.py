"""Many runs: in several processes if wished, each into a file of its own, those that are there already left alone."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rlsedit_fast.evaluation.cases import Case
from rlsedit_fast.evaluation.grounds import GroundSpec, make_cases, make_ground
from rlsedit_fast.evaluation.stream import Ground, Plan, Unedited, finished, run


@dataclass(frozen=True)
class Job:
    """A run and the file that it goes to."""

    spec: GroundSpec
    plan: Plan
    path: Path

    @property
    def done(self) -> bool:
        """Whether its file is there."""
        return finished(self.path, self.spec.name, self.plan, self.spec.made_of) is not None


def path_of(folder: Path, plan: Plan) -> Path:
    """Where a run's results go; the name has what most often differs between runs, and the file has the rest."""
    order = f"-o{plan.order}" if plan.order else ""
    name = f"{plan.label}-{plan.stream}-n{plan.edits}-b{plan.config.batch_size}-s{plan.seed}{order}.json"
    return folder / name.replace("/", "_").replace(" ", "_")


def make(
    jobs: Sequence[Job], *, processes: int = 1, say: Callable[[str], None] = print, show: bool = False
) -> list[dict[str, Any]]:
    """Makes the runs that have no file yet; the results of all, in the order of the jobs.

    One process uses all of PyTorch's threads, several divide them. An interrupt leaves the files of the runs that
    ended.

    Args:
        jobs: in any number.
        processes: at most.
        say: called with a line of progress.
        show: bars on stderr: of each phase of a run, or, with several processes, of the runs.
    """
    todo = [job for job in jobs if not job.done]
    say(f"{len(jobs) - len(todo)} of {len(jobs)} runs are there, {len(todo)} to make")
    processes = min(processes, len(todo))
    if processes < 2:
        for at, job in enumerate(todo, 1):
            say(_line(at, len(todo), job, _make_one(job, show=show)))
    else:
        threads = max(1, torch.get_num_threads() // processes)
        # Not forked: the threads of a process that has computed do not survive it.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=torch.set_num_threads, initargs=(threads,))
        with pool, _threads_each(threads), tqdm(total=len(todo), desc="runs", unit="run", disable=not show) as bar:
            under_way = {pool.submit(_make_one, job): job for job in todo}
            try:
                for at, future in enumerate(as_completed(under_way), 1):
                    say(_line(at, len(todo), under_way[future], future.result()))
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # those under way end, and no other begins
                raise
    return [run_of(job) for job in jobs]


def run_of(job: Job) -> dict[str, Any]:
    """The results of a job that is done."""
    found = finished(job.path, job.spec.name, job.plan, job.spec.made_of)
    assert found is not None
    return found


def value(result: dict[str, Any], metric: str, form: str, *, of: str = "all", edits: int | None = None) -> float | None:
    """One figure of a run, at the end of what was made or after some edits; None where it is not there."""
    found = row(result, metric, form, of=of, edits=edits)
    return None if found is None else float(found["value"])


def row(
    result: dict[str, Any], metric: str, form: str, *, of: str = "all", edits: int | None = None
) -> dict[str, Any] | None:
    """The row of a figure, see `value`."""
    at = result["made"] if edits is None else edits
    for found in reversed(result["rows"]):  # a stream that breaks off behind a look is looked at again in its place
        if (found["edits"], found["metric"], found["form"]) == (at, metric, form) and found["of"] == of:
            return dict(found)
    return None


def _line(at: int, of: int, job: Job, result: dict[str, Any]) -> str:
    plan = job.plan
    scores = [value(result, metric, "strict") for metric in ("efficacy", "generalization", "neighbors")]
    said = " ".join("-" if score is None else f"{score:.3f}" for score in scores)
    return f"[{at}/{of}] {plan.label} {plan.stream} seed {plan.seed}: {said} ({result['seconds_run']:.0f} s)"


def _print(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def _threads_each(threads: int) -> Iterator[None]:
    """For the processes that start within it: BLAS counts its threads when it is loaded, before the initializer."""
    name = "OPENBLAS_NUM_THREADS"  # of scipy's, which goes by no setting of torch's
    given = os.environ.get(name)
    os.environ[name] = str(threads)
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given


def _make_one(job: Job, *, show: bool = False) -> dict[str, Any]:
    cases, superseded = _cases(job.spec, job.plan.stream, job.plan.edits, job.plan.seed, job.plan.order)
    ground, unedited = _ground(job.spec)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    return run(ground, job.plan, cases, job.path, superseded=superseded, unedited=unedited, say=_print, show=show)


@lru_cache(maxsize=2)
def _ground(spec: GroundSpec) -> tuple[Ground, Unedited]:
    return make_ground(spec), Unedited()


@lru_cache(maxsize=4)
def _cases(spec: GroundSpec, kind: str, edits: int, seed: int, order: int) -> tuple[list[Case], list[Case]]:
    return make_cases(spec, kind, edits, seed, order)
