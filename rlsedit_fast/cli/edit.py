"""`rlsedit edit`: apply edits from a file, or a single edit, and write the edited model, a delta or an adapter."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit_fast.cli import DONE, INTERRUPTED, PARTIAL, VIOLATED, setup
from rlsedit_fast.cli.export import (
    Written,
    add_exports,
    check_exports,
    check_gguf_export,
    withhold_exports,
    write_exports,
)
from rlsedit_fast.cli.facts import Facts, add_facts, read_facts, sift
from rlsedit_fast.cli.gates import add_checks, gate_lines, gate_results, read_gates
from rlsedit_fast.cli.output import add_json, complain, emit, progress, say, working
from rlsedit_fast.cli.show import describe_layers, layer_lines
from rlsedit_fast.cli.stability import probe_other_text
from rlsedit_fast.cli.summary import past_lines, summary
from rlsedit_fast.data import Edit
from rlsedit_fast.data.prompts import read_prompts
from rlsedit_fast.editing import Editor, EditRecord
from rlsedit_fast.editing.session import PILOT
from rlsedit_fast.editing.storage.recovery import read_history
from rlsedit_fast.errors import GateError, InputError, counted
from rlsedit_fast.interrupts import Interrupts, interrupts_counted
from rlsedit_fast.logs import warnings_silenced
from rlsedit_fast.processes import world
from rlsedit_fast.store import Store

if TYPE_CHECKING:
    from rlsedit_fast.evaluation.gates import BoundGates
    from rlsedit_fast.evaluation.outcome import CollectedAnswers
    from rlsedit_fast.evaluation.stability import TextProbe

HELP = "apply edits from a file, or a single edit, to a model"
ABOUT = (
    "Apply edits from a file, or a single edit, to a model, batch by batch, and write the edited model, its change, or "
    "both. At the end, the command prints which targets the model states, with the answers before and after for those "
    "that it does not state. Ctrl-C finishes the current batch and writes the results."
)
USAGE = "--model MODEL --edits FILE [--store DIR] [--out DIR|FILE.gguf] [options]"

CHAT_EDITS = 100
"""Maximum number of edits that are also asked in a chat by default; two answers are generated for each."""

_PER_BATCH = ("rlsedit_fast.editing.session", "rlsedit_fast.editing.stream")
"""Loggers of warnings about single batches; the summary reports them once."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    setup.add_model(parser, divided=True)
    add_facts(parser, single=True)
    setup.add_settings(parser)
    setup.add_anchors(parser)
    parser.add_argument(
        "--protect",
        type=Path,
        metavar="FILE",
        help="file of prompts, one per line, whose continuations are preserved; prompts already protected are ignored",
    )
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="crash-safe store of the edits, which allows undo; created if it does not exist. Edits of the file that "
        "are already in the store are skipped, including undone and replaced ones",
    )
    parser.add_argument(
        "--again", action="store_true", help="also apply edits that are undone, replaced or skipped in the store"
    )
    parser.add_argument(
        *("--require-stated", "--require-said"),
        action="store_true",
        help="stop at a batch with an edit whose target the model does not state after the write: the batch is taken "
        "back, earlier batches stay, and the exit code is 2",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="at the end, apply edits again whose target the model does not state; with --store also those of earlier "
        "runs that are in the file",
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="also ask each prompt in a chat before and after, if the model has a chat template (default: for at most "
        f"{CHAT_EDITS} edits)",
    )
    add_checks(parser)
    add_exports(parser)
    parser.add_argument("--no-evaluation", action="store_true", help="do not evaluate the edits before and after")
    parser.add_argument(
        "--no-stability",
        action="store_true",
        help="do not measure perplexity and KL divergence on other text before and after; the text is the part of "
        "--text FILE after the anchors, or text that the model generates",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the edits and print layers and memory; nothing is modified"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; on an interrupt, finishes the batch, writes the outputs and reports what was applied."""
    setup.show_warnings()
    setup.settle_text(options)
    if options.again and options.store is None:
        raise InputError("--again requires --store DIR; add it or omit --again")
    if not options.dry_run:
        check_exports(options, options.model)
    protected = read_prompts(options.protect, f"--protect {options.protect}") if options.protect else []
    options.gates = read_gates(options)
    facts = read_facts(options)
    if options.chat is None and "measure_chat" not in setup.settings_given(options):
        options.chat = len(facts.edits) <= CHAT_EDITS
    if options.store and Store.exists(options.store):
        asked = {_identity(record) for record in read_history(options.store)}
        if asked and any(_identity(edit) not in asked for edit in facts.edits):
            _check_anchors_fixed(options)
    if options.dry_run and options.store and not Store.exists(options.store):
        options.store = None
    plan = setup.plan_editor(options)
    facts = sift(facts, plan, options)
    with plan.load() as editor:
        return _run(editor, facts, protected, options)


def _run(editor: Editor, facts: Facts, protected: list[str], options: argparse.Namespace) -> int:
    from rlsedit_fast.evaluation.outcome import collect_answers, compute_outcome

    facts, known, past = _new_facts(editor, facts, again=options.again, retry=options.retry_failed)
    layers = describe_layers(editor.context.projections, editor.context.memory())
    say(*layer_lines(layers))
    results: dict[str, Any] = {
        "model": str(options.model),
        "edits": len(facts.edits),
        "left_out": facts.left_out,
        "in_store_already": known,
        "left_as_they_became": past,
        "conflicts": facts.conflicts,
        "unread_fields": facts.unread,
        "layers": layers,
        "config": editor.config.to_dict(),
    }
    if options.dry_run:
        lines = [f"{counted(len(facts.edits), 'edit')} would be applied; nothing was modified", *past_lines(past)]
        emit(results, lines, options.json)
        return PARTIAL if facts.left_out or past else DONE
    check_gguf_export(editor, options)
    if known_prompts := set(editor.protected).intersection(protected):
        say(f"{len(known_prompts)} of {len(protected)} prompts are already protected")
        protected = [prompt for prompt in protected if prompt not in known_prompts]
    if not facts.edits:
        _protect(editor, protected)
        bound = _bind_gates(editor, options)
        if bound is not None:
            bound.measure()
        checked = _report_gates(bound, results, options)
        written = _write(editor, bound, options)
        results |= written.to_json
        lines = [f"all {len(known) + len(past)} edits are already in the store; no edit was applied"]
        with written.attempt():
            emit(results, [*lines, *past_lines(past), *checked, *written.lines], options.json)
        written.raise_failures()
        if results.get("gates", {}).get("violated"):
            return VIOLATED
        return PARTIAL if facts.left_out or past or written.lost else DONE
    resumed = bool(editor.priors)
    if resumed:
        _check_anchors_fixed(options)
    results["anchors"] = "the store's" if resumed else setup.anchor(editor, options)
    _protect(editor, protected)
    gates = _bind_gates(editor, options)
    before: CollectedAnswers | None = None
    probe: TextProbe | None = None
    if not options.no_evaluation:
        with working("evaluating before the edits"):
            before = collect_answers(editor.model, editor.tokenizer, facts.edits)
        results["before"] = asdict(compute_outcome(facts.edits, before, before))
        if not options.no_stability:
            with working("measuring other text"):
                probe, results["stability"] = probe_other_text(editor, options)
    with warnings_silenced(*_PER_BATCH), working("calibrating"):
        priors = editor.priors or editor.calibrate(facts.edits[:PILOT])
    results["priors"] = [{"lam": prior.lam, "mu": prior.mu} for prior in priors]
    with warnings_silenced(*_PER_BATCH), interrupts_counted(say) as interrupts:
        applied, error = _edit(editor, facts, gates, interrupts, results, options)
        if applied and before is not None:
            failure = _evaluate(editor, applied, before, probe, interrupts, results)
            error = error or failure
        checked = _report_gates(gates, results, options)
        written = _write(editor, gates, options, results.get("stability"))
        results |= written.to_json
        with written.attempt():
            emit(results, [*summary(results), *checked, *written.lines], options.json)
    if error is not None:
        complain(*written.failures)
        raise error
    written.raise_failures()
    if _interrupted(interrupts):
        return INTERRUPTED
    incomplete = facts.left_out or past or results["skipped"] or results["not_stated"] or written.lost
    return PARTIAL if incomplete else DONE


def _check_anchors_fixed(options: argparse.Namespace) -> None:
    if options.statistics or options.text or options.self_generate or options.no_anchors:
        raise InputError(
            f"the anchors of the store {str(options.store)!r} are fixed and apply to all of its edits; omit "
            "--statistics, --text, --self-generate and --no-anchors, or create another store"
        )


def _protect(editor: Editor, prompts: list[str]) -> None:
    if prompts:
        say(f"protected {editor.protect(prompts)} tokens of {len(prompts)} prompts")


class _Interrupted(Exception):
    """Ends editing after an interrupt, once the current batch is applied."""


def _interrupted(interrupts: Interrupts) -> bool:
    """Returns whether Ctrl-C was pressed, in any process."""
    pressed = world().any(interrupts.pressed > 0)
    if pressed and not interrupts.pressed:
        say("interrupted in another process: finished the current batch; writing the results so far")
    interrupts.pressed = max(interrupts.pressed, int(pressed))
    return pressed


def _patience(presses: int) -> int | None:
    """Returns how many presses are deferred; all of them in several processes, which could end at different points."""
    return presses if world().count == 1 else None


def _bind_gates(editor: Editor, options: argparse.Namespace) -> BoundGates | None:
    if options.gates is None:
        return None
    with working("measuring the gates in the unedited model"):
        return options.gates.bind(editor)


def _report_gates(gates: BoundGates | None, results: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Enters the last check into the results and returns its lines, without the violations, which the error lists."""
    if gates is None:
        return []
    results["gates"] = gate_results(gates.reports, options.gates)
    if not gates.reports:
        return ["gates: not checked, because the run ended before"]
    last = gates.reports[-1]
    lines = gate_lines(last, violations="records" not in results)
    if not last.final and not last.violated:
        lines.insert(1, "  not checked at the end, because the run ended before")
    return lines


def _edit(
    editor: Editor,
    facts: Facts,
    gates: BoundGates | None,
    interrupts: Interrupts,
    results: dict[str, Any],
    options: argparse.Namespace,
) -> tuple[dict[str, Edit], Exception | None]:
    """Applies the edits in batches and fills in `results`; returns the applied edits by place, and the error if any."""
    began = time.perf_counter()
    by_place = dict(zip(facts.places, facts.edits, strict=True))
    made, error = _apply(editor, by_place, gates, interrupts, require_stated=options.require_stated)
    failed = [place for place, record in made.items() if record.state == "active" and not record.success]
    # A gate that applies at the end may pass after the second try.
    may_go_on = error is None or (isinstance(error, GateError) and error.report.final)
    if options.retry_failed and failed and may_go_on and not _interrupted(interrupts):
        say(f"applying {counted(len(failed), 'edit')} again whose target the model does not state")
        again, error = _apply(editor, {place: by_place[place] for place in failed}, gates, interrupts)
        made |= again
        results["applied_again"] = list(again)
    made = dict(zip(made, _current(editor, made.values()), strict=True))
    results["seconds"] = time.perf_counter() - began
    results["skipped"] = [place for place, record in made.items() if record.state == "skipped"]
    results["made"] = len(made) - len(results["skipped"])
    results["not_made"] = [place for place in facts.places if place not in made]
    active = {place: record for place, record in made.items() if record.state == "active"}
    results["not_converged"] = [place for place, record in active.items() if not record.search_converged]
    results["not_stated"] = [place for place, record in active.items() if not record.success]
    results["records"] = [_entry(place, record) for place, record in made.items()]
    results["deviation"] = [asdict(layer) for layer in editor.deviation()]
    return {place: by_place[place] for place in made if place not in results["skipped"]}, error


def _apply(
    editor: Editor,
    edits: dict[str, Edit],
    gates: BoundGates | None,
    interrupts: Interrupts,
    *,
    require_stated: bool = False,
) -> tuple[dict[str, EditRecord], Exception | None]:
    """Applies edits, given by place; returns the records of those that were applied, and the error if any."""
    first = len(editor.history())
    error: Exception | None = None
    with interrupts.patient(_patience(1)), progress(len(edits), "editing", "edit") as bar:

        def on_batch(records: list[EditRecord]) -> None:
            bar.update(len(records))
            if _interrupted(interrupts):
                raise _Interrupted

        try:
            editor.edit(list(edits.values()), on_batch=on_batch, require_stated=require_stated, gates=gates)
        except _Interrupted:
            pass
        except Exception as failure:  # the batches before it are applied and must be written
            error = failure
    return dict(zip(edits, editor.history()[first:], strict=False)), error


def _current(editor: Editor, records: Iterable[EditRecord]) -> list[EditRecord]:
    """Returns the present records of edits; a later edit may have changed them."""
    history = editor.history()
    return [history[record.id - 1] for record in records]


def _entry(place: str, record: EditRecord) -> dict[str, Any]:
    return record.to_dict() | {"place": place, "stated": record.success, "chat_stated": record.chat_success}


def _evaluate(
    editor: Editor,
    applied: dict[str, Edit],
    before: CollectedAnswers,
    probe: TextProbe | None,
    interrupts: Interrupts,
    results: dict[str, Any],
) -> Exception | None:
    """Evaluates the applied edits, given by place; Ctrl-C skips the evaluation."""
    from rlsedit_fast.evaluation.outcome import collect_answers, compute_outcome, stated

    with interrupts.patient(_patience(0)):
        try:
            edits = list(applied.values())
            with working("evaluating after the edits"):
                after = collect_answers(editor.model, editor.tokenizer, edits)
            # Restrict "before" to the edits that were applied.
            results |= {
                "before": asdict(compute_outcome(edits, before, before)),
                "after": asdict(compute_outcome(edits, after, before)),
            }
            # Later batches may have changed the answers measured right after an edit.
            results["not_stated"] = [place for place, edit in applied.items() if not stated(edit, after)]
            if probe is not None:
                with working("measuring other text"):
                    results["stability"]["after"] = asdict(probe(editor.model))
                    if routing := editor.routing_change(probe.texts):
                        results["stability"]["routing_change"] = routing
        except Exception as failure:
            return failure
    if "after" not in results:
        say("interrupted: skipping the evaluation; writing the results so far")
    return None


def _write(
    editor: Editor,
    gates: BoundGates | None,
    options: argparse.Namespace,
    stability: dict[str, Any] | None = None,
) -> Written:
    """Writes the exports if an edit is active and the gates passed.

    A store may have active edits although this run applied none.
    """
    if not (options.out or options.delta or options.adapter or options.patch):
        return Written()
    if not any(record.state == "active" for record in editor.history()):
        say("no edit is active: nothing was written")
        return Written()
    if gates is None or gates.passed:
        return write_exports(editor, options, stability)
    return withhold_exports(editor, options)


def _identity(edit: Edit | EditRecord) -> object:
    """Returns what an edit of a file and an edit of the history have in common if they are the same edit."""
    return edit.prompt, edit.subject, edit.target, edit.weight, edit.join, repr(edit.messages)


def _new_facts(
    editor: Editor, facts: Facts, *, again: bool, retry: bool
) -> tuple[Facts, list[str], list[dict[str, str]]]:
    """Selects the facts that are not in the history, so that an interrupted run can be resumed.

    Args:
        editor: editor with a new or an existing store, or without one.
        facts: facts of the file.
        again: skip only active edits, and apply undone, replaced and skipped ones again.
        retry: also apply active edits again whose target the model did not state.

    Returns:
        The facts to apply; the places of edits that are already active; and `{place, state}` of the other skipped ones.
    """
    states: dict[object, str] = {}
    for r in editor.history():
        asked = _identity(r)
        if states.get(asked) != "active":
            states[asked] = r.state
        if retry and r.state == "active" and not r.success:
            del states[asked]
    found = [states.get(_identity(edit)) for edit in facts.edits]
    if again:
        found = [state if state == "active" else None for state in found]
    known = [place for place, state in zip(facts.places, found, strict=True) if state == "active"]
    past = [
        {"place": place, "state": state}
        for place, state in zip(facts.places, found, strict=True)
        if state not in (None, "active")
    ]
    if known:
        say(f"skipping {len(known)} of {len(facts.edits)} edits that are already active in the store")
    left = [at for at, state in enumerate(found) if state is None]
    kept = replace(facts, places=[facts.places[at] for at in left], edits=[facts.edits[at] for at in left])
    return kept, known, past
