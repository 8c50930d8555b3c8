"""`--tp N` and `--dp N`: a command in the processes of `torchrun`, of which the first one prints and writes files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch

from rlsedit_fast.cli.output import set_quiet
from rlsedit_fast.errors import InputError, ProcessError
from rlsedit_fast.models.gguf_files import is_gguf
from rlsedit_fast.processes import ALONE, Group, set_world, world

_TIMEOUT = timedelta(hours=2)
"""Of a collective: the other processes may wait for the first one, which writes a large checkpoint."""


def add_processes(parser: argparse._ActionsContainer) -> None:
    """Adds the options --tp and --dp."""
    parser.add_argument(
        "--tp",
        type=int,
        metavar="N",
        help="divide the model over N processes, one per device (tensor parallelism of transformers); start the "
        "command with `torchrun --nproc-per-node N --no-python rlsedit ...`",
    )
    parser.add_argument(
        "--dp",
        type=int,
        metavar="N",
        help="search values in N processes, each of which holds the whole model (data parallel); start the command as "
        "with --tp",
    )


@contextmanager
def launched(options: argparse.Namespace) -> Iterator[None]:
    """Joins the processes of --tp or --dp; all but the first one print nothing.

    Raises:
        InputError: the number of processes is not that of the option.
        ProcessError: another process failed.
    """
    set_world(ALONE)
    replicas = getattr(options, "dp", None) is not None
    count = options.dp if replicas else getattr(options, "tp", None)
    started = int(os.environ.get("WORLD_SIZE") or 1)
    rank = int(os.environ.get("RANK") or 0) if started > 1 else 0
    if count is None and started == 1:
        yield
        return
    with _silent() if rank else nullcontext():
        _check(options, count, started, "--dp" if replicas else "--tp")
        if started == 1:
            yield
            return
        _join(replicas)
        with _of_all():
            yield


def reports(error: BaseException) -> bool:
    """Returns whether this process prints an error: the first one, and one that failed while the others did not."""
    if int(os.environ.get("RANK") or 0) == 0 or int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return True
    held = world()
    return isinstance(held, Group) and held.ended and not isinstance(error, ProcessError)


def _check(options: argparse.Namespace, count: int | None, started: int, option: str) -> None:
    command = f"torchrun --nproc-per-node {max(count or started, 1)} --no-python rlsedit {options.command} ..."
    if count is None:
        add = (
            f"add --tp {started} or --dp {started}"
            if hasattr(options, "tp")
            else "start it in one process; it does not divide a model"
        )
        raise InputError(f"torchrun started {started} processes, each of which would run the whole command; {add}")
    if count < 1 or count != started:
        raise InputError(
            f"{option} {count}, and {started} processes were started; run `{command} {option} {max(count, 1)}`, with "
            "one process per device"
        )
    if getattr(options, "tp", None) is not None and getattr(options, "dp", None) is not None:
        raise InputError("--tp and --dp exclude each other; pass one of them")
    if getattr(options, "device", None) is not None:
        raise InputError(f"--device and {option} exclude each other; each process uses the device of its rank")
    model = getattr(options, "model", None)
    if option == "--tp" and model is not None and is_gguf(model):
        raise InputError(f"--model {model}: a GGUF file is not divided over processes; pass a checkpoint")


def _join(replicas: bool) -> None:
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
        backend = "cpu:gloo,cuda:nccl"
    try:
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes cannot be connected: {error}") from error
    set_world(Group(replicas=replicas))


@contextmanager
def _of_all() -> Iterator[None]:
    import torch.distributed as dist

    try:
        with world().operation():
            yield
            world().agree(lambda: None)  # the first one may be writing still
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _silent() -> Iterator[None]:
    set_quiet(True)
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        yield
