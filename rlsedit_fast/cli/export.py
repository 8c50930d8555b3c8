"""`rlsedit export`: what distinguishes an edited checkpoint from its base, as a delta or a LoRA adapter."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlsedit_fast.cli import DONE, setup, unforeseen
from rlsedit_fast.cli.output import add_json, emit, say
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.cli.words import spoken
from rlsedit_fast.editing import Editor
from rlsedit_fast.errors import InputError, RLSEditError
from rlsedit_fast.export import AdapterReport, changes_between, write_adapter, write_delta
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.store import Store

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
        raise InputError("name what is to be written, --delta FILE or --adapter DIR")
    _check_new(options)
    check_places(options, folders=("adapter",), files=("delta", "json"))
    base, _ = setup.load_model(options)
    edited, _ = setup.load_model(options, options.edited)
    changes = changes_between(base, edited)
    written = Written()
    results: dict[str, Any] = {"changed": [change.name for change in changes]}
    if options.delta:
        with written.attempt(f"--delta {options.delta}"):
            write_delta(changes, options.delta, base_fingerprint=fingerprint(base))
            written.files.append(f"delta: {options.delta}")
    if options.adapter:
        if edited.dtype != torch.float32:
            say(
                f"{edited.dtype} checkpoints hold rounded weights, whose difference is of almost full rank; `rlsedit "
                "edit --adapter` writes the exact one, of as many ranks as there are edits"
            )
        with written.attempt(f"--adapter {options.adapter}"):
            report = write_adapter(changes, options.adapter, rank=options.rank, base_model=str(options.model))
            results["adapter"] = asdict(report)
            written.files += adapter_lines(report, options.adapter)
    with written.attempt():
        emit(results | written.told, written.files, options.json)
    written.raise_failures()
    return DONE


@dataclass
class Written:
    """What became of the files that a command was to write, each of which is tried whatever becomes of the others.

    Attributes:
        files: a line for each that is there.
        failures: a reason for each that is not.
    """

    files: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str = "") -> Iterator[None]:
        """Within it an error becomes a failure; where no `what` is named, only one that says itself what failed."""
        try:
            yield
        except RLSEditError as error:
            self.failures.append(f"{what}: {spoken(error)}" if what else spoken(error))
        except Exception as error:
            if not what:
                raise
            self.failures.append(f"{what}: not written, or not whole: {unforeseen(error)}")

    @property
    def told(self) -> dict[str, list[str]]:
        """The same for JSON."""
        return {"files": self.files, "not_written": self.failures}

    def raise_failures(self) -> None:
        """Raises InputError where there are failures."""
        if self.failures:
            raise InputError("\n".join(self.failures))


def add_exports(parser: argparse.ArgumentParser) -> None:
    """Options that say where an edited model goes."""
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="an ordinary checkpoint")
    _add_partial(parser)


def check_exports(options: argparse.Namespace, model: str) -> None:
    """Before the work: there is somewhere to put it, and nothing in its place.

    Raises:
        InputError: no output was named, or one exists already or cannot be made.
    """
    if not (options.out or options.delta or options.adapter or options.store):
        raise InputError(
            "name where the edited model goes: --out DIR (a checkpoint), --delta FILE or --adapter DIR, or --store DIR "
            "to keep the edits and be able to take them back; --dry-run changes nothing"
        )
    if options.out is not None:
        check_checkpoint(options.out, model)
    _check_new(options)
    _check_places(options)


def check_named_exports(options: argparse.Namespace) -> None:
    """The same where nothing need be named: there is nothing in the place of what is.

    Raises:
        InputError: one exists already or cannot be made.
    """
    if options.out is not None:
        _check_absent("--out", options.out)
    _check_new(options)
    _check_places(options)


def check_checkpoint(out: Path, model: str) -> None:
    """Raises InputError if there is something where a checkpoint is to go, the model itself above all."""
    if Path(model).exists() and out.resolve() == Path(model).resolve():
        raise InputError(f"--out {out} is the model itself; name another folder")
    _check_absent("--out", out)


def write_exports(editor: Editor, options: argparse.Namespace) -> Written:
    """Writes what was named; of a model that no edit is active in, a checkpoint alone."""
    written = Written()
    active = any(record.state == "active" for record in editor.history())
    if not active and (options.delta or options.adapter):
        say("no edit is active: there is no change to write, and no delta or adapter was written")
    if options.out is not None:
        with written.attempt(f"--out {options.out}"):
            editor.save_pretrained(options.out)
            written.files.append(f"checkpoint: {options.out}")
    if options.delta is not None and active:
        with written.attempt(f"--delta {options.delta}"):
            editor.save_delta(options.delta)
            written.files.append(f"delta: {options.delta}")
    if options.adapter is not None and active:
        with written.attempt(f"--adapter {options.adapter}"):
            written.files += adapter_lines(editor.save_adapter(options.adapter, rank=options.rank), options.adapter)
    if written.failures and options.store:
        again = f"rlsedit edit --store {options.store}"
        written.failures.append(
            f"the edits are in the store; `{again}` with the same facts and another place writes them"
        )
    return written


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
    if options.rank is not None and options.rank < 1:
        raise InputError(f"--rank {options.rank}: expected at least 1, or no --rank for an exact adapter")


def _check_absent(name: str, path: Path) -> None:
    with suppress(OSError):  # a path that cannot even be looked at is told when it is tried
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{name} {path} exists already; name another, or remove it")


def _check_places(options: argparse.Namespace) -> None:
    folders = ("out", "adapter") if options.store and Store.exists(options.store) else ("out", "adapter", "store")
    check_places(options, folders=folders, files=("delta", "json"))
