"""`rlsedit export`: write the present state of a store, or the difference of an edited checkpoint and its base."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import gettempdir
from typing import Any, get_args

import torch

from rlsedit_fast.cli import DONE, PARTIAL, setup, unexpected
from rlsedit_fast.cli.output import add_json, emit, say, working
from rlsedit_fast.cli.places import check_places
from rlsedit_fast.editing import Editor
from rlsedit_fast.editing.methods.exports import GgufReport
from rlsedit_fast.errors import InputError, RLSEditError, counted, listed
from rlsedit_fast.export import (
    AdapterReport,
    CheckpointReport,
    Engine,
    WeightChange,
    changes_between,
    write_adapter,
    write_delta,
    write_patch,
)
from rlsedit_fast.export.engines import check_engine
from rlsedit_fast.export.gguf import AUTO, TYPES
from rlsedit_fast.logs import warnings_silenced
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.gguf_files import SUFFIX, is_gguf
from rlsedit_fast.models.loading import load_config
from rlsedit_fast.processes import world
from rlsedit_fast.store import Store

WRITER = "rlsedit_fast.export.checkpoint"
"""Logger of warnings that the lines of a `CheckpointReport` contain."""

HELP = "write the edited model of a store, or the difference of an edited checkpoint and its base"
USAGE = (
    "(--store DIR | --model BASE --edited MODEL) [--out DIR|FILE.gguf] [--delta FILE] [--adapter DIR] [--patch FILE] "
    "[options]"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--store", type=Path, metavar="DIR", help="store whose active edits are exported")
    parser.add_argument("--edited", metavar="MODEL", help="instead of --store: edited checkpoint; --model is its base")
    setup.add_model(parser, required=False, divided=True)
    add_exports(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    setup.show_warnings()
    if (options.store is None) == (options.edited is None):
        raise InputError("pass either --store DIR, or --edited MODEL with --model BASE")
    if not (options.out or options.delta or options.adapter or options.patch):
        raise InputError(
            "no output given; pass --out DIR (checkpoint), --out FILE.gguf, --delta FILE, --adapter DIR or --patch FILE"
        )
    if options.edited is not None and options.model is None:
        raise InputError("--edited requires --model BASE, the model before the edits; add it")
    if options.edited is not None and options.out is not None:
        raise InputError("--out requires --store; the edited checkpoint of --edited exists already")
    if options.edited is not None and (options.tp is not None or options.dp is not None):
        raise InputError("--tp and --dp require --store; --edited compares two models in one process")
    check_named_exports(options, options.model or "")
    return _export_store(options) if options.store is not None else _export_difference(options)


def _export_store(options: argparse.Namespace) -> int:
    from rlsedit_fast.cli.stores import open_editor

    with open_editor(options) as editor:
        check_gguf_export(editor, options)
        written = write_exports(editor, options)
        active = sum(record.state == "active" for record in editor.history())
    lines = [counted(active, "active edit"), *written.files]
    with written.attempt():
        emit({"active": active} | written.to_json, lines, options.json)
    written.raise_failures()
    return PARTIAL if written.lost else DONE


def _export_difference(options: argparse.Namespace) -> int:
    paths = (options.model, options.edited)
    configs = [setup.check_model(options, path=path) for path in paths]
    base, edited = (
        setup.load_model(options, path, config=config)[0] for path, config in zip(paths, configs, strict=True)
    )
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
                f"warning: the difference of {edited.dtype} checkpoints includes rounding and has almost full rank; "
                "`rlsedit edit --adapter` writes an exact adapter whose rank is at most the number of edits"
            )
        with written.attempt(f"--adapter {options.adapter}"):
            report = write_adapter(
                changes, options.adapter, rank=options.rank, base_model=str(options.model), engine=options.engine
            )
            results["adapter"] = asdict(report)
            written.files += adapter_lines(report, options.adapter)
    if options.patch:
        _write_patch(changes, options.patch, fingerprint(base), written)
    with written.attempt():
        emit(results | written.to_json, written.files, options.json)
    written.raise_failures()
    return DONE


@dataclass
class Written:
    """Collects the outcome of several file writes; one failure does not prevent the others.

    Attributes:
        files: one line per written file.
        failures: one reason per file that could not be written.
        gguf: the GGUF file, if one was written.
        checkpoint: the checkpoint, if one was written.
        withheld: options whose output was not written, because the gates did not pass.
        kept: where the edits are, if outputs are withheld.
    """

    files: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    gguf: GgufReport | None = None
    checkpoint: CheckpointReport | None = None
    withheld: list[str] = field(default_factory=list)
    kept: str = ""

    @property
    def lines(self) -> list[str]:
        """Written files, and what is withheld."""
        if not self.withheld:
            return self.files
        return [*self.files, f"not written, because the gates did not pass: {', '.join(self.withheld)}", self.kept]

    @property
    def lost(self) -> list[int]:
        """Ids of the edits that the quantization of a GGUF file lost."""
        return self.gguf.lost if self.gguf else []

    @contextmanager
    def attempt(self, what: str = "") -> Iterator[None]:
        """Turns errors inside the block into failures; with an empty `what`, only `RLSEditError`."""
        try:
            yield
        except RLSEditError as error:
            self.failures.append(f"{what}: {error}" if what else str(error))
        except Exception as error:
            if not what:
                raise
            self.failures.append(f"{what}: not written or incomplete: {unexpected(error)}")

    def add_checkpoint(self, report: CheckpointReport) -> None:
        """Adds a checkpoint that was written."""
        self.checkpoint = report
        self.files += report.lines

    def holds(self, option: str, options: argparse.Namespace) -> bool:
        """Returns whether the output of an option is given and was written."""
        given = getattr(options, option.lstrip("-")) is not None
        return given and not any(failure.startswith(f"{option} ") for failure in self.failures)

    @property
    def to_json(self) -> dict[str, Any]:
        """Files and failures, JSON-serializable."""
        gguf = {"gguf": asdict(self.gguf) | {"lost": self.lost}} if self.gguf else {}
        checkpoint = {"checkpoint": asdict(self.checkpoint)} if self.checkpoint else {}
        files = [line for line in self.files if not line.startswith(" ")]  # without details
        withheld = {"withheld": self.withheld, "kept": self.kept} if self.withheld else {}
        return {"files": files, "not_written": self.failures} | gguf | checkpoint | withheld

    def raise_failures(self) -> None:
        """Raises InputError if there are failures."""
        if self.failures:
            raise InputError("\n".join(self.failures))


def add_exports(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the output of an edited model."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR|FILE.gguf",
        help="folder for the complete edited checkpoint; or, if --model is a GGUF file, edited copy of that file",
    )
    group.add_argument(
        "--gguf-type",
        choices=TYPES,
        metavar="TYPE",
        help=f"type of the edited tensors in a GGUF file: {', '.join(TYPES)}. auto (default): their own type if no "
        "edit is lost with it, and otherwise the smallest of Q8_0, F16 and F32 with which none is lost",
    )
    add_overwrite(group)
    _add_difference(parser)


def add_overwrite(parser: argparse._ActionsContainer) -> None:
    """Adds the option --overwrite."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace existing outputs, once the new ones are complete (default: an existing output is an error)",
    )


