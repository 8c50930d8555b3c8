"""`rlsedit export`: what distinguishes an edited checkpoint from its base, as a delta or a LoRA adapter."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlsedit_fast.cli import setup
from rlsedit_fast.cli.output import add_json, emit, say
from rlsedit_fast.editing import Editor
from rlsedit_fast.errors import InputError
from rlsedit_fast.export import AdapterReport, changes_between, write_adapter, write_delta
from rlsedit_fast.models.fingerprint import fingerprint

HELP = "from a base and an edited checkpoint: the delta alone, or a LoRA adapter"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    setup.add_model(parser)
    parser.add_argument("--edited", required=True, help="the edited checkpoint; --model is its base")
    _add_partial(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs it."""
    if not (options.delta or options.adapter):
        raise InputError("export: name what is to be written, --delta FILE or --adapter DIR")
    _check_new(options)
    base, _ = setup.load_model(options)
    edited, _ = setup.load_model(options, options.edited)
    changes = changes_between(base, edited)
    files: list[str] = []
    results: dict[str, Any] = {"changed": [change.name for change in changes]}
    if options.delta:
        write_delta(changes, options.delta, base_fingerprint=fingerprint(base))
        files.append(f"delta: {options.delta}")
    if options.adapter:
        if edited.dtype != torch.float32:
            say(
                f"{edited.dtype} checkpoints hold rounded weights, whose difference is of almost full rank; `rlsedit "
                "edit --adapter` writes the exact one, of as many ranks as there are edits"
            )
        report = write_adapter(changes, options.adapter, rank=options.rank, base_model=str(options.model))
        results["adapter"] = asdict(report)
        files += adapter_lines(report, options.adapter)
    emit(results | {"files": files}, files, options.json)
    return 0


def add_exports(parser: argparse.ArgumentParser) -> None:
    """Options that say where an edited model goes."""
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="an ordinary checkpoint")
    _add_partial(parser)


def check_exports(options: argparse.Namespace, model: str) -> None:
    """Before the work: there is somewhere to put it, and nothing in its place.

    Raises:
        InputError: no output was named, or one exists already.
    """
    if not (options.out or options.delta or options.adapter or options.store):
        raise InputError(
            "name where the edited model goes: --out DIR (a checkpoint), --delta FILE or --adapter DIR, or --store DIR "
            "to keep the edits and be able to take them back; --dry-run changes nothing"
        )
    if options.out is not None:
        check_checkpoint(options.out, model)
    _check_new(options)


def check_named_exports(options: argparse.Namespace) -> None:
    """The same where nothing need be named: there is nothing in the place of what is.

    Raises:
        InputError: one exists already.
    """
    if options.out is not None:
        _check_absent("--out", options.out)
    _check_new(options)


def check_checkpoint(out: Path, model: str) -> None:
    """Raises InputError if there is something where a checkpoint is to go, the model itself above all."""
    if Path(model).exists() and out.resolve() == Path(model).resolve():
        raise InputError(f"--out {out} is the model itself; name another folder")
    _check_absent("--out", out)


def write_exports(editor: Editor, options: argparse.Namespace) -> list[str]:
    """Writes what was named; a line for each."""
    lines = []
    if options.out is not None:
        editor.save_pretrained(options.out)
        lines.append(f"checkpoint: {options.out}")
    if options.delta is not None:
        editor.save_delta(options.delta)
        lines.append(f"delta: {options.delta}")
    if options.adapter is not None:
        lines += adapter_lines(editor.save_adapter(options.adapter, rank=options.rank), options.adapter)
    return lines


def adapter_lines(report: AdapterReport, directory: Path) -> list[str]:
    """Where the adapter is, and what it leaves of each change."""
    lines = [f"adapter: {directory}"]
    lines += [
        f"  {module.name}: rank {module.used} of {module.needed}, relative error {module.error:.2g}"
        for module in report.modules
    ]
    return lines


def _add_partial(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the change alone")
    group.add_argument("--delta", type=Path, metavar="FILE", help="safetensors, for `rlsedit apply`")
    group.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter that peft loads")
    group.add_argument("--rank", type=int, help="of the adapter; by default what makes it exact")


def _check_new(options: argparse.Namespace) -> None:
    for name, path in (("--delta", options.delta), ("--adapter", options.adapter)):
        if path is not None:
            _check_absent(name, path)
    if options.rank is not None and options.adapter is None:
        raise InputError("--rank is of an adapter; name --adapter DIR too")


def _check_absent(name: str, path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{name} {path} exists already; name another, or remove it")
