"""`rlsedit evaluate`: compare editing rules on streams of edits over several seeds."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlsedit_fast.baselines import RECURSIVE, RULES
from rlsedit_fast.cli import DONE, PARTIAL, setup
from rlsedit_fast.cli.output import add_json, emit, is_quiet, say
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.editing import EditConfig
from rlsedit_fast.errors import InputError
from rlsedit_fast.files import read_json

HELP = "compare editing rules on streams of edits, on the demo model or on any model with CounterFact, zsRE or MQuAKE"
USAGE = "[--model MODEL --data FILE --text FILE] [--rules RULE ...] [options]"

_SHOWN = (
    ("efficacy", "strict"),
    ("generalization", "strict"),
    ("neighbors", "strict"),
    ("score", "forced"),
    ("efficacy", "free"),
)
_OPTIONAL = (
    *(("multihop", "strict"), ("multihop", "free"), ("consistency", "cosine")),
    *(("chat_start", "strict"), ("chat_question", "free"), ("chat_neighbors", "strict")),
)
"""Metrics that are shown only if the data set contains the prompts for them."""

_EXPLAINED = (
    "fractions of prompts: efficacy of the edited prompts, generalization to paraphrases, neighbors that do not change",
    "strict: each token of the target is ranked first (neighbors: the prediction is that of the unedited model); free: "
    "greedy generation gives the target; score forced: harmonic mean, where a prompt counts if the right answer is the "
    "more likely one of two",
)
_EXPLAINED_CHAT = (
    "chat_start: the answer to the prompt repeats it and continues with the target; chat_question: the answer to a "
    "question in other words contains the target; chat_neighbors: neighbors as the start of an answer"
)
"""Explanation of the figures in the table."""

_ITEMS = _FREE = 100
_PROBED = 2000


def _error(count: int) -> str:
    """Returns the largest standard error of a fraction of `count` samples."""
    return f"{0.5 / count**0.5:.2f}"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        default="demo",
        help="local folder or Hugging Face Hub name of the model, or demo, the bundled model with its own settings "
        "unless --config is given (default demo)",
    )
    group.add_argument("--dtype", type=setup.dtype, help="dtype to load the model in (default float32)")
    group.add_argument("--device", help="device to load the model on (default cpu)")
    group.add_argument(
        "--data", metavar="FILE", help="CounterFact, zsRE or MQuAKE file (required unless the model is demo)"
    )
    group.add_argument(
        "--among", type=setup.at_least_one, metavar="N", help="sample edits from the first N records of --data"
    )
    group.add_argument(
        "--text", metavar="FILE", help="text file: three quarters are used as anchors, the rest measures drift"
    )
    group.add_argument(
        "--tokens",
        type=setup.at_least_one,
        metavar="N",
        help="maximum number of anchor tokens from --text (default 20 for each dimension of the widest key, at most "
        "100000)",
    )
    group.add_argument(
        "--statistics",
        metavar="FILE",
        help="key statistics written by `rlsedit statistics`, used as anchors instead of --text",
    )
    group.add_argument(
        "--references",
        metavar="FILE",
        help="reference texts about subjects (ROME's attribute_snippets.json), for the consistency metric",
    )
    group.add_argument(
        "--tasks", metavar="DIR", help="folder of GLUE and MMLU tasks as NAME.jsonl, scored by likelihood"
    )
    group.add_argument(
        "--items",
        type=setup.at_least_one,
        metavar="N",
        help=f"maximum number of items per task (default {_ITEMS}, standard error at most {_error(_ITEMS)})",
    )
    group = parser.add_argument_group("streams")
    group.add_argument(
        "--rules",
        nargs="+",
        choices=RULES,
        default=[RECURSIVE],
        metavar="RULE",
        help=f"editing methods: {', '.join(RULES)} (default {RECURSIVE})",
    )
    group.add_argument(
        "--rule-settings", type=Path, metavar="FILE", help="JSON file that maps a rule to fields of EditConfig"
    )
    group.add_argument(
        "--stream", default="plain", help="plain, or for the demo model also conflicting or related (default plain)"
    )
    group.add_argument(
        "--edits", type=setup.at_least_one, metavar="N", default=1000, help="edits per stream (default 1000)"
    )
    group.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        default=[0],
        help="one stream per seed; several give mean and standard deviation (default 0)",
    )
    group.add_argument(
        "--free",
        type=setup.at_least_one,
        metavar="N",
        default=_FREE,
        help="maximum number of edits evaluated by greedy generation after the stream "
        f"(default {_FREE}, standard error at most {_error(_FREE)})",
    )
    group.add_argument(
        "--probed",
        type=setup.at_least_one,
        metavar="N",
        default=_PROBED,
        help="maximum number of tokens of --text on which perplexity and KL are measured; their standard errors are in "
        f"the results (default {_PROBED})",
    )
    group.add_argument(
        "--jobs",
        type=setup.at_least_one,
        metavar="N",
        default=1,
        help="number of parallel runs, which share the CPU cores (default 1)",
    )
    group.add_argument(
        "--out", type=Path, default=Path("evaluation"), metavar="DIR", help="output folder (default evaluation)"
    )
    setup.add_settings(parser, rule=False)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; runs whose result file is already in the output folder are not repeated."""
    from rlsedit_fast.evaluation.demo import CONFIG
    from rlsedit_fast.evaluation.figures import over_seeds
    from rlsedit_fast.evaluation.grounds import DEMO, GroundSpec
    from rlsedit_fast.evaluation.plan import Plan
    from rlsedit_fast.evaluation.runs import Job, result_path, run_jobs

    setup.show_warnings()
    _check(options, demo=options.model == DEMO)
    check_places(options, folders=("out",))
    given = {name: getattr(options, name) for name in GroundSpec.__dataclass_fields__}
    if options.tasks is not None and options.items is None:
        given["items"] = _ITEMS
    spec = GroundSpec(**{name: value for name, value in given.items() if value is not None})
    base = setup.make_config(options)
    if base.rule != RECURSIVE:
        raise InputError(
            f"--config {options.config}: the field rule={base.rule!r} is not allowed here; remove it and pass --rules"
        )
    if options.model == DEMO and options.config is None and options.preset == "auto":
        base = CONFIG.replace(**setup.settings_given(options))
    changes = _changes(options.rule_settings)
    if unused := sorted(set(changes) - set(options.rules)):
        raise InputError(
            f"--rule-settings {options.rule_settings}: {', '.join(unused)} not in --rules; add them to --rules or "
            "remove their settings"
        )
    if options.model != DEMO:
        setup.check_model(options, base)
    jobs: dict[str, list[Job]] = {}
    for rule in options.rules:
        config = base.for_rule(rule, **changes.get(rule, {}))
        for seed in options.seeds:
            plan = Plan(
                label=rule,
                stream=options.stream,
                edits=options.edits,
                seed=seed,
                config=config,
                free=options.free,
                probed=options.probed,
            )
            jobs.setdefault(rule, []).append(Job(spec, plan, result_path(options.out, plan)))
    every_job = [job for each in jobs.values() for job in each]
    runs_done = iter(run_jobs(every_job, processes=options.jobs, log=say, show=not is_quiet()))
    found = {rule: [next(runs_done) for _ in each] for rule, each in jobs.items()}
    every = [result for each in found.values() for result in each]
    shown = (*_SHOWN, *(figure for figure in _OPTIONAL if over_seeds(every, *figure) is not None))
    header = " ".join(f"{f'{metric} {form}':>22}" for metric, form in shown)
    seeds = ", ".join(map(str, options.seeds))
    lines = [
        f"{options.edits} edits, "
        + (f"seeds {seeds}: mean ± standard deviation" if len(options.seeds) > 1 else f"seed {seeds}"),
        f"{'':14}{header}",
    ]
    results: dict[str, Any] = {"model": spec.name, "edits": options.edits, "seeds": options.seeds, "rules": {}}
    failed = []
    for rule, runs in found.items():
        complete = [run for run in runs if not run["failed"]]
        figures = {f"{metric} {form}": over_seeds(complete, metric, form) for metric, form in shown}
        lines.append(f"{rule:14}" + " ".join(f"{'-' if s is None else str(s):>22}" for s in figures.values()))
        failed += [
            f"{rule}, seed {run['plan']['seed']}, after {run['failed']['after']} edits: {run['failed']['reason']}"
            for run in runs
            if run["failed"]
        ]
        results["rules"][rule] = {
            "figures": {name: None if s is None else asdict(s) for name, s in figures.items()},
            "files": [str(job.path) for job in jobs[rule]],
        }
    results["failed"] = failed
    lines += [f"failed, not included in the figures: {line}" for line in failed]
    in_chat = [_EXPLAINED_CHAT] if any(metric == "chat_start" for metric, _ in shown) else []
    if len(options.rules) > 1 and options.rule_settings is None:
        lines.append("rules without --rule-settings used their default settings, which are not tuned for this model")
    emit(results, [*lines, *_EXPLAINED, *in_chat, _samples(every[0]), f"results: {options.out}"], options.json)
    return PARTIAL if failed else DONE


