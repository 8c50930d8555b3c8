"""`rlsedit show`: show the token and the layers that an edit changes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlsedit_fast.baselines.memory import LayerMemory, size
from rlsedit_fast.cli import DONE, PARTIAL, setup
from rlsedit_fast.cli.devices import add_devices, device_lines, plan_devices
from rlsedit_fast.cli.facts import Facts, add_facts, facts_given, read_facts, sift
from rlsedit_fast.cli.output import add_json, emit
from rlsedit_fast.cli.stores import use_recorded_model
from rlsedit_fast.editing import Editor
from rlsedit_fast.editing.context import plan_layers, rows_per_edit
from rlsedit_fast.editing.presets import find_preset
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.errors import InputError, counted
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.models.loading import empty_model
from rlsedit_fast.models.tokens import fill

HELP = "show the tokens and layers that edits would change, and the memory needed; the model is not modified"
ABOUT = (
    "Show the token and the layers that each edit would change, and the memory needed; the model is not modified. With "
    "--store, also show how much of the key of each edit the edits of the store already use (used share): an edit with "
    "a large one repeats or contradicts an earlier edit, although their texts differ."
)
USAGE = "{--model MODEL | --store DIR} [--edits FILE | --prompt TEXT --subject TEXT --target TEXT] [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    setup.add_model(parser, required=False)
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="folder of earlier edits, with which the edits are compared"
    )
    add_facts(parser, required=False, single=True)
    setup.add_settings(parser)
    add_devices(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    setup.show_warnings()
    facts = read_facts(options) if facts_given(options) else None
    if options.store is not None:
        if facts is None:
            raise InputError(
                "--store compares planned edits with those of the store; pass --edits FILE or a single edit"
            )
        use_recorded_model(options)
    elif options.model is None:
        raise InputError("pass --model MODEL, or --store DIR to compare planned edits with those of a store")
    if options.devices or without_weights(options.model):
        return _show_plan(options, facts)
    plan = setup.plan_editor(options)
    if facts:
        facts = sift(facts, plan, options)
    with plan.load() as editor:
        return _show(editor, facts, options)


def _show(editor: Editor, facts: Facts | None, options: argparse.Namespace) -> int:
    requests = editor.context.prepare(facts.edits) if facts else []
    overlaps = editor.overlaps(facts.edits) if facts and options.store is not None else []
    results: dict[str, Any] = {
        "model": type(editor.model).__name__,
        "preset": getattr(find_preset(editor.model.config), "name", None),
        "dtype": str(editor.model.dtype),
        "layers": describe_layers(editor.context.projections, editor.context.memory()),
        "edits": [_tokens(editor, request) for request in requests],
        "left_out": facts.left_out if facts else [],
    }
    lines = [f"{results['model']}, {results['dtype']}, preset {results['preset'] or 'none (layers chosen by depth)'}"]
    lines += layer_lines(results["layers"])
    for shown, overlap in zip(results["edits"], overlaps, strict=False):
        shown["overlap"] = asdict(overlap)
    for shown in results["edits"]:
        lines += ["", f"{shown['prompt']!r} -> {shown['target']!r}", f"  {' '.join(shown['marked'])}"]
        lines.append(f"  edited at token {shown['lookup']} of {len(shown['tokens'])}; target: {shown['target_tokens']}")
        if overlap := shown.get("overlap"):
            lines.append(f"  used share of its key: {overlap['used']:.3f}{_flag(editor, overlap)}")
    if flagged := sum(overlap.flagged for overlap in overlaps):
        lines += ["", f"{counted(flagged, 'edit')} of {len(overlaps)} repeat or contradict edits of the store"]
    emit(results, lines, options.json)
    return PARTIAL if results["left_out"] else DONE


def _flag(editor: Editor, overlap: dict[str, Any]) -> str:
    """Describes an overlap that is flagged."""
    if not overlap["flagged"]:
        return ""
    if overlap["nearest"] is None:
        return "; it repeats or contradicts an earlier edit"
    earlier = editor.history()[overlap["nearest"] - 1]
    return (
        f"; it repeats or contradicts an earlier edit, probably {earlier.id}: "
        f"{fill(earlier.prompt, earlier.subject)[0]!r} -> {earlier.target!r}"
    )


def without_weights(path: str) -> bool:
    """Returns whether a folder contains the config of a model and no weights."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return False
    return not any(file for kind in ("*.safetensors", "*.bin", "*.pt", "*.gguf") for file in folder.glob(kind))


