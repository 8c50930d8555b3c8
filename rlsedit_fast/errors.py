"""Errors that the package raises on purpose.

The message states what was given and what is expected; `hint`, where there is one, states what to do. An operation
that raises one of these errors leaves the model, the state and the store as they were before it, or as they were after
the last committed batch.
"""

from __future__ import annotations

from collections.abc import Iterable


class RLSEditError(Exception):
    """Base class of all errors of this package.

    Attributes:
        message: what was given and what is expected.
        hint: what to do, naming the Python argument and the command-line option; None where the message includes it.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class InputError(RLSEditError, ValueError):
    """An argument has the wrong shape, dtype or value, or is not finite."""


class PriorError(RLSEditError, ValueError):
    """The prior is zero (lam = mu = 0) or not positive definite."""


class RemovalError(RLSEditError):
    """A batch cannot be removed from the current state; the state must be rebuilt from the remaining edits."""


class UpdateError(RLSEditError, ArithmeticError):
    """The factorization of a batch failed or its result is not finite."""


class BackendError(RLSEditError, RuntimeError):
    """A backend that was selected by name is not available."""


class RequestError(RLSEditError, ValueError):
    """An edit request is invalid."""


class ModelError(RLSEditError, ValueError):
    """The model has no editable projection where one is expected, or a weight was modified by other code."""


class ResourceError(RLSEditError, MemoryError):
    """There is not enough memory."""


class StoreError(RLSEditError):
    """A store cannot be opened, read or written, or belongs to another model."""


def listed(lines: Iterable[object], most: int = 10, *, where: str = "") -> list[str]:
    """Returns at most `most` of the lines as strings, followed by "and N more" plus `where` if there are more."""
    every = [str(line) for line in lines]
    rest = len(every) - most
    return [*every[:most], f"and {rest} more{where}"] if rest > 0 else every
