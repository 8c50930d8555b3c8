"""Which backend runs an operation.

A backend is a module with these names:
    OPS          its implementations by operation, with the signatures of `reference`;
    BATCHED      those of them whose tensors and results have a dimension of layers in front; the others are called
                 layer by layer;
    unavailable_reason()    why it cannot run on this machine, or None;
    unsupported_reason(op, tensors)   why it cannot take these tensors, with or without a dimension of layers, or None.
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

# What `auto` tries, best first, by the device's type. No GPU has run the triton and cuda backends yet, so they are
# there for whoever names them; they enter this table with the measurement that shows where they win.
PREFERENCE: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "reference")}


class Backend(Protocol):
    """What a backend's module offers."""

    OPS: Mapping[str, Callable[..., Any]]
    BATCHED: Collection[str]

    def unavailable_reason(self) -> str | None:
        """Why it cannot run on this machine, or None."""

    def unsupported_reason(self, op: str, tensors: Sequence[Tensor]) -> str | None:
        """Why it cannot take these tensors, or None."""


@cache
def load(name: str) -> Backend:
    """The backend's module; importing one imports no Triton and loads no library."""
    return cast(Backend, importlib.import_module(f"rlsedit_fast.ops.{name}"))


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine; `python -m rlsedit_fast` says why the others cannot."""
    return tuple(name for name in BACKENDS if load(name).unavailable_reason() is None)


def requested(backend: str | None) -> str:
    """The backend, or several of them, that the caller, else the environment, else `auto` asks for.

    Raises:
        InputError: there is no backend of that name.
    """
    source = "backend" if backend is not None else ENVIRONMENT
    name = backend if backend is not None else os.environ.get(ENVIRONMENT) or "auto"
    if name != "auto" and not set(name.split(",")) <= set(BACKENDS):
        raise InputError(
            f"{source}={name!r}: expected one of auto, {', '.join(BACKENDS)}, or several with commas between, of which "
            "the first that can run an operation does"
        )
    return name


def why_not(name: str, op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why the backend cannot run `op` on these tensors, or None if it can."""
    module = load(name)
    if op not in module.OPS:
        return f"it does not implement {op} (only {', '.join(module.OPS)})"
    return module.unavailable_reason() or module.unsupported_reason(op, tensors)


@full_float32()
def run(op: str, backend: str, layers: int | None, tensors: Sequence[Tensor], *scalars: int) -> Any:
    """Runs `op`.

    Args:
        op: the operation.
        backend: who is to run it, as `requested` gives it.
        layers: how many layers the tensors have in front, None for a single one without that dimension.
        tensors: its tensors, checked.
        scalars: what else it takes.

    Raises:
        BackendError: the backend was asked for by name and cannot run this.
    """
    name = choose(op, backend, tensors)
    implementation, batched = load(name).OPS[op], op in load(name).BATCHED
    if batched == (layers is not None):
        return implementation(*tensors, *scalars)
    if batched:
        return _each(lambda result: result.squeeze(0), implementation(*(t.unsqueeze(0) for t in tensors), *scalars))
    results = [implementation(*(tensor[layer] for tensor in tensors), *scalars) for layer in range(layers or 0)]
    if not results:
        raise InputError(f"{op}: expected at least one layer, got none")
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return None if results[0] is None else torch.stack(results)


def _each(change: Callable[[Tensor], Tensor], results: Any) -> Any:
    """Applies `change` to a tensor, to each of a tuple, or to nothing."""
    if isinstance(results, tuple):
        return tuple(map(change, results))
    return None if results is None else change(results)


def choose(op: str, backend: str, tensors: Sequence[Tensor]) -> str:
    """The name of the backend that runs `op` on these tensors: the one asked for, or the first that can of several;
    `reference` where none of those can.

    Raises:
        BackendError: one backend was asked for by name and cannot run this.
    """
    if backend in BACKENDS:
        reason = why_not(backend, op, tensors)
        if reason:
            raise BackendError(
                f"backend {backend!r} was asked for and cannot run {op}: {reason}. "
                f"Ask for 'auto' or 'reference', or see `python -m rlsedit_fast`"
            )
        return backend
    passed_over = []
    for name in PREFERENCE.get(tensors[0].device.type, ()) if backend == "auto" else backend.split(","):
        reason = why_not(name, op, tensors)
        if reason is None:
            break
        passed_over.append(f"{name}: {reason}")
    else:
        name = "reference"
    _say_once(op, name, tensors[0].device.type, "; ".join(passed_over) or "the first choice here")
    return name


@cache
def _say_once(op: str, name: str, device: str, why: str) -> None:
    logger.info("%s on %s runs on backend %r (%s)", op, device, name, why)