def _show_plan(options: argparse.Namespace, facts: object) -> int:
    """Shows the layers and the memory for a folder without weights, or those of each of several devices."""
    if facts and options.devices:
        raise InputError("--devices reads only the config of the model, so edits cannot be shown; omit them")
    if facts:
        raise InputError(f"model {options.model!r}: the folder has no weights, so edits cannot be shown; omit them")
    config = setup.make_config(options, None)
    model = empty_model(options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    projections, memory = plan_layers(model, config)
    results: dict[str, Any] = {
        "model": type(model).__name__,
        "preset": getattr(find_preset(model.config), "name", None),
        "dtype": str(model.dtype),
        "layers": describe_layers(projections, memory),
    }
    if options.devices:
        edits = config.batch_size
        rows = edits * rows_per_edit(config)
        results["plan"] = plan_devices(model, projections, config, options.devices, edits=edits, rows=rows)
        lines = [f"{results['model']}, {results['dtype']}; a plan from the config"]
        lines += [f"  {layer['name']}  {layer['shape']}" for layer in results["layers"]]
        lines += device_lines(results["plan"])
    else:
        lines = [f"{results['model']}, {results['dtype']}; the folder has no weights, so this is a plan"]
        lines += layer_lines(results["layers"])
    emit(results, lines, options.json)
    return DONE


def describe_layers(projections: Sequence[Projection], memory: Sequence[LayerMemory]) -> list[dict[str, Any]]:
    """Returns the edited projections with shape, dtype, device and memory in bytes."""
    return [asdict(layer) | _described(projection) for layer, projection in zip(memory, projections, strict=True)]


def _described(projection: Projection) -> dict[str, Any]:
    """Returns shape, dtype and, for a mixture of experts, its numbers of experts."""
    layout = projection.layout
    found: dict[str, Any] = {"shape": [projection.value_width, projection.blocks[0].shape[1]]}
    found["dtype"] = str(projection.dtype)
    if layout is not None:
        found |= {"experts": layout.experts, "active": layout.active, "shared": layout.shared}
    return found


def layer_lines(layers: list[dict[str, Any]]) -> list[str]:
    """Formats the result of `describe_layers` as text."""
    lines = [
        f"  {layer['name']}  {_experts(layer)}{layer['shape']} {layer['dtype']} on {layer['device']}: "
        f"state {'up to ' * ('experts' in layer)}{size(layer['state'])}, "
        f"plus {size(layer['building'])} while it is built"
        for layer in layers
    ]
    lines += [
        f"  {layer['name']}: each edit adds {size(layer['applied'])}, and {size(layer['pairs'])} per pair of edits "
        f"(1,000 edits: {size(1000 * layer['applied'] + 10**6 * layer['pairs'])})"
        for layer in layers
        if layer["applied"]
    ]
    anchors, per_edit = (size(sum(layer[what] for layer in layers)) for what in ("anchors", "per_edit"))
    lines.append(f"  host memory: {anchors} for anchors, {per_edit} per undoable edit")
    return lines


def _experts(layer: dict[str, Any]) -> str:
    if "experts" not in layer:
        return ""
    shared = " and a shared one" if layer["shared"] else ""
    return f"{layer['experts']} experts, {layer['active']} per token{shared}, "


def _tokens(editor: Editor, request: Request) -> dict[str, Any]:
    row = request.contexts[0]
    words = editor.tokenizer.convert_ids_to_tokens(row.ids)
    prompt = words[: row.prompt_length]
    return {
        "prompt": request.prompt_key,
        "subject": request.edit.subject,
        "target": request.edit.target,
        "tokens": prompt,
        "lookup": row.lookup,
        "marked": [f"[{word}]" if at == row.lookup else word for at, word in enumerate(prompt)],
        "target_tokens": words[row.prompt_length :],
    }
