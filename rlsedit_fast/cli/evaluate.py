"""`rlsedit evaluate`: streams of edits under one rule or several, over seeds, and what became of the model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlsedit_fast.cli import DONE, LEFT_OUT, setup
from rlsedit_fast.cli.output import add_json, emit, say
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.editing import EditConfig
from rlsedit_fast.editing.presets import GENERIC
from rlsedit_fast.errors import InputError
from rlsedit_fast.rules import RECURSIVE, RULES

HELP = "compare rules over streams of edits, on the shipped model or your own with CounterFact, zsRE or MQuAKE"

_SHOWN = (
    ("efficacy", "strict"),
    ("generalization", "strict"),
    ("neighbors", "strict"),
    ("score", "forced"),
    ("efficacy", "free"),
)
_WHERE_THERE = (("multihop", "strict"), ("multihop", "free"), ("consistency", "cosine"))
"""Shown only where the data set has what they are measured on."""

_ITEMS = _FREE = 100


def _error(count: int) -> str:
    """The largest standard error of a share of this many."""
    return f"{0.5 / count**0.5:.2f}"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    group = parser.add_argument_group("what is edited")
    group.add_argument(
        "--model",
        default="demo",
        help="demo (the default, in its own settings unless --config is given), or what from_pretrained takes",
    )
    group.add_argument("--dtype", help="to load it in (default float32)")
    group.add_argument("--device", help="to load it onto (default cpu)")
    group.add_argument("--data", metavar="FILE", help="CounterFact, zsRE or MQuAKE; the demo has facts of its own")
    group.add_argument("--among", type=setup.at_least_one, metavar="N", help="only the first N records of it")
    group.add_argument("--text", metavar="FILE", help="running text: three quarters are anchors, the rest is probed")
    group.add_argument(
        "--tokens",
        type=setup.at_least_one,
        metavar="N",
        help=f"tokens of --text to read as anchors, at most (default {setup.DEFAULT_TOKENS})",
    )
    group.add_argument(
        "--statistics",
        metavar="FILE",
        help="anchors from `rlsedit statistics` instead, which need not be collected anew for each command",
    )
    group.add_argument(
        "--references", metavar="FILE", help="texts about subjects, as ROME's attribute_snippets.json, for consistency"
    )
    group.add_argument("--tasks", metavar="DIR", help="GLUE and MMLU as NAME.jsonl, answered by likelihood")
    group.add_argument(
        "--items",
        type=setup.at_least_one,
        metavar="N",
        help=f"of each task, at most (default {_ITEMS}: a standard error of {_error(_ITEMS)} at most)",
    )
    group = parser.add_argument_group("streams")
    group.add_argument("--rules", nargs="+", choices=RULES, default=[RECURSIVE], metavar="RULE", help=", ".join(RULES))
    group.add_argument(
        "--rule-settings", type=Path, metavar="FILE", help="a JSON object: by rule, EditConfig's fields that it changes"
    )
    group.add_argument("--stream", default="plain", help="plain; on the demo also conflicting and related")
    group.add_argument("--edits", type=setup.at_least_one, default=1000)
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    group.add_argument(
        "--free",
        type=setup.at_least_one,
        metavar="N",
        default=_FREE,
        help="edits whose prompts are answered freely, by greedy generation, at the end, at most "
        f"(default {_FREE}: a standard error of {_error(_FREE)} at most)",
    )
    group.add_argument(
        "--jobs",
        type=setup.at_least_one,
        default=1,
        help="runs made at the same time, which share the cores; one run uses all of them (default 1)",
    )
    group.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder of the results (default evaluation)"
    )
    setup.add_settings(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it. A run whose file is in the folder is not made again."""
    from rlsedit_fast.evaluation.demo import CONFIG
    from rlsedit_fast.evaluation.figures import over_seeds
    from rlsedit_fast.evaluation.grounds import DEMO, GroundSpec
    from rlsedit_fast.evaluation.runs import Job, make, path_of
    from rlsedit_fast.evaluation.stream import Plan

    setup.show_warnings()
    _check(options, demo=options.model == DEMO)
    check_places(options, folders=("out",))
    given = {name: getattr(options, name) for name in GroundSpec.__dataclass_fields__}
    if options.tasks is not None and options.items is None:
        given["items"] = _ITEMS
    if options.model != DEMO and options.statistics is None and options.tokens is None:
        given["tokens"] = setup.DEFAULT_TOKENS
    spec = GroundSpec(**{name: value for name, value in given.items() if value is not None})
    base = setup.make_config(options)
    if options.preset == GENERIC and options.model != DEMO:
        raise InputError("--preset generic: the layers go with the model's depth; name them with --layers")
    if base.rule != RECURSIVE:
        raise InputError(f"--config {options.config}: rule={base.rule!r} is for --rules to say; leave it out")
    if options.model == DEMO and options.config is None and options.preset in ("auto", GENERIC):
        base = replace(CONFIG, **setup.settings_given(options))
    changes = _changes(options.rule_settings)
    if unused := sorted(set(changes) - set(options.rules)):
        raise InputError(
            f"--rule-settings {options.rule_settings}: {', '.join(unused)} are not among --rules; name them there"
        )
    jobs: dict[str, list[Job]] = {}
    for rule in options.rules:
        config = base.under(rule, **changes.get(rule, {}))
        for seed in options.seeds:
            plan = Plan(
                label=rule, stream=options.stream, edits=options.edits, seed=seed, config=config, free=options.free
            )
            jobs.setdefault(rule, []).append(Job(spec, plan, path_of(options.out, plan)))
    made = iter(make([job for each in jobs.values() for job in each], processes=options.jobs, say=say, show=True))
    found = {rule: [next(made) for _ in each] for rule, each in jobs.items()}
    every = [result for each in found.values() for result in each]
    shown = (*_SHOWN, *(figure for figure in _WHERE_THERE if over_seeds(every, *figure) is not None))
    header = " ".join(f"{f'{metric} {form}':>22}" for metric, form in shown)
    lines = [f"{options.edits} edits, seeds {', '.join(map(str, options.seeds))}: mean ± deviation", f"{'':14}{header}"]
    results: dict[str, Any] = {"model": spec.name, "edits": options.edits, "seeds": options.seeds, "rules": {}}
    failed = []
    for rule, runs in found.items():
        whole = [run for run in runs if not run["failed"]]  # of as many edits as the others
        told = {f"{metric} {form}": over_seeds(whole, metric, form) for metric, form in shown}
        lines.append(f"{rule:14}" + " ".join(f"{'-' if s is None else str(s):>22}" for s in told.values()))
        failed += [
            f"{rule}, seed {run['plan']['seed']}, after {run['failed']['after']} edits: {run['failed']['reason']}"
            for run in runs
            if run["failed"]
        ]
        results["rules"][rule] = {
            "figures": {name: None if s is None else asdict(s) for name, s in told.items()},
            "files": [str(job.path) for job in jobs[rule]],
        }
    results["failed"] = failed
    lines += [f"broke off, and not in the figures: {line}" for line in failed]
    if len(options.rules) > 1 and options.rule_settings is None:
        lines.append("rules run under settings of their own where --rule-settings has none, tuned for no model")
    emit(results, [*lines, f"results: {options.out}"], options.json)
    return LEFT_OUT if failed else DONE