def check_exports(options: argparse.Namespace, model: str) -> None:
    """Checks before the work that an output is given and that every output can be created.

    Raises:
        InputError: no output is given, or one already exists or cannot be created.
    """
    if not (options.out or options.delta or options.adapter or options.patch or options.store):
        raise InputError(
            "no output given; pass --out DIR (checkpoint) or FILE.gguf, --delta FILE, --adapter DIR, or --store DIR "
            "(keeps the edits and allows undo), or check the edits with --dry-run"
        )
    check_named_exports(options, model)


def check_named_exports(options: argparse.Namespace, model: str) -> None:
    """Checks like `check_exports`, but no output is required.

    Raises:
        InputError: an output already exists or cannot be created.
    """

    def check() -> None:
        if options.out is not None:
            check_checkpoint(options.out, model, overwrite=options.overwrite)
        _check_new(options)
        _check_places(options)

    world().lead(check)  # another process would see what this one creates for a moment


def check_checkpoint(out: Path, model: str, *, overwrite: bool) -> None:
    """Raises InputError if the output is the model itself, cannot be made of it, or exists and may not be replaced."""
    if is_gguf_output(out) and model and not is_gguf(model):
        raise InputError(
            f"--out {out}: a GGUF file is written as an edited copy of the GGUF file of the model, and {model} is "
            "not one; pass --model FILE.gguf, or write a folder and convert it with convert_hf_to_gguf.py of llama.cpp"
        )
    if is_gguf_output(out) and model and out.exists() and Path(model).exists() and out.samefile(model):
        raise InputError(f"--out {out} is the file of the model; choose another file")
    if model and Path(model).exists() and out.resolve() == Path(model).resolve():
        raise InputError(f"--out {out} is the folder of the model; choose another folder")
    _check_absent("--out", out, overwrite=overwrite)


