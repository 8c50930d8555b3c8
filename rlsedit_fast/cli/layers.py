"""`rlsedit layers`: recommend which layers of a model to edit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit_fast.cli import DONE, PARTIAL, setup
from rlsedit_fast.cli.facts import Facts, add_facts, facts_given, read_facts, sift
from rlsedit_fast.cli.output import add_json, emit, progress, say
from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError

if TYPE_CHECKING:
    from rlsedit_fast.evaluation.layers import LayerSearch, Trial

HELP = "try groups of layers with a few edits each and recommend one; the model is not modified"
USAGE = "--model MODEL --text FILE [--edits FILE] [options]"

DEFAULT_COUNT = 40
DEFAULT_TOKENS = 20_000


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    setup.add_model(parser)
    add_facts(parser, required=False)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        required=True,
        help="text file, one paragraph per line: three quarters are used as anchors, the rest measures drift",
    )
    group.add_argument(
        "--tokens",
        type=setup.at_least_one,
        default=DEFAULT_TOKENS,
        metavar="N",
        help=f"tokens of the anchors (default {DEFAULT_TOKENS})",
    )
    group.add_argument(
        "--count",
        type=setup.at_least_one,
        metavar="N",
        default=DEFAULT_COUNT,
        help=f"edits per trial (default {DEFAULT_COUNT}); without --edits, facts of a built-in list are used",
    )
    group.add_argument(
        "--stride",
        type=setup.at_least_one,
        metavar="N",
        help="distance between the single layers that are tried (default: chosen by depth)",
    )
    group.add_argument(
        "--widths",
        type=setup.at_least_one,
        nargs="*",
        metavar="N",
        help="numbers of consecutive layers to try around the best one (default 3 5)",
    )
    setup.add_settings(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from rlsedit_fast.evaluation.grounds import running_text
    from rlsedit_fast.evaluation.layers import WIDTHS, search_layers

    setup.show_warnings()
    config = setup.make_config(options)
    if options.layers is not None or config.layers is not None:
        raise InputError(
            "`rlsedit layers` searches the layers; omit --layers, layers in --config, and presets of a model"
        )
    texts = running_text(options.text)
    facts = _facts(options)
    plan = setup.plan_editor(options)
    if options.edits is not None:
        facts = sift(facts, plan, options)
    model, tokenizer = setup.load_model(options, config=plan.model_config, tokenizer=plan.tokenizer)
    edits = _of_different_subjects(facts.edits, options.count)
    if len(edits) < options.count:
        say(f"only {len(edits)} edits have different subjects; --count is {options.count}")
    with progress(None, "trials", "trial") as bar:

        def made(_trial: Trial | None, done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        found = search_layers(
            model,
            tokenizer,
            edits,
            texts,
            config=config,
            stride=options.stride,
            widths=WIDTHS if options.widths is None else options.widths,
            tokens=options.tokens,
            on_trial=made,
        )
    results: dict[str, Any] = {**found.to_json(), "left_out": facts.left_out}
    emit(results, _lines(found), options.json)
    return PARTIAL if facts.left_out else DONE


def _facts(options: argparse.Namespace) -> Facts:
    from rlsedit_fast.evaluation.generic_facts import MOST, generic_edits

    if facts_given(options):
        return read_facts(options)
    if options.count > MOST:
        raise InputError(
            f"--count {options.count}: the built-in list has {MOST} facts; reduce --count or pass --edits FILE"
        )
    edits = generic_edits(options.count)
    return Facts(edits, [f"built-in fact {at}" for at in range(1, len(edits) + 1)], [], {}, [])


def _of_different_subjects(edits: Sequence[Edit], count: int) -> list[Edit]:
    """Returns the first edit of each of the first `count` subjects, since edits of one subject share a value."""
    first: dict[str, Edit] = {}
    for edit in edits:
        first.setdefault(edit.subject.strip() or edit.prompt, replace(edit, weight=1.0))
    return list(islice(first.values(), count))


def _lines(found: LayerSearch) -> list[str]:
    from rlsedit_fast.evaluation.layers import compare

    best = found.trial(found.best)
    lines = [f"{found.edits} edits in each trial, {found.anchor_tokens} anchor tokens"]
    titles = ("layers", "efficacy", "paraphrases", "neighbors", "KL", "change", "score", "below best")
    lines.append("{:>12}{:>10}{:>13}{:>11}{:>9}{:>9}{:>8}{:>18}".format(*titles))
    for trial in found.trials:
        difference, error = compare(trial, best)
        behind = "best" if trial is best else f"{max(0.0, -difference):.3f} ± {error:.3f}"
        shares = (trial.efficacy, trial.generalization, trial.specificity)
        shown = ["-" if share is None else f"{share:.3f}" for share in shares]
        lines.append(
            f"{named(trial.layers):>12}{shown[0]:>10}{shown[1]:>13}{shown[2]:>11}{trial.kl:9.4f}{trial.change:9.4f}"
            f"{trial.score:8.3f}{behind:>18}"
        )
    lines += [f"layers {named(layers)} cannot be edited: {reason}" for layers, reason in found.failed.items()]
    lines.append(
        f"recommended: --layers {named(found.chosen)} (default: {named(found.default)}), the trial with the least "
        "drift within one standard error of the best score"
    )
    return lines


def named(layers: Sequence[int]) -> str:
    """Formats layers as `--layers` accepts them."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))
