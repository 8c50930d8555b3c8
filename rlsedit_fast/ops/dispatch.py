"""Selects the backend that runs an operation.

A backend is a module with the members of `Backend`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from rlsedit_fast.errors import BackendError, InputError
from rlsedit_fast.ops.precision import full_float32

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPERATIONS = ("panel", "factor", "downdate_", "correct_", "correct_split_", "moment_")
ENVIRONMENT = "RLSEDIT_BACKEND"

# Backends that `auto` tries, best first, by device type. The triton and cuda backends have not run on a GPU yet and
# must be requested by name; they are added here once a measurement shows where they are faster.
PREFERENCE: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "reference")}


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
    name = choose(op, backend, tensors)
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

    A single name is used as is. Of several names, or for `auto`, the first backend that can run the operation is used,
    and `reference` if none can.

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
    skipped = []
    for name in PREFERENCE.get(tensors[0].device.type, ()) if backend == "auto" else backend.split(","):
        reason = unsupported_reason(name, op, tensors)
        if reason is None:
            break
        skipped.append(f"{name}: {reason}")
    else:
        name = "reference"
    _log_once(op, name, tensors[0].device.type, "; ".join(skipped) or "first choice for this device")
    return name


@cache
def _log_once(op: str, name: str, device: str, reason: str) -> None:
    logger.info("%s on %s uses backend %r (%s)", op, device, name, reason)
