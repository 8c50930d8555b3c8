"""The processes that edit one model: how many there are, which one this is, and what they agree on.

Every process runs the same program. The first one speaks to the user and writes files. Collectives are called by all
processes in the same order; `operation` ends those that wait for a process that failed.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlsedit_fast import errors
from rlsedit_fast.errors import InputError, ProcessError, ResourceError, RLSEditError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds for which a process that failed waits for the others to fail, too, before it ends the process group."""

_CAUSE = 3.0  # seconds for which a process whose connection was lost waits for the reason
_POLL = 0.05
_operations = itertools.count(1)  # every process enters the same operations


class Processes:
    """A single process, which decides alone; see `Group` for several.

    Attributes:
        count: number of processes.
        rank: index of this process.
        replicas: whether each process holds the whole model; otherwise they hold it together.
    """

    count = 1
    rank = 0
    replicas = False

    @property
    def first(self) -> bool:
        """Whether this is the first process, which speaks to the user and writes files."""
        return self.rank == 0

    @property
    def together(self) -> Processes:
        """The processes that compute a forward pass together."""
        return ALONE if self.replicas else self

    def all(self, attempt: Callable[[], T]) -> list[T]:
        """Returns the results of `attempt` in all processes, which can be pickled; see `agree` for errors."""
        return [attempt()]

    def same(self, value: T) -> T:
        """Returns the value of the first process; it can be pickled."""
        return value

    def same_tensors(self, *tensors: Tensor) -> None:
        """Gives every process the values of the tensors of the first one, in place."""

    def any(self, vote: bool) -> bool:
        """Returns whether the vote is true in any process."""
        return vote

    def agree(self, attempt: Callable[[], T]) -> T:
        """Returns the result of `attempt`, which calls no collectives; raises in every process if it raises in one."""
        return attempt()

    def in_turn(self, attempt: Callable[[], T]) -> T:
        """See `agree`; the other processes begin once the first one is done."""
        return attempt()

    def lead(self, work: Callable[[], T]) -> T:
        """Returns in every process the result of `work` in the first one, or raises its error."""
        return work()

    def serve(self, work: Callable[[Callable[[str], Any]], T], help: Callable[[str], Any]) -> T:
        """See `lead`, for work that needs `help` of all processes.

        Args:
            work: called in the first process only, with a function that calls `help` in every process.
            help: may call collectives; its result in the first process is returned to `work`.
        """
        return work(help)

    @contextmanager
    def operation(self) -> Iterator[None]:
        """An error in the block of one process ends the block in all of them."""
        yield


ALONE = Processes()
"""The single process."""


