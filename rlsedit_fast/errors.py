"""Every error that the package raises on purpose.

Each message says what was given, what is expected and what to do. Whatever raises one of these has left the
model, the state and the store as they were, or as the last batch that was acknowledged left them.
"""

from __future__ import annotations

from collections.abc import Iterable


class RLSEditError(Exception):
    """Base of all errors of this package."""


class InputError(RLSEditError, ValueError):
    """An argument has the wrong shape, dtype or value, or is not finite."""


class PriorError(RLSEditError, ValueError):
    """The prior holds nothing (lam = mu = 0) or is not positive definite."""


class RemovalError(RLSEditError):
    """A batch cannot be removed from the present state; it must be rebuilt from the edits that remain."""


class UpdateError(RLSEditError, ArithmeticError):
    """A batch's factorisation failed or its result is not finite."""


class BackendError(RLSEditError, RuntimeError):
    """A backend that was asked for by name cannot run here."""


class RequestError(RLSEditError, ValueError):
    """An edit request cannot be carried out as written."""


class ModelError(RLSEditError, ValueError):
    """The model has no editable projection where one was looked for, or something else has touched a weight."""


class ResourceError(RLSEditError, MemoryError):
    """There is less memory than the work takes."""


class StoreError(RLSEditError):
    """A store cannot be opened, read or written, or does not belong to this model."""


def listed(lines: Iterable[object], most: int = 10, *, where: str = "") -> list[str]:
    """What a message says of many: the first `most` of them, how many more there are, and where these are told."""
    every = [str(line) for line in lines]
    rest = len(every) - most
    return [*every[:most], f"and {rest} more{where}"] if rest > 0 else every
