"""`rlsedit push`: upload an edited model to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlsedit_fast.baselines.memory import size
from rlsedit_fast.cli import DONE, setup
from rlsedit_fast.cli.output import add_json, emit, is_quiet, say, working
from rlsedit_fast.editing.storage.recovery import read_history
from rlsedit_fast.errors import InputError, counted
from rlsedit_fast.export.card import CARD, CardContents, make_card
from rlsedit_fast.export.push import check_folder, check_repository, push_folder
from rlsedit_fast.files import read_json

HELP = "upload the edited model of a store, or a checkpoint, to the Hugging Face Hub"
ABOUT = (
    "Upload the edited model of a store, its LoRA adapter, or the folder of a checkpoint, an adapter or GGUF files to "
    "a repository on the Hugging Face Hub, in one commit, with a model card. The repository is created if it does not "
    "exist, and is private unless --public is given."
)
USAGE = "(--store DIR [--adapter] | --checkpoint DIR) REPO_ID [options]"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("repo_id", metavar="REPO_ID", help="name of the repository: OWNER/NAME")
    parser.add_argument("--store", type=Path, metavar="DIR", help="store whose edited model is uploaded")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="instead of --store: folder with a checkpoint or an adapter"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="with --store: upload the change as a LoRA adapter, not the whole model"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--private", action="store_true", help="create a private repository (default)")
    which.add_argument(
        "--public", action="store_true", help="create a public repository, or upload to one that is public"
    )
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help="access token (default: HF_TOKEN, or that of `hf auth login`, which others cannot see in the list of "
        "processes)",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created if it does not exist (default: main)")
    parser.add_argument("--commit-message", metavar="TEXT", help="message of the commit")
    parser.add_argument(
        "--overwrite", action="store_true", help="add a commit to a branch that contains weights (default: an error)"
    )
    setup.add_model(parser, required=False)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    setup.show_warnings()
    if is_quiet():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    if (options.store is None) == (options.checkpoint is None):
        raise InputError("pass either --store DIR, whose edited model is uploaded, or --checkpoint DIR")
    if options.adapter and options.store is None:
        raise InputError("--adapter requires --store; an adapter in a folder is uploaded with --checkpoint DIR")
    if options.model is not None and options.store is None:
        raise InputError("--model is used only with --store; omit it")
    where: dict[str, Any] = {
        "private": False if options.public else None,
        "token": options.token,
        "revision": options.revision,
        "overwrite": options.overwrite,
    }
    if options.store is not None:
        _check_active(options.store)
        check_repository(options.repo_id, **where)  # before the model is loaded
    with ExitStack() as stack:
        folder = options.checkpoint or Path(stack.enter_context(TemporaryDirectory(prefix="rlsedit-push-")), "model")
        if options.store is not None:
            _write(options, folder)
        names = check_folder(folder)
        held = sum((folder / name).stat().st_size for name in names)
        say(f"uploading {counted(len(names), 'file')}, {size(held)}, to {options.repo_id}")
        with working("uploading"):
            done = push_folder(
                folder,
                options.repo_id,
                message=options.commit_message,
                **where,
                card=None if CARD in names else _plain_card(folder),
            )
    visible = "private" if done.private else "public"
    lines = [
        f"{done.url}: {counted(len(done.files), 'file')}, {size(done.bytes)}, on branch {done.revision} of a {visible} "
        f"repository{' that was created' * done.created}",
        f"commit {done.commit}",
    ]
    emit(asdict(done), lines, options.json)
    return DONE


def _check_active(store: Path) -> None:
    if not any(record.state == "active" for record in read_history(store)):
        raise InputError(f"the store {str(store)!r} has no active edit, so there is nothing to upload")


def _write(options: argparse.Namespace, folder: Path) -> None:
    """Writes the model or the adapter of the store into a folder."""
    from rlsedit_fast.cli.stores import open_editor

    with open_editor(options) as editor, working("writing the model"):
        if options.adapter:
            editor.save_adapter(folder)
        else:
            editor.save_pretrained(folder)


def _plain_card(folder: Path) -> str:
    """Returns a card for a folder without one, of which only an adapter names its base model."""
    settings = folder / "adapter_config.json"
    if not settings.exists():
        library = "transformers" if (folder / "config.json").exists() else "gguf"
        return make_card(CardContents("", None), library=library)
    about = read_json(settings, "the config of an adapter")
    base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
    return make_card(CardContents(str(base or ""), None), library="peft")
