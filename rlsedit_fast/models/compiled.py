"""Compiled models: finds the model inside of `torch.compile(model)`, and runs compiled modules without compilation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from rlsedit_fast.errors import ModelError

_INNER = "_orig_mod"
"""Attribute of the wrapper of `torch.compile`; a private name of torch, and part of the names of its parameters."""

T = TypeVar("T")


def unwrapped(model: T) -> T:
    """Returns the model that `torch.compile(model)` runs, or the model itself.

    Both have the same parameters, so the compiled model runs with the edited weights.

    Args:
        model: a model.

    Raises:
        ModelError: modules within the model are wrapped, which changes the names of their weights.

    Example:
        >>> import torch
        >>> from rlsedit_fast.models.compiled import unwrapped
        >>> model = torch.nn.Linear(2, 2)
        >>> unwrapped(torch.compile(model)) is model
        True
    """
    found: Any = model
    while isinstance(found, nn.Module) and isinstance(inner := found._modules.get(_INNER), nn.Module):
        found = inner
    if isinstance(found, nn.Module):
        wrapped = next((name for name, _ in found.named_modules() if _INNER in name.split(".")), None)
        if wrapped is not None:
            raise ModelError(
                f"{wrapped.partition(f'.{_INNER}')[0]} is wrapped by torch.compile, which changes the names of its "
                "weights",
                hint="compile modules in place (module.compile()), or the whole model (torch.compile(model))",
            )
    result: T = found
    return result


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Runs modules that are compiled in place (`module.compile()`) as they are: compiled code ignores new hooks.

    Args:
        model: a model.

    Returns:
        A context, which has no effect for other models.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
