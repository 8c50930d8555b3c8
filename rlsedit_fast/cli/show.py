"""`rlsedit show`: where would this edit go?"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rlsedit_fast.cli import DONE, LEFT_OUT, setup
from rlsedit_fast.cli.facts import FILE_OPTIONS, add_facts, read_facts, sift
from rlsedit_fast.cli.output import add_json, emit
from rlsedit_fast.editing import Edit, Editor
from rlsedit_fast.editing.memory import size
from rlsedit_fast.editing.presets import recognise
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.errors import InputError

HELP = "where edits would go: tokens, layers, shapes, memory; nothing is changed"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    setup.add_model(parser)
    add_facts(parser, required=False)
    one = parser.add_argument_group("one edit, in the place of a file")
    one.add_argument("--prompt", help="with {} where the subject stands")
    one.add_argument("--subject")
    one.add_argument("--target")
    setup.add_settings(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    setup.show_warnings()
    one = (options.prompt, options.subject, options.target)
    if any(one) and (not all(one) or options.edits):
        raise InputError("give --prompt, --subject and --target together, or --edits FILE, or neither")
    ignored = [] if options.edits else [name for name, usual in FILE_OPTIONS.items() if getattr(options, name) != usual]
    if ignored:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        raise InputError(f"{named}: of a file of edits; name one with --edits FILE, or leave it out")
    facts = read_facts(options) if options.edits else None
    editor = setup.make_editor(options)
    if facts:
        facts = sift(editor, facts, options)
    edits = facts.edits if facts else [Edit(*one)] if all(one) else []
    requests = editor.requests(edits) if edits else []
    results: dict[str, Any] = {
        "model": type(editor.model).__name__,
        "preset": getattr(recognise(editor.model.config), "name", None),
        "dtype": str(editor.model.dtype),
        "layers": describe_layers(editor),
        "edits": [_tokens(editor, request) for request in requests],
        "left_out": facts.left_out if facts else [],
    }
    lines = [f"{results['model']}, {results['dtype']}, preset {results['preset'] or 'none: layers by depth'}"]
    lines += layer_lines(results["layers"])
    for shown in results["edits"]:
        lines += ["", f"{shown['prompt']!r} -> {shown['target']!r}", f"  {' '.join(shown['marked'])}"]
        lines.append(f"  edited at token {shown['lookup']} of {len(shown['tokens'])}; target: {shown['target_tokens']}")
    emit(results, lines, options.json)
    return LEFT_OUT if results["left_out"] else DONE


def describe_layers(editor: Editor) -> list[dict[str, Any]]:
    """The edited projections and what each takes."""
    weights = {p.layer: p.weight for p in editor.projections}
    return [
        asdict(layer) | {"shape": list(weights[layer.layer].shape), "dtype": str(weights[layer.layer].dtype)}
        for layer in editor.memory()
    ]


def layer_lines(layers: list[dict[str, Any]]) -> list[str]:
    """The same for a terminal."""
    lines = [
        f"  {layer['name']}  {layer['shape']} {layer['dtype']} on {layer['device']}: "
        f"{size(layer['state'])} beside the model, {size(layer['building'])} more while it is made"
        for layer in layers
    ]
    anchors, per_edit = (size(sum(layer[what] for layer in layers)) for what in ("anchors", "per_edit"))
    lines.append(f"  in the host's memory: {anchors} of anchors, and {per_edit} for each edit that can be taken back")
    return lines


def _tokens(editor: Editor, request: Request) -> dict[str, Any]:
    row = request.contexts[0]
    words = editor.tokenizer.convert_ids_to_tokens(row.ids)
    prompt = words[: row.prompt_length]
    return {
        "prompt": request.asks,
        "subject": request.edit.subject,
        "target": request.edit.target,
        "tokens": prompt,
        "lookup": row.lookup,
        "marked": [f"[{word}]" if at == row.lookup else word for at, word in enumerate(prompt)],
        "target_tokens": words[row.prompt_length :],
    }
