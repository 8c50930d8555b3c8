"""The comparison: every rule on the same keys, values, masters and prior, over streams of edits, with error bars.

    python bench/paper.py demo --jobs 2                 # the shipped model: all experiments, then the report
    python bench/paper.py model --model DIR --data counterfact.json --text text.txt --edits 1000

Every run has a file of its own under --out, and one that is there is not made again: interrupt it and go on as you
like. `demo` first tunes every rule on seed 0, on a grid that is written below, by the harmonic mean of strict efficacy,
generalization and specificity; the seeds that are reported are others. The recursive rule is not tuned: it runs at the
demo's adherence. `bench/report.py` makes the report of the files.
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
from report_runs import taken

from rlsedit_fast.editing import EditConfig, Editor
from rlsedit_fast.editing.sources import GivenTexts
from rlsedit_fast.evaluation.demo import CONFIG
from rlsedit_fast.evaluation.grounds import DEMO, GroundSpec, make_cases, make_ground
from rlsedit_fast.evaluation.runs import Job, make, path_of, run_of
from rlsedit_fast.evaluation.stream import Plan

HERE = Path(__file__).resolve().parent
TUNING_SEED = 0
TUNING_EDITS = 500
SEEDS = (1, 2, 3)
JUDGED = 300
BRIEF: dict[str, Any] = {"checkpoints": (), "judged": 200}
"""Of runs of which only the end is looked at."""
ALONG: dict[str, Any] = {"checkpoints": (0.5, 1.0), "judged": JUDGED}
"""Of runs that are reported by age and along the stream."""

BASE = replace(CONFIG, batch_size=10)
"""The demo's settings; `same_subject="joint"`, which only the recursive rule has, is idle on different subjects."""


@dataclass(frozen=True)
class Contender:
    """A rule with settings, and what tells how they were set."""

    label: str
    changes: Mapping[str, Any]
    forgetting: float = 1.0
    protected: float = 0.0

    def config(self, base: EditConfig) -> EditConfig:
        return _under(base, self.changes)


def _under(base: EditConfig, changes: Mapping[str, Any]) -> EditConfig:
    """The base under the rule of the changes, the recursive one where they name none."""
    rest = {name: value for name, value in changes.items() if name != "rule"}
    return base.under(changes.get("rule", base.rule), **rest)


def _grid(
    rule: str, *axes: Mapping[str, Sequence[Any]], options: Mapping[str, Sequence[Any]] | None = None
) -> list[dict]:
    """All combinations of some settings of the editor and of the rule."""
    made = []
    fields = {name: values for axis in axes for name, values in axis.items()}
    for chosen in itertools.product(*fields.values()):
        for picked in itertools.product(*(options or {}).values()):
            settings = dict(zip(fields, chosen, strict=True))
            made.append({"rule": rule, **settings, "rule_options": dict(zip(options or {}, picked, strict=True))})
    return made


MOMENT: dict[str, Sequence[Any]] = {"lam": (0.0,), "adherence": (0.95, 0.975, 0.99)}
"""Of rules with a moment weight. The recursive rule's own adherence, here and of `EditConfig`, is among them."""

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
"""What each rule is tried with. `adherence` finds the moment weight mu^2 by the rule's own scale (the published 15,000
goes with keys of other models), lam is 0 as published; where a rule has no moment weight, `ridge` says how much of the
identity the moment gets. The report says where a setting that was taken lies at an end of what was tried."""


def tuning(
    out: Path, grids: Mapping[str, list[dict]], edits: int, spec: GroundSpec | None = None, base: EditConfig = BASE
) -> dict[str, list[Job]]:
    """The runs of every grid, on a seed that is not reported."""
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
            jobs.setdefault(rule, []).append(Job(spec or GroundSpec(), plan, path_of(out / "tuning", plan)))
    return jobs


def tuned(grids: Mapping[str, list[dict]], jobs: Mapping[str, Sequence[Job]]) -> dict[str, Contender]:
    """Of each rule the settings that its runs of the grid speak for; see `report_runs.taken`."""
    best = {rule: Contender(rule, grid[0]) for rule, grid in grids.items()}
    for rule, tried in jobs.items():
        at = taken([run_of(job) for job in tried])
        best[rule] = Contender(rule, grids[rule][at])
        print(f"{rule}: {best[rule].changes}")
    return best


