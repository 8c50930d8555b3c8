"""`rlsedit edit`: facts from a file into a model, and the edited model, or its change alone, onto the disk."""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit_fast.cli import DONE, INTERRUPTED, LEFT_OUT, setup
from rlsedit_fast.cli.export import Written, add_exports, check_exports, write_exports
from rlsedit_fast.cli.facts import Facts, add_facts, read_facts, sift
from rlsedit_fast.cli.interrupts import Interrupts, interrupts
from rlsedit_fast.cli.output import add_json, emit, progress, say
from rlsedit_fast.cli.show import describe_layers, layer_lines
from rlsedit_fast.editing import Edit, Editor, EditRecord
from rlsedit_fast.editing.editor import PILOT
from rlsedit_fast.editing.written import record_text
from rlsedit_fast.errors import InputError, listed
from rlsedit_fast.store import Store

if TYPE_CHECKING:
    from rlsedit_fast.evaluation.outcome import Said

HELP = "edit facts from a file into a model"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    setup.add_model(parser)
    add_facts(parser)
    setup.add_settings(parser)
    setup.add_anchors(parser)
    parser.add_argument(
        "--protect",
        type=Path,
        metavar="FILE",
        help="prompts, one a line, whose continuations are to stay; a store's own are passed over",
    )
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="keep the edits there, or go on with those that are there: they outlive a crash and can be taken back. "
        "Edits of the file that the store has already are left as they are, undone and replaced ones among them",
    )
    parser.add_argument(
        "--again", action="store_true", help="tell edits anew that the store has as undone, replaced or skipped"
    )
    add_exports(parser)
    parser.add_argument("--no-evaluation", action="store_true", help="do not ask the model about the edits at the end")
    parser.add_argument(
        "--dry-run", action="store_true", help="read, check, and say what it would take; change nothing"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it. Interrupted, it finishes the batch, writes what was made until then, and says how much that is."""
    setup.show_warnings()
    setup.settle_text(options)
    if options.again and options.store is None:
        raise InputError("--again is about the edits of a store; name --store DIR, or leave it out")
    if not options.dry_run:
        check_exports(options, options.model)
    protected = _prompts(options.protect) if options.protect else []
    facts = read_facts(options)
    if options.dry_run and options.store and not Store.exists(options.store):
        options.store = None
    with setup.make_editor(options) as editor:
        return _run(editor, facts, protected, options)


def _run(editor: Editor, facts: Facts, protected: list[str], options: argparse.Namespace) -> int:
    from rlsedit_fast.evaluation.outcome import ask, outcome

    facts = sift(editor, facts, options)
    facts, known, past = _not_yet_made(editor, facts, again=options.again)
    layers = describe_layers(editor)
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
        "config": asdict(editor.config),
    }
    if options.dry_run:
        lines = [f"{len(facts.edits)} edits would be made; nothing was changed", *_past_lines(past)]
        emit(results, lines, options.json)
        return LEFT_OUT if facts.left_out or past else DONE
    if known_prompts := set(editor.protected).intersection(protected):
        say(f"{len(known_prompts)} of {len(protected)} prompts are protected already, and stay so")
        protected = [prompt for prompt in protected if prompt not in known_prompts]
    if not facts.edits:
        _protect(editor, protected)
        written = _write(editor, options)
        results |= written.told
        lines = [f"all {len(known) + len(past)} edits are in the store already; the model was told nothing"]
        with written.attempt():
            emit(results, lines + _past_lines(past) + written.files, options.json)
        written.raise_failures()
        return LEFT_OUT if facts.left_out or past else DONE
    taken_up = bool(editor.priors)
    if taken_up and (options.statistics or options.text or options.self_generate or options.no_anchors):
        raise InputError(
            f"the store {str(options.store)!r} has its anchors already, which hold for all of its edits; leave out "
            "--statistics, --text, --self-generate and --no-anchors, or make another store"
        )
    results["anchors"] = "the store's" if taken_up else setup.anchor(editor, options)
    _protect(editor, protected)
    before: Said | None = None
    if not options.no_evaluation:
        before = ask(editor.model, editor.tokenizer, facts.edits)
        results["before"] = asdict(outcome(facts.edits, before, before))
    with _warnings_left_to_the_summary():
        priors = editor.priors or editor.calibrate(facts.edits[:PILOT])
    results["priors"] = [{"lam": prior.lam, "mu": prior.mu} for prior in priors]
    with _warnings_left_to_the_summary(), interrupts() as presses:
        made, error = _edit(editor, facts, presses, results)
        if made and before is not None:
            error = _ask(editor, made, before, presses, results) or error
        written = _write(editor, options)
        results |= written.told
        with written.attempt():
            emit(results, _summary(results), options.json)
    if error is not None:
        say(*written.failures)
        raise error
    written.raise_failures()
    if presses.seen:
        return INTERRUPTED
    return LEFT_OUT if facts.left_out or past or results["skipped"] or results["not_stated"] else DONE


def _protect(editor: Editor, prompts: list[str]) -> None:
    if prompts:
        say(f"{editor.protect(prompts)} tokens of {len(prompts)} prompts are protected")


class _Finished(Exception):
    """The batch under way when the user interrupted is written."""


def _edit(
    editor: Editor, facts: Facts, presses: Interrupts, results: dict[str, Any]
) -> tuple[dict[str, Edit], Exception | None]:
    """Makes the edits, batch by batch, and enters what became of them into `results`; those made, by their place."""
    first = len(editor.history())
    error: Exception | None = None
    began = time.perf_counter()
    with presses.patient(1), progress(len(facts.edits), "editing", "edit") as bar:

        def written(made: list[EditRecord]) -> None:
            bar.update(len(made))
            if presses.seen:
                raise _Finished

        try:
            editor.edit(facts.edits, on_batch=written)
        except _Finished:
            pass
        except Exception as trouble:  # whatever it is, the batches before it are made
            error = trouble
    records = editor.history()[first:]
    places = dict(zip((record.id for record in records), facts.places, strict=False))
    results["seconds"] = time.perf_counter() - began
    skipped = {record.id for record in records if record.state == "skipped"}
    results["made"] = len(records) - len(skipped)
    results["skipped"] = [places[i] for i in sorted(skipped)]
    results["not_made"] = facts.places[len(records) :]
    active = [record for record in records if record.state == "active"]
    results["not_converged"] = [places[record.id] for record in active if not record.search_converged]
    results["not_stated"] = [places[record.id] for record in active if not record.success]
    results["records"] = [record_text(record) | {"place": places[record.id]} for record in records]
    results["deviation"] = [asdict(layer) for layer in editor.deviation()]
    made = {
        places[record.id]: edit for edit, record in zip(facts.edits, records, strict=False) if record.id not in skipped
    }
    return made, error


def _ask(
    editor: Editor, made: dict[str, Edit], before: Said, presses: Interrupts, results: dict[str, Any]
) -> Exception | None:
    """Asks the model about the edits that were made, by place; Ctrl-C ends that, and the rest is written without."""
    from rlsedit_fast.evaluation.outcome import ask, outcome, stated

    with presses.patient(0):
        try:
            edits = list(made.values())
            after = ask(editor.model, editor.tokenizer, edits)
            # Of the same edits, where not all of them were made.
            results |= {
                "before": asdict(outcome(edits, before, before)),
                "after": asdict(outcome(edits, after, before)),
            }
            # Later batches may have changed what was measured when an edit was written.
            results["not_stated"] = [place for place, edit in made.items() if not stated(edit, after)]
        except Exception as trouble:
            return trouble
    if "after" not in results:
        say("interrupted: the model is not asked about the edits; writing what was made")
    return None


def _write(editor: Editor, options: argparse.Namespace) -> Written:
    """Writes the exports, where there is a change to write: a store may have edits though this run made none."""
    if any(record.state == "active" for record in editor.history()):
        return write_exports(editor, options)
    if options.out or options.delta or options.adapter:
        say("no edit is active: there is no change to write, and nothing was written")
    return Written()


def _not_yet_made(editor: Editor, facts: Facts, *, again: bool) -> tuple[Facts, list[str], list[dict[str, str]]]:
    """The facts that the history does not have: a run that was cut off goes on, and what was taken back stays so.

    Args:
        editor: of a new store or one that has edits.
        facts: of the file.
        again: only active edits are left out.

    Returns:
        The facts that are left; where those stand that are active; and `{place, state}` of those that are not.
    """
    states: dict[tuple[str, str, str, float], str] = {}
    for r in editor.history():
        asked = (r.prompt, r.subject, r.target, r.weight)
        if states.get(asked) != "active":
            states[asked] = r.state
    found = [states.get((edit.prompt, edit.subject, edit.target, edit.weight)) for edit in facts.edits]
    if again:
        found = [state if state == "active" else None for state in found]
    known = [place for place, state in zip(facts.places, found, strict=True) if state == "active"]
    past = [
        {"place": place, "state": state}
        for place, state in zip(facts.places, found, strict=True)
        if state not in (None, "active")
    ]
    if known:
        say(f"{len(known)} of {len(facts.edits)} edits are in the store already, and stay as they are")
    left = [at for at, state in enumerate(found) if state is None]
    kept = replace(facts, places=[facts.places[at] for at in left], edits=[facts.edits[at] for at in left])
    return kept, known, past


def _past_lines(past: list[dict[str, str]]) -> list[str]:
    if not past:
        return []
    counts = Counter(entry["state"] for entry in past)
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return [f"{len(past)} edits stay what the store's history has them as ({told}); --again tells them anew"]


def _summary(results: dict[str, Any]) -> list[str]:
    made, seconds = results["made"], results["seconds"]
    lines = [f"{made} of {results['edits']} edits made in {seconds:.1f} s"]
    for what, count in (
        ("not made, since the run ended before them", len(results["not_made"])),
        ("skipped, since their value search had not converged", len(results["skipped"])),
        ("made though their value search had found no value that states the target", len(results["not_converged"])),
        ("records left out of the file", len(results["left_out"])),
    ):
        if count:
            lines.append(f"{count} {what}")
    if failed := results["not_stated"]:
        lines.append(
            f"{made - len(failed)} of {made} are stated by the model now, {len(failed)} are not: "
            f"{', '.join(listed(map(str, failed), 10))}"
        )
        lines.append("to state more: a higher --adherence, more text for the anchors, or fewer edits of one kind")
    lines += _past_lines(results["left_as_they_became"])
    if "after" in results:
        lines.append(f"{'':44}{'before':>8}{'after':>8}")
        for name, what in (
            ("efficacy", "targets said, every token ranked first"),
            ("generalization", "the same after paraphrases"),
            ("specificity", "neighbourhood prompts unchanged"),
        ):
            was, now = (results[when][name] for when in ("before", "after"))
            if now["of"]:
                lines.append(f"{what:44}{was['count'] / was['of']:8.3f}{now['count'] / now['of']:8.3f}  of {now['of']}")
    for layer in results["deviation"]:
        lines.append(f"layer {layer['layer']}: ||W - W0|| = {layer['weight']:.4g}, bound {layer['weight_bound']:.4g}")
    return lines + results["files"]


@contextmanager
def _warnings_left_to_the_summary() -> Iterator[None]:
    """What the editor warns of batch by batch is told once, at the end."""
    logger = logging.getLogger("rlsedit_fast.editing.editor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines(): texts may hold U+2028 and its like
        prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--protect {path}: cannot be read as UTF-8 text ({error})") from error
    if not prompts:
        raise InputError(f"--protect {path}: no prompt in it; expected one a line")
    return prompts