def _samples(result: dict[str, Any]) -> str:
    """The sample sizes of a run and their standard errors."""
    from rlsedit_fast.evaluation.runs import row

    free = row(result, "efficacy", "free")
    text, error = (row(result, "perplexity", form, of="text") for form in ("text", "error"))
    parts = []
    if free is not None:
        parts.append(f"{free['n']} free answers (--free, standard error at most {_error(free['n'])})")
    if text is not None:
        deviation = "" if error is None else f", standard error {error['value']:.2g}"
        parts.append(f"{text['n']} tokens of text (--probed, perplexity {text['value']:.4g}{deviation})")
    if result["anchors"] is not None:
        parts.append(f"{result['anchors']['tokens']} tokens of anchors (--tokens)")
    return f"samples per run: {'; '.join(parts)}"


_NOT_FOR_DEMO = ("data", "among", "text", "tokens", "statistics", "dtype", "device")
"""Options that do not apply to the demo model."""


def _check(options: argparse.Namespace, *, demo: bool) -> None:
    """Raises InputError for options that would be ignored or are invalid."""
    from rlsedit_fast.evaluation.grounds import layout_of

    if options.rule is not None:
        raise InputError(f"--rule {options.rule} is not supported by `rlsedit evaluate`; pass --rules")
    for name in ("seeds", "rules"):
        given = getattr(options, name)
        if twice := sorted({str(value) for value in given if given.count(value) > 1}):
            raise InputError(f"--{name}: {', '.join(twice)} given more than once; give each value once")
    if options.items is not None and options.tasks is None:
        raise InputError("--items requires --tasks DIR; add it or omit --items")
    if options.tokens is not None and options.statistics is not None:
        raise InputError("--tokens has no effect with --statistics; omit one of them")
    if demo:
        if ignored := [f"--{name}" for name in _NOT_FOR_DEMO if getattr(options, name) is not None]:
            raise InputError(
                f"{', '.join(ignored)}: not supported for the demo model, which has its own edits, text and anchors "
                "and runs in float32 on the CPU; pass --model or omit these options"
            )
        return
    for name, what in (("data", "CounterFact, zsRE or MQuAKE"), ("text", "text on which drift is measured")):
        if getattr(options, name) is None:
            raise InputError(f"--model {options.model} requires --{name} FILE ({what})")
    if options.among is not None and layout_of(Path(options.data)) == "zsre":
        raise InputError("--among supports CounterFact and MQuAKE only; omit it for zsRE, which is sampled as a whole")


def _changes(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    expected = 'a JSON object of objects such as {"rome": {"lam": 1}}'
    given = read_json(path, expected, f"--rule-settings {path}")
    if not isinstance(given, dict) or not all(isinstance(fields, dict) for fields in given.values()):
        raise InputError(f"--rule-settings {path}: expected {expected}")
    if wrong := sorted({*given} - {*RULES}):
        raise InputError(f"--rule-settings {path}: unknown rules: {', '.join(wrong)}")
    for rule, changes in given.items():
        try:
            EditConfig().for_rule(rule, **changes)
        except InputError as error:
            raise InputError(f"--rule-settings {path}, rule {rule}: {error.message}", error.hint) from None
    return given
