"""Errors that the package raises on purpose.

The message states what was given and what is expected; `hint`, where there is one, states what to do. An operation
that raises one of these errors leaves the model, the state and the store as they were before it, or as they were after
the last committed batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

__all__ = [
    "BackendError",
    "GateError",
    "InputError",
    "ModelError",
    "PriorError",
    "ProcessError",
    "RLSEditError",
    "RemovalError",
    "RequestError",
    "ResourceError",
    "ServerError",
    "StoreError",
    "UnstatedError",
    "UpdateError",
]


class RLSEditError(Exception):
    """Base class of all errors of this package.

    Attributes:
        message: what was given and what is expected.
        hint: what to do, naming the Python argument and the command-line option; None where the message includes it.

    Example:
        >>> from rlsedit_fast.errors import RLSEditError
        >>> print(RLSEditError("layers=[40] do not exist", hint="pass --layers (Python: EditConfig(layers=...))"))
        layers=[40] do not exist
        hint: pass --layers (Python: EditConfig(layers=...))
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class InputError(RLSEditError, ValueError):
    """An argument has the wrong shape, dtype or value, or is not finite.

    It is also a `ValueError`.

    Example:
        >>> import torch
        >>> from rlsedit_fast import ops
        >>> from rlsedit_fast.errors import InputError
        >>> try:
        ...     ops.moment_(torch.zeros(2, 2), torch.ones(4, 3))
        ... except InputError as error:
        ...     print(error)
        moment_: rows has shape [4, 3], expected [any, 2]
    """


class PriorError(RLSEditError, ValueError):
    """The prior is zero (lam = mu = 0) or not positive definite.

    It is also a `ValueError`.

    Example:
        >>> from rlsedit_fast.errors import PriorError
        >>> from rlsedit_fast.rls import Prior
        >>> try:
        ...     Prior(lam=0.0)
        ... except PriorError as error:
        ...     print(error)
        lam and mu are both 0; at least one of them must be positive.
    """


class RemovalError(RLSEditError):
    """A batch cannot be removed from the current state; the state must be rebuilt from the remaining edits.

    Example:
        >>> import torch
        >>> from rlsedit_fast.errors import RemovalError
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> state = RLSState(torch.zeros(1, 2), Prior(lam=1.0))
        >>> _ = state.update(torch.tensor([[1.0, 0.0]]), torch.ones(1, 1))
        >>> try:  # this key was not applied
        ...     state.remove(torch.tensor([[2.0, 0.0]]), torch.ones(1, 1))
        ... except RemovalError:
        ...     print(state.weight)  # unchanged
        tensor([[0.5000, 0.0000]])
    """


class UpdateError(RLSEditError, ArithmeticError):
    """The factorization of a batch failed or its result is not finite.

    It is also an `ArithmeticError`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.errors import UpdateError
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> state = RLSState(torch.zeros(1, 2), Prior(lam=1.0))
        >>> try:  # the square of the key overflows float32
        ...     state.update(torch.tensor([[1e30, 0.0]]), torch.ones(1, 1))
        ... except UpdateError:
        ...     print(state.weight)  # unchanged
        tensor([[0., 0.]])
    """


class BackendError(RLSEditError, RuntimeError):
    """A backend that was selected by name is not available.

    It is also a `RuntimeError`.

    Example:
        >>> import torch
        >>> from rlsedit_fast import ops
        >>> from rlsedit_fast.errors import BackendError
        >>> try:  # the cuda backend does not run on CPU tensors
        ...     ops.moment_(torch.zeros(2, 2), torch.ones(4, 2), backend="cuda")
        ... except BackendError as error:
        ...     print(str(error).partition(":")[0])
        backend 'cuda' cannot run moment_
    """


class RequestError(RLSEditError, ValueError):
    """An edit request is invalid.

    It is also a `ValueError`.

    Example:
        >>> from rlsedit_fast.errors import RequestError
        >>> from rlsedit_fast.models import fill
        >>> try:
        ...     fill("The capital is", "Peru")
        ... except RequestError as error:
        ...     print(error)
        the prompt 'The capital is' contains neither {} nor the subject 'Peru'; write {} in place of the subject
    """