RECURSIVE = (
    Contender("rls", {}),
    Contender("rls norm-anchored", {"norm_anchor": True}),
    Contender("rls forgetting", {}, forgetting=0.9),
)
CLOSEST = ("rls", "memit-history", "memit", "alphaedit")


def protecting(best: Mapping[str, Contender]) -> list[Contender]:
    """The recursive rule, and the closest one that remembers keys too, with prompts protected that nobody asks."""
    remembering = [RECURSIVE[0], *(best[rule] for rule in ("memit-history",) if rule in best)]
    return [replace(one, label=f"{one.label} protecting", protected=0.01) for one in remembering]


def side_by_side(out: Path, best: Mapping[str, Contender], edits: int, seeds: Sequence[int]) -> Iterator[Job]:
    """All contenders in batches of 10, for scores, ages, bounds and capability; two also in batches of 1 and 100."""
    for seed, contender in itertools.product(seeds, (*RECURSIVE, *best.values(), *protecting(best))):
        yield _job(out / "rules", contender, edits, seed, **ALONG)
    for size, seed in itertools.product((1, 100), seeds[:1]):
        for contender in (RECURSIVE[0], best["memit"]):
            yield _job(out / "batches", contender, edits // 2, seed, batch_size=size, **BRIEF)


FACTORS = {"plain": (0.01, 0.1, 1.0, 10.0, 100.0), "conflicting": (0.1, 1.0, 10.0), "related": (0.1, 1.0, 10.0)}
"""Of mu and of lam against the calibrated ones, by the stream: four decades, and two where a stream takes longer."""


def sweep(out: Path, prior: Mapping[str, float], edits: int, seed: int) -> Iterator[Job]:
    """Mu and lam around the calibrated ones, which are in the middle, one at a time."""
    for kind, factors in FACTORS.items():
        for of_mu, of_lam in itertools.product(factors, factors):
            if 1.0 in (of_mu, of_lam):
                chosen = {"mu": prior["mu"] * of_mu, "lam": prior["lam"] * of_lam}
                contender = Contender(f"rls mu x{of_mu:g} lam x{of_lam:g}", chosen)
                yield _job(out / "sweep", contender, edits, seed, kind=kind, **BRIEF)


def orders(out: Path, best: Mapping[str, Contender], edits: int, seed: int, count: int = 5) -> Iterator[Job]:
    """The same cases in five orders."""
    for order, contender in itertools.product(range(count), (RECURSIVE[0], best["memit"])):
        yield _job(out / "orders", contender, edits, seed, order=order, **BRIEF)


def hard(out: Path, best: Mapping[str, Contender], edits: int, seed: int) -> Iterator[Job]:
    """Facts that contradict earlier ones, and all the facts of a few subjects, whose keys are nearly one.

    Only the recursive rule can take an edit back, and so replace one, and let a subject's facts share a value
    (`same_subject="joint"`); `separate` is how every other rule must do it.
    """
    apart = {"same_subject": "separate"}
    chosen = [
        RECURSIVE[0],
        Contender("rls separate", apart),
        Contender("rls separate forgetting", apart, forgetting=0.7),
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
        config=replace(contender.config(base), batch_size=batch_size),
        forgetting=contender.forgetting,
        protected=contender.protected,
        **more,
    )
    return Job(spec or GroundSpec(), plan, path_of(folder, plan))


def demo(options: argparse.Namespace) -> None:
    out, edits, seeds = options.out or HERE / "results" / "paper" / DEMO, options.edits, options.seeds
    tried = tuning(out, GRIDS, TUNING_EDITS)
    make([job for jobs in tried.values() for job in jobs], processes=options.jobs)
    best = tuned(GRIDS, tried)
    main = list(side_by_side(out, best, edits, seeds))
    # Those that matter most go first, so that a report can be made of what there is at any time.
    make([job for job in main if job.plan.label in CLOSEST and job.plan.edits == edits], processes=options.jobs)
    make([job for job in main if job.plan.seed == seeds[0]], processes=options.jobs)
    ours = next(run_of(job) for job in main if (job.plan.label, job.plan.seed) == (CLOSEST[0], seeds[0]))
    make(list(hard(out, best, edits // 2, seeds[0])), processes=options.jobs)
    make(list(sweep(out, ours["priors"][0], edits // 2, seeds[0])), processes=options.jobs)
    make(main, processes=options.jobs)
    make(list(orders(out, best, edits // 2, seeds[0])), processes=options.jobs)
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
    base = EditConfig(layers=options.layers and tuple(options.layers), batch_size=options.batch_size, search_ahead=100)
    if options.clamp is not None:
        base = replace(base, clamp=options.clamp)
    out = options.out or HERE / "results" / "paper" / spec.name
    if spec.statistics is None:
        spec = _with_statistics(spec, base, out)
    grids = {rule: grid for rule, grid in GRIDS.items() if options.rules is None or rule in options.rules}
    tried = tuning(out, grids, options.tuning_edits, spec, base)
    make([job for jobs in tried.values() for job in jobs], processes=options.jobs)
    best = tuned(grids, tried)
    contenders = [RECURSIVE[0], *best.values()]
    if any(case.spare for case in make_cases(spec, "plain", options.edits, options.seeds[0])[0]):
        contenders += protecting(best)
    else:
        print("the data have no prompts to spare, so none are protected")
    jobs = [
        _job(out / "rules", one, options.edits, seed, spec=spec, base=base, batch_size=options.batch_size, **ALONG)
        for seed in options.seeds
        for one in contenders
    ]
    # Those that matter most go first, so that a report can be made of what there is at any time.
    make([job for job in jobs if job.plan.label in CLOSEST], processes=options.jobs)
    make(jobs, processes=options.jobs)
    print(*write(out))


def _with_statistics(spec: GroundSpec, base: EditConfig, out: Path) -> GroundSpec:
    """With the anchors' key statistics in a file, so that no run has to collect them again.

    Raises:
        SystemExit: there are some of another text.
    """
    path, told = out / "statistics.safetensors", out / "statistics-of.txt"
    text = str(spec.made_of["text"])
    if path.exists() and told.exists() and told.read_text(encoding="utf-8").strip() != text:
        raise SystemExit(f"{path} is of {told.read_text(encoding='utf-8').strip()}, not {text}; name another --out")
    if not path.exists():
        print("collecting key statistics", flush=True)
        ground = make_ground(spec)
        model, tokenizer = ground.load()
        found = Editor(model, tokenizer, config=base).statistics(GivenTexts(ground.anchors(0)))
        out.mkdir(parents=True, exist_ok=True)
        found.save(path)
        told.write_text(f"{text}\n", encoding="utf-8")
    return replace(spec, statistics=str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    on_demo = commands.add_parser("demo", help="every experiment on the shipped model")
    on_model = commands.add_parser("model", help="the rules side by side on another model")
    for one in (on_demo, on_model):
        one.add_argument("--out", type=Path, help="folder for the result files (default bench/results/paper/NAME)")
        one.add_argument("--edits", type=int, default=1000)
        one.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
        one.add_argument("--jobs", type=int, default=1, help="processes, each on one thread")
    on_model.add_argument("--model", required=True)
    on_model.add_argument("--data", required=True, help="CounterFact, zsRE or MQuAKE")
    on_model.add_argument("--text", required=True, help="running text")
    on_model.add_argument("--statistics", help="key statistics of `rlsedit statistics`, in place of the text's")
    on_model.add_argument(
        "--references", help="texts about subjects for consistency, as ROME's attribute_snippets.json"
    )
    on_model.add_argument("--tasks", help="folder with GLUE and MMLU as NAME.jsonl")
    on_model.add_argument(
        "--rules", nargs="+", choices=sorted(GRIDS), metavar="RULE", help="beside rls; all by default"
    )
    on_model.add_argument("--layers", type=int, nargs="+")
    on_model.add_argument("--batch-size", type=int, default=100)
    on_model.add_argument("--clamp", type=float, help="as in EditConfig")
    on_model.add_argument("--tuning-edits", type=int, help="edits of a run of the grids (default: 3 batches)")
    on_model.add_argument("--device", default="cpu")
    on_model.add_argument("--dtype", default="float32")
    on_model.add_argument("--among", type=int, help="only the first so many records of the data")
    options = parser.parse_args()
    if options.command == "model":
        options.tuning_edits = options.tuning_edits or 3 * options.batch_size
        if options.tuning_edits < 2 * options.batch_size:
            parser.error(
                f"--tuning-edits {options.tuning_edits}: expected 2 batches of {options.batch_size} at least; what a "
                "rule remembers, or wears down, shows from the second one on"
            )
    torch.set_num_threads(1 if options.jobs > 1 else torch.get_num_threads())
    (demo if options.command == "demo" else model)(options)


if __name__ == "__main__":
    main()