_ITS_OWN = ("data", "among", "text", "tokens", "statistics", "dtype", "device")
"""What is the demo's own, and options say of another model."""


def _check(options: argparse.Namespace, *, demo: bool) -> None:
    """Raises InputError for what would be ignored, or cannot be meant."""
    from rlsedit_fast.evaluation.grounds import layout_of

    if options.rule is not None:
        raise InputError(f"--rule {options.rule}: streams run under each of --rules; say it there")
    for name in ("seeds", "rules"):
        given = getattr(options, name)
        if twice := sorted({str(one) for one in given if given.count(one) > 1}):
            raise InputError(f"--{name}: {', '.join(twice)} more than once, which is one stream; name it once")
    if options.items is not None and options.tasks is None:
        raise InputError("--items is of tasks; name their folder with --tasks DIR, or leave it out")
    if options.tokens is not None and options.statistics is not None:
        raise InputError("--tokens is how much of --text to read as anchors; with --statistics leave it out")
    if demo:
        if ignored := [f"--{name}" for name in _ITS_OWN if getattr(options, name) is not None]:
            raise InputError(
                f"{', '.join(ignored)}: the demo model has facts, text and anchors of its own and runs in float32 on "
                "the CPU; name your model with --model, or leave these out"
            )
        return
    for name, what in (("data", "CounterFact, zsRE or MQuAKE"), ("text", "running text, on which drift is measured")):
        if getattr(options, name) is None:
            raise InputError(f"--model {options.model} needs --{name} FILE: {what}")
    if options.among is not None and layout_of(Path(options.data)) == "zsre":
        raise InputError("--among is of CounterFact and MQuAKE; of zsRE all records are drawn from, leave it out")


def _changes(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"--rule-settings {path}: cannot be read as JSON ({error})") from error
    known = set(EditConfig.__dataclass_fields__)
    if not isinstance(given, dict) or not all(isinstance(fields, dict) for fields in given.values()):
        raise InputError(f"--rule-settings {path}: expected a JSON object of objects, such as {{'rome': {{'lam': 1}}}}")
    wrong = sorted({*given} - {*RULES} | {name for fields in given.values() for name in set(fields) - known})
    if wrong:
        raise InputError(f"--rule-settings {path}: no rules or fields of EditConfig: {', '.join(wrong)}")
    return given
