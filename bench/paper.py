"""Compares all editing rules on streams of edits with the same keys, values, master weights and prior, over seeds.

    python bench/paper.py demo --jobs 2                 # the demo model: all experiments, then the report
    python bench/paper.py model --model DIR --data counterfact.json --text text.txt --edits 1000

Every run has its own result file under --out and is skipped if the file exists, so that the comparison can be resumed.
`demo` first tunes every rule on seed 0 with the grids below, by the harmonic mean of strict efficacy,
generalization and specificity; the reported seeds are different. The recursive rule is not tuned and uses the adherence
of the demo. `bench/report.py` writes the report.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from report import write
from report_data import selected, tabulate

from rlsedit_fast.editing import EditConfig, Editor
from rlsedit_fast.evaluation.demo import CONFIG
from rlsedit_fast.evaluation.grounds import DEMO, GroundSpec, make_cases, make_ground
from rlsedit_fast.evaluation.plan import Plan
from rlsedit_fast.evaluation.runs import Job, load_result, result_path, run_jobs
from rlsedit_fast.statistics.sources import GivenTexts

HERE = Path(__file__).resolve().parent
TUNING_SEED = 0
TUNING_EDITS = 500
SEEDS = (1, 2, 3)
JUDGED = 300
BRIEF: dict[str, Any] = {"checkpoints": (), "judged": 200}
"""Settings of runs that are evaluated only at the end."""
ALONG: dict[str, Any] = {"checkpoints": (0.5, 1.0), "judged": JUDGED}
"""Settings of runs that are reported by age of the edits and along the stream."""

BASE = CONFIG.replace(batch_size=10)
"""Demo settings; `same_subject="joint"`, only supported by the recursive rule, has no effect on different subjects."""


@dataclass(frozen=True)
class Contender:
    """A rule with its settings and label."""

    label: str
    changes: Mapping[str, Any]
    protected: float = 0.0

    def config(self, base: EditConfig) -> EditConfig:
        return _under(base, self.changes)


def _under(base: EditConfig, changes: Mapping[str, Any]) -> EditConfig:
    """Applies the changes to the base settings, with the recursive rule unless the changes contain another rule."""
    rest = {name: value for name, value in changes.items() if name != "rule"}
    return base.for_rule(changes.get("rule", base.rule), **rest)


def _grid(
    rule: str, *axes: Mapping[str, Sequence[Any]], options: Mapping[str, Sequence[Any]] | None = None
) -> list[dict]:
    """Returns all combinations of the given settings of the editor and of the rule."""
    made = []
    fields = {name: values for axis in axes for name, values in axis.items()}
    for chosen in itertools.product(*fields.values()):
        for picked in itertools.product(*(options or {}).values()):
            settings = dict(zip(fields, chosen, strict=True))
            made.append({"rule": rule, **settings, "rule_options": dict(zip(options or {}, picked, strict=True))})
    return made


MOMENT: dict[str, Sequence[Any]] = {"prior": [{"lam": 0.0, "adherence": a} for a in (0.95, 0.975, 0.99)]}
"""Grid of rules with a moment weight; contains the adherence of the recursive rule and the default of `EditConfig`."""

GRIDS: dict[str, list[dict]] = {
    "ft": _grid("ft", options={"steps": (25, 1000)}),
    "ft-bounded": _grid("ft-bounded", options={"bound": (1e-3, 5e-3, 2e-2, 1e-1), "steps": (25,)}),
    "rome": _grid("rome"),
    "memit": _grid("memit", MOMENT),
    "memit-history": _grid("memit-history", MOMENT),
    "prune": _grid("prune", MOMENT, options={"base": (1.2,)}),
    "rect": _grid("rect", MOMENT, options={"share": (0.4, 0.8)}),
    "emmet": _grid("emmet", options={"damping": (0.0, 0.01, 0.1)}),
    "alphaedit": _grid("alphaedit", options={"null_share": (0.8, 0.95, 0.99), "ridge": (1.0, 10.0)}),
    "nse": _grid("nse", MOMENT, options={"activation": (0.8, 0.95)}),
    "ultraedit": _grid("ultraedit", options={"rate": (5e-4, 1e-3, 2e-3, 4e-3)}),
}
"""Tuning grids. `adherence` calibrates the moment weight mu^2 on the scale of the rule (the published value of 15,000
depends on the keys of the model); lam is 0 as published. For rules without a moment weight, `ridge` is the multiple of
the identity that is added to the moment. The report marks selected settings at the end of their range."""


def tuning(
    out: Path, grids: Mapping[str, list[dict]], edits: int, spec: GroundSpec | None = None, base: EditConfig = BASE
) -> dict[str, list[Job]]:
    """Returns the runs of every grid, on a seed that is not reported."""
    jobs: dict[str, list[Job]] = {}
    for rule, grid in grids.items():
        for at, changes in enumerate(grid if len(grid) > 1 else []):
            plan = Plan(
                label=f"{rule}_{at}",
                stream="plain",
                edits=edits,
                seed=TUNING_SEED,
                config=_under(base, changes),
                **BRIEF,
            )
            jobs.setdefault(rule, []).append(Job(spec or GroundSpec(), plan, result_path(out / "tuning", plan)))
    return jobs


def tuned(grids: Mapping[str, list[dict]], jobs: Mapping[str, Sequence[Job]]) -> dict[str, Contender]:
    """Returns every rule with the settings that its tuning runs select, see `report_data.selected`."""
    best = {rule: Contender(rule, grid[0]) for rule, grid in grids.items()}
    for rule, tried in jobs.items():
        at = selected(tabulate(load_result(job) for job in tried).runs)
        best[rule] = Contender(rule, grids[rule][at])
        print(f"{rule}: {best[rule].changes}")
    return best


RECURSIVE = (
    Contender("rls", {}),
    Contender("rls norm-anchored", {"norm_anchor": True}),
    Contender("rls ageing", {"halve_after": 100}),
)
CLOSEST = ("rls", "memit-history", "memit", "alphaedit")


def protecting(best: Mapping[str, Contender]) -> list[Contender]:
    """Returns the recursive rule and the best other rule with a key history, with protected prompts of other cases."""
    remembering = [RECURSIVE[0], *(best[rule] for rule in ("memit-history",) if rule in best)]
    return [replace(one, label=f"{one.label} protecting", protected=0.01) for one in remembering]


def side_by_side(out: Path, best: Mapping[str, Contender], edits: int, seeds: Sequence[int]) -> Iterator[Job]:
    """Yields runs of all contenders with batches of 10, and of two contenders with batches of 1 and 100."""
    for seed, contender in itertools.product(seeds, (*RECURSIVE, *best.values(), *protecting(best))):
        yield _job(out / "rules", contender, edits, seed, **ALONG)
    for size, seed in itertools.product((1, 100), seeds[:1]):
        for contender in (RECURSIVE[0], best["memit"]):
            yield _job(out / "batches", contender, edits // 2, seed, batch_size=size, **BRIEF)


FACTORS = {"plain": (0.01, 0.1, 1.0, 10.0, 100.0), "conflicting": (0.1, 1.0, 10.0), "related": (0.1, 1.0, 10.0)}
"""Factors on the calibrated mu and lam by stream: four decades, or two for streams that take longer."""


def sweep(out: Path, prior: Mapping[str, float], edits: int, seed: int) -> Iterator[Job]:
    """Yields runs that vary mu or lam around the calibrated values, one at a time."""
    for kind, factors in FACTORS.items():
        for of_mu, of_lam in itertools.product(factors, factors):
            if 1.0 in (of_mu, of_lam):
                chosen = {"prior": {"mu": prior["mu"] * of_mu, "lam": prior["lam"] * of_lam}}
                contender = Contender(f"rls mu x{of_mu:g} lam x{of_lam:g}", chosen)
                yield _job(out / "sweep", contender, edits, seed, kind=kind, **BRIEF)


def orders(out: Path, best: Mapping[str, Contender], edits: int, seed: int, count: int = 5) -> Iterator[Job]:
    """Yields runs of the same cases in five orders."""
    for order, contender in itertools.product(range(count), (RECURSIVE[0], best["memit"])):
        yield _job(out / "orders", contender, edits, seed, order=order, **BRIEF)


def hard(out: Path, best: Mapping[str, Contender], edits: int, seed: int) -> Iterator[Job]:
    """Yields runs on edits that contradict earlier ones, and on all facts of a few subjects with very similar keys.

    Only the recursive rule can undo and therefore replace an edit, and share one value between the facts of a subject
    (`same_subject="joint"`); `separate` is what every other rule does.
    """
    separate = {"same_subject": "separate"}
    chosen = [
        RECURSIVE[0],
        Contender("rls separate", separate),
        Contender("rls separate ageing", separate | {"halve_after": 50}),
        *(best[rule] for rule in ("memit", "memit-history", "alphaedit")),
    ]
    for kind, contender in itertools.product(("conflicting", "related"), chosen):
        yield _job(out / "hard", contender, edits, seed, kind=kind, **BRIEF)


def _job(
    folder: Path,
    contender: Contender,
    edits: int,
    seed: int,
    *,
    kind: str = "plain",
    order: int = 0,
    batch_size: int = 10,
    spec: GroundSpec | None = None,
    base: EditConfig = BASE,
    **more: Any,
) -> Job:
    plan = Plan(
        label=contender.label,
        stream=kind,
        edits=edits,
        seed=seed,
        order=order,
        config=contender.config(base).replace(batch_size=batch_size),
        protected=contender.protected,
        **more,
    )
    return Job(spec or GroundSpec(), plan, result_path(folder, plan))


def demo(options: argparse.Namespace) -> None:
    out, edits, seeds = options.out or HERE / "results" / "paper" / DEMO, options.edits, options.seeds
    tried = tuning(out, GRIDS, TUNING_EDITS)
    run_jobs([job for jobs in tried.values() for job in jobs], processes=options.jobs)
    best = tuned(GRIDS, tried)
    main = list(side_by_side(out, best, edits, seeds))
    # The most important runs first, so that a partial report can be written at any time.
    run_jobs([job for job in main if job.plan.label in CLOSEST and job.plan.edits == edits], processes=options.jobs)
    run_jobs([job for job in main if job.plan.seed == seeds[0]], processes=options.jobs)
    ours = next(load_result(job) for job in main if (job.plan.label, job.plan.seed) == (CLOSEST[0], seeds[0]))
    run_jobs(list(hard(out, best, edits // 2, seeds[0])), processes=options.jobs)
    run_jobs(list(sweep(out, ours["priors"][0], edits // 2, seeds[0])), processes=options.jobs)
    run_jobs(main, processes=options.jobs)
    run_jobs(list(orders(out, best, edits // 2, seeds[0])), processes=options.jobs)
    print(*write(out))


def model(options: argparse.Namespace) -> None:
    spec = GroundSpec(
        model=options.model,
        data=options.data,
        text=options.text,
        statistics=options.statistics,
        references=options.references,
        tasks=options.tasks,
        device=options.device,
        dtype=options.dtype,
        among=options.among,
    )
    base = EditConfig(
        layers=options.layers and tuple(options.layers), batch_size=options.batch_size, search={"ahead": 100}
    )
    if options.clamp is not None:
        base = base.replace(search={"clamp": options.clamp})
    out = options.out or HERE / "results" / "paper" / spec.name
    if spec.statistics is None:
        spec = _with_statistics(spec, base, out)
    grids = {rule: grid for rule, grid in GRIDS.items() if options.rules is None or rule in options.rules}
    tried = tuning(out, grids, options.tuning_edits, spec, base)
    run_jobs([job for jobs in tried.values() for job in jobs], processes=options.jobs)
    best = tuned(grids, tried)
    contenders = [RECURSIVE[0], *best.values()]
    if any(case.held_out for case in make_cases(spec, "plain", options.edits, options.seeds[0])[0]):
        contenders += protecting(best)
    else:
        print("the data have no unused prompts, so none are protected")
    jobs = [
        _job(out / "rules", one, options.edits, seed, spec=spec, base=base, batch_size=options.batch_size, **ALONG)
        for seed in options.seeds
        for one in contenders
    ]
    # The most important runs first, so that a partial report can be written at any time.
    run_jobs([job for job in jobs if job.plan.label in CLOSEST], processes=options.jobs)
    run_jobs(jobs, processes=options.jobs)
    print(*write(out))


def _with_statistics(spec: GroundSpec, base: EditConfig, out: Path) -> GroundSpec:
    """Stores the key statistics of the anchors in a file, so that they are collected only once.

    Raises:
        SystemExit: the file contains statistics of another text.
    """
    path, source = out / "statistics.safetensors", out / "statistics-of.txt"
    text = str(spec.identity["text"])
    if path.exists() and source.exists() and source.read_text(encoding="utf-8").strip() != text:
        raise SystemExit(
            f"{path} was collected on {source.read_text(encoding='utf-8').strip()}, not {text}; choose another --out"
        )
    if not path.exists():
        print("collecting key statistics", flush=True)
        ground = make_ground(spec)
        model, tokenizer = ground.load()
        found = Editor(model, tokenizer, config=base).statistics(GivenTexts(ground.anchors(0)))
        out.mkdir(parents=True, exist_ok=True)
        found.save(path)
        source.write_text(f"{text}\n", encoding="utf-8")
    return replace(spec, statistics=str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    on_demo = commands.add_parser("demo", help="all experiments on the demo model")
    on_model = commands.add_parser("model", help="compare the rules on another model")
    for one in (on_demo, on_model):
        one.add_argument("--out", type=Path, help="output folder (default bench/results/paper/NAME)")
        one.add_argument("--edits", type=int, default=1000)
        one.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
        one.add_argument("--jobs", type=int, default=1, help="number of parallel processes, each with one thread")
    on_model.add_argument("--model", required=True)
    on_model.add_argument("--data", required=True, help="CounterFact, zsRE or MQuAKE file")
    on_model.add_argument("--text", required=True, help="text file")
    on_model.add_argument(
        "--statistics", help="key statistics written by `rlsedit statistics`, instead of those of --text"
    )
    on_model.add_argument(
        "--references", help="reference texts about subjects (ROME's attribute_snippets.json), for consistency"
    )
    on_model.add_argument("--tasks", help="folder of GLUE and MMLU tasks as NAME.jsonl")
    on_model.add_argument(
        "--rules", nargs="+", choices=sorted(GRIDS), metavar="RULE", help="rules to compare with rls (default: all)"
    )
    on_model.add_argument("--layers", type=int, nargs="+")
    on_model.add_argument("--batch-size", type=int, default=100)
    on_model.add_argument("--clamp", type=float, help="clamp of EditConfig")
    on_model.add_argument("--tuning-edits", type=int, help="edits per tuning run (default: 3 batches)")
    on_model.add_argument("--device", default="cpu")
    on_model.add_argument("--dtype", default="float32")
    on_model.add_argument("--among", type=int, help="use the first N records of --data")
    options = parser.parse_args()
    if options.command == "model":
        options.tuning_edits = options.tuning_edits or 3 * options.batch_size
        if options.tuning_edits < 2 * options.batch_size:
            parser.error(
                f"--tuning-edits {options.tuning_edits}: expected at least 2 batches of {options.batch_size}, since "
                "rules that use earlier edits differ only from the second batch on"
            )
    torch.set_num_threads(1 if options.jobs > 1 else torch.get_num_threads())
    (demo if options.command == "demo" else model)(options)


if __name__ == "__main__":
    main()
