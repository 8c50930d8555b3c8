"""Executes runs, in one or several processes, and writes one result file per run. Existing results are reused."""

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

from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import Case
from rlsedit_fast.evaluation.grounds import GroundSpec, make_cases, make_ground
from rlsedit_fast.evaluation.plan import Plan, finished
from rlsedit_fast.evaluation.stream import Ground, UneditedResults, run


@dataclass(frozen=True)
class Job:
    """A run and its result file.

    Attributes:
        spec: specification of the model and data.
        plan: settings of the run.
        path: result file.

    Example:
        >>> from pathlib import Path
        >>> from rlsedit_fast.evaluation import CONFIG, GroundSpec, Job, Plan, result_path
        >>> plan = Plan(label="rls", stream="plain", edits=100, seed=1, config=CONFIG)
        >>> Job(GroundSpec(), plan, result_path(Path("missing"), plan)).done
        False
    """

    spec: GroundSpec
    plan: Plan
    path: Path

    @property
    def done(self) -> bool:
        """Whether the result file exists and has these settings."""
        return finished(self.path, self.spec.name, self.plan, self.spec.identity) is not None


def result_path(folder: Path, plan: Plan) -> Path:
    """Returns the path of a result file, whose name contains the settings that differ most often.

    Args:
        folder: folder of the results.
        plan: settings of the run.

    Example:
        >>> from pathlib import Path
        >>> from rlsedit_fast.evaluation import CONFIG, Plan, result_path
        >>> result_path(Path("runs"), Plan(label="rls", stream="plain", edits=50, seed=1, config=CONFIG)).name
        'rls-plain-n50-b100-s1.json'
    """
    order = f"-o{plan.order}" if plan.order else ""
    name = f"{plan.label}-{plan.stream}-n{plan.edits}-b{plan.config.batch_size}-s{plan.seed}{order}.json"
    return folder / name.replace("/", "_").replace(" ", "_")


def run_jobs(
    jobs: Sequence[Job], *, processes: int = 1, log: Callable[[str], None] = print, show: bool = False
) -> list[dict[str, Any]]:
    """Executes the runs that have no result file yet.

    One process uses all threads of PyTorch; several processes share them. Files of finished runs survive an interrupt.

    Args:
        jobs: the runs.
        processes: maximum number of processes.
        log: called with lines that describe the progress.
        show: whether to show progress bars on stderr, of the phases of each run or, with several processes, of the
            runs.

    Returns:
        The contents of all result files, in the order of the jobs.

    Example:
        >>> from rlsedit_fast.evaluation import run_jobs
        >>> run_jobs([])
        0 of 0 runs are complete, 0 to do
        []
    """
    todo = [job for job in jobs if not job.done]
    log(f"{len(jobs) - len(todo)} of {len(jobs)} runs are complete, {len(todo)} to do")
    processes = min(processes, len(todo))
    if processes < 2:
        for at, job in enumerate(todo, 1):
            log(_line(at, len(todo), job, _run_one(job, show=show, log=log)))
    else:
        threads = max(1, torch.get_num_threads() // processes)
        # Not fork: it does not copy the threads of a process that has used PyTorch.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=torch.set_num_threads, initargs=(threads,))
        with pool, _threads_each(threads), tqdm(total=len(todo), desc="runs", unit="run", disable=not show) as bar:
            running = {pool.submit(_run_one, job): job for job in todo}
            try:
                for at, future in enumerate(as_completed(running), 1):
                    log(_line(at, len(todo), running[future], future.result()))
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # running jobs finish, no other one starts
                raise
    return [load_result(job) for job in jobs]


def load_result(job: Job) -> dict[str, Any]:
    """Reads the result file of a finished run.

    Args:
        job: the run.

    Returns:
        The contents of the file, see `rlsedit_fast.evaluation.stream.run`.

    Raises:
        InputError: the file does not exist or has other settings.

    Example:
        >>> from pathlib import Path
        >>> from rlsedit_fast.errors import InputError
        >>> from rlsedit_fast.evaluation import CONFIG, GroundSpec, Job, Plan, load_result
        >>> plan = Plan(label="rls", stream="plain", edits=100, seed=1, config=CONFIG)
        >>> try:
        ...     load_result(Job(GroundSpec(), plan, Path("missing.json")))
        ... except InputError as error:
        ...     print(error)
        missing.json does not contain the results of run 'rls' with these settings; execute the run first
    """
    found = finished(job.path, job.spec.name, job.plan, job.spec.identity)
    if found is None:
        raise InputError(
            f"{job.path} does not contain the results of run {job.plan.label!r} with these settings; execute the run "
            "first"
        )
    return found


def value(result: dict[str, Any], metric: str, form: str, *, of: str = "all", edits: int | None = None) -> float | None:
    """Returns one figure of a run.

    Args:
        result: contents of a result file.
        metric: name of the metric.
        form: form of the metric.
        of: edits, text, task or layer that the figure refers to, as in the rows of result files.
        edits: number of edits after which it was measured; None for the end of the stream.

    Returns:
        The value, or None if the run does not have it.

    Example:
        >>> from rlsedit_fast.evaluation import value
        >>> row = {"edits": 10, "of": "all", "metric": "efficacy", "form": "strict", "value": 0.9, "n": 10}
        >>> value({"made": 10, "rows": [row]}, "efficacy", "strict")
        0.9
    """
    found = row(result, metric, form, of=of, edits=edits)
    return None if found is None else float(found["value"])


def row(
    result: dict[str, Any], metric: str, form: str, *, of: str = "all", edits: int | None = None
) -> dict[str, Any] | None:
    """Returns the row of a figure, or None; see `value` for the arguments."""
    at = result["made"] if edits is None else edits
    for found in reversed(result["rows"]):  # a stream that fails directly after a checkpoint is evaluated twice there
        if (found["edits"], found["metric"], found["form"]) == (at, metric, form) and found["of"] == of:
            return dict(found)
    return None


def _line(at: int, of: int, job: Job, result: dict[str, Any]) -> str:
    plan = job.plan
    scores = {metric: value(result, metric, "strict") for metric in ("efficacy", "generalization", "neighbors")}
    shown = ", ".join(f"{metric} {'-' if score is None else f'{score:.3f}'}" for metric, score in scores.items())
    return f"[{at}/{of}] {plan.label} {plan.stream} seed {plan.seed}: {shown} ({result['seconds_run']:.0f} s)"


def _print(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def _threads_each(threads: int) -> Iterator[None]:
    """Sets the number of BLAS threads of processes that start in the context.

    BLAS reads it when it is loaded, before the initializer of a process runs.
    """
    name = "OPENBLAS_NUM_THREADS"  # read by SciPy's BLAS, which ignores the setting of PyTorch
    given = os.environ.get(name)
    os.environ[name] = str(threads)
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given


def _run_one(job: Job, *, show: bool = False, log: Callable[[str], None] | None = None) -> dict[str, Any]:
    cases, superseded = _cases(job.spec, job.plan.stream, job.plan.edits, job.plan.seed, job.plan.order)
    ground, unedited = _ground(job.spec)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    return run(
        ground, job.plan, cases, job.path, superseded=superseded, unedited=unedited, log=log or _print, show=show
    )


@lru_cache(maxsize=2)
def _ground(spec: GroundSpec) -> tuple[Ground, UneditedResults]:
    return make_ground(spec), UneditedResults()


@lru_cache(maxsize=4)
def _cases(spec: GroundSpec, kind: str, edits: int, seed: int, order: int) -> tuple[list[Case], list[Case]]:
    return make_cases(spec, kind, edits, seed, order)
