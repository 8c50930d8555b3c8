"""Selects the backend that runs an operation.

A backend is a module with the members of `Backend`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from rlsedit_fast.errors import BackendError, InputError
from rlsedit_fast.files import cache_folder
from rlsedit_fast.ops.choices import Choices, identity
from rlsedit_fast.ops.measurement import Run
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.ops.selection import Selection
from rlsedit_fast.ops.sizes import SizeClass, size_class

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPERATIONS = ("panel", "factor", "downdate_", "correct_", "correct_split_", "moment_")
ENVIRONMENT = "RLSEDIT_BACKEND"

TUNE = "RLSEDIT_TUNE"

# Backends that `auto` chooses from, by device type; of those that are preferred, the first is the default, unless a
# measurement on the machine chose another, see `selection`. The kernels of triton and cuda have not run on a GPU yet.
CANDIDATES: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("reference", "triton", "cuda")}

_used: dict[str, str] = {}  # backends of `auto` by size class, in this process
_pinned: Mapping[str, str] = {}
_measures = True


class Backend(Protocol):
    """Interface of a backend module.

    Attributes:
        OPS: implementations by operation name, with the signatures of `reference`.
        BATCHED: operations whose tensors and results have a leading dimension of layers; the others are called once
            per layer.
    """

    OPS: Mapping[str, Callable[..., Any]]
    BATCHED: Collection[str]

    def unavailable_reason(self) -> str | None:
        """Returns why the backend cannot run on this machine, or None if it can."""

    def unsupported_reason(self, op: str, tensors: Sequence[Tensor]) -> str | None:
        """Returns why the backend does not support these tensors (with or without layers), or None if it does."""

    def preferred(self, size: SizeClass) -> bool:
        """Returns whether `auto` uses the backend where nothing was measured, by recorded benchmarks."""


@cache
def load(name: str) -> Backend:
    """Imports a backend module. This does not import Triton or load the CUDA library."""
    return cast(Backend, importlib.import_module(f"rlsedit_fast.ops.{name}"))


def available_backends() -> tuple[str, ...]:
    """Returns the backends that can run on this machine; `python -m rlsedit_fast` reports why the others cannot.

    Returns:
        Backend names, a subset of `reference`, `cpu`, `triton` and `cuda`. `reference` is always available.

    Example:
        >>> from rlsedit_fast.ops import available_backends
        >>> "reference" in available_backends()
        True
    """
    return tuple(name for name in BACKENDS if load(name).unavailable_reason() is None)


def requested(backend: str | None) -> str:
    """Returns the requested backend name or names: the argument, else `RLSEDIT_BACKEND`, else `auto`.

    Raises:
        InputError: the name is unknown.
    """
    source = "backend" if backend is not None else ENVIRONMENT
    name = backend if backend is not None else os.environ.get(ENVIRONMENT) or "auto"
    if name != "auto" and not set(name.split(",")) <= set(BACKENDS):
        raise InputError(
            f"{source}={name!r}: expected one of auto, {', '.join(BACKENDS)}, or several of these backends separated "
            "by commas"
        )
    return name


def unsupported_reason(name: str, op: str, tensors: Sequence[Tensor]) -> str | None:
    """Returns why the backend cannot run `op` on these tensors, or None if it can."""
    module = load(name)
    if op not in module.OPS:
        return f"it does not implement {op} (only {', '.join(module.OPS)})"
    return module.unavailable_reason() or module.unsupported_reason(op, tensors)


@full_float32()
def run(op: str, backend: str, layers: int | None, tensors: Sequence[Tensor], *scalars: int) -> Any:
    """Runs an operation.

    Args:
        op: name of the operation.
        backend: backend name or names, as returned by `requested`.
        layers: size of the leading dimension of layers, or None if the tensors have no such dimension.
        tensors: checked tensor arguments.
        scalars: remaining arguments.

    Returns:
        The results of the operation, with a dimension of layers if the tensors have one.

    Raises:
        BackendError: the requested backend cannot run this operation.
    """
    return execute(choose(op, backend, tensors), op, layers, tensors, *scalars)


def execute(name: str, op: str, layers: int | None, tensors: Sequence[Tensor], *scalars: int) -> Any:
    """Runs an operation on a backend that supports it; arguments as for `run`."""
    implementation, batched = load(name).OPS[op], op in load(name).BATCHED
    if batched == (layers is not None):
        return implementation(*tensors, *scalars)
    if batched:
        return _map(lambda result: result.squeeze(0), implementation(*(t.unsqueeze(0) for t in tensors), *scalars))
    results = [implementation(*(tensor[layer] for tensor in tensors), *scalars) for layer in range(layers or 0)]
    if not results:
        raise InputError(f"{op}: expected at least one layer, got none")
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return None if results[0] is None else torch.stack(results)


def _map(function: Callable[[Tensor], Tensor], results: Any) -> Any:
    """Applies a function to a tensor or to each tensor of a tuple; None stays None."""
    if isinstance(results, tuple):
        return tuple(map(function, results))
    return None if results is None else function(results)


def choose(op: str, backend: str, tensors: Sequence[Tensor]) -> str:
    """Returns the name of the backend that runs `op` on these tensors.

    A single name is used as is. Of several names, the first backend that can run the operation is used, and `reference`
    if none can. `auto` uses the backend that was measured to be fastest on this machine, see `selection`.

    Raises:
        BackendError: A single backend was requested and cannot run this operation.
    """
    if backend in BACKENDS:
        reason = unsupported_reason(backend, op, tensors)
        if reason:
            raise BackendError(
                f"backend {backend!r} cannot run {op}: {reason}. "
                f"Use 'auto' or 'reference', or see `python -m rlsedit_fast`"
            )
        return backend
    names = CANDIDATES.get(tensors[0].device.type, ()) if backend == "auto" else backend.split(",")
    reasons = {name: unsupported_reason(name, op, tensors) for name in names}
    usable = [name for name, reason in reasons.items() if reason is None]
    name = _automatic(op, usable, tensors) if backend == "auto" else next(iter(usable), "reference")
    skipped = "; ".join(f"{other}: {reason}" for other, reason in reasons.items() if reason)
    _log_once(op, name, tensors[0].device.type, skipped or "all candidates can run it")
    return name


def _automatic(op: str, usable: Sequence[str], tensors: Sequence[Tensor]) -> str:
    """Returns the pinned, the measured, or the default backend of the size class."""
    size, device = size_class(op, tensors), tensors[0].device
    names, name = _different(size, usable)
    if _pinned.get(size.key) in usable:
        name = _pinned[size.key]
    elif len(names) > 1 and (chosen := _selection(device)) is not None:
        name = chosen.backend(size, lambda: runs(op, names), names, name)
    _used[size.key] = name
    return name


def _different(size: SizeClass, usable: Sequence[str]) -> tuple[list[str], str]:
    """Returns the default and the backends whose implementation is another one, and the default."""
    default = next((name for name in usable if load(name).preferred(size)), "reference")
    found = {id(load(name).OPS[size.op]): name for name in usable}
    return [*{**found, id(load(default).OPS[size.op]): default}.values()], default


def alternatives(size: SizeClass, tensors: Sequence[Tensor]) -> tuple[list[str], str]:
    """Returns the backends that `auto` chooses from, and the default.

    Args:
        size: the class.
        tensors: operands of the operation with the rows of the class; their widths do not matter.
    """
    names = CANDIDATES.get(tensors[0].device.type, ())
    return _different(size, [name for name in names if unsupported_reason(name, size.op, tensors) is None])


def runs(op: str, names: Sequence[str]) -> dict[str, Run]:
    """Returns an operation on several backends, which must support it."""

    def one(name: str) -> Run:
        return lambda *arguments: execute(name, op, None, *_separated(arguments))

    return {name: one(name) for name in names}


def _separated(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the tensors of the arguments of an operation as one argument, and the scalars."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return tensors, *arguments[len(tensors) :]


def tuned() -> bool:
    """Returns whether `auto` measures backends on this machine, by `RLSEDIT_TUNE`.

    Raises:
        InputError: the value is unknown.
    """
    value = os.environ.get(TUNE) or "1"
    if value not in ("0", "1"):
        raise InputError(f"{TUNE}={value!r}: expected 1 (measure backends on first use) or 0 (use the defaults)")
    return value == "1"


def _selection(device: torch.device) -> Selection | None:
    """Returns the measured backends of a device; None in `unmeasured`, with `RLSEDIT_TUNE=0`, or in a CUDA graph."""
    if not (_measures and tuned()) or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    try:
        return selection_of(device)
    except RuntimeError as error:  # without a home folder
        _warn_once(f"backends are not measured, since there is no cache folder ({error}); set RLSEDIT_CACHE")
        return None


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def choices_of(device: torch.device) -> Choices:
    """Returns the stored choices of a device with its present number of threads."""
    backends = [name for name in CANDIDATES[device.type] if load(name).unavailable_reason() is None]
    return Choices(identity(device, backends))


def selection_of(device: torch.device) -> Selection:
    """Returns the measured backends of a device with its present number of threads, in the present cache folder."""
    return _cached_selection(device, torch.get_num_threads(), str(cache_folder()))


@cache
def _cached_selection(device: torch.device, threads: int, folder: str) -> Selection:
    return Selection(choices_of(device), device)


def forget_selections() -> None:
    """Reads the stored choices again at the next operation."""
    _cached_selection.cache_clear()


def used() -> dict[str, str]:
    """Returns the backend that `auto` used last for each size class in this process."""
    return dict(_used)


@contextmanager
def unmeasured() -> Iterator[None]:
    """Uses the default backends in the block, for operations whose time does not matter."""
    global _measures
    before, _measures = _measures, False
    try:
        yield
    finally:
        _measures = before


@contextmanager
def pinned(backends: Mapping[str, str]) -> Iterator[None]:
    """Makes `auto` use these backends, by size class, in the block, where they can run; for an exact replay.

    Args:
        backends: as returned by `used`.
    """
    global _pinned
    before, _pinned = _pinned, backends
    try:
        yield
    finally:
        _pinned = before


@cache
def _log_once(op: str, name: str, device: str, reason: str) -> None:
    logger.info("%s on %s uses backend %r (%s)", op, device, name, reason)