def write_exports(editor: Editor, options: argparse.Namespace, stability: Mapping[str, Any] | None = None) -> Written:
    """Writes the outputs given by the options; delta and adapter only if an edit is active.

    Args:
        editor: the editor.
        options: the options.
        stability: measurements on other text, for the model card.
    """
    written = Written()
    active = any(record.state == "active" for record in editor.history())
    if not active and (options.delta or options.adapter or options.patch):
        say("no edit is active: no delta or adapter was written")
    if options.out is not None and is_gguf_output(options.out):
        with written.attempt(f"--out {options.out}"), working("writing the GGUF file and measuring the edits in it"):
            written.gguf = editor.save_gguf(
                options.out, tensor_type=options.gguf_type or AUTO, overwrite=options.overwrite
            )
            written.files += gguf_lines(written.gguf)
    elif options.out is not None:
        with written.attempt(f"--out {options.out}"), warnings_silenced(WRITER):
            written.add_checkpoint(
                editor.save_pretrained(options.out, overwrite=options.overwrite, stability=stability)
            )
    if options.delta is not None and active:
        with written.attempt(f"--delta {options.delta}"):
            editor.save_delta(options.delta, overwrite=options.overwrite)
            written.files.append(f"delta: {options.delta}")
    if options.adapter is not None and active:
        with written.attempt(f"--adapter {options.adapter}"):
            report = editor.save_adapter(
                options.adapter, rank=options.rank, engine=options.engine, overwrite=options.overwrite
            )
            written.files += adapter_lines(report, options.adapter)
    if options.patch is not None and active:
        _write_patch(editor.changes(), options.patch, editor.fingerprint(), written)
    if written.failures and options.store:
        command = f"rlsedit export --store {options.store}"
        written.failures.append(f"the edits are stored; run `{command}` with another output path to write them")
    elif active and written.failures and not any(written.holds(f"--{name}", options) for name in ("out", "delta")):
        written.failures.append(_rescue(editor, options))
    return written


def withhold_exports(editor: Editor, options: argparse.Namespace) -> Written:
    """Writes none of the outputs given by the options; without a store, keeps the active edits in a delta.

    Args:
        editor: the editor.
        options: the options.

    Returns:
        The options whose output is missing, and how to write it.
    """
    given = {name: getattr(options, name) for name in ("out", "delta", "adapter", "patch")}
    withheld = {f"--{name}": str(path) for name, path in given.items() if path is not None}
    if options.store:
        settings = {"--gguf-type": options.gguf_type, "--rank": options.rank, "--for": options.engine}
        named = withheld | {name: str(value) for name, value in settings.items() if value is not None}
        words = [*(part for pair in named.items() for part in pair), *(["--overwrite"] if options.overwrite else [])]
        command = shlex.join(["rlsedit", "export", "--store", str(options.store), *words])
        kept = f"the edits are stored; `{command}` writes them nevertheless"
    else:
        kept = _rescue(editor, options)
    return Written(withheld=[f"{name} {path}" for name, path in withheld.items()], kept=kept)


def _rescue(editor: Editor, options: argparse.Namespace) -> str:
    """Writes the edits without a store into a delta file of another name, and returns what to do with it."""
    outputs = [path for path in (options.out, options.delta, options.adapter, options.patch) if path is not None]
    places = [*(path.absolute().parent for path in outputs), Path.cwd(), Path(gettempdir())]
    name = f"{outputs[0].stem or 'edits'}-{datetime.now():%Y%m%d-%H%M%S}.delta.safetensors"
    reasons = list[str]()
    for kept in (place / name for place in dict.fromkeys(places)):
        try:
            editor.save_delta(kept)
            break
        except (RLSEditError, OSError) as error:
            reasons.append(f"{kept}: {error}")
    else:
        return "the edits could not be written as a delta either: " + "; ".join(reasons)
    command = f"rlsedit apply --model {options.model} --delta {kept} --out DIR"
    return f"the edits are in the delta {kept}; `{command}` writes the edited model from it"


def is_gguf_output(out: Path | None) -> bool:
    """Returns whether --out names a GGUF file."""
    return out is not None and out.suffix.lower() == SUFFIX


def check_gguf_export(editor: Editor, options: argparse.Namespace) -> None:
    """Checks before the work that the edited weights can be written into a GGUF file, if one is the output.

    Raises:
        InputError: the model was not loaded from a GGUF file, or a tensor cannot be written with the type.
        ModelError: the file has no tensor for an edited module.
    """
    if is_gguf_output(options.out):
        editor.check_gguf(tensor_type=options.gguf_type or AUTO)