class Group(Processes):
    """Several processes that hold one model together, or copies of it.

    Args:
        group: their process group; None for all processes.
        replicas: see `Processes`.

    Attributes:
        ended: whether this process ended the process group, because it failed.

    Raises:
        InputError: no process group is initialized.
    """

    def __init__(self, group: Any = None, *, replicas: bool = False) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise InputError("no process group is initialized; call torch.distributed.init_process_group first.")
        self._dist: Any = dist
        self._group: Any = dist.group.WORLD if group is None else group
        self._store: Any = dist.distributed_c10d._get_default_store()
        self.count, self.rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        self.ended, self.replicas = False, replicas
        self._source = self._dist.get_global_rank(self._group, 0)

    def same(self, value: T) -> T:
        """See `Processes`."""
        held = [value if self.first else None]
        self._dist.broadcast_object_list(held, self._source, group=self._group)
        return held[0]  # type: ignore[return-value]

    def same_tensors(self, *tensors: Tensor) -> None:
        """See `Processes`."""
        for tensor in tensors:
            if tensor.device.type == "cpu" and self._dist.get_backend(self._group) != "gloo":
                tensor.copy_(self.same(tensor))
                continue
            sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
            self._dist.broadcast(sent, self._source, group=self._group)
            if sent is not tensor:
                tensor.copy_(sent)

    def any(self, vote: bool) -> bool:
        """See `Processes`."""
        return any(self._every(bool(vote)))

    def agree(self, attempt: Callable[[], T]) -> T:
        """See `Processes`."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = attempt()
        except Exception as caught:
            error = caught
        raise_first(self._every(described(error)), error)
        return result  # type: ignore[return-value]

    def all(self, attempt: Callable[[], T]) -> list[T]:
        """See `Processes`."""
        return self._every(self.agree(attempt))

    def in_turn(self, attempt: Callable[[], T]) -> T:
        """See `Processes`."""
        if self.first:
            result = self.agree(attempt)
            self.agree(lambda: None)
            return result
        self.agree(lambda: None)
        return self.agree(attempt)

    def lead(self, work: Callable[[], T]) -> T:
        """See `Processes`."""
        found = self.agree(lambda: work() if self.first else None)
        return self.same(found)  # type: ignore[return-value]

    def serve(self, work: Callable[[Callable[[str], Any]], T], help: Callable[[str], Any]) -> T:
        """See `Processes`."""

        def ask(question: str) -> Any:
            self.same(question)
            return help(question)

        def led() -> T:
            try:
                return work(ask)
            finally:
                self.same("")

        if not self.first:
            while question := self.same(""):
                help(question)
        return self.lead(led)

    @contextmanager
    def operation(self) -> Iterator[None]:
        """See `Processes`.

        A process whose block raises waits until the blocks of all others have raised. If one does not, it waits for
        this one: the process group is ended, so that its collective raises `ProcessError`. Gloo closes the connections
        when the process ends, or when nothing, such as a divided model, refers to the process group. With NCCL a
        collective may wait until the timeout of the process group; torchrun ends its process before that.

        Raises:
            ProcessError: another process failed; or the process group was ended before.
        """
        if not self._dist.is_initialized():
            raise ProcessError("the process group has ended, because a process failed; start the processes again")
        name = f"rlsedit/{next(_operations)}"
        try:
            yield
        except BaseException as error:
            causes, alike = self._exchange_in_time(name, error)
            if alike or not _lost(error):
                raise
            where, reason = next(iter(causes.items()), (None, f"it ended, or its connection was lost ({_line(error)})"))
            place = "another process" if where is None else f"process {where}"
            raise ProcessError(
                f"{place} of {self.count} failed, so that this one ended, too: {reason}",
                hint="see the output of that process, and start all processes again",
            ) from error

    def _every(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        self._dist.all_gather_object(found, value, group=self._group)
        return found

    def _exchange_in_time(self, name: str, error: BaseException) -> tuple[dict[int, str], bool]:
        """See `_exchange`; gives up a store that does not answer, such as one behind a lost network connection."""
        found: list[tuple[dict[int, str], bool]] = []
        exchange = threading.Thread(target=lambda: found.append(self._exchange(name, error)), daemon=True)
        exchange.start()
        exchange.join((_CAUSE if _lost(error) else PATIENCE) + 2 * _CAUSE)
        if not found:
            self._close()
        return found[0] if found else ({}, False)

    def _exchange(self, name: str, error: BaseException) -> tuple[dict[int, str], bool]:
        """Reports the failure of this process to the others, and ends the process group if one waits for this process.

        Returns:
            The errors of the other processes that did not only lose a connection, by rank; and whether all processes
            have the same error, so that none waited for another one.
        """
        lost = _lost(error)
        places = [f"{name}/{rank}" for rank in range(self.count)]
        failed = {"lost": lost, "message": f"{type(error).__name__}: {error}"}
        found: dict[int, str] = {}
        alike = False
        with suppress(RuntimeError):  # the store ends with the process that holds it
            self._store.set(places[self.rank], json.dumps(failed))
            end = time.monotonic() + (_CAUSE if lost else PATIENCE)
            while not (complete := self._store.check(places)) and time.monotonic() < end:
                time.sleep(_POLL)
            alike = complete and all(json.loads(self._store.get(place)) == failed for place in places)
            if not complete or (lost and not alike):
                logger.info("ending the process group: not all processes failed in %s", name)
                self._close()
            for rank, place in enumerate(places):
                if rank != self.rank and self._store.check([place]):
                    about = json.loads(self._store.get(place))
                    if not about["lost"]:
                        found[rank] = about["message"]
        return found, alike

    def _close(self) -> None:
        self.ended = True
        with suppress(RuntimeError, ValueError, AssertionError):
            self._dist.destroy_process_group()


_world: Processes = ALONE


def world() -> Processes:
    """Returns the processes that run a command of `rlsedit`; a single process otherwise."""
    return _world


def set_world(processes: Processes) -> None:
    """Sets the processes that run a command."""
    global _world
    _world = processes


Described = tuple[str, str, str | None]
"""Type, message and hint of an error."""


def described(error: BaseException | None) -> Described | None:
    """Returns an error for `raise_first`; None for None."""
    if error is None:
        return None
    message, hint = (error.message, error.hint) if isinstance(error, RLSEditError) else (str(error), None)
    return type(error).__name__, message, hint


def raise_first(found: list[Described | None], mine: BaseException | None) -> None:
    """Raises the error of this process, else that of the first process that has one; returns if there is none.

    Args:
        found: the described error of each process.
        mine: that of this process.
    """
    if mine is not None:
        raise mine
    for rank, each in enumerate(found):
        if each is not None:
            name, message, hint = each
            fallback = ResourceError if "Memory" in name else RLSEditError
            kind: type[RLSEditError] = getattr(errors, name) if name in errors.__all__ else fallback
            raise kind(f"{message} (in process {rank} of {len(found)})", hint)


def _line(error: BaseException) -> str:
    """Returns the type and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _lost(error: BaseException) -> bool:
    """Returns whether an error may be that of a collective for which another process is missing."""
    if isinstance(error, RLSEditError | torch.OutOfMemoryError | NotImplementedError | RecursionError):
        return False
    return isinstance(error, RuntimeError | ConnectionError)