class UnstatedError(RLSEditError):
    """The model does not state the target of an edit after the write, and `require_stated` is set.

    Example:
        >>> from rlsedit_fast import Edit, EditConfig, Editor
        >>> from rlsedit_fast.errors import UnstatedError
        >>> from rlsedit_fast.world import load_demo_model
        >>> config = EditConfig(layers=[0], prior={"lam": 1e6}, contexts={"prefixes": [""]}, refine=0)
        >>> editor = Editor(*load_demo_model(), config=config)
        >>> try:  # the penalty on the weight change leaves no freedom for edits
        ...     editor.edit([Edit("{} speaks", "Toze Lado Rekuno", "Nafiish")], require_stated=True)
        ... except UnstatedError:
        ...     print(len(editor.history()))  # the batch was not applied
        0
    """


class GateError(RLSEditError):
    """An edited model violates a gate, see `Gates`.

    Attributes:
        report: the `GateReport` with all measurements.

    Example:
        >>> from rlsedit_fast import Edit, EditConfig, Editor, Gates
        >>> from rlsedit_fast.errors import GateError
        >>> from rlsedit_fast.world import load_demo_model
        >>> config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
        >>> editor = Editor(*load_demo_model(), config=config)
        >>> gates = Gates(unchanged=["Toze Lado Rekuno speaks"], on_violation="undo")
        >>> try:
        ...     editor.edit([Edit("{} speaks", "Toze Lado Rekuno", "Nafiish")], gates=gates)
        ... except GateError as error:
        ...     print(error.report.violated[0].gate, len(editor.history()))  # the batch was taken back
        unchanged 0
    """

    def __init__(self, message: str, hint: str | None = None, report: Any = None) -> None:
        super().__init__(message, hint)
        self.report = report


class ModelError(RLSEditError, ValueError):
    """The model has no editable projection where one is expected, or a weight was modified by other code.

    It is also a `ValueError`.

    Example:
        >>> from rlsedit_fast.errors import ModelError
        >>> from rlsedit_fast.models import find_decoder
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, _ = load_demo_model()
        >>> try:
        ...     find_decoder(model).select([7])
        ... except ModelError as error:
        ...     print(error)
        layers [7] do not exist; the model has layers 0 to 3
    """


class ProcessError(RLSEditError):
    """One of several processes that hold a model together failed, so that all of them ended.

    Model and store are as they were before the batch.

    Example:
        >>> from rlsedit_fast.errors import ProcessError, RLSEditError
        >>> issubclass(ProcessError, RLSEditError)
        True
    """


class ResourceError(RLSEditError, MemoryError):
    """There is not enough memory.

    It is also a `MemoryError`. The message states which memory is insufficient and which settings require less.

    Example:
        >>> from rlsedit_fast.errors import ResourceError
        >>> issubclass(ResourceError, MemoryError)
        True
    """


class ServerError(RLSEditError):
    """An inference server cannot be reached, or refused a request.

    Example:
        >>> from rlsedit_fast.errors import ServerError
        >>> from rlsedit_fast.serving import VLLM
        >>> try:
        ...     VLLM("http://127.0.0.1:1").models()
        ... except ServerError as error:
        ...     print(str(error).partition(":")[0])
        http
    """


class StoreError(RLSEditError):
    """A store cannot be opened, read or written, or belongs to another model.

    Example:
        >>> from rlsedit_fast.errors import StoreError
        >>> from rlsedit_fast.store import Store
        >>> try:
        ...     Store("missing")
        ... except StoreError as error:
        ...     print(error)
        'missing' does not contain a store (no journal.db); pass the folder of a store
    """


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns "; did you mean 'NAME'?" with the most similar known name, or an empty string if there is none."""
    near = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def counted(count: int, noun: str) -> str:
    """Returns a number with its noun, which gets an `s` unless the number is 1: `1 edit`, `2 edits`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def listed(lines: Iterable[object], most: int = 10, *, where: str = "") -> list[str]:
    """Returns at most `most` of the lines as strings, followed by "and N more" plus `where` if there are more."""
    every = [str(line) for line in lines]
    rest = len(every) - most
    return [*every[:most], f"and {rest} more{where}"] if rest > 0 else every