def gguf_lines(report: GgufReport) -> list[str]:
    """Returns the path of a GGUF file, one line per changed tensor, and what quantization did to the edits."""
    lines = [f"GGUF file: {report.path}"]
    if not report.tensors:
        return [*lines, f"  no weight differs: the file is a copy of {report.source}"]
    lines += [
        f"  {one.name}: {one.type if one.type == one.type_before else f'{one.type} (before {one.type_before})'}, error "
        f"of quantization {one.error:.2g} of the change"
        for one in report.tensors
    ]
    lines += [f"  {types} was not used: {counted(lost, 'edit')} would be lost" for types, lost in report.tried.items()]
    stated = sum(edit.rank == 1 for edit in report.edits)
    before = sum(edit.rank_before == 1 for edit in report.edits)
    lines.append(f"  the written weights state {stated} of {len(report.edits)} active edits, the model {before}")
    if report.lost:
        ids = ", ".join(listed(report.lost, 20))
        lines.append(f"  lost by quantization: edits {ids}; --gguf-type auto chooses a larger type")
    return lines


def adapter_lines(report: AdapterReport, directory: Path) -> list[str]:
    """Returns the path of the adapter and one line per module with rank and relative error."""
    lines = [f"adapter: {directory}, rank {report.rank}"]
    lines += [
        f"  {module.name}: rank {module.used} of {module.needed}, relative error {module.error:.2g}"
        for module in report.modules
    ]
    return lines


def _write_patch(changes: list[WeightChange], path: Path, base_fingerprint: str, written: Written) -> None:
    with written.attempt(f"--patch {path}"):
        patches = world().lead(lambda: write_patch(changes, path, base_fingerprint=base_fingerprint))
        entries = sum(patch.full_shape[0] * patch.full_shape[1] for patch in patches)
        changed = sum(len(patch.indices) for patch in patches)
        written.files.append(f"patch: {path}, {changed:,} of {entries:,} entries of {counted(len(patches), 'weight')}")


def _add_difference(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output of the weight change only")
    group.add_argument(
        "--delta", type=Path, metavar="FILE", help="delta file (safetensors), to be applied with `rlsedit apply`"
    )
    group.add_argument("--adapter", type=Path, metavar="DIR", help="folder for a LoRA adapter in PEFT format")
    group.add_argument(
        "--rank",
        type=setup.at_least_one,
        metavar="R",
        help="maximum rank of the adapter (default: as high as needed to be exact)",
    )
    group.add_argument(
        "--for",
        dest="engine",
        choices=get_args(Engine),
        help="server of the adapter: vllm pads the rank with zeros to the next value of its --max-lora-rank",
    )
    group.add_argument(
        "--patch",
        type=Path,
        metavar="FILE",
        help="sparse patch (safetensors): changed entries by position in the checkpoint, for vLLM",
    )


def _check_new(options: argparse.Namespace) -> None:
    for name, path in (("--delta", options.delta), ("--adapter", options.adapter), ("--patch", options.patch)):
        if path is not None:
            _check_absent(name, path, overwrite=options.overwrite)
    if options.rank is not None and options.adapter is None:
        raise InputError("--rank requires --adapter DIR; add it or omit --rank")
    if options.engine is not None and options.adapter is None:
        raise InputError(f"--for {options.engine} requires --adapter DIR; add it or omit --for")
    if options.gguf_type is not None and not is_gguf_output(options.out):
        raise InputError("--gguf-type requires --out FILE.gguf; add it or omit --gguf-type")
    if options.engine is not None and options.model is not None:
        config = load_config(options.model, trust_remote_code=options.trust_remote_code)
        check_engine(options.engine, next(iter(config.architectures or []), ""))


def _check_absent(name: str, path: Path, *, overwrite: bool) -> None:
    with suppress(OSError):  # an inaccessible path is reported when it is created
        is_file = name in ("--delta", "--patch") or is_gguf_output(path)
        if overwrite and path.exists() and path.is_dir() == is_file:
            raise InputError(f"{name} {path} is a {'folder' if path.is_dir() else 'file'}; choose another path")
        if not overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{name} {path} already exists; choose another path or pass --overwrite")


def _check_places(options: argparse.Namespace) -> None:
    out = is_gguf_output(options.out)
    folders = ["adapter"] if out else ["out", "adapter"]
    if not (options.store and Store.exists(options.store)):
        folders.append("store")
    check_places(options, folders=folders, files=("delta", "patch", "json", *["out"] * out))
