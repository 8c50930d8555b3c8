"""`rlsedit check`: check an edited model against gates, for a release."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlsedit_fast.cli import DONE, PARTIAL, VIOLATED, setup
from rlsedit_fast.cli.gates import add_gate, gate_lines, gate_results, read_gates
from rlsedit_fast.cli.output import add_json, emit, working
from rlsedit_fast.cli.stores import check_source, open_editor

if TYPE_CHECKING:
    from rlsedit_fast.evaluation.gates import GateReport, Gates

HELP = "check an edited model against gates; exit code 3 if one is violated"
ABOUT = (
    "Check the edited model of a store, an edited checkpoint and its base, or one checkpoint against the gates of a "
    "file. Nothing is modified. Exit codes: 0 all gates passed; 1 none is violated, but some could not be measured; "
    "2 error; 3 a gate is violated."
)
USAGE = "(--store DIR | --model MODEL [--edited MODEL]) --gate FILE [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--store", type=Path, metavar="DIR", help="store of the edits")
    parser.add_argument(
        "--edited",
        metavar="MODEL",
        help="instead of --store: edited checkpoint; --model is its base. Without it, --model itself is checked, and "
        "gates that compare with the unedited model are not measured",
    )
    add_gate(parser, required=True)
    setup.add_model(parser, required=False)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    setup.show_warnings()
    check_source(options)
    gates = read_gates(options)
    assert gates is not None
    report = _check_store(gates, options) if options.store is not None else _check_checkpoint(gates, options)
    emit(gate_results([report], gates), gate_lines(report), options.json)
    if report.violated:
        return VIOLATED
    return PARTIAL if report.not_measured else DONE


def _check_store(gates: Gates, options: argparse.Namespace) -> GateReport:
    with open_editor(options) as editor, working("measuring the gates"):
        return gates.check(editor)


def _check_checkpoint(gates: Gates, options: argparse.Namespace) -> GateReport:
    from rlsedit_fast.evaluation.gates import Baseline, measure_gates
    from rlsedit_fast.export import changes_between

    config = setup.check_model(options)
    edited_config = setup.check_model(options, path=options.edited) if options.edited is not None else None
    base, tokenizer = setup.load_model(options, config=config)
    with working("measuring the gates"):
        found = Baseline(gates, base, tokenizer)
        if options.edited is None:
            return measure_gates(gates, found, base, tokenizer, compared=False)
        edited, edited_tokenizer = setup.load_model(options, options.edited, config=edited_config)
        return measure_gates(gates, found, edited, edited_tokenizer, changes=changes_between(base, edited))
