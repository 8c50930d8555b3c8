"""Chooses between backends by a check and a timing on the user's machine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch

from rlsedit_fast.ops import measurement
from rlsedit_fast.ops.choices import Choice, Choices
from rlsedit_fast.ops.measurement import Run
from rlsedit_fast.ops.sizes import SizeClass

logger = logging.getLogger(__name__)

MARGIN = 1.2
"""A backend must be this many times as fast as the default, in every round, to replace it. Backends take turns in a
round, so that other load on the machine affects all of them, and an even race does not depend on chance."""

SMALLEST = 1 << 16
"""Operations on fewer numbers are not measured; they take microseconds on any backend."""

SECONDS = {"cpu": 2.0, "cuda": 60.0}
"""Time after which a process starts no further measurement, by device type; later sizes use the default until another
process measures them. On CUDA most of it compiles kernels, which are then cached."""

FALLBACK = "reference"


class Selection:
    """The backends of one device.

    Args:
        choices: the stored choices of the device.
        device: the device.
    """

    def __init__(self, choices: Choices, device: torch.device) -> None:
        self.choices, self._device, self._left = choices, device, SECONDS[device.type]
        self._known: dict[str, Choice | None] = dict(choices.read())
        self._lock = threading.RLock()

    def backend(
        self, size: SizeClass, runs: Callable[[], Mapping[str, Run]], names: Sequence[str], default: str
    ) -> str:
        """Returns the backend of a size class; measures it on first use.

        Args:
            size: the class.
            runs: returns the operation by backend.
            names: the backends that support the operation.
            default: the backend that is used without a measurement.
        """
        if size.key not in self._known:
            with self._lock:
                if size.key not in self._known:
                    self._known[size.key] = self._first_use(size, runs, default)
        choice = self._known[size.key]
        return choice.backend if choice and choice.backend in names else default

    def _first_use(self, size: SizeClass, runs: Callable[[], Mapping[str, Run]], default: str) -> Choice | None:
        """Returns the choice of a class that is not known; None if it is not measured now."""
        if size.numbers < SMALLEST or self._left <= 0 or not self.choices.writable():
            return None
        if stored := self.choices.read().get(size.key):  # of another process
            return stored
        began = time.perf_counter()
        choice = self.measure(size, runs(), default)
        self._left -= time.perf_counter() - began
        if self._left <= 0:
            logger.info("the time for measuring backends is used up; further sizes use the defaults for now")
        if choice is None or (merged := self.choices.store({size.key: choice})) is None:
            return None
        logger.info("%s uses %s; stored in %s", size.key, described(merged[size.key]), self.choices.path)
        return merged[size.key]

    @torch.no_grad()
    def measure(
        self, size: SizeClass, runs: Mapping[str, Run], default: str, *, seconds: float = measurement.SECONDS
    ) -> Choice | None:
        """Checks and times backends; None if there is not enough memory for it.

        Args:
            size: the class.
            runs: the operation by backend.
            default: the backend that stays unless another is `MARGIN` times as fast.
            seconds: time for the timing.
        """
        excluded = self.choices.crashed(size.op)
        found = dict[str, list[float]]()
        try:
            for name in [name for name in runs if name not in excluded]:
                with self._marked(size.op, name):
                    if reason := measurement.check(size, runs[name], self._device):
                        excluded[name] = reason
            kept = {name: run for name, run in runs.items() if name not in excluded}
            if len(kept) > 1:
                with self._marked(size.op, *kept):
                    found, failed = measurement.times(size, kept, self._device, seconds=seconds)
                excluded |= failed
        except torch.OutOfMemoryError:
            logger.info("%s is not measured: there is not enough memory", size.key)
            return None
        except Exception as error:  # after a failed kernel, every later call on the device can fail
            logger.warning("measuring %s failed: %s", size.key, error)
        finally:
            if self._device.type == "cuda":
                with suppress(RuntimeError):  # of a failed device
                    torch.cuda.empty_cache()  # the problems are larger than the operands of most steps
        for name, reason in excluded.items():
            logger.warning("backend %r is not used for %s: %s", name, size.key, reason)
        if default in excluded:
            default = FALLBACK
        best = min(found, key=lambda name: min(found[name]), default=default)
        rounds = zip(found.get(default, ()), found.get(best, ()), strict=False)
        if any(before < MARGIN * after for before, after in rounds):
            best = default
        return Choice(best, {name: round(min(ms), 4) for name, ms in sorted(found.items())}, excluded)

    @contextmanager
    def _marked(self, op: str, *backends: str) -> Iterator[None]:
        """Marks backends whose kernels could end the process; those of the CPU are tested on CPUs."""
        with ExitStack() as stack:
            for name in backends:
                if self._device.type == "cuda" and name != FALLBACK:
                    stack.enter_context(self.choices.trying(op, name))
            yield


def described(choice: Choice) -> str:
    """Formats a choice, such as `triton (reference 0.80 ms, triton 0.21 ms)`."""
    parts = [f"{name} {ms:.3g} ms" for name, ms in choice.ms.items()]
    parts += [f"{name} excluded" for name in choice.excluded]
    return f"{choice.backend} ({', '.join(parts) or 'the only one'})"
